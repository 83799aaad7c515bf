"""Optional packages: imported when first needed, named when missing."""

from __future__ import annotations

import importlib
from typing import Any

from fips.errors import MissingPackageError

__all__ = ["require"]


def require(module: str, *, extra: str, purpose: str) -> Any:
    """The imported module; raises ``MissingPackageError`` saying which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs `{module.partition('.')[0]}` ({error}); install fips with its extra: "
            f"`pip install 'fips[{extra}]'`, or `pip install '.[{extra}]'` in a checkout"
        ) from None
