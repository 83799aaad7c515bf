"""In a terminal: bars overwrite nothing, tables and help fit 80 and 120 columns; from Python nothing is printed."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import batches_for, tiny_model
from fresh import COMMAND, start_fips
from rich.console import Console

import fips
from fips.app.tables import result_table
from fips.bars import Bars, Clock, progress_bars
from fips.cli import main
from fips.cli.console import fitted, stdout
from fips.demo.run import MODEL_DIRECTORY
from fips.models.transformers import load_processor
from fips.plan.footprint import state_bytes
from fips.recipes import load_recipe, recipe_names

Capture = pytest.CaptureFixture[str]
UP = re.compile(r"\x1b\[\d*A")
"""The cursor goes up, to draw over lines that are there."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", vocab_size=260).save_pretrained(path)
    load_processor(str(MODEL_DIRECTORY), "text").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n" * 200)
    return path


@pytest.fixture(scope="module")
def packed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "small"
    command = ["compress", str(model), "--data", str(text), "--bits", "6", "--layers", "blocks", "--output", str(path)]
    assert main([*command, "--num-samples", "16", "--sequence-length", "16"]) == 0
    return path


def in_terminal(*words: object, code: str = COMMAND, columns: int = 80, lines: int = 24) -> str:
    """What the command, or ``code``, writes to a terminal of this size, escape sequences and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = start_fips(
        *words, stdin=theirs, stdout=theirs, stderr=theirs, environment={**environment, "TERM": "xterm"}, code=code
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            part = b""
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait(timeout=60) == 0, seen.decode()
    return seen.decode()


@pytest.mark.slow
def test_the_result_of_a_compression_stays_in_a_terminal(model: Path, text: Path, tmp_path: Path) -> None:
    command = ["compress", model, "--data", text, "--bits", "6"]
    options = ["--num-samples", "8", "--sequence-length", "16", "--output", tmp_path / "out"]
    bars, title, result = in_terminal(*command, *options).partition("Result")
    assert title
    assert UP.search(bars), "bars are drawn on a terminal"
    assert not UP.search(result)
    lines = [line for line in result.replace("\r", "").split("\n") if line]
    assert lines[-1].replace(" ", "").endswith(f'fips.load("{tmp_path / "out"}")'), lines[-2:]
    shown = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", line) for line in lines]
    assert "…" not in "".join(shown)
    for line in shown:  # tables fit, and sentences are broken between words
        assert len(line) <= 80 or " " not in line, line


def test_sentences_are_broken_for_terminals_alone() -> None:
    line = "errors on data held out are 2.85 times those " * 3 + "/a/path/" + 90 * "x"
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    *sentence, path = fitted(line, terminal).split("\n")
    assert max(map(len, sentence)) <= 80
    assert " ".join([*sentence, path]) == line
    assert path == "/a/path/" + 90 * "x", "it can be copied"
    assert fitted(line, Console(file=io.StringIO(), width=80)) == line


@pytest.mark.slow
def test_the_last_lines_of_the_demo_stay_in_a_terminal(tmp_path: Path) -> None:
    code = (
        "import sys, fips.demo.run as demo\n"
        "from fips.cli import main\n"
        "from transformers import AutoModelForCausalLM\n"
        "from fips.models.transformers import load_processor\n"
        "small = demo.Path(sys.argv[1]) / 'small'\n"
        "AutoModelForCausalLM.from_pretrained(demo.MODEL_DIRECTORY, num_hidden_layers=1).save_pretrained(small)\n"
        "load_processor(str(demo.MODEL_DIRECTORY), 'text').save_pretrained(small)\n"
        "recipe = demo.demo_recipe(bits=6.0)\n"
        "recipe = recipe.model_copy(update={'data': recipe.data.replace(num_samples=16, sequence_length=64)})\n"
        "demo.MODEL_DIRECTORY, demo.EVALUATION_WINDOWS, demo.demo_recipe = small, 8, lambda **_: recipe\n"
        "sys.exit(main(['demo', '--output', sys.argv[1] + '/out']))\n"
    )
    seen = in_terminal(tmp_path, code=code)
    bars, title, result = seen.partition("Result")
    assert title
    for stage in ("score the original", "calibrate", "solve", "score the compressed"):
        assert f"{stage} " in bars, stage
    assert UP.search(bars)
    assert not UP.search(result)
    assert f'import fips\n    model = fips.load("{tmp_path}/out")' in result.replace("\r", "")


def test_there_is_one_bar_for_a_stage_however_many_groups_it_has() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=10)
    with progress_bars(console) as bars:
        for group in range(40):
            for done in (1, 2, 3):
                bars.event(fips.ProgressEvent("solve", f"model.layers.{group}", done, 3))
    final = screen.getvalue().rpartition("\x1b[2K")[2]
    assert "solve" in final
    assert "model.layers.39" in final
    assert "3/3" in final
    ups = [int(up[2:-1] or 1) for up in UP.findall(screen.getvalue())]
    assert max(ups, default=1) == 1, "never more than one line is drawn over"
    assert max(len(line) for line in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", final).split("\n")) <= 80


def test_a_bar_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = Bars(Console(file=io.StringIO(), force_terminal=True, width=80))
    now = [0.0]
    monkeypatch.setattr(bars._bars, "get_time", lambda: now[0])

    def clock(seconds: float, done: int) -> str:
        now[0] = seconds
        bars.show("reconstruct", done, 10)
        return Clock().render(bars._bars.tasks[0]).plain

    assert clock(0, 0) == "0:00:00<-:--:--"
    assert clock(60, 1) == "0:01:00<-:--:--"
    assert clock(120, 2) == "0:02:00<0:08:00"
    assert clock(180, 10) == "0:03:00"
    assert clock(240, 1).startswith("0:04:00<")  # the next group
    bars.stop()


def test_a_log_has_a_line_per_tenth() -> None:
    log = io.StringIO()
    bars = Bars(Console(file=log, width=80))
    for _ in range(2):
        bars.show("measure", 1, 2)
    for done in range(1, 101):
        bars.event(fips.ProgressEvent("reconstruct", "g0", done, 100, 0.5))
    lines = log.getvalue().splitlines()
    assert lines.pop(0) == "measure 1/2"
    assert lines[:2] == ["train blocks g0 1/100 loss 0.5", "train blocks g0 10/100 loss 0.5"]
    assert len(lines) == 11


@pytest.mark.parametrize("widgets", [False, True])
def test_a_notebook_without_widgets_has_the_lines_of_a_log(widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.display = lambda cell: shown.append(cell._repr_mimebundle_([], [])["text/plain"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("fips.bars.find_spec", lambda name: object() if widgets else None)
    bars = Bars(Console(force_jupyter=True))
    monkeypatch.setattr(bars._bars, "start", lambda: shown.append("bars"))
    for done in range(1, 21):
        bars.event(fips.ProgressEvent("solve", "g0", done, 20))
    assert shown[:1] == (["bars"] if widgets else ["solve g0 1/20\n"])
    assert widgets or (len(shown) == 11 and shown[-1] == "solve g0 20/20\n")


COMMANDS = (
    "compress", "plan", "inspect", "evaluate", "compare", "bench", "export", "merge", "report", "recipes", "demo",
)  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits(command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", columns)  # read from the environment once, when it is imported
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    for line in shown.splitlines():
        words = re.match(r"│ +(--[\w-]+)", line)
        assert words is None or len(line.split()) > 2, f"{words[1]} says nothing"


def test_options_stand_in_panels_with_their_units(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 120)
    assert main(["compress", "--help"]) == 0
    shown = capsys.readouterr().out
    panels = re.findall(r"╭─ (.+?) ─", shown)
    assert panels[2:] == [
        "Size (give one)", "Model and output", "Data", "Layers", "Method", "Shared bases", "Training",
        "Machine and work",
    ]  # fmt: skip
    for option, unit in {
        "--bits": "BITS", "--budget": "FRACTION", "--sequence-length": "TOKENS", "--memory": "BYTES",
        "--distill": "STEPS", "--share-blocks": "BLOCKS",
    }.items():  # fmt: skip
        assert re.search(rf"{option} +{unit} ", shown), option
    assert "<int>" not in shown
    assert "<float>" not in shown


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("compress --effort ", ["fast", "default", "max"]),
        ("compress --method fips-", ["fips-paper", "fips-shared"]),
        ("plan --recipe paper-l", ["paper-llama-3.1-8b", "paper-llama-3.2-1b"]),
        ("compress --values tc4", ["tc4", "tc4g64"]),
        ("export --format g", ["gguf"]),
    ],
)
def test_a_shell_completes_what_an_option_takes(
    typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = f"fips {typed}"
    monkeypatch.setenv("_FIPS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == offered


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "words",
    ["plan MODEL --layers blocks", "inspect MODEL", "inspect PACKED", "recipes", "plan --recipe paper-llama-3.1-8b",
     "evaluate PACKED --data TEXT --sequence-length 16 --num-samples 4"],
)  # fmt: skip
def test_tables_fit(
    words: str, columns: int, model: Path, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(stdout, "width", columns)
    places = {"MODEL": str(model), "PACKED": str(packed), "TEXT": str(text)}
    assert main([places.get(word, word) for word in words.split()]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "│┃┏┡├└"]
    assert tables
    assert max(map(len, tables)) <= columns
    assert not [line for line in tables if "…" in line]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_widest_result_fits(columns: int) -> None:
    """With bases and training, which the header of 80 columns had no room for."""
    names = [f"layers.{number}" for number in range(12)]
    formats = [("full", "int8"), ("bitmask, full", "int5g64, nl4g64, nl5, tc3, tc3g64")]
    report = SimpleNamespace(
        plan={
            "groups": [
                {"rank": 2048, "factored": {"bytes": 1}, "dense": {"parameters": 1}, "format": fmt, "values": values}
                for fmt, values in formats
            ]
        },
        groups=[
            {"name": f"g1{n}", "blocks": names, "relative_error_start": 0.000012345, "relative_error_final": 0.1 * n,
             "seconds": 12345.6 * n}
            for n in (0, 1)
        ],
        config=None,
    )  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=columns).print(result_table(report))  # type: ignore[arg-type]
    text = shown.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    for words in (
        "group",
        "rank",
        "patterns",
        "values",
        "start",
        "error",
        "int5g64,",
        "bitmask,",
        "12346 s",
        "1.23e-05",
    ):
        assert re.search(rf"(?<!\S){words}(?!\S)", text), words


@pytest.mark.parametrize("columns", [80, 120])
def test_names_of_recipes_are_not_broken(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(stdout, "width", columns)
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    recipes = [load_recipe(name) for name in recipe_names()]
    assert all(recipe.model is None or f"│ {recipe.model} " in shown for recipe in recipes)
    assert any(recipe.model for recipe in recipes)


def test_a_plan_says_sizes_by_kind_and_the_smallest_one(model: Path, capsys: Capture) -> None:
    assert main(["plan", str(model), "--bits", "6", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    kinds = {kind["kind"]: kind for kind in plan["kinds"]}
    assert list(kinds) == [
        "MLP up", "MLP down", "attention readers", "attention writers", "embeddings, heads", "all else",
    ]  # fmt: skip
    config = tiny_model("llama").config
    size = config.hidden_size * config.intermediate_size
    assert [kinds[name]["weights"] for name in ("MLP up", "MLP down")] == [
        2 * config.num_hidden_layers * size, config.num_hidden_layers * size
    ]  # fmt: skip
    assert kinds["MLP up"]["bits_before"] == 32
    assert kinds["MLP up"]["bits_after"] == pytest.approx(6, rel=0.02)
    assert kinds["attention readers"]["bits_after"] == pytest.approx(6, rel=0.02)
    assert kinds["all else"]["bytes_after"] == kinds["all else"]["bytes_before"]
    assert sum(kind["bytes_before"] for kind in plan["kinds"]) == plan["model"]["bytes"]
    assert sum(kind["bytes_after"] for kind in plan["kinds"]) == pytest.approx(plan["compressed_model"]["bytes"])
    least = plan["smallest"]
    assert plan["unused"] is None
    assert main(["plan", str(model)]) == 0
    assert "no size was given: this is 4.8 bits a weight" in capsys.readouterr().out
    assert main(["plan", str(model), "--size", "90%"]) == 0
    assert re.search(r"90% would be [\d.]+ bits a weight; the most that layers take is 9", capsys.readouterr().out)
    assert main(["plan", str(model), "--size", f"{least['bytes'] + 1}B", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unused"] is None
    assert main(["plan", str(model), "--bits", str(least["bits"])]) == 0
    capsys.readouterr()
    for option, value in (("--size", f"{int(0.99 * least['bytes'])}B"), ("--bits", str(0.99 * least["bits"]))):
        assert main(["plan", str(model), option, value]) == 2
        assert "smallest" in capsys.readouterr().err


def test_a_plan_says_when_bits_are_not_reached(model: Path, capsys: Capture) -> None:
    assert main(["plan", str(model), "--bits", "14"]) == 0
    assert re.search(r"asked for 14 bits a weight; the most that layers take is 9", capsys.readouterr().out)


def test_a_dry_run_refuses_data_that_is_not_there(model: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["compress", str(model), "--bits", "6", "--dry-run", "--data"]
    for missing in (str(tmp_path / "no.txt"), f"{tmp_path / 'no.txt'}:0.5,{tmp_path / 'neither.txt'}:0.5"):
        assert main([*command, missing]) == 1
        assert "there is no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_shows_the_same_table_and_what_the_run_takes(model: Path, text: Path, capsys: Capture) -> None:
    options = ["--bits", "6", "--layers", "blocks"]
    assert main(["plan", str(model), *options]) == 0
    plan = capsys.readouterr().out
    assert main(["compress", str(model), *options, "--data", str(text), "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert dry.startswith(plan)
    assert dry.removeprefix(plan).startswith("estimate for ")


def test_a_packed_directory_is_inspected_from_its_headers_and_record(packed: Path, capsys: Capture) -> None:
    assert main(["inspect", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = fips.load(packed)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, fips.FactoredLinear)}
    assert {layer["name"] for layer in found["layers"]} == set(layers)
    for layer in found["layers"]:
        module = layers[layer["name"]]
        stored = [t for key, t in module.state_dict().items() if key not in ("bias", "weight")]
        count = module.in_features * module.out_features
        assert (layer["inputs"], layer["outputs"]) == (module.in_features, module.out_features)
        assert layer["values"] == module.kind
        assert layer["bits"] == pytest.approx(8 * sum(t.numel() * t.element_size() for t in stored) / count)
        assert layer["held_out"] == model.fips_report.overfit[layer["name"]]
    assert sum(kind["bytes_after"] for kind in found["kinds"]) == pytest.approx(state_bytes(model))
    assert sum(kind["bytes_before"] for kind in found["kinds"]) == model.fips_report.plan["model"]["bytes"]
    assert list(found["block_errors"]) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert main(["inspect", str(packed)]) == 0
    shown = capsys.readouterr().out
    for words in ("model.layers.0.mlp", "held out", "MLP up", "attention readers", "calibrated on 16 examples"):
        assert words in shown
    assert main(["inspect", str(packed), "--bits", "4"]) == 2
    assert "cannot be changed by --bits" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shared_basis_is_counted_with_its_layers(tmp_path: Path, capsys: Capture) -> None:
    model = tiny_model("vit")
    fips.compress(model, batches_for(model), fips.CompressionConfig(method="fips-paper", budget=0.5))
    fips.save(model, tmp_path / "small")
    assert main(["inspect", str(tmp_path / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(layer["rank"] > 0 for layer in found["layers"])
    total = state_bytes(fips.load(tmp_path / "small"))
    assert sum(kind["bytes_after"] for kind in found["kinds"]) == pytest.approx(total)


@pytest.mark.slow
def test_nothing_is_printed_unless_bars_are_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    report = fips.compress(model, batches_for(model), fips.CompressionConfig(bits=6.0))
    assert capfd.readouterr() == ("", "")
    summary = report.summary()
    plan = report.plan
    for words in (
        "fips",
        f"{8 * plan['layers']['factored']['bytes'] / plan['layers']['dense']['parameters']:.2f} bits",
    ):
        assert words in summary
    assert max(map(len, summary.splitlines())) < 120
    html = report._repr_html_()
    assert html.startswith("<table")
    assert html.count("<tr>") == len(summary.splitlines())
    other = tiny_model("llama")
    fips.compress(other, batches_for(other), fips.CompressionConfig(bits=6.0), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "solve model.layers.0 1/3" in err
    quiet = tiny_model("llama")
    fips.compress(quiet, batches_for(quiet), fips.CompressionConfig(bits=6.0), progress=False)
    assert capfd.readouterr() == ("", "")


def test_all_loggers_are_below_the_one_of_fips() -> None:
    names = re.findall(
        r"getLogger\(([^)]*)\)",
        "".join(path.read_text(encoding="utf-8") for path in Path(fips.__file__).parent.rglob("*.py")),
    )
    ours = [name for name in names if name.startswith('"')]
    assert ours
    assert not [
        name for name in ours if not re.fullmatch(r'"(fips(\.[\w.]+)?|lm_eval|transformers[\w.]*|torch[\w.]*)"', name)
    ]
    assert logging.getLogger("fips").handlers == []
