"""Every snippet of the pages, as it stands there: commands fit the command line, and pages run from top to bottom.

A page runs in a directory of its own, beside tiny models: ``MODEL``, ``DATA`` and ``UNSEEN`` stand for what
``STAND_INS`` says, everything else is taken literally. A block under a comment ``<!-- not run: reason -->`` is only
read.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from conftest import save_tiny_vit
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fips.demo.run
from fips.cli import main
from fips.cli.app import app
from fips.cli.options import COMPRESSION, RECONSTRUCTION, data_fields, given, settings_of_options
from fips.config import DataConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
SHELL = ("", "sh")
COMMAND = re.compile(r"^(?:\w+=\S+ )*(?:fips|python -m fips|torchrun .*-m fips) ")
LANGUAGE = {"MODEL": "llama", "DATA": "text.txt", "UNSEEN": "unseen.txt"}
STAND_INS = {"docs/guides/vision-models.md": {"MODEL": "vit", "DATA": "photos", "UNSEEN": "unseen-photos"}}
"""By page, where it is not about a language model."""
NEEDS = {
    "docs/export.md": ("gguf", "onnx", "onnxscript", "onnxruntime"),
    "docs/guides/serving.md": ("gguf", "onnx", "onnxscript", "onnxruntime"),
    "docs/guides/training.md": ("peft",),
}
"""Optional packages without which a page cannot run."""
ELSEWHERE = {"demo", "compare", "bench"}
"""Commands that take long even here and have tests of their own."""
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    run: bool

    @property
    def commands(self) -> list[list[str]]:
        """The words after ``fips`` of every command of a shell block."""
        lines = self.code.replace("\\\n", " ").splitlines() if self.language in SHELL else []
        parts = [part.strip() for line in lines for part in line.split("&&")]
        return [shlex.split(part[found.end() :], comments=True) for part in parts if (found := COMMAND.match(part))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[Block]:
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [Block(block["language"], block["code"], block["reason"] is None) for block in found]


def commands_in_text(path: Path) -> list[list[str]]:
    """The words after ``fips`` of commands within sentences, which may leave out arguments."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8")).replace("\n", " ")
    found = [shlex.split(code) for code in re.findall(r"`(fips [^`]+)`", text)]
    return [[word for word in words[1:] if word != "..."] for words in found]


def check(words: list[str], *, whole: bool = True) -> None:
    """Raise if an option does not exist or does not take its value; ``whole``: also if an argument is missing."""
    name, *options = words
    if name.startswith("-"):
        assert name in {"--help", "--version", "--install-completion", "--show-completion"}, words
        return
    assert name in COMMANDS, words
    if options == ["--help"]:
        return
    try:
        read = COMMANDS[name].make_context(name, options).params
    except Exception as error:
        if whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise AssertionError(f"{' '.join(words)}: {error!r}") from error
        return
    given_options = {option: list(value) if isinstance(value, tuple) else value for option, value in read.items()}
    for parameter in COMMANDS[name].params:
        choices = (parameter.metavar or "").split("|")
        value = given_options[parameter.name]
        if len(choices) > 1 and all(choice.islower() for choice in choices) and value is not None:
            assert value in choices, words
    data = data_fields({"data": None, **given_options})
    if "source" in data:
        DataConfig(**data)
    if "recipe" in given_options:
        settings_of_options(
            given_options["recipe"],
            compression=given(given_options, COMPRESSION),
            reconstruction=given(given_options, RECONSTRUCTION),
            default_size=4.8,
        )


page = pytest.mark.parametrize("path", PAGES, ids=name_of)


@page
def test_commands_exist_with_the_options_and_values_shown(path: Path) -> None:
    for block in blocks(path):
        for words in block.commands:
            check(words)
    for words in commands_in_text(path):
        check(words, whole=False)


def test_the_readme_shows_commands() -> None:
    shown = {words[0] for block in blocks(ROOT / "README.md") for words in block.commands}
    assert {"demo", "inspect", "compress", "evaluate", "bench", "compare", "export", "recipes"} <= shown


@page
def test_python_blocks_compile(path: Path) -> None:
    for block in blocks(path):
        if block.language == "python":
            compile(block.code, name_of(path), "exec")


@pytest.mark.parametrize(
    "line",
    [
        "fips compress MODEL --data DATA --bit 4.8 --output smaller",
        "fips compress MODEL --data DATA --bits four --output smaller",
        "fips compress MODEL --data DATA --bits 4.8 --values int9 --output smaller",
        "fips compress MODEL --data DATA --bits 4.8 --recipe papers --output smaller",
        "fips compress MODEL --data DATA --size 4y --output smaller",
        "fips evaluate smaller --data DATA --num-samples many",
        "fips export smaller --output dense --format ggml",
        "fips export smaller",
        "fips squeeze MODEL",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = Block("sh", f"{line}  # a comment\n", True).commands
    with pytest.raises(Exception):  # noqa: B017, PT011 - of the option parser, of settings, or of this file
        check(words)


def test_commands_are_found_in_every_notation() -> None:
    code = "pip install x && fips demo\nFIPS_ISA=avx2 fips bench d\ntorchrun --n 2 -m fips plan m \\\n  --bits 4\n"
    assert Block("sh", code, True).commands == [["demo"], ["bench", "d"], ["plan", "m", "--bits", "4"]]
    assert Block("text", code, True).commands == []


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models and data that pages are run on."""
    root = tmp_path_factory.mktemp("snippets")
    source = fips.demo.run.MODEL_DIRECTORY
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.from_pretrained(source, **small, num_key_value_heads=1, max_position_embeddings=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "llama")
    AutoTokenizer.from_pretrained(source).save_pretrained(root / "llama")
    tokenizer = root / "llama" / "tokenizer.json"  # cuts text as GPT-2 does, which llama.cpp has a name for
    tokenizer.write_text(tokenizer.read_text().replace('"use_regex": false', '"use_regex": true'))
    save_tiny_vit(root / "vit")
    code = Path(shutil.__file__).read_text(encoding="utf-8")
    (root / "text.txt").write_text(code[:18000])
    (root / "unseen.txt").write_text(code[18000:20000])
    generator = np.random.default_rng(0)
    for folder, images in (("photos", 256), ("unseen-photos", 32)):
        for name in ("cat", "dog"):
            (root / folder / name).mkdir(parents=True)
            for index in range(images // 2):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{index}.png")
    return root


def stood_in(code: str, path: Path) -> str:
    for word, name in STAND_INS.get(name_of(path), LANGUAGE).items():
        code = re.sub(rf"\b{word}\b", name, code)
    return code


def steps(path: Path) -> Iterator[Block]:
    """What is run of a page."""
    for block in blocks(path):
        if block.run and (block.language == "python" or block.commands):
            yield Block(block.language, stood_in(block.code, path), True)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if any(steps(path))], ids=name_of)
def test_a_page_runs_from_top_to_bottom(
    path: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in NEEDS.get(name_of(path), ()):
        pytest.importorskip(package)
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fips.demo.run, "MODEL_DIRECTORY", Path("llama"))
    # what a run will take is counted on the meta device, in most of the time that so small a run takes
    monkeypatch.setattr("fips.app.forecast.operations", lambda *_, **__: None)
    monkeypatch.setattr("fips.app.fitting.calibration_memory", lambda *_, **__: None)
    module = ModuleType("page")  # where classes that a page defines can be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    for block in steps(path):
        if block.language == "python":
            for name in re.findall(r'save\(\w+, "([\w-]+)"', block.code):
                shutil.rmtree(name, ignore_errors=True)
            exec(compile(block.code, name_of(path), "exec"), module.__dict__)
        for words in block.commands:
            if words[0] not in ELSEWHERE:
                run_command(words, capsys)


def run_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; what lies where it writes was made by an earlier example of the page."""
    for option, value in pairwise(words):
        if option == "--output":
            shutil.rmtree(value, ignore_errors=True)
    capsys.readouterr()
    code = main(words)
    assert code == 0, f"{' '.join(words)}\n{capsys.readouterr().err}"
