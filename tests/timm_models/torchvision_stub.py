"""Imported before timm where torchvision cannot be installed: timm's models use none of it, they only import names.

With a real torchvision nothing is replaced. ``pip install timm --no-deps`` beside fips is all the tests need.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch


class _Names(ModuleType):
    """A module in which every name is an empty module class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (torch.nn.Module,), {"BILINEAR": 2, "BICUBIC": 3, "NEAREST": 0, "LANCZOS": 1, "HAMMING": 5,
                                                "BOX": 4})  # fmt: skip
        setattr(self, name, found)
        return found


class _Stub(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


if importlib.util.find_spec("timm") is not None and importlib.util.find_spec("torchvision") is None:
    from transformers.utils import import_utils

    assert not import_utils.is_torchvision_available()  # cached before the stub could be taken for it
    sys.meta_path.append(_Stub())
    with pytest.MonkeyPatch.context() as patch:  # the wrapper of transformers asks for both together
        patch.setattr(import_utils, "is_torchvision_available", lambda: True)
        import_utils.is_timm_available.cache_clear()
        assert import_utils.is_timm_available()
