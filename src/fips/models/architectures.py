"""Which class builds a model: one of transformers, or one whose code lies in the model's repository.

What ``config.json`` says is material, not a program: a name is looked up among the model classes of transformers
only, and code of a repository runs only where the caller trusts it.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from fips.errors import ModelError

__all__ = [
    "REMOTE_MODULE",
    "architecture_names",
    "check_trust",
    "code_of",
    "config_class",
    "foreign_code",
    "json_numbers",
    "library_class",
    "lies_in_repository",
    "model_class",
    "plain_numbers",
    "saved_class",
    "saved_config_class",
]

REMOTE_MODULE = "fips_remote"
"""Module that fips writes beside packed weights; it defines nothing that fips would need to run itself."""
_REFERENCE = re.compile(r"(?:[\w./-]+--)?(\w+)\.(\w+)")
_DECLARATIONS = {
    "__annotations__", "__doc__", "__init__", "__module__", "__orig_bases__", "__parameters__", "__qualname__",
    "config_class", "input_modalities", "main_input_name", "model_tags", "supports_gradient_checkpointing",
}  # fmt: skip


def foreign_code(fields: Mapping[str, Any]) -> dict[str, str]:
    """``AutoModel...: module.Class`` of ``auto_map`` in ``config.json``, without the module that fips wrote.

    Raises ``ModelError`` if ``auto_map`` has another form.
    """
    entries = fields.get("auto_map") or {}
    if not isinstance(entries, Mapping):
        raise ModelError(f"`auto_map` in config.json must be an object, got {type(entries).__name__}")
    found = {}
    for name, reference in entries.items():
        if not str(name).startswith(("AutoModel", "AutoConfig")):
            continue  # tokenizers and processors are loaded, and trusted or not, on their own
        match = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
        if match is None:
            raise ModelError(f"`auto_map.{name}` in config.json must be `module.Class`, got {reference!r}")
        if match[1] != REMOTE_MODULE:
            found[str(name)] = reference
    return found


def check_trust(source: str, fields: Mapping[str, Any], *, trust_remote_code: bool, packed: bool = False) -> bool:
    """Whether code of the repository is to run; raises ``ModelError`` if a model needs it and it is not trusted.

    A model that transformers has a class for needs none, unless it is ``packed``: then what was compressed was built
    by that code.
    """
    _refuse_hub_kernels(source, fields)
    code = foreign_code(fields)
    if not code or trust_remote_code:
        return bool(code)
    names = architecture_names(fields)
    known = any(library_class(name) is not None for name in names) and _known_type(fields.get("model_type"))
    own = {reference.rpartition(".")[2] for reference in code.values()}
    if known and not (packed and own & set(names)):
        return False
    files = sorted({reference.rpartition("--")[2].partition(".")[0] + ".py" for reference in code.values()})
    raise ModelError(
        f"`{source}` is built by code in its repository ({', '.join(files)}); read that code, then allow it with "
        "--trust-remote-code, in Python trust_remote_code=True"
    )


def config_class(fields: Mapping[str, Any], source: str, *, trusted: bool) -> type[PretrainedConfig]:
    """Configuration class of the fields of a ``config.json``; raises ``ModelError`` for an unknown ``model_type``."""
    reference = (fields.get("auto_map") or {}).get("AutoConfig")
    if trusted and reference is not None:
        own: type[PretrainedConfig] = _load_class(reference, source, PretrainedConfig, auto_class="AutoConfig")
        return own
    kind = fields.get("model_type")
    if not _known_type(kind):
        raise ModelError(f"`model_type` in config.json must name a type of transformers, got {kind!r}")
    found: type[PretrainedConfig] = transformers.CONFIG_MAPPING[kind]
    return found


def model_class(config: PretrainedConfig, source: str, *, trusted: bool) -> type[PreTrainedModel]:
    """The class that ``architectures`` names; raises ``ModelError`` if it is not the class of a whole model."""
    names = architecture_names(vars(config))
    code = {key: ref for key, ref in foreign_code(vars(config)).items() if key != "AutoConfig"} if trusted else {}
    if code:
        auto_class = min(code, key=lambda key: code[key].rpartition(".")[2] not in names)
        own: type[PreTrainedModel] = _load_class(code[auto_class], source, PreTrainedModel, auto_class=auto_class)
        return own
    for name in names:
        found = library_class(name)
        if found is not None:
            return found
    for mapping in (
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if not names and type(config) in mapping:
            return mapping[type(config)]  # type: ignore[no-any-return]
    raise ModelError(
        f"transformers {transformers.__version__} has no model class for {names or type(config).__name__}; "
        "`architectures` in config.json must name a class of the library"
    )


def saved_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that a saved model of class ``kind`` names: itself, or the class of transformers it behaves like.

    Raises ``ModelError`` if nobody else could build it: a subclass that changes what its base does, whose code does
    not travel with the weights.
    """
    if library_class(kind.__name__) is kind or lies_in_repository(kind):
        return kind
    base = next((parent for parent in kind.__mro__ if library_class(parent.__name__) is parent), None)
    where = f"`{kind.__module__}.{kind.__qualname__}`"
    cure = (
        'put it into a module of its own and call `register_for_auto_class("AutoModel...")` on it, so that its code '
        "is saved with the weights"
    )
    if base is None:
        raise ModelError(f"{where} is no class of transformers, so that what is saved could not be loaded; {cure}")
    changed = sorted(_overrides(kind, base))
    if changed:
        raise ModelError(
            f"{where} overrides {', '.join(f'`{name}`' for name in changed[:3])} of `{base.__name__}`, so that what is "
            f"saved would be loaded as another model; {cure}, or build a `{base.__name__}`"
        )
    return base


