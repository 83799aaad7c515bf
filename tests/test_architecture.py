"""Rooms import one way, imports inside functions included, and modules of a room do not import in a circle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "fips"

ROOMS = [
    *(
        "version",
        "errors",
        "signals",
        "optional",
        "bars",
        "ranks",
        "formats",
        "config",
        "files",
        "kernels",
        "solve",
        "models",
    ),
    *(
        "layers",
        "plan",
        "calibration",
        "training",
        "record",
        "storage",
        "methods",
        "registration",
        "compression",
        "estimate",
        "data",
        "evaluation",
        "fips",
    ),
    *("integrations", "app", "recipes", "demo", "cli", "lm_eval", "__main__"),
]
"""From the ground up: a room imports rooms before it. ``fips`` is ``__init__.py``, the public names."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or "fips"] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.partition(".")[0]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of fips that a file imports anywhere, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module and node.module.split(".")[0] == "fips":
                base = node.module.removeprefix("fips").removeprefix(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".strip(".")
                    yield (inner if inner in MODULES else base or "fips"), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fips":
                    yield alias.name.removeprefix("fips").removeprefix(".") or "fips", node.lineno


def room_graph() -> dict[str, set[str]]:
    """For every room the rooms it imports."""
    graph: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module, path in MODULES.items():
        graph[room(module)] |= {room(target) for target, _ in imports(path)} - {room(module)}
    return graph


def order_of(graph: Mapping[str, set[str]]) -> list[str]:
    """An order in which everything follows what it imports; raises ``CycleError``."""
    return list(TopologicalSorter(graph).static_order())


def test_every_room_has_its_place() -> None:
    assert sorted(ROOMS) == sorted({room(module) for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_rooms_below(module: str) -> None:
    place = ROOMS.index(room(module))
    wrong = [
        f"line {line} imports {target}, which stands above"
        for target, line in imports(MODULES[module])
        if ROOMS.index(room(target)) > place
    ]
    assert not wrong


def test_rooms_form_no_cycle(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints an order that the imports ask for."""
    order = order_of(room_graph())
    with capsys.disabled():
        sys.stdout.write(f"\nrooms: {' '.join(order)}\n")
    assert sorted(order) == sorted(ROOMS)


@pytest.mark.parametrize("name", [name for name in ROOMS if (SRC / name).is_dir()])
def test_modules_of_a_room_form_no_cycle(name: str) -> None:
    """Without ``__init__.py``, which gathers names of its modules."""
    inside = {module: path for module, path in MODULES.items() if room(module) == name and module != name}
    order_of({module: {t for t, _ in imports(path) if t in inside} for module, path in inside.items()})


def test_a_cycle_is_found() -> None:
    with pytest.raises(CycleError):
        order_of({"a": {"b"}, "b": {"a"}})


if __name__ == "__main__":
    graph = room_graph()
    for name in ROOMS:
        sys.stdout.write(f"{name:14}{' '.join(other for other in ROOMS if other in graph[name])}\n")
