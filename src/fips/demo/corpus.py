"""The standard library of the running interpreter as calibration and evaluation text."""

from __future__ import annotations

import shutil
import sysconfig
from importlib.resources import files
from pathlib import Path

import numpy as np

from fips.errors import DataError

__all__ = ["calibration_files", "copy_files", "held_out_files", "held_out_names"]

NUM_CALIBRATION_FILES = 120


def held_out_names() -> list[str]:
    """Modules the demo model has never seen."""
    return files(__package__).joinpath("held_out.txt").read_text(encoding="utf-8").split()


def held_out_files() -> list[Path]:
    """Their source files in this interpreter (a module that became a package contributes its ``__init__``)."""
    found = []
    for name in held_out_names():
        module = _stdlib() / f"{name}.py"
        package = _stdlib() / name / "__init__.py"
        found += [path for path in (module, package) if path.is_file()]
    return _require(found)


def calibration_files(*, seed: int) -> list[Path]:
    """A seeded choice of other top-level modules and packages."""
    held_out = set(held_out_names())
    candidates = [
        path
        for path in sorted([*_stdlib().glob("*.py"), *_stdlib().glob("*/*.py")])
        if path.parent.name not in ("site-packages", "test", "tests", "encodings", "lib2to3", "idlelib")
        and not {path.stem, path.parent.name} & held_out
        and path.stat().st_size >= 2048
    ]
    order = np.random.default_rng(seed).permutation(len(candidates))[:NUM_CALIBRATION_FILES]
    return _require([candidates[index] for index in order])


def copy_files(paths: list[Path], directory: Path) -> Path:
    """Copies of files side by side in a new directory, named in order."""
    directory.mkdir()
    for index, path in enumerate(paths):
        shutil.copyfile(path, directory / f"{index:03d}-{path.parent.name}-{path.stem}.txt")
    return directory


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _require(paths: list[Path]) -> list[Path]:
    if not paths:
        raise DataError(f"no module sources under `{_stdlib()}`; run the demo with an interpreter that ships .py files")
    return paths
