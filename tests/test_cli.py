"""The command as a user types it: results on stdout, one-line errors on stderr, exit codes, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_vit, tiny_model
from fresh import start_fips
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fips
from fips.cli import main
from fips.layers.linear import factored_layers

TEXT = "the cat sat on the mat and the dog ran to the cat . " * 400


@pytest.fixture(scope="module")
def vit_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "vit"
    save_tiny_vit(path)
    return path


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(path)
    words = sorted(set(TEXT.split()))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: index + 3 for index, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for index in range(12):
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(TEXT)
    return path


Capture = pytest.CaptureFixture[str]


def test_inspect_lists_layers_and_changes_nothing(vit_directory: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in vit_directory.iterdir()}
    assert main(["inspect", str(vit_directory)]) == 0
    out = capsys.readouterr().out
    for word in ("vit.layers.0.mlp", "fc1 (up", "g0", "MLP up", "whole file", "smallest size: --bits"):
        assert word in out
    assert main(["inspect", str(vit_directory), "--json", "--budget", "0.25", "--share-blocks", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [group["blocks"] for group in plan["groups"]] == [["vit.layers.0", "vit.layers.1"], ["vit.layers.2"]]
    assert plan["layers"]["factored"]["parameters"] <= 0.25 * plan["layers"]["dense"]["parameters"]
    assert before == {path: path.stat().st_mtime_ns for path in vit_directory.iterdir()}


@pytest.mark.slow
def test_compress_and_evaluate_images(vit_directory: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "small"
    command = ["compress", str(vit_directory), "--data", str(images), "--budget", "0.5", "--output", str(out)]
    assert main([*command, "--steps", "3", "--batch-size", "8", "--num-samples", "16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tensor_bytes"] == record["compressed_model"]["bytes"]
    assert record["data"]["num_samples"] == 16
    assert record["source"] == str(vit_directory)
    assert {"preprocessor_config.json", "config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    recipe = fips.Recipe.load(out / "fips_recipe.yaml")
    assert recipe.compression.reconstruction.steps == 3
    assert recipe.compression.budget == 0.5
    for source in (vit_directory, out):
        assert main(["evaluate", str(source), "--data", str(images), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert 0 <= result["top1_percent"] <= 100
        assert result["num_images"] == 24
    against = ["evaluate", str(out), "--data", str(images), "--against", str(vit_directory)]
    assert main([*against, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"]["kl"] > 0
    assert main(against) == 0
    shown = capsys.readouterr().out
    assert "top1" in shown
    assert "agreement_percent" in shown


@pytest.mark.slow
def test_compress_and_evaluate_text(llama_directory: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "small"
    command = ["compress", str(llama_directory), "--data", str(text), "--budget", "0.5", "--output", str(out)]
    assert main([*command, "--steps", "2", "--sequence-length", "16", "--num-samples", "8", "--batch-size", "4"]) == 0
    assert f'fips.load("{out}")' in capsys.readouterr().out
    assert main(["evaluate", str(out), "--data", str(text), "--sequence-length", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sequence_length"] == 16
    assert result["perplexity"] > 1
    assert (out / "tokenizer.json").is_file()
    assert isinstance(fips.load(out), torch.nn.Module)


@pytest.mark.parametrize("native", [False, True], ids=["passes in float32", "passes in bfloat16"])
@pytest.mark.parametrize("name", ["paper-deit-b", "paper-llama-3.1-8b"])
@pytest.mark.slow
def test_dry_run_plans_a_recipe_without_weights_or_data(
    name: str, native: bool, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("fips.estimate.memory.has_bfloat16", lambda device: native)  # whatever this machine has
    assert main(["compress", "--recipe", name, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["compressed_model"]["bytes"] < 0.75 * plan["model"]["bytes"]
    if name == "paper-llama-3.1-8b" and native:  # its bfloat16 weights stay in their files, not widened for a pass
        assert plan["estimate"]["mapped_bytes"] == plan["model"]["bytes"]
        assert plan["estimate"]["memory_bytes"] > 0.5 * plan["model"]["bytes"]
    else:
        assert plan["estimate"]["memory_bytes"] > plan["model"]["bytes"]
    assert plan["estimate"]["seconds"] is None, "the time of training is not told"
    assert main(["compress", "--recipe", name, "--dry-run", "--budget", "0.25"]) == 0
    assert "25.0%" in capsys.readouterr().out


def test_a_comparison_without_names_is_of_the_methods_that_train_nothing() -> None:
    from fips.app.comparing import untrained_methods

    found = untrained_methods(4.8)
    assert {"fips", "gptq", "sparsegpt", "svd"} <= set(found)
    assert not {"fips-paper", "fips-shared", "no-sharing"} & set(found)


@pytest.mark.slow
def test_compare_says_that_the_data_is_not_other_data(
    llama_directory: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [
        "compare",
        str(llama_directory),
        "--data",
        str(text),
        "--methods",
        "gptq",
        "--bits",
        "6",
        "--num-samples",
    ]
    command += ["4", "--sequence-length", "16", "--eval-samples", "4", "--output"]
    assert main([*command, str(tmp_path / "same")]) == 0
    assert "scoring on the data that is calibrated on" in caplog.text
    caplog.clear()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text())
    assert main([*command, str(tmp_path / "other"), "--eval-data", str(other)]) == 0
    assert "scoring on" not in caplog.text


def test_compare_writes_table_json_and_plot(vit_directory: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "compared"
    methods = "fips,no-sharing+values=float,fips-paper+reconstruction.steps=2,sparsegpt,wanda,svd-llm,basis-sharing"
    command = ["compare", str(vit_directory), "--data", str(images), "--output", str(out), "--methods", methods]
    assert main([*command, "--bits", "0.8,8", "--seeds", "0,1", "--num-samples", "8", "--batch-size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "A method takes the largest of its settings that fits" in " ".join(shown.split())
    result = json.loads((out / "compare.json").read_text())
    assert result["metric"] == "top1_percent"
    assert len(result["runs"]) == 7 * 2 * 2
    for run in result["runs"]:
        assert (run["quality"] is None) == (run["failure"] is not None)
        assert run["stored_bits"] is None or run["stored_bits"] <= run["bits"]
        assert run["quality"] is None or (run["against"]["kl"] >= 0 and run["against"]["agreement_percent"] <= 100)
    assert {run["method"] for run in result["runs"] if run["bits"] == 8 and run["failure"]} == set()
    ours = [run["stored_bits"] for run in result["runs"] if (run["method"], run["bits"]) == ("fips", 8)]
    assert min(ours) > 7.2  # layers kept whole have the size of their bits
    assert f"| fips | {sum(ours) / 2:.3f} |" in (out / "compare.md").read_text()


def test_recipes_are_listed(capsys: Capture) -> None:
    assert main(["recipes", "--json"]) == 0
    assert {"paper", "demo", "paper-swin-l"} <= json.loads(capsys.readouterr().out).keys()


Case = tuple[list[str], int, str]
BAD_INPUT: dict[str, Case] = {
    "unknown model": (["compress", "./nowhere", "--data", "TEXT", "--budget", "0.5"], 1, "unknown model `./nowhere`"),
    "unknown hub id": (["compress", "no/such-model", "--data", "TEXT", "--budget", "0.5"], 1, "no/such-model"),
    "directory without config": (["compress", "IMAGES", "--data", "TEXT", "--budget", "0.5"], 1, "no config.json"),
    "budget 0": (["compress", "VIT", "--data", "IMAGES", "--budget", "0"], 2, "`budget`"),
    "budget over 1": (["compress", "VIT", "--data", "IMAGES", "--budget", "1.5"], 2, "`budget`"),
    "budget below a basis": (
        ["compress", "VIT", "--data", "IMAGES", "--budget", "0.001", "--method", "fips-paper"], 2, "smallest `budget`"
    ),
    "bytes below the patterns": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "0.16"], 2, "the smallest `bits`"
    ),
    "budget and bits": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "8.0", "--budget", "0.5"], 2, "got bits and budget"
    ),
    "strange group": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "8.0", "--group", "some"], 2, "`--group` wants"
    ),
    "unknown method to compare": (
        ["compare", "VIT", "--data", "IMAGES", "--output", "OUT", "--methods", "fips,magic"], 2, "`method`"
    ),
    "no size": (["compress", "VIT", "--data", "IMAGES"], 2, "no size"),
    "no data": (["compress", "VIT", "--budget", "0.5"], 2, "no calibration data"),
    "missing data": (["compress", "VIT", "--data", "./nothing", "--budget", "0.5"], 1, "nothing"),
    "empty image folder": (["compress", "VIT", "--data", "EMPTY", "--budget", "0.5"], 1, "empty"),
    "empty text": (["compress", "LLAMA", "--data", "BLANK", "--budget", "0.5"], 1, "blank.txt"),
    "images for a text model": (["compress", "LLAMA", "--data", "IMAGES", "--budget", "0.5"], 1, "image"),
    "text for an image model": (["compress", "VIT", "--data", "TEXT", "--budget", "0.5"], 1, "text"),
    "unknown recipe": (["compress", "VIT", "--data", "IMAGES", "--recipe", "papr"], 2, "did you mean `paper`"),
    "unknown recipe field": (["compress", "VIT", "--data", "IMAGES", "--recipe", "RECIPE"], 2, "unknown field `rnk`"),
    "unknown target": (
        ["compress", "VIT", "--data", "IMAGES", "--budget", "0.5", "--targets", "fc9"], 1, "closest names"
    ),
    "unknown pattern": (["compress", "VIT", "--data", "IMAGES", "--budget", "0.5", "--pattern", "2-4"], 2,
        "known: unstructured, block4, block8, N:M",
    ),
    "unknown device": (["compress", "VIT", "--data", "IMAGES", "--budget", "0.5", "--device", "tpu9"], 2, "tpu9"),
    "meta device": (["compress", "VIT", "--data", "IMAGES", "--budget", "0.5", "--device", "meta"], 2, "no numbers"),
    "seed beyond torch's": (
        ["compress", "VIT", "--data", "IMAGES", "--budget", "0.5", "--seed", str(2**64)], 2, "`seed`: Input should be"
    ),
    "seed of a later run": (
        ["compare", "VIT", "--data", "IMAGES", "--bits", "6", "--seeds", f"0,{2**64}"], 2, "`seed`: Input should be"
    ),
    "bits of a later run": (["compare", "VIT", "--data", "IMAGES", "--bits", "6,0"], 2, "`bits`: Input should be"),
    "recipe in another encoding": (
        ["compress", "VIT", "--data", "IMAGES", "--recipe", "UTF16"], 2, "is not UTF-8 text (byte 0)"
    ),
    "backslash": (
        ["compress", "LLAMA", "--data", "TEXT", "--bits", "6", "--document-separator", "\\x"], 2, "is no text"
    ),
    "memory with a comma": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "6", "--memory", "1,5GiB"], 2, "wants a size such as 6GiB"
    ),
    "digits of a group": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "6", "--group", "9" * 5000], 2, "`--group` wants"
    ),
    "no group at all": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "6", "--groups", "3-1"], 2, "`groups` wants at least one"
    ),
    "groups of too many blocks": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "6", "--groups", "0-99999999999"], 2, "are below 100,000"
    ),
    "infinite rate": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "6", "--steps", "1", "--learning-rate", "inf"], 2, "finite"
    ),
    "pipe": (["evaluate", "LLAMA", "--data", "PIPE"], 1, "is neither a regular file nor a directory"),
    "unknown option": (["compress", "VIT", "--frobnicate"], 2, "`fips compress --help` lists the options"),
    "option of another type": (["compress", "VIT", "--bits", "x"], 2, "'--bits': Input should be a valid number"),
    "nothing to compare that fits": (
        ["compare", "VIT", "--data", "IMAGES", "--output", "OUT", "--bits", "0.5,0.4", "--methods", "fips,gptq"], 2,
        "no method fits into any of the sizes",
    ),
    "unknown command": (["comprss", "VIT"], 2, "Did you mean 'compress', 'compare'? `fips --help` lists the options"),
    "nothing but an output": (["compress"], 2, "missing: MODEL, a size (--bits, --size or --budget), --data DATA"),
    "bits beyond 16": (
        ["compress", "VIT", "--data", "IMAGES", "--bits", "35"], 2, "got 35.0 (stored bits per weight of the compressed"
    ),
    "part of names": (
        ["compress", "LLAMA", "--data", "TEXT", "--bits", "6", "--targets", "self_attn"], 1, "`*.self_attn.*` fits"
    ),
    "chats": (["compress", "LLAMA", "--data", "CHAT", "--bits", "6"], 1, "are read with `--chat`"),
    "text to score images": (["evaluate", "VIT", "--data", "TEXT"], 1, "reads images"),
    "nothing to evaluate on": (["evaluate", "VIT"], 2, "give --data or --tasks"),
    "dense to merge": (["merge", "VIT", "--output", "OUT"], 1, "is not a compressed model"),
    "dense to export": (["export", "VIT", "--output", "OUT"], 1, "is not a compressed model"),
    "dense to bench": (["bench", "VIT"], 1, "is not a compressed directory"),
    "no model to plan": (["plan", "--bits", "6"], 2, "no model: give MODEL"),
}  # fmt: skip


COUNTS = {
    "compress": ("--num-samples", "--batch-size", "--eval-samples", "--share-blocks"),
    "plan": ("--share-blocks",),
    "inspect": ("--share-blocks",),
    "evaluate": ("--num-samples", "--batch-size", "--limit"),
    "compare": ("--num-samples", "--batch-size", "--eval-samples"),
    "report": ("--num-samples", "--batch-size"),
    "bench": ("--batch", "--prompt", "--repeats"),
}
"""Options that count something of which there is at least one; of the others there may be none."""
OTHERS = {
    "compress": ("--seed", "--steps", "--distill"), "evaluate": ("--num-fewshot", "--seed"),
    "report": ("--examples", "--seed"), "bench": ("--seed",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *((command, option, value) for command, names in COUNTS.items() for option in names for value in ("0", "-1")),
        *((command, option, "-1") for command, names in OTHERS.items() for option in names),
    ],
)
def test_what_is_counted_is_counted_from_one(command: str, option: str, value: str, capsys: Capture) -> None:
    required = ["--data", "x", "--output", "y"] if command == "compare" else []
    assert main([command, "nowhere", *required, f"{option}={value}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: Invalid value for '{option}': " in said.err
    assert said.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    case: str,
    vit_directory: Path,
    llama_directory: Path,
    images: Path,
    text: Path,
    tmp_path: Path,
    write_recipe: Callable[[str], Path],
    capsys: Capture,
) -> None:
    arguments, code, message = BAD_INPUT[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "hi"}]}] * 9))
    places = {
        "OUT": tmp_path / "out",
        "VIT": vit_directory, "LLAMA": llama_directory, "IMAGES": images, "TEXT": text, "EMPTY": tmp_path / "empty",
        "BLANK": tmp_path / "blank.txt", "CHAT": tmp_path / "chat.json",
        "RECIPE": write_recipe("compression: {budget: 0.5, rnk: 3}"), "UTF16": tmp_path / "utf16.yaml",
        "PIPE": tmp_path / "pipe.txt",
    }  # fmt: skip
    places["UTF16"].write_text("compression: {budget: 0.5}", encoding="utf-16")
    os.mkfifo(places["PIPE"])
    before = sorted(tmp_path.rglob("*"))
    given = [str(places.get(argument, argument)) for argument in arguments]
    output = ["--output", str(tmp_path / "out")] if arguments[0] in ("compress", "compare") else []
    assert main([*given, *output]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_output_directory_is_refused_before_the_model_is_read(
    images: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    command = ["compress", "./nowhere", "--data", str(images), "--budget", "0.5", "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_of_few_examples_a_part_is_held_out_too(llama_directory: Path, text: Path, tmp_path: Path) -> None:
    """One batch of them all could not be parted."""
    command = ["compress", str(llama_directory), "--data", str(text), "--bits", "6", "--output", str(tmp_path / "out")]
    assert main([*command, "--num-samples", "16", "--sequence-length", "16"]) == 0
    report = json.loads((tmp_path / "out" / "fips_report.json").read_text())
    assert len(report["overfit"]) == len(factored_layers(fips.load(tmp_path / "out"))) == 21


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupt_exits_cleanly_and_leaves_nothing(
    number: signal.Signals, vit_directory: Path, images: Path, tmp_path: Path
) -> None:
    command = ["compress", vit_directory, "--data", images, "--budget", "0.5", "--method", "fips-paper"]
    command += ["--output", tmp_path / "out", "--steps", "1000000"]  # nothing is kept before the first group is trained
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as out, os.fdopen(reader) as err:
        process = start_fips(*command, stdout=out.fileno(), stderr=writer)
        os.close(writer)
        seen = ""
        while "train blocks" not in seen:
            line = err.readline()
            assert line, seen
            seen += line
        process.send_signal(number)
        said = err.read()
        assert process.wait(timeout=60) == 128 + number
        out.seek(0)
        assert out.read() == b""
    assert "interrupted: nothing was written" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_subcommand(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in (
        "plan", "inspect", "compress", "evaluate", "compare", "bench", "export", "merge", "report", "recipes", "demo",
    ):  # fmt: skip
        assert name in out


@pytest.mark.parametrize(
    "command",
    [
        ["plan"], ["inspect"], ["bench"], ["report"], ["export", "--output", "out"], ["evaluate", "--data", "text.txt"],
        ["compress", "--data", "text.txt", "--bits", "4", "--output", "out"],
    ],
)  # fmt: skip
def test_a_model_whose_name_no_file_can_have_is_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command[0], "x" * 300, *command[1:]]) == 1
    said = capsys.readouterr().err
    assert "is longer than a name of a file can be; give a path or a hub id" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
