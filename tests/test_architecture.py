"""Imports point one way, and every module has its place in the order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "fips"

ORDER = [
    "errors",
    "signals",
    "config",
    "structure.patterns",
    "structure.locate",
    "structure.group",
    "structure",
    "solve",
    "solve.rank",
    "solve.patterns",
    "solve.schedules",
    "solve.svd",
    "solve.conjugate",
    "solve.problems",
    "solve.basis",
    "solve.factors",
    "solve.rounding",
    "solve.alternate",
    "solve.supports",
    "solve.search",
    "solve.reorder",
    "baselines",
    "baselines.moments",
    "baselines.pruning",
    "baselines.lowrank",
    "baselines.quantization",
    "storage",
    "storage.packing",
    "kernels.reference",
    "kernels",
    "kernels.cpu",
    "kernels.gpu",
    "kernels.ops",
    "kernels.timings",
    "kernels.runtime",
    "nn",
    "fixed",
    "accounting",
    "wrappers",
    "least",
    "plan",
    "preserve",
    "inputs",
    "heads",
    "tokens",
    "finite",
    "activations",
    "statistics",
    "survey",
    "trainable",
    "calibrate",
    "distill",
    "methods",
    "methods.workbench",
    "methods.paper",
    "methods.solver",
    "methods.baseline",
    "memory",
    "report.record",
    "report",
    "merge",
    "storage.untrusted",
    "storage.output",
    "storage.files",
    "storage.layout",
    "storage.weights",
    "integrations",
    "integrations.extras",
    "integrations.building",
    "integrations.lm_eval",
    "integrations.architectures",
    "integrations.companions",
    "integrations.peft",
    "integrations.onnx",
    "integrations.transformers",
    "integrations.quantizer",
    "integrations.timm",
    "integrations.reload",
    "compress",
    "storage.checkpoint",
    "integrations.sources",
    "",
    "recipes",
    "report.tables",
    "data.batches",
    "data.source",
    "data.rows",
    "data.images",
    "data.text",
    "data.load",
    "data",
    "evaluate",
    "report.plots",
    "compare",
    "fitting",
    "jobs",
    "lm_eval",
    "bench",
    "demo.corpus",
    "demo.run",
    "demo",
    "cli",
]


def path_of(module: str) -> Path:
    base = SRC.joinpath(*module.split(".")) if module else SRC
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def imports_of(path: Path) -> set[str]:
    """Modules of fips that a file imports when it is loaded (imports inside functions do not count)."""
    modules: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fips":
            modules.add(node.module.partition(".")[2])
        elif isinstance(node, ast.Import):
            modules |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "fips"}
    return modules


def test_the_order_lists_every_module() -> None:
    found = {
        ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        for path in SRC.rglob("*.py")
    }
    assert found == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module: str) -> None:
    later = set(ORDER[ORDER.index(module) :])
    if module == "":
        later.discard("")
    assert not imports_of(path_of(module)) & later


@pytest.mark.parametrize("module", [name for name in ORDER if name.split(".")[0] == "solve"])
def test_the_maths_knows_no_models(module: str) -> None:
    assert all(name.split(".")[0] in ("solve", "errors") for name in imports_of(path_of(module)))
