"""Building a model that a stranger's ``config.json`` describes: within the bounds of its weights, errors named."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as registration
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fips.errors import CheckpointError, FipsError
from fips.files.untrusted import no_nan
from fips.models.architectures import architecture_names, plain_numbers

__all__ = ["build_within", "check_fields", "naming", "try_build"]

LAYERS = re.compile(r"(layers?|depths?|blocks|stages)$")
"""Names of settings that say how often something is there: mostly each time takes a tensor."""
LABELS = re.compile(r"num_(labels|classes)$")
"""Names of settings that say how many outputs a head has."""
TIMM_LOADS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable")
"""Arguments of ``timm.create_model`` that read other files than those of the directory, or are not of the model."""
BUFFER_BYTES = 256 << 20
"""Buffers that no file holds (masks, positions) may take as much, and 4 times the bytes of the files."""
WEIGHTS_PER_BYTE = 64
"""Most weights that a byte of a packed file stands for: blocks of 8 with a bit each, none of them kept."""
NO_FILE = 10_000
"""Tensors a model may have when it is built before its files are known."""


@contextmanager
def naming(path: Path | str, what: str = "no model that can be built") -> Iterator[None]:
    """Whatever a library raises while it reads ``path`` or builds what that describes becomes a ``CheckpointError``."""
    try:
        yield
    except FipsError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(f"`{path}` describes {what}: {type(error).__name__}: {text}") from None


def check_fields(fields: Mapping[str, Any], *, tensors: int, nbytes: int, where: str) -> None:
    """Raise ``CheckpointError`` for settings that no model with weights of so many ``tensors`` and ``nbytes`` has.

    These are counts of layers, NaN, and names by which timm would load a model from elsewhere.
    """
    no_nan(plain_numbers(fields), where=where)
    for name, value in _numbers(fields, ""):
        key = name.rpartition(".")[2]
        if (LAYERS.search(key) and value > 16 * tensors + 256) or (LABELS.search(key) and value > nbytes):
            raise CheckpointError(
                f"{where}: `{name}` is {value:.3g}, but the weights are {tensors} tensors of {nbytes:,} bytes"
            )
    architecture, arguments = fields.get("architecture"), fields.get("model_args")
    if "architecture" in fields and not (isinstance(architecture, str) and re.fullmatch(r"[\w.]+", architecture)):
        raise CheckpointError(
            f"{where}: `architecture` wants the name of a model of timm, got {str(architecture)[:100]!r}"
        )
    if arguments is not None and not isinstance(arguments, Mapping):
        raise CheckpointError(f"{where}: `model_args` wants an object, got {type(arguments).__name__}")
    foreign = next((name for name in arguments or {} if name in TIMM_LOADS), None)
    if foreign is not None:
        raise CheckpointError(f"{where}: `model_args.{foreign}` is no setting of a model; remove it")


def check_settings(config: PretrainedConfig, path: Path | str) -> None:
    """Raise ``CheckpointError`` for a setting of another type than its default: a text for a number or for yes or no.

    transformers looks at some of them when the configuration is made, and stumbles over others in the first call.
    """
    try:
        defaults = vars(type(config)())
    except Exception:  # a configuration that has no defaults
        defaults = {}
    for name, value in vars(config).items():
        default = defaults.get(name)
        if isinstance(value, PretrainedConfig):
            check_settings(value, path)
        elif isinstance(default, bool) and not (value is None or value in (True, False)):
            raise CheckpointError(f"`{path}`: `{name}` wants true or false, got {str(value)[:60]!r}")
        elif isinstance(default, int | float) and isinstance(value, str):
            raise CheckpointError(f"`{path}`: `{name}` wants a number, got {str(value)[:60]!r}")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Integers by name; those of a list have the name of the list."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int):
        yield name, value


def build_within(
    build: Callable[[], nn.Module], *, tensors: int, nbytes: int, path: Path, trial_on_meta: bool = True
) -> nn.Module:
    """The model that ``build`` makes, once it is known to fit weights of so many ``tensors`` and ``nbytes``.

    It is made on the meta device first, where nothing is allocated, and stopped as soon as it has more parameters or
    modules than such weights fill, and refused where it has more weights; without ``trial_on_meta``, for models that
    cannot be made there, only stopped. Raises ``CheckpointError`` naming ``path``, the configuration.
    """
    with naming(path):
        if not trial_on_meta:
            with _counting(tensors, path):
                return build()
        with torch.device("meta"), no_init_weights(), _counting(tensors, path):
            trial = build()
        if isinstance(trial, PreTrainedModel):
            check_settings(trial.config, path)
        count = sum(parameter.numel() for parameter in trial.parameters())
        if count > WEIGHTS_PER_BYTE * nbytes + NO_FILE:
            raise CheckpointError(f"`{path}` describes a model of {count:,} weights; its files have {nbytes:,} bytes")
        held = sum(buffer.numel() * buffer.element_size() for buffer in trial.buffers())
        if held > BUFFER_BYTES + 4 * nbytes:
            raise CheckpointError(
                f"`{path}` describes a model with {held:,} bytes of buffers; its weights have {nbytes:,}"
            )
        del trial
        return build()


def try_build(config: PretrainedConfig, *, tensors: int | None, path: Path | str) -> None:
    """Build the model of ``architectures`` on the meta device and drop it, to see whether it can be built.

    For models that transformers builds itself and whose errors would be its own. Classes that transformers does not
    hold are left to it. Raises ``CheckpointError`` naming ``path``.
    """
    names = architecture_names(vars(config))
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return
    check_settings(config, path)
    with (
        naming(path),
        torch.device("meta"),
        no_init_weights(),
        _counting(tensors, path),
    ):
        found(copy.deepcopy(config))


@contextmanager
def _counting(tensors: int | None, path: Path | str) -> Iterator[None]:
    """Stop this thread from registering many more parameters or modules than ``tensors`` fill, if that is known."""
    thread, seen = threading.get_ident(), {"parameters": 0, "modules": 0}
    several = NO_FILE if tensors is None else tensors
    most = {"parameters": 4 * several + 1024, "modules": 64 * several + 16384}
    weights = "" if tensors is None else f"; its weights are {tensors} tensors"

    def count(kind: str) -> Callable[[nn.Module, str, Any], None]:
        def hook(_module: nn.Module, _name: str, value: Any) -> None:
            if value is not None and threading.get_ident() == thread:
                seen[kind] += 1
                if seen[kind] > most[kind]:
                    raise CheckpointError(f"`{path}` describes a model of more than {most[kind]:,} {kind}{weights}")

        return hook

    handles = [
        registration.register_module_parameter_registration_hook(count("parameters")),
        registration.register_module_module_registration_hook(count("modules")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
