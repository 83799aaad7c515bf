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
        package, missing = (name.partition(".")[0] for name in (module, error.name or module))
        if missing != package:
            raise MissingPackageError(
                f"{purpose} needs `{package}`, which cannot be imported here ({error}): install `{missing}`"
            ) from None
        raise MissingPackageError(
            f"{purpose} needs `{package}` ({error}); install fips with its extra: "
            f"`pip install 'fips[{extra}]'`, or `pip install '.[{extra}]'` in a checkout"
        ) from None
