"""Writes a GGUF file tensor by tensor: only one is unpacked at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fips.errors import ModelError
from fips.integrations.gguf.blocks import (
    BLOCK,
    Choice,
    GgufType,
    block_scales,
    choose,
    half_type,
    integer_array,
    rounded_array,
)
from fips.integrations.gguf.families import Family, add_parameters, require_family, rope_factors, tensors_of
from fips.integrations.gguf.tokens import Vocabulary, add_vocabulary
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.optional import require

__all__ = ["GgufFile", "Kind", "export_gguf"]

FEWER_BYTES = (
    "a smaller file needs integers that llama.cpp has too, in columns that are not turned: compress with `--bits 4.5 "
    "--values int4g32 --pattern unstructured`"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What became of the tensors of one kind."""

    kind: str
    """What the model holds, in words."""
    type: str
    """What the file holds: ``Q4_0``, ``Q5_0``, ``Q8_0``, ``F16``, ``BF16`` or ``F32``."""
    kept: bool
    """Whether these are the same integers, or the same floating numbers."""
    tensors: int
    bytes: int

    def line(self) -> str:
        """For people."""
        how = "kept" if self.kept else "rounded"
        return f"{self.kind} -> {self.type}, {how}: {self.tensors} tensors, {self.bytes:,} bytes"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What ``export_gguf`` wrote."""

    path: Path
    bytes: int
    kinds: tuple[Kind, ...]
    notes: tuple[str, ...]
    """What is worth knowing of the file, in sentences."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file, not yet made."""

    name: str
    kind: str
    type: str
    kept: bool
    shape: tuple[int, ...]
    make: Callable[[], Any]
    layer: FactoredLinear | None = None
    """Of fips, that it comes from."""
    choice: Choice | None = None
    """What became of it."""


def export_gguf(
    model: PreTrainedModel, path: Path, vocabulary: Vocabulary, *, name: str, packed_type: GgufType = "q8_0"
) -> GgufFile:
    """Write a packed language model, or a dense one, as a GGUF file for llama.cpp.

    Integers of packed layers become Q4_0, Q5_0 or Q8_0 with the same integers, if their columns are not turned and 32
    of them share a scale, which is rounded to float16. All other packed layers are decoded and written in
    ``packed_type``. Vectors are float32, other matrices 16 bits: bfloat16 where they are that, else float16. The model
    is left as it is. Raises ``ModelError`` if llama.cpp has no such architecture, ``MissingPackageError`` without gguf.
    """
    package = require("gguf", extra="gguf", purpose="export to GGUF")
    family = require_family(model)
    entries = list(_entries(model, family, package, packed_type))
    writer = package.GGUFWriter(path, family.arch)
    writer.add_type("model")
    writer.add_name(name)
    notes = add_parameters(writer, family, model.config, package)
    add_vocabulary(writer, vocabulary)
    writer.add_file_type(_file_type(entries, package))
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for entry in entries:
        type_ = package.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), _nbytes(entry, package), raw_dtype=type_)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make())
    kinds = _kinds(entries, package)
    return GgufFile(path, path.stat().st_size, kinds, (*notes, *_notes(entries, vocabulary)))


def _entries(model: PreTrainedModel, family: Family, package: Any, packed_type: GgufType) -> Iterator[_Entry]:
    """All tensors in the order of the modules; a tensor that has two names is written under the first."""
    names = package.get_tensor_name_map(_arch(family, package), model.config.num_hidden_layers)
    arrange, seen = tensors_of(family, model.config), set()
    for module_name, module in model.named_modules():
        if isinstance(module, SharedBasis):
            continue
        if isinstance(module, FactoredLinear):
            yield _packed(module, f"{module_name}.weight", names, arrange, package, packed_type)
        for key, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen or (isinstance(module, FactoredLinear) and key != "bias"):
                continue
            seen.add(id(tensor))
            if key == "bias" and module_name.rpartition(".")[2] not in family.biases:
                raise ModelError(f"llama.cpp has no `{module_name}.bias` in `{family.arch}`")
            yield _dense(tensor.detach(), f"{module_name}.{key}", names, arrange, package)
    factors = rope_factors(model.config)
    if factors is not None:
        yield _Entry(
            "rope_freqs.weight", "factors of positions", "F32", True, tuple(factors.shape),
            lambda: rounded_array(factors, "F32", package),
        )  # fmt: skip


