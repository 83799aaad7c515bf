"""What the pages promise: tables equal the committed results, links lead somewhere, the map is right."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fips import FactoredLinear
from fips.formats.patterns import pattern_named
from fips.formats.values import pack_integers

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "fips"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = load_tables()


def blocks(path: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(path.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize("name", TABLES.PAGES)
def test_tables_equal_the_committed_results(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert TABLES.MARKED.search(text), f"{name} has no table"
    assert TABLES.stale(text) == [], "run python benchmarks/tables.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES.PAGES)
def test_an_edited_figure_is_noticed(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for table in TABLES.MARKED.finditer(text):
        rows = table[3].split("\n")
        last = max(index for index, row in enumerate(rows) if re.search(r"\d", row))
        place = [digit.start() for digit in re.finditer(r"\d", rows[last])][-1]
        digit = rows[last][place]
        rows[last] = rows[last][:place] + str((int(digit) + 1) % 10) + rows[last][place + 1 :]
        edited = text.replace(table[3], "\n".join(rows), 1)
        assert TABLES.stale(edited) == [table[2]]


def test_every_table_stands_on_a_page() -> None:
    shown = [name for page_ in TABLES.PAGES for _, name, *_ in TABLES.MARKED.findall((ROOT / page_).read_text())]
    assert sorted(shown) == sorted(TABLES.TABLES)


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert 'pip install . && fips demo\npip install ".[test]" && pytest\n' in text


@page
def test_relative_links_lead_to_files_and_headings(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def worked_example() -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    """Integers, mask and the hexadecimal bytes that docs/file-format.md shows."""
    grid, stored = blocks(ROOT / "docs" / "file-format.md", "text")
    cells = [row.split() for row in grid.splitlines()]
    integers = torch.tensor([[0 if cell == "." else int(cell) for cell in row] for row in cells], dtype=torch.int8)
    mask = torch.tensor([[cell != "." for cell in row] for row in cells])
    return integers, mask, {line.split()[0]: " ".join(line.split()[1:]) for line in stored.splitlines()}


def hexadecimal(tensor: torch.Tensor) -> str:
    return " ".join(f"{byte:02x}" for byte in tensor.contiguous().view(torch.uint8).tolist())


def test_the_worked_example_is_what_is_packed() -> None:
    integers, mask, shown = worked_example()
    scales = torch.tensor([0.5, 0.0, 0.25, 2.0], dtype=torch.bfloat16)
    assert integers.shape == (4, 8)
    kept, pattern = pattern_named("bitmask").pack(integers, mask)
    packed = {"values": pack_integers(kept, bits=4), "pattern": pattern, "scales": scales}
    assert {name: hexadecimal(tensor) for name, tensor in packed.items()} == shown
    matrix = integers.float() * scales.float().unsqueeze(1)
    layer = FactoredLinear.from_factor(
        None, matrix, mask, role="down", fmt="bitmask", dtype=torch.bfloat16, values="int4", scales=scales
    )
    assert {name: hexadecimal(getattr(layer, name)) for name in shown} == shown
    assert torch.equal(layer.factor().float(), matrix)


def imported(path: Path) -> set[str]:
    """Modules of fips that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fips":
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if exists(name)]
            found |= {name.partition(".")[2] for name in modules or [node.module]}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "fips"}
    return found


def exists(module: str) -> bool:
    base = SRC.parent.joinpath(*module.split("."))
    return base.is_dir() or base.with_suffix(".py").is_file()


def files_of(module: str) -> list[Path]:
    base = SRC.joinpath(*module.split("."))
    return sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]


def map_rows() -> list[tuple[list[str], str]]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| room |") :].split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in table]
    return [(re.findall(r"`([\w.]+)`", row[0]), row[-1]) for row in rows]


def within(module: str, packages: list[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(("modules", "rule"), map_rows(), ids=lambda value: value[0] if isinstance(value, list) else "")
def test_modules_import_only_what_the_map_allows(modules: list[str], rule: str) -> None:
    named = re.findall(r"`([\w.]+)`", rule)
    for path in (path for module in modules for path in files_of(module)):
        found = {name for name in imported(path) if name and not within(name, modules)}
        if rule.startswith("everything"):
            wrong = {name for name in found if not within(name, named)}
        else:
            wrong = {name for name in found if within(name, named)}
        assert not wrong, f"{path.relative_to(SRC)} imports {sorted(wrong)}"


def test_the_map_names_every_package() -> None:
    mapped = [module for modules, _ in map_rows() for module in modules]
    top = {
        path.stem for path in SRC.iterdir() if path.name != "__pycache__" and (path.is_dir() or path.suffix == ".py")
    }
    small = {"__init__", "lm_eval"}
    assert top - small == {module.split(".")[0] for module in mapped}
