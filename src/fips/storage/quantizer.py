"""Packed models as any other checkpoint of transformers: ``from_pretrained``, ``save_pretrained``, ``dequantize``.

``import fips`` registers the quantization method ``fips`` (``fips.registration``). ``from_pretrained`` then builds the
model on the meta device, puts empty bases and factored layers in place and fills them from the packed tensors: no dense
matrix ever exists.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fips.errors import CheckpointError, ConfigError, ModelError
from fips.files.manifest import MANIFEST, read_json, write_json
from fips.files.untrusted import file_inside
from fips.layers.blocks import quicken_blocks
from fips.layers.decoding import quicken
from fips.layers.dense import quicken_dense
from fips.layers.embedding import PackedEmbedding
from fips.layers.fixed import watch_training
from fips.layers.linear import BASES, FactoredLinear, SharedBasis, basis_owner, factored_layers
from fips.layers.merge import drop_unused_bases, merge
from fips.layers.norms import quicken_norms
from fips.models.architectures import architecture_names, library_class
from fips.models.building import naming, try_build
from fips.models.experts import split_experts
from fips.models.transformers import build_empty, build_from_classes
from fips.plan.footprint import named_state
from fips.record import REPORT_FILE, CompressionReport
from fips.storage.companions import (
    architecture_of,
    license_of,
    model_card,
    saved_classes,
    write_card,
    write_remote_code,
)
from fips.storage.layout import QUANT_METHOD, Layout, check_layers, describe_layout, install_layout
from fips.storage.memory import MappedFiles
from fips.storage.weights import (
    FLOATS,
    WEIGHTS,
    WEIGHTS_INDEX,
    Stored,
    StoredWeights,
    check_layout,
    require,
    weight_files,
)

__all__ = ["FipsConfig", "FipsHfQuantizer", "attach", "read_report"]

log = logging.getLogger("fips")


class FipsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a packed model."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.layout = Layout.parse({**fields, "quant_method": QUANT_METHOD}, where="`config.json`")

    def to_dict(self) -> dict[str, Any]:
        return self.layout.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class FipsHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds packed layers for ``from_pretrained`` and writes them in ``save_pretrained``.

    Floating tensors keep the type of the file unless a narrower one is asked for. Raises ``CheckpointError`` if the
    checkpoint lacks a packed tensor: transformers would only warn and leave it random.
    """

    requires_calibration = True  # from_pretrained cannot make a packed model out of a dense one
    is_qat_trainable = True
    is_compileable = True
    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Called before the model is built, which is tried here first: what goes wrong is named after its file."""
        source = Path(str(config._name_or_path or "config.json"))
        try_build(config, tensors=_num_tensors(source), path=source / "config.json" if source.is_dir() else source)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        layout: Layout = self.quantization_config.layout
        is_saved_class = type(model).__name__ in architecture_names(vars(model.config))
        stored: Mapping[str, Stored] = {}
        if checkpoint_files:
            stored = _stored_tensors(checkpoint_files, Path(str(model.config._name_or_path or "")))
            check_layout(layout, StoredWeights(tuple(map(Path, checkpoint_files)), stored))
        with torch.device("meta"):
            install_layout(model, layout, partial=not is_saved_class)
        if stored:
            _adopt_types(model, stored)
        if stored and is_saved_class:
            _require_all(model, stored, Path(str((checkpoint_files or ("",))[0])).parent)
        elif stored:
            _require_tensors(model, stored, layout)
        ignored = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        model._keys_to_ignore_on_load_missing = ignored | {rf"{name}\.weight$" for name in factored_layers(model)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        _copy_out_of_files(model)
        check_layers(model)
        model.is_quantized = False  # casting and training work as in any other model
        attach(model)
        report = read_report(Path(model.config._name_or_path))
        if report is not None:
            model.fips_report = report

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> nn.Module:
        return merge(model, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Called before ``save_pretrained`` writes anything: the layout of now, not the one that was loaded.

        transformers refuses tensors under two names, also those of one module that the class registers twice.
        """
        _refresh_config(model)
        return named_state(model) if _repeats_modules(model) else None, {}


def attach(model: nn.Module) -> None:
    """Make a packed transformers model save itself packed, with what loading it needs; other modules are left alone.

    Whatever the model, training it says once what stays as it is.
    """
    watch_training(model)
    if not isinstance(model, PreTrainedModel):
        return
    _refresh_config(model)
    quicken(model)
    quicken_dense(model)
    quicken_norms(model)
    quicken_blocks(model)
    if not isinstance(getattr(model, "hf_quantizer", None), FipsHfQuantizer):
        model.hf_quantizer = FipsHfQuantizer(model.config.quantization_config)
    if "_fips_conversions" not in vars(model):
        model._fips_conversions = vars(model).get("_weight_conversions")
    model._weight_conversions = []  # packed tensors are named after their modules, not after older checkpoints
    model.save_pretrained = partial(_save_pretrained, model)  # unlike bound methods, these pickle
    model._upload_modified_files = partial(_upload_modified_files, model)
    if any(isinstance(layer, PackedEmbedding) for layer in factored_layers(model).values()):
        model.resize_token_embeddings = partial(_resize_token_embeddings, model)


