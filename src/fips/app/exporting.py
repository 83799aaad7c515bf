"""``fips export``: a compressed directory in a form that needs nothing of fips."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fips.app.sources import Source, is_compressed_source
from fips.config import DataConfig
from fips.errors import ConfigError, ModelError
from fips.files.output import Output, require_empty
from fips.integrations.gguf import Kind, Vocabulary, export_gguf, require_family, vocabulary_of
from fips.integrations.onnx import export_onnx
from fips.layers.merge import merge
from fips.models.transformers import example_inputs, load_processor, model_kind, quiet
from fips.optional import require
from fips.plan.footprint import state_bytes

__all__ = ["Export", "export_directory"]


@dataclass(frozen=True, slots=True)
class Export:
    """What ``export_directory`` wrote."""

    format: str
    file_bytes: int
    relative_error: float | None = None
    """Of ONNX Runtime against torch; None for other formats."""
    kinds: tuple[Kind, ...] = ()
    """What became of the tensors in a GGUF file."""
    notes: tuple[str, ...] = ()
    """What is worth knowing of it."""


def export_directory(
    source: str,
    output: Path,
    *,
    fmt: str,
    data: DataConfig | None = None,
    gguf_type: str | None = None,
    activation_bits: int | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """Write a compressed directory in a form that needs nothing of fips.

    ``dense`` is a plain checkpoint of the original architecture; ``onnx`` a ``model.onnx`` with packed constants,
    checked with ONNX Runtime on the first batch of ``data``, or on made-up inputs without it, in which layers may round
    inputs to ``activation_bits``: 8, or 16 for never, None for what each layer says; both with the tokenizer
    or image processor. ``gguf`` is a ``model.gguf`` for llama.cpp, in which layers that it has no integers for are
    ``gguf_type``: ``q8_0``, the default, or ``f16``. Raises ``ConfigError`` for another format or type and everything
    ``load`` raises.
    """
    if fmt not in ("dense", "onnx", "gguf"):
        raise ConfigError(f"`--format` must be dense, onnx or gguf, got {fmt!r}")
    if gguf_type not in (None, "q8_0", "f16"):
        raise ConfigError(f"`--gguf-type` must be q8_0 or f16, got {gguf_type!r}")
    if gguf_type is not None and fmt != "gguf":
        raise ConfigError(f"`--gguf-type` goes with `--format gguf`, got {fmt}")
    if activation_bits not in (None, 8, 16):
        raise ConfigError(f"`--activation-bits` must be 8, or 16 for inputs as they are, got {activation_bits}")
    if activation_bits is not None and fmt != "onnx":
        raise ConfigError(f"`--activation-bits` goes with `--format onnx`, got {fmt}")
    require_empty(output)
    if not is_compressed_source(source):
        raise ModelError(f"`{source}` is not a compressed model; `fips compress` makes one")
    packed = Source(source, trust_remote_code=trust_remote_code)
    vocabulary = _vocabulary(packed) if fmt == "gguf" else None
    with Output(output, needed=_export_bytes(packed, fmt)) as target:
        model = packed.model()
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"`{source}` holds a `{type(model).__name__}`; only transformers models can be exported")
        done = Export(fmt, 0)
        if vocabulary is not None:
            with target.writing("the GGUF file"):
                file = export_gguf(
                    model, target.scratch / "model.gguf", vocabulary,
                    name=Path(os.path.abspath(source)).name, packed_type="f16" if gguf_type == "f16" else "q8_0",
                )  # fmt: skip
            done = Export(fmt, 0, kinds=file.kinds, notes=file.notes)
        else:
            if fmt == "onnx":
                example = _example(packed, model, data)
                with target.writing("the ONNX file"):
                    written = export_onnx(
                        model, target.scratch / "model.onnx", example, activation_bits=activation_bits
                    )
                done = Export(fmt, 0, written.relative_error, notes=written.notes)
            _write_plain(model, target, packed, fmt)
        file_bytes = target.written_bytes()
        target.commit()
    return replace(done, file_bytes=file_bytes)


def _vocabulary(source: Source) -> Vocabulary:
    """The tokenizer of a directory for llama.cpp, once it is known that a GGUF file can be written at all."""
    require("gguf", extra="gguf", purpose="export to GGUF")
    empty = source.empty()
    require_family(empty)
    tokenizer = load_processor(source.name, "text", trust_remote_code=source.trust_remote_code)
    return vocabulary_of(tokenizer, empty.config, source=source.name)


def _write_plain(model: PreTrainedModel, target: Output, source: Source, fmt: str) -> None:
    """A dense model, or its configuration beside an ONNX file, with the tokenizer or image processor."""
    merge(model)
    with quiet(), target.writing("the model"):
        if fmt == "onnx":
            model.config.save_pretrained(target.scratch)
        else:
            _save_dense(model, target.scratch, source.name)
    with quiet(), target.writing("the tokenizer or image processor", finished="the model"):
        processor = load_processor(source.name, model_kind(model), trust_remote_code=source.trust_remote_code)
        if processor is not None:
            processor.save_pretrained(target.scratch)


def _save_dense(model: PreTrainedModel, directory: Path, source: str) -> None:
    """A plain checkpoint with the generation settings of the source as they are.

    Loading leaves them behind, and ``save_pretrained`` refuses those of many models.
    """
    if model.can_generate():
        model.generation_config = GenerationConfig()
    model.save_pretrained(directory)
    settings = Path(source) / "generation_config.json"
    if settings.is_file():
        shutil.copyfile(settings, directory / settings.name)


def _export_bytes(source: Source, fmt: str) -> int:
    """About what an export writes at least: dense weights, or packed ones, half as much where float32 becomes F16."""
    if fmt == "dense":
        return state_bytes(source.empty())
    packed = sum(path.stat().st_size for path in Path(source.name).glob("*.safetensors"))
    return packed // 2 if fmt == "gguf" else packed


def _example(source: Source, model: PreTrainedModel, data: DataConfig | None) -> dict[str, Tensor]:
    """Inputs to trace and check an export with: the first batch of the data, or made-up ones of the right shape."""
    if data is not None:
        batches, _ = source.batches(data, model, purpose="calibration")
        batch = {key: value for key, value in next(iter(batches)).items() if key != "labels"}
    else:
        batch = example_inputs(model)
    if "input_ids" in batch:
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch
