"""What transformers and peft learn of fips. ``import fips`` imports neither: each is told when it has been imported.

A finder in ``sys.meta_path`` works whoever imports first, and in threads: the import system runs it under the lock of
the module that is being imported. Replacing ``__import__`` would miss ``importlib``, and neither library asks installed
packages for additions (entry points).

What is told is small and imports nothing more of fips: in the middle of its own import transformers is not ready for
modules that need its models. Those are imported when a packed model is met.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_when_imported"]

log = logging.getLogger("fips")

METHOD = "fips"
"""``quant_method`` of packed models, ``fips.storage.layout.QUANT_METHOD``."""


def register_when_imported() -> None:
    """Tell those libraries now that are imported, and the others when they are; may be called again."""
    _install(Finder())
    for name in TOLD:
        if name in sys.modules:
            _tell(importlib.import_module(name))  # waits where another thread is importing it


class _Late:
    """Stands for a class of ``fips.storage.quantizer``, which is imported when it is called or asked for something."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._class()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle and copy ask for these
            raise AttributeError(name)
        return getattr(self._class(), name)

    def _class(self) -> Any:
        from fips.storage import quantizer

        return getattr(quantizer, self._name)


def _quantizers(module: ModuleType) -> None:
    module.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Late("FipsConfig")
    module.AUTO_QUANTIZER_MAPPING[METHOD] = _Late("FipsHfQuantizer")


def _adapters(module: ModuleType) -> None:
    """Let every ``LoraConfig`` dispatch packed layers to ``fips.layers.lora.LoraFactoredLinear``."""
    create = module.LoraModel._create_new_module
    if getattr(create, "knows_fips", False):
        return

    def create_new_module(config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
        if "fips.layers.linear" in sys.modules:  # otherwise no layer is packed
            from fips.layers.lora import packed_adapter

            adapter = packed_adapter(config, adapter_name, target, **options)
            if adapter is not None:
                return adapter
        return create(config, adapter_name, target, **options)

    create_new_module.knows_fips = True  # type: ignore[attr-defined]
    module.LoraModel._create_new_module = staticmethod(create_new_module)


def _all_linear(module: ModuleType) -> None:
    """``target_modules="all-linear"`` of LoRA means packed layers too, which are linear without being that class."""
    find = module._maybe_include_all_linear_layers
    if getattr(find, "knows_fips", False):
        return

    def with_packed(config: Any, model: Any) -> Any:
        asked = getattr(config, "target_modules", None)
        found = find(config, model)
        every = isinstance(asked, str) and asked.lower() == "all-linear" and config.peft_type == "LORA"
        if every and "fips.layers.linear" in sys.modules:  # otherwise no layer is packed
            from fips.layers.lora import adaptable

            found.target_modules = {*found.target_modules, *adaptable(model)}
        return found

    with_packed.knows_fips = True  # type: ignore[attr-defined]
    module._maybe_include_all_linear_layers = with_packed  # type: ignore[attr-defined]


TOLD: dict[str, Callable[[ModuleType], None]] = {
    "transformers.quantizers.auto": _quantizers,
    "peft.tuners.tuners_utils": _all_linear,
    "peft.tuners.lora.model": _adapters,
}
"""The modules that hold what is added to, and how."""


def _tell(module: ModuleType) -> None:
    try:
        TOLD[module.__name__](module)
    except Exception as error:  # of a version that is made otherwise: its own import must not fail for that
        log.warning("`%s` cannot be told of packed layers: %s: %s", module.__name__, type(error).__name__, error)


class Finder:
    """Finds the modules of ``TOLD`` as the other finders do, and has them told when they have run."""

    teaches_fips = True

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in TOLD:
            return None
        for finder in sys.meta_path:
            find = None if getattr(finder, "teaches_fips", False) else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                _tell_after(spec)
                return spec
        return None


def _tell_after(spec: ModuleSpec) -> None:
    """Have a module told at the end of its execution.

    The loader stays what it is, for those who ask it for sources; its one method is replaced for this one module.
    """
    loader = spec.loader
    run = getattr(loader, "exec_module", None)
    if run is None:
        return

    def exec_module(module: ModuleType) -> None:
        run(module)
        if module.__name__ == spec.name:  # a loader may be that of many modules
            _tell(module)

    setattr(loader, "exec_module", exec_module)  # noqa: B010 - no type checker allows the assignment


def _install(finder: Finder) -> None:
    """Put a finder first, in place of one that an earlier import of fips, or a reload, has left."""
    sys.meta_path[:] = [finder, *(other for other in sys.meta_path if not getattr(other, "teaches_fips", False))]