def _resize_token_embeddings(model: PreTrainedModel, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
    """``resize_token_embeddings`` of a packed embedding, which has as many rows as it has."""
    found: Any = model.get_input_embeddings()
    if not isinstance(found, PackedEmbedding):
        return type(model).resize_token_embeddings(model, new_num_tokens, *_, **__)
    if new_num_tokens in (None, found.num_embeddings) and not (_ or __):
        return found
    raise ModelError(
        f"the embedding of `{type(model).__name__}` is packed with {found.num_embeddings} rows, which cannot become "
        f"{new_num_tokens}; wanted a dense embedding: call `fips.merge(model)` first, or resize the original model and "
        "compress it again"
    )


def _refresh_config(model: PreTrainedModel) -> None:
    model.config.quantization_config = FipsConfig(**describe_layout(model).to_dict())


def _save_pretrained(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of the class, and the files a packed model needs beside its weights.

    No manifest is written, since training loops and people go on editing such directories; one that ``fips.save``
    left there is removed, because it no longer describes the files.
    """
    drop_unused_bases(model)  # adapters merged into some layers, or into all of them, have made those dense
    before = _written(Path(save_directory))
    result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        (Path(save_directory) / MANIFEST).unlink(missing_ok=True)
        _drop_old_weights(Path(save_directory), before)
        _write_companions(model, Path(save_directory), Path(save_directory).name)
    return result


def _repeats_modules(model: nn.Module) -> bool:
    """Whether the model's class registers a packed layer at several places."""
    return len(factored_layers(model)) < sum(
        isinstance(module, FactoredLinear) for _, module in model.named_modules(remove_duplicate=False)
    )


def _written(directory: Path) -> dict[str, tuple[int, int]]:
    """When, and as which file, the weights or their index in a directory were written."""
    found = {name: directory / name for name in (WEIGHTS, WEIGHTS_INDEX) if (directory / name).is_file()}
    return {name: (path.stat().st_mtime_ns, path.stat().st_ino) for name, path in found.items()}


def _drop_old_weights(directory: Path, before: Mapping[str, tuple[int, int]]) -> None:
    """Remove the one file of weights, or the index, that a save in the other form has left as it was ``before``."""
    after = _written(directory)
    if len(after) == 2:
        for name in after:
            if after[name] == before.get(name):
                (directory / name).unlink()


def _upload_modified_files(model: PreTrainedModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    _write_companions(model, Path(working_dir), repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _write_companions(model: PreTrainedModel, directory: Path, name: str) -> None:
    if not factored_layers(model) or not (directory / "config.json").is_file():  # an adapter alone, or merged
        return
    write_json(directory / "config.json", {**read_json(directory / "config.json"), **saved_classes(model)})
    write_remote_code(directory, model)
    report = getattr(model, "fips_report", None)
    fields = None if report is None else report.to_dict()
    if fields is not None:
        write_json(directory / REPORT_FILE, fields)
    write_card(
        directory, name=name, architecture=architecture_of(model), report=fields, license_fields=license_of(model)
    )


def read_report(directory: Path) -> CompressionReport | None:
    """The report beside the weights; None where there is none, and where it cannot be read, which is logged.

    A model works without, so a damaged one costs the report and not the model.
    """
    path = directory / REPORT_FILE
    if not path.is_file():
        return None
    try:
        with naming(path, "no report"):
            report = CompressionReport.from_dict(read_json(file_inside(directory, REPORT_FILE, where=f"`{directory}`")))
            model_card("model", architecture=None, report=report.to_dict())  # all that is made of it later
    except (CheckpointError, ConfigError) as error:  # the latter for a method that is not known here
        log.warning("the report is left out: %s", error)
        return None
    return report


def _num_tensors(source: Path) -> int | None:
    """Tensors of a directory, None for a hub id and for weights that are not there under these names.

    Raises ``CheckpointError`` for those that are there and malformed: transformers, which reads them next, would raise
    whatever it stumbles over.
    """
    if not any((source / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        return None
    return len(StoredWeights.of_directory(source).tensors)


def _stored_tensors(files: Sequence[str], source: Path) -> Mapping[str, Stored]:
    """What the files hold that transformers found; those of a directory are in it and are all there is."""
    odd = next((name for name in files if not str(name).endswith(".safetensors")), None)
    if odd is not None:
        raise CheckpointError(f"`{odd}` is no safetensors file; packed models have no others, copy the directory again")
    if source.is_dir():
        for name in files:
            file_inside(source, os.path.relpath(name, source), where=f"`{source}`")
        if (Path(files[0]).parent / WEIGHTS_INDEX).exists():
            weight_files(Path(files[0]).parent)
    return StoredWeights.of(files).tensors


def _require_all(model: PreTrainedModel, stored: Mapping[str, Stored], directory: Path) -> None:
    """Raise ``CheckpointError`` unless every tensor of the model is there: transformers would leave it random.

    Shapes are those of the model as the directory's own ``config.json`` builds it. A caller who changes the config, say
    the number of labels, gets the answer of transformers, which depends on ``ignore_mismatched_sizes``.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    placeholders = {f"{name}.weight" for name in factored_layers(model)}
    spared = placeholders | {name for pair in tied.items() if any(part in stored for part in pair) for name in pair}
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    wanted = named_state(model)
    if any(name in stored and stored[name].shape != tensor.shape for name, tensor in wanted.items()):
        fields = read_json(directory / "config.json")
        written = named_state(build_from_classes(type(model), type(model.config), fields))
        dense = (set(written) & set(stored)) - placeholders
        wanted = {name: written[name] if name in dense else tensor for name, tensor in wanted.items()}
    for name, tensor in wanted.items():
        if name in stored or not (name in spared or any(re.search(pattern, name) for pattern in patterns)):
            require(name, stored.get(name), FLOATS if tensor.dtype in FLOATS else (tensor.dtype,), tensor.shape)


def _copy_out_of_files(model: nn.Module) -> None:
    """Tensors mapped from a file as memory of their own: the file may be cut short, or be written anew from them."""
    mapped = MappedFiles()
    parameters = [parameter for parameter in model.parameters() if _is_mapped(parameter)]
    for parameter, copy in zip(parameters, mapped.copies([one.data for one in parameters]), strict=True):
        parameter.data = copy
    buffers = [buffer for buffer in model.buffers() if _is_mapped(buffer)]
    copies = {id(buffer): copy for buffer, copy in zip(buffers, mapped.copies(buffers), strict=True)}
    for module in model.modules():  # a view holds on to the file, whatever is put in its `data`
        for key, buffer in module._buffers.items():
            if id(buffer) in copies:
                module._buffers[key] = copies[id(buffer)]


def _is_mapped(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


def _adopt_types(model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
    """Give empty packed tensors the type they have on file where that is no wider than the model's."""
    prefix = f"{model.base_model_prefix}."
    bases: dict[str, SharedBasis] = dict(getattr(basis_owner(model), BASES).items())
    owner = next((f"{name}." for name, module in model.named_modules() if module is basis_owner(model) and name), "")
    modules: dict[str, nn.Module] = {f"{owner}{BASES}.{name}": basis for name, basis in bases.items()}
    for path, module in {**modules, **factored_layers(model)}.items():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = f"{path}.{key}"
            found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in stored), None)
            if found is not None:
                _set_type(module, key, tensor, stored[found].dtype)
            elif path in modules or key != "weight":
                raise CheckpointError(f"the checkpoint lacks tensor `{name}`; copy the directory again")


def _require_tensors(model: PreTrainedModel, stored: Collection[str], layout: Layout) -> None:
    """Raise ``CheckpointError`` for a tensor of the saved model, outside its packed layers, that the files lack.

    transformers would fill it with random numbers and warn, as it should where a new head is asked for: what counts is
    the class that was saved, not the one that is loaded.
    """
    names = architecture_names(vars(model.config))
    if type(model).__name__ not in names:
        known = [name for name in names if library_class(name) is not None]
        if not known:
            return
        model = build_empty(model.config)
        around = {name.rsplit(".", 2)[0] for name in layout.layers}
        split_experts(model, [name for name, _ in model.named_modules() if name in around])
    packed = {*layout.layers, *factored_layers(model)}  # their placeholders are not in older files
    tied = model.all_tied_weights_keys
    state = model.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in state.items() if name in stored}  # modules registered twice
    for name, tensor in state.items():
        partners = {tied.get(name), *(target for target, source in tied.items() if source == name)}
        held = id(tensor) in present or partners & set(stored) or name.rpartition(".")[0] in packed
        if not held and BASES not in name.split("."):
            raise CheckpointError(f"the checkpoint lacks tensor `{name}`; copy the directory again")


def _set_type(module: nn.Module, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not (tensor.is_floating_point() and dtype.is_floating_point and dtype.itemsize < tensor.dtype.itemsize):
        return
    cast = tensor.detach().to(dtype)
    setattr(module, key, nn.Parameter(cast) if isinstance(tensor, nn.Parameter) else cast)