def saved_config_class(kind: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The configuration class that a saved model names, as ``saved_class`` for models.

    Fields are all written, so that a subclass which only adds or presets some is its base.
    """
    kind = next(parent for parent in kind.__mro__ if not parent.__module__.endswith(f".{REMOTE_MODULE}"))
    if lies_in_repository(kind):
        return kind
    base = next((parent for parent in kind.__mro__ if _is_library_config(parent)), None)
    methods = (types.FunctionType, property)
    changed = [
        name
        for parent in (kind.__mro__[: kind.__mro__.index(base)] if base is not None else ())
        for name, value in vars(parent).items()
        if isinstance(value, methods) and not name.startswith("__") and hasattr(base, name)
    ]
    if base is None or changed:
        what = f"overrides `{changed[0]}` of `{base.__name__}`" if base is not None else "is no class of transformers"
        raise ModelError(
            f"configuration class `{kind.__module__}.{kind.__qualname__}` {what}, so that what is saved could not be "
            "loaded; put it into a module of its own and call `register_for_auto_class()` on it"
        )
    return base


def _is_library_config(kind: type) -> bool:
    name = getattr(kind, "model_type", None)
    return _known_type(name) and transformers.CONFIG_MAPPING[name] is kind


def lies_in_repository(kind: type) -> bool:
    """Whether the code of a class is saved with a model: it came from a repository, or was registered to be saved.

    Raises ``ModelError`` if it was registered where there is no file to save.
    """
    if kind.__module__.endswith(f".{REMOTE_MODULE}"):
        return False
    if not (kind.__module__.startswith("transformers_modules.") or getattr(kind, "_auto_class", None)):
        return False
    if kind.__module__.startswith("transformers."):
        return False  # a class of the library that a configuration from a repository led to
    code_of(kind)
    return True


def code_of(kind: type) -> Path:
    """The file that defines a class; raises ``ModelError`` if there is none to copy."""
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if path is None or kind.__module__ == "__main__":
        raise ModelError(
            f"the code of `{kind.__qualname__}` cannot be saved with the weights, since `{kind.__module__}` is no "
            "module of its own; move the class into a file and import it from there"
        )
    return Path(path)


def _overrides(kind: type, base: type) -> Iterator[str]:
    """Names that ``kind`` gives another meaning than ``base``; data under a private name is declaration."""
    for parent in kind.__mro__[: kind.__mro__.index(base)]:
        for name, value in vars(parent).items():
            if name in _DECLARATIONS or not hasattr(base, name) or getattr(base, name) is value:
                continue
            behaves = callable(value) or isinstance(value, property | classmethod | staticmethod)
            if behaves or not name.startswith("_"):
                yield name


def plain_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a ``config.json`` with the numbers that transformers writes there as objects, since JSON has none like
    them: infinity is ``{"__float__": "Infinity"}``."""
    found: dict[str, Any] = PretrainedConfig._decode_special_floats(dict(fields))
    return found


def json_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The other way: fields as transformers writes them, so that a ``config.json`` is JSON."""
    found: dict[str, Any] = PretrainedConfig._encode_special_floats(dict(fields))
    return found


def architecture_names(fields: Mapping[str, Any]) -> list[str]:
    """The class names in ``architectures`` of a configuration; raises ``ModelError`` if it is no list of names."""
    names = fields.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"`architectures` in config.json must be a list of class names, got {names!r:.80}")
    return names


def library_class(name: str) -> type[PreTrainedModel] | None:
    """The whole model of transformers of that name; None for anything else that the library holds."""
    try:
        found = getattr(transformers, name, None)
    except Exception:  # lazy modules import what a name needs, which may fail in any way
        return None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        return None
    has_forward = getattr(found, "forward", None) is not PreTrainedModel.forward
    return found if has_forward else None


def _known_type(name: Any) -> bool:
    """Whether transformers itself has this ``model_type``; those registered by a running program do not count."""
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        return False
    return str(transformers.CONFIG_MAPPING[name].__module__).startswith("transformers.")


def _load_class(reference: str, source: str, wanted: type, *, auto_class: str) -> Any:
    try:
        found = get_class_from_dynamic_module(reference, source)
    except Exception as error:  # foreign code may fail in any way
        raise ModelError(
            f"the code of `{source}` cannot be run (`{reference}`): {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    if not (isinstance(found, type) and issubclass(found, wanted)):
        raise ModelError(f"`auto_map.{auto_class}` of `{source}` names `{reference}`, which is no {wanted.__name__}")
    found.register_for_auto_class(auto_class)  # type: ignore[attr-defined]
    return add_generation_mixin_to_remote_model(found) if wanted is PreTrainedModel else found


def _refuse_hub_kernels(source: str, fields: Mapping[str, Any]) -> None:
    """Attention named as ``owner/repository`` would be downloaded and run."""
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if "/" in str(fields.get(name, "")):
            raise ModelError(
                f"`{name}` in config.json of `{source}` names code to download ({fields[name]!r:.80}); remove it"
            )
