"""Every error fips raises on purpose: one base class, one child per kind of cause.

Messages say what was wrong, what was got, what was wanted and what to do next. The command line turns any
``FipsError`` into one line on stderr and the exit code below.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FipsError",
    "MissingPackageError",
    "ModelError",
    "NoMatchError",
    "OutputError",
    "ShapeError",
]


class FipsError(Exception):
    """Base class of all errors raised by fips."""

    exit_code = 1


class ConfigError(FipsError, ValueError):
    """A setting has an unknown name, the wrong type or a value outside its range."""

    exit_code = 2


class BudgetError(ConfigError):
    """The size asked for cannot be met: it is smaller than the smallest that the method can make."""


class NoMatchError(FipsError, ValueError):
    """A pattern matched no layer, or the model has no layer that fips can compress."""


class MissingPackageError(FipsError, ImportError):
    """Something was asked for that an optional package does, and it is not installed."""


class ModelError(FipsError, ValueError):
    """A model cannot be found, loaded, or used for what was asked."""


class DataError(FipsError, ValueError):
    """A data source cannot be found, is empty, or is of the wrong kind for the model."""


class OutputError(FipsError, ValueError):
    """An output directory exists and is not empty, or cannot be written."""


class CheckpointError(FipsError, ValueError):
    """A compressed directory is incomplete, altered, or of an unknown version."""


class ShapeError(FipsError, RuntimeError):
    """A tensor given to a compressed layer does not fit it; a dense layer raises a ``RuntimeError`` too."""


class BackendError(FipsError, RuntimeError):
    """A kernel was asked for that this machine or this installation does not have."""