def _arch(family: Family, package: Any) -> Any:
    return next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == family.arch)


def _name(names: Any, key: str) -> str:
    found: str | None = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"llama.cpp has no name for `{key}`: the model is not one of its architecture alone")
    return found


def _packed(
    layer: FactoredLinear, key: str, names: Any, arrange: Callable[[str, Tensor], Tensor], package: Any,
    packed_type: GgufType,
) -> _Entry:  # fmt: skip
    choice = choose(layer, packed_type)

    def make() -> Any:
        if choice.integers:
            return integer_array(layer, choice.type, lambda rows: arrange(key, rows))
        return rounded_array(arrange(key, layer.dense_weight()), choice.type, package)

    shape = (layer.out_features, layer.in_features)
    return _Entry(_name(names, key), choice.kind, choice.type, choice.kept, shape, make, layer, choice)


def _dense(tensor: Tensor, key: str, names: Any, arrange: Callable[[str, Tensor], Tensor], package: Any) -> _Entry:
    vector = tensor.dim() == 1
    type_ = "F32" if vector else half_type(tensor)
    kind = f"{'vectors' if vector else 'matrices'} in {str(tensor.dtype).removeprefix('torch.')}"
    kept = vector or type_ == "F32" or tensor.dtype != torch.float32
    return _Entry(
        _name(names, key), kind, type_, kept, tuple(tensor.shape),
        lambda: rounded_array(arrange(key, tensor), type_, package),
    )  # fmt: skip


def _nbytes(entry: _Entry, package: Any) -> int:
    block, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[entry.type]]
    count = 1
    for length in entry.shape:
        count *= length
    return int(count // block * size)


def _file_type(entries: list[_Entry], package: Any) -> Any:
    """The type of most numbers in matrices other than the embedding, as files of llama.cpp are called by."""
    sizes: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) == 2 and entry.name.startswith("blk."):
            sizes[entry.type] += entry.shape[0] * entry.shape[1]
    most = sizes.most_common(1)[0][0]
    return package.LlamaFileType.ALL_F32 if most == "F32" else package.LlamaFileType[f"MOSTLY_{most}"]


def _kinds(entries: list[_Entry], package: Any) -> tuple[Kind, ...]:
    found: dict[tuple[str, str, bool], list[int]] = {}
    for entry in entries:
        found.setdefault((entry.kind, entry.type, entry.kept), []).append(_nbytes(entry, package))
    return tuple(Kind(*key, tensors=len(sizes), bytes=sum(sizes)) for key, sizes in found.items())


def _notes(entries: list[_Entry], vocabulary: Vocabulary) -> list[str]:
    notes = []
    packed = [(entry.layer, entry.choice) for entry in entries if entry.layer is not None and entry.choice is not None]
    layers = [layer for layer, choice in packed if choice.integers]
    if layers:
        notes.append(f"scales of kept integers are rounded to float16, by at most {100 * _rounding(layers):.2g} %")
    short = sorted({layer.in_features for layer, _ in packed if layer.in_features % BLOCK})
    if short:
        notes.append(f"rows of {', '.join(map(str, short))} do not fill blocks of {BLOCK}: they are not quantized")
    if any(choice.larger for _, choice in packed):
        notes.append(FEWER_BYTES)
    if vocabulary.ambiguous:
        notes.append(
            f"llama.cpp may put {vocabulary.ambiguous} of {len(vocabulary.tokens)} tokens together from parts that the "
            "tokenizer does not join: some text is cut otherwise there"
        )
    return notes


def _rounding(layers: list[FactoredLinear]) -> float:
    """Largest relative error of a block scale in float16."""
    found = 0.0
    for layer in layers:
        scales = block_scales(layer)
        scales = scales[scales != 0]
        if scales.numel():
            found = max(found, float(((scales.half().double() - scales) / scales).abs().max()))
    return found
