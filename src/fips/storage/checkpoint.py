"""Save and load compressed models: safetensors and JSON, complete or absent, exact, verified."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fips.accounting import named_state
from fips.errors import CheckpointError, ModelError
from fips.finite import require_finite_state
from fips.integrations.companions import architecture_of, auto_map, write_card, write_remote_code
from fips.integrations.quantizer import attach
from fips.integrations.timm import build_timm, is_timm_config, is_timm_model, restore_buffers, write_timm_config
from fips.integrations.transformers import build_empty, config_from_fields
from fips.nn import factored_layers
from fips.report.record import REPORT_FILE, CompressionReport
from fips.storage.files import MANIFEST, complete_directory, read_json, verify_manifest, write_json, write_manifest
from fips.storage.layout import QUANT_METHOD, Layout, check_patterns, describe_layout, install_layout

__all__ = ["RECIPE_FILE", "REPORT_FILE", "is_compressed", "load", "save"]

RECIPE_FILE = "fips_recipe.yaml"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


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

    Raises ``OutputError`` if the directory is not empty, ``ModelError`` if the model is not a compressed one or
    holds NaN.
    """
    if not factored_layers(model):
        raise ModelError("the model has no factored layer to save; call `fips.compress` first")
    if not isinstance(model, PreTrainedModel) and not is_timm_model(model):
        raise ModelError(f"`{type(model).__name__}` is neither of transformers nor of timm; only those can be saved")
    require_finite_state(model)
    state = {name: tensor.contiguous().cpu() for name, tensor in named_state(model).items()}
    with complete_directory(Path(directory)) as scratch:
        _write_weights(state, scratch, max_shard_size)
        if isinstance(model, PreTrainedModel):
            _write_config(model, scratch)
            write_remote_code(scratch, model.config)
            if getattr(model, "generation_config", None) is not None and model.can_generate():
                model.generation_config.save_pretrained(scratch)
        else:
            write_timm_config(model, scratch, quantization=describe_layout(model).to_dict())
        if processor is not None:
            processor.save_pretrained(scratch)
        report = getattr(model, "fips_report", None)
        fields = None if report is None else report.to_dict()
        if fields is not None:
            write_json(scratch / REPORT_FILE, fields)
        write_card(scratch, name=Path(directory).name, architecture=architecture_of(model), report=fields)
        if recipe is not None:
            (scratch / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        write_manifest(scratch)
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def load(directory: str | Path, *, device: torch.device | str = "cpu", verify: bool = True) -> Any:
    """Load a compressed model, of transformers or of timm, in evaluation mode; its outputs are the saved model's.

    They are equal bit for bit. Built without weights and filled tensor by tensor, so that no dense MLP matrix is ever
    allocated. Buffers that no checkpoint holds (rotary frequencies) are computed anew. ``verify`` checks the SHA-256
    of all files first, where a manifest lists them (``save_pretrained`` writes none). Raises ``CheckpointError``
    naming the file or tensor that is missing, cut short, altered, of an unknown version or of the wrong shape or type.
    """
    path = _local(directory)
    fields = read_json(path / "config.json")
    layout = Layout.parse(fields.pop("quantization_config", None), where=f"`{path / 'config.json'}`")
    if verify and (path / MANIFEST).is_file():
        verify_manifest(path)
    model = build_timm(path) if is_timm_config(fields) else build_empty(config_from_fields(fields))
    with init_empty_weights(include_buffers=False):
        install_layout(model, layout)
    _fill(model, _read_weights(path, device))
    if is_timm_model(model):
        restore_buffers(model)
    model.to(device)  # buffers that no file holds, such as rotary frequencies
    attach(model)
    if (path / REPORT_FILE).is_file():
        model.fips_report = CompressionReport.from_dict(read_json(path / REPORT_FILE))
    return model.eval()


def _local(source: str | Path) -> Path:
    """The directory itself, or the one a hub id is downloaded to."""
    path = Path(source)
    if path.is_dir():
        return path
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise CheckpointError(f"`{path}` is not a directory; give one written by `fips.save` or `fips compress`")
    try:
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
    config = model.config.to_dict()
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = describe_layout(model).to_dict()
    remote = auto_map(model.config)
    if remote is not None:
        config["auto_map"] = remote
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _read_weights(directory: Path, device: torch.device | str) -> dict[str, Tensor]:
    if (directory / WEIGHTS_INDEX).is_file():
        files = sorted(set(read_json(directory / WEIGHTS_INDEX).get("weight_map", {}).values()))
    else:
        files = [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"`{path}` is missing; copy the directory again")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"`{path}` is cut short or not a safetensors file: {error}") from None
    return tensors


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Assign tensors to a model on the meta device; every expected one must be there with its shape."""
    expected = model.state_dict()
    for name in factored_layers(model):  # directories of the first kind hold no placeholders
        wanted = expected[f"{name}.weight"]
        tensors.setdefault(f"{name}.weight", torch.empty(0, dtype=wanted.dtype))
    tied = set(expected) - set(named_state(model))
    missing = sorted(set(expected) - tied - set(tensors))
    surplus = sorted(set(tensors) - set(expected))
    if missing or surplus:
        first = f"lacks tensor `{missing[0]}`" if missing else f"has a tensor `{surplus[0]}` the model does not know"
        raise CheckpointError(f"the checkpoint {first} ({len(missing)} missing, {len(surplus)} unknown in all)")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise CheckpointError(f"tensor `{name}` has shape {tuple(tensor.shape)}, wanted {tuple(wanted.shape)}")
        if tensor.dtype != wanted.dtype and not (tensor.is_floating_point() and wanted.is_floating_point()):
            raise CheckpointError(f"tensor `{name}` has type {tensor.dtype}, wanted a type like {wanted.dtype}")
    model.load_state_dict(tensors, assign=True, strict=False)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    check_patterns(model)
