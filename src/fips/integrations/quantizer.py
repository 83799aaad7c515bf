"""Packed models as any other checkpoint of transformers: ``from_pretrained``, ``save_pretrained``, ``dequantize``.

``import fips`` registers the quantization method ``fips``. ``from_pretrained`` then builds the model on the meta
device, puts empty bases and factored layers in place and fills them from the packed tensors: no dense matrix ever
exists.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fips.errors import CheckpointError
from fips.fixed import watch_training
from fips.integrations.companions import architecture_of, auto_map, write_card, write_remote_code
from fips.merge import drop_unused_bases, merge
from fips.nn import BASES, SharedBasis, basis_owner, factored_layers
from fips.report.record import REPORT_FILE, CompressionReport
from fips.storage.files import MANIFEST, read_json, write_json
from fips.storage.layout import QUANT_METHOD, Layout, check_patterns, describe_layout, install_layout

__all__ = ["FipsConfig", "FipsHfQuantizer", "attach"]

_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


@register_quantization_config(QUANT_METHOD)
class FipsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a packed model."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.layout = Layout.parse({**fields, "quant_method": QUANT_METHOD}, where="`config.json`")

    def to_dict(self) -> dict[str, Any]:
        return self.layout.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHOD)
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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        install_layout(model, self.quantization_config.layout, partial=True)
        if checkpoint_files and str(checkpoint_files[0]).endswith(".safetensors"):
            _adopt_types(model, _stored_types(checkpoint_files))
        ignored = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        model._keys_to_ignore_on_load_missing = ignored | {rf"{name}\.weight$" for name in factored_layers(model)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        check_patterns(model)
        model.is_quantized = False  # casting and training work as in any other model
        attach(model)
        report = Path(model.config._name_or_path) / REPORT_FILE
        if report.is_file():
            model.fips_report = CompressionReport.from_dict(read_json(report))

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> nn.Module:
        return merge(model, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called before ``save_pretrained`` writes anything: the layout of now, not the one that was loaded."""
        _refresh_config(model)
        return None, {}


def attach(model: nn.Module) -> None:
    """Make a packed transformers model save itself packed, with what loading it needs; other modules are left alone.

    Whatever the model, training it says once what stays as it is.
    """
    watch_training(model)
    if not isinstance(model, PreTrainedModel):
        return
    _refresh_config(model)
    if not isinstance(getattr(model, "hf_quantizer", None), FipsHfQuantizer):
        model.hf_quantizer = FipsHfQuantizer(model.config.quantization_config)
    if "_fips_conversions" not in vars(model):
        model._fips_conversions = vars(model).get("_weight_conversions")
    model._weight_conversions = []  # packed tensors are named after their modules, not after older checkpoints
    if "peft" in sys.modules:  # whoever imported peft means to use it; others are spared the import
        import fips.integrations.peft  # noqa: F401
    model.save_pretrained = partial(_save_pretrained, model)  # unlike bound methods, these pickle
    model._upload_modified_files = partial(_upload_modified_files, model)


def _refresh_config(model: PreTrainedModel) -> None:
    model.config.quantization_config = FipsConfig(**describe_layout(model).to_dict())
    remote = auto_map(model.config)
    if remote is not None:
        model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), **remote}


def _save_pretrained(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of the class, and the files a packed model needs beside its weights.

    No manifest is written, since training loops and people go on editing such directories; one that ``fips.save``
    left there is removed, because it no longer describes the files.
    """
    drop_unused_bases(model)  # adapters merged into some layers, or into all of them, have made those dense
    result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        (Path(save_directory) / MANIFEST).unlink(missing_ok=True)
        _write_companions(model, Path(save_directory), Path(save_directory).name)
    return result


def _upload_modified_files(model: PreTrainedModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    _write_companions(model, Path(working_dir), repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _write_companions(model: PreTrainedModel, directory: Path, name: str) -> None:
    if not factored_layers(model) or not (directory / "config.json").is_file():  # an adapter alone, or merged
        return
    write_remote_code(directory, model.config)
    report = getattr(model, "fips_report", None)
    fields = None if report is None else report.to_dict()
    if fields is not None:
        write_json(directory / REPORT_FILE, fields)
    write_card(directory, name=name, architecture=architecture_of(model), report=fields)


def _stored_types(files: Sequence[str]) -> dict[str, torch.dtype]:
    types: dict[str, torch.dtype] = {}
    for name in files:
        with safe_open(name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                types[key] = _TYPES.get(file.get_slice(key).get_dtype(), torch.uint8)
    return types


def _adopt_types(model: PreTrainedModel, stored: dict[str, torch.dtype]) -> None:
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
                _set_type(module, key, tensor, stored[found])
            elif path in modules or key != "weight":
                raise CheckpointError(f"the checkpoint lacks tensor `{name}`; copy the directory again")


def _set_type(module: nn.Module, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not (tensor.is_floating_point() and dtype.is_floating_point and dtype.itemsize < tensor.dtype.itemsize):
        return
    cast = tensor.detach().to(dtype)
    setattr(module, key, nn.Parameter(cast) if isinstance(tensor, nn.Parameter) else cast)
