"""Save and load compressed models: safetensors and JSON, complete or absent, exact, verified."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fips.errors import CheckpointError, ModelError
from fips.files.hub import hub_where_reached
from fips.files.manifest import MANIFEST, read_json, verify_manifest, write_json, write_manifest
from fips.files.output import Output
from fips.files.untrusted import file_inside
from fips.layers.embedding import packed_places
from fips.layers.linear import factored_layers
from fips.models.architectures import json_numbers
from fips.models.building import build_within, check_fields, naming
from fips.models.devices import usable_device
from fips.models.timm import build_timm, is_timm_config, is_timm_model, restore_buffers, write_timm_config
from fips.models.transformers import build_packed
from fips.models.wrappers import unwrap
from fips.plan.finite import require_finite_state
from fips.plan.footprint import named_state, state_bytes
from fips.record import REPORT_FILE
from fips.storage.companions import CARD, architecture_of, license_of, saved_fields, write_card, write_remote_code
from fips.storage.layout import QUANT_METHOD, Layout, check_layers, describe_layout, install_layout
from fips.storage.quantizer import attach, read_report
from fips.storage.reload import check_reloadable
from fips.storage.weights import (
    FLOATS,
    WEIGHTS,
    WEIGHTS_INDEX,
    Stored,
    StoredWeights,
    check_layout,
    check_types,
    require,
    weight_files,
)

__all__ = ["RECIPE_FILE", "REPORT_FILE", "is_compressed", "load", "local_directory", "save", "write_model"]

log = logging.getLogger("fips.storage")

RECIPE_FILE = "fips_recipe.yaml"
CONFIG = "config.json"


def is_compressed(directory: str | Path) -> bool:
    """Whether a path is a directory written by ``fips.save`` (complete or not)."""
    path = Path(directory)
    if (path / MANIFEST).is_file():
        return True
    if not (path / "config.json").is_file():
        return False
    quantization = read_json(path / "config.json").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    processor: Any = None,
    recipe: str | None = None,
    max_shard_size: str | int = "5GB",
) -> int:
    """Write a compressed model to a directory that is absent or empty; returns the bytes of tensor data.

    The directory holds ``model.safetensors`` (packed factors, each basis once, all other tensors), the ``config.json``
    of transformers or timm with the layout, the tokenizer or image processor given, the recipe, the report of
    ``fips.compress``, a model card, the code that ``trust_remote_code`` runs and a manifest with the SHA-256 of every
    file but the card. It appears under its name only when complete. ``model.save_pretrained`` writes the same without
    promises: no manifest, any place.

    Raises ``OutputError`` if the directory is in use, not empty or cannot be written: before writing where that can
    be known, else with the place where finished parts were kept, if any. The model stays as it is and can be saved
    elsewhere. ``ModelError`` if the model is not a compressed one, was changed into one that could not be
    loaded again, or holds NaN.
    """
    model = unwrap(model)
    _check_savable(model, processor)
    with Output(directory, needed=state_bytes(model)) as output:
        size = write_model(model, output, processor=processor, recipe=recipe, max_shard_size=max_shard_size)
        output.commit()
    return size


def write_model(
    model: nn.Module,
    output: Output,
    *,
    processor: Any = None,
    recipe: str | None = None,
    max_shard_size: str | int = "5GB",
    beside: Callable[[Path], None] | None = None,
) -> int:
    """What ``save`` writes, into a place that is held already and stays to be committed; returns the same.

    ``beside`` is given the directory before its manifest is made, to write further files for people, which loading does
    not read: where it fails, what it wrote is removed and the failure is logged.
    Once weights and configuration are written they are kept whatever fails after them: ``output.kept`` says where.
    """
    with output.writing("the weights"):
        state = {name: tensor.contiguous().cpu() for name, tensor in named_state(model).items()}
        _write_weights(state, output.scratch, max_shard_size)
        if isinstance(model, PreTrainedModel):
            _write_config(model, output.scratch)
        else:
            write_timm_config(model, output.scratch, quantization=describe_layout(model).to_dict())
    with output.writing("what goes with the model", finished="what `fips.load` reads"):
        if isinstance(model, PreTrainedModel):
            write_remote_code(output.scratch, model)
            if getattr(model, "generation_config", None) is not None and model.can_generate():
                # not save_pretrained, which refuses settings that many published models have
                model.generation_config.to_json_file(output.scratch / "generation_config.json")
        if processor is not None:
            processor.save_pretrained(output.scratch)
        if recipe is not None:
            (output.scratch / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        _write_report(model, output)
        if beside is not None:
            _write_beside(beside, output.scratch)
        write_manifest(output.scratch)
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _check_savable(model: nn.Module, processor: Any) -> None:
    if not factored_layers(model):
        raise ModelError("the model has no factored layer to save; call `fips.compress` first")
    if not isinstance(model, PreTrainedModel) and not is_timm_model(model):
        raise ModelError(f"`{type(model).__name__}` is neither of transformers nor of timm; only those can be saved")
    check_reloadable(model, packed_places(model))
    require_finite_state(model)
    if processor is not None and not callable(getattr(processor, "save_pretrained", None)):
        raise ModelError(
            f"`processor` must be a tokenizer or an image processor, which have `save_pretrained`; got "
            f"`{type(processor).__name__}`"
        )


def _write_report(model: nn.Module, output: Output) -> None:
    """Report and model card. They describe the model and are not needed to load it: failing, they are left out."""
    try:
        report = getattr(model, "fips_report", None)
        fields = None if report is None else report.to_dict()
        if fields is not None:
            write_json(output.scratch / REPORT_FILE, fields)
        write_card(
            output.scratch, name=output.directory.resolve().name, architecture=architecture_of(model), report=fields,
            license_fields=license_of(model),
        )  # fmt: skip
    except OSError:
        raise
    except Exception as error:
        log.warning("no report or no model card written: %s: %s", type(error).__name__, error)
        for name in (REPORT_FILE, CARD):
            (output.scratch / name).unlink(missing_ok=True)


def _write_beside(beside: Callable[[Path], None], directory: Path) -> None:
    before = set(directory.iterdir())
    try:
        beside(directory)
    except Exception as error:
        log.warning("the directory lacks its report for people: %s: %s", type(error).__name__, error)
        for path in set(directory.iterdir()) - before:
            path.unlink(missing_ok=True)


def load(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """Load a compressed model, of transformers or of timm, in evaluation mode; its outputs are the saved model's.

    They are equal bit for bit. Built without weights and filled tensor by tensor, so that no dense MLP matrix is ever
    allocated. Buffers that no checkpoint holds (rotary frequencies) are computed anew. ``verify`` checks the SHA-256 of
    all files, where a manifest lists them (``save_pretrained`` writes none): first if ``trust_remote_code``, else while
    the model is built. ``trust_remote_code`` lets code in
    the directory run where the model was built by it. Raises ``CheckpointError`` naming the file or tensor that is
    missing, cut short, altered, not among those written, of an unknown version or of the wrong shape or type, and the
    setting with which no model can be built, ``ModelError`` if the model needs code that is not trusted, and first of
    all ``ConfigError`` for a device that is not there. Sizes are
    compared with the headers of the files before anything is allocated, and tensors are copied out of the files: the
    model does not depend on them.
    """
    device = usable_device(device)
    path = local_directory(directory)
    read = partial(_load, path, str(directory), device=device, trust_remote_code=trust_remote_code)
    listed = path / MANIFEST
    if not verify or not (listed.is_symlink() or listed.exists()):
        return read()
    files = _files_read(path)
    if trust_remote_code:
        verify_manifest(path, files)
        return read()
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify_manifest, path, files)
        try:
            model = read()
        except Exception:
            verified.result()  # what was altered says more than what it led to
            raise
        verified.result()
    return model


def _load(path: Path, name: str, *, device: torch.device, trust_remote_code: bool) -> Any:
    config_file = file_inside(path, CONFIG, where=f"`{path}`")
    fields = read_json(config_file)
    layout = Layout.parse(fields.pop("quantization_config", None), where=f"`{config_file}`")
    weights = StoredWeights.of_directory(path)
    check_layout(layout, weights)
    size = {"tensors": len(weights.tensors), "nbytes": weights.nbytes()}
    check_fields(fields, **size, where=f"`{config_file}`")
    build = partial(_build, path, fields, trust_remote_code)
    model: Any = build_within(build, **size, path=config_file, trial_on_meta=not is_timm_config(fields))
    with init_empty_weights(include_buffers=False):
        install_layout(model, layout)
    _fill(model, weights, device)
    with naming(config_file):
        if is_timm_model(model):
            restore_buffers(model)
        model.to(device)  # buffers that no file holds, such as rotary frequencies
        attach(model)
    if not is_timm_model(model):
        model.name_or_path = model.config._name_or_path = name  # as `from_pretrained` leaves it: tokenizers lie there
    report = read_report(path)
    if report is not None:
        model.fips_report = report
    return model.eval()


def _files_read(directory: Path) -> list[str]:
    """What ``load`` reads, as far as it is there: what is missing is better named by the manifest."""
    return [CONFIG, *(weight_files(directory) if (directory / WEIGHTS_INDEX).is_file() else [WEIGHTS])]


def _build(path: Path, fields: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    """The dense model of a directory without its weights."""
    return (
        build_timm(path) if is_timm_config(fields) else build_packed(path, fields, trust_remote_code=trust_remote_code)
    )


def local_directory(source: str | Path) -> Path:
    """The directory itself, or the one a hub id is downloaded to."""
    path = Path(source)
    if os.path.isdir(path):  # unlike a method of the path, it raises nothing for a name that is too long
        return path
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise CheckpointError(f"`{path}` is not a directory; give one written by `fips.save` or `fips compress`")
    try:
        with hub_where_reached():
            return Path(snapshot_download(source))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot download `{source}`, which is no directory either: {first}") from None


def _write_weights(state: dict[str, Tensor], directory: Path, max_shard_size: str | int) -> None:
    split = split_torch_state_dict_into_shards(
        state, max_shard_size=max_shard_size, filename_pattern="model{suffix}.safetensors"
    )
    for filename, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, directory / filename, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(directory / WEIGHTS_INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_config(model: PreTrainedModel, directory: Path) -> None:
    config = {**json_numbers(saved_fields(model)), "quantization_config": describe_layout(model).to_dict()}
    text = json.dumps(config, indent=2, sort_keys=True, default=str, allow_nan=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _fill(model: nn.Module, weights: StoredWeights, device: torch.device) -> None:
    """Read tensors into a model on the meta device; every expected one must be there with its shape and type."""
    expected = model.state_dict()
    placeholders = {f"{name}.weight" for name in factored_layers(model)}
    _check_tensors(model, expected, weights.tensors, placeholders)
    check_types(model, weights)
    tensors = dict(weights.read(device))
    for name in placeholders - set(tensors):  # directories of the first kind hold none
        tensors[name] = torch.empty(expected[name].shape, dtype=expected[name].dtype)
    for name, tensor in tensors.items():
        if name not in placeholders and (tensor.shape, tensor.dtype) != (
            weights.tensors[name].shape,
            weights.tensors[name].dtype,
        ):
            raise CheckpointError(f"`{weights.tensors[name].path}` was changed while it was read; load it again")
    model.load_state_dict(tensors, assign=True, strict=False)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    check_layers(model)


def _check_tensors(
    model: nn.Module, expected: Mapping[str, Tensor], stored: Mapping[str, Stored], placeholders: set[str]
) -> None:
    """Raise ``CheckpointError`` unless the files hold the tensors of a model, no more and no fewer."""
    tied = set(expected) - set(named_state(model))
    missing = sorted(set(expected) - tied - placeholders - set(stored))
    surplus = sorted(set(stored) - set(expected))
    if missing or surplus:
        first = f"lacks tensor `{missing[0]}`" if missing else f"has a tensor `{surplus[0]}` the model does not know"
        raise CheckpointError(f"the checkpoint {first} ({len(missing)} missing, {len(surplus)} unknown in all)")
    for name, found in stored.items():
        dtype = expected[name].dtype
        require(name, found, FLOATS if dtype in FLOATS else (dtype,), expected[name].shape)
