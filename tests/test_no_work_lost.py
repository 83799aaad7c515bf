"""Outputs are tried before the work, finished work outlives what fails after it, batches fit, training is honest."""

from __future__ import annotations

import copy
import errno
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, quick_settings, tiny_model
from fresh import start_fips
from test_cli import TEXT, llama_directory, text  # noqa: F401 - fixtures
from transformers import PreTrainedModel

import fips
from fips.app import compare as app_compare
from fips.app import fitting, sources
from fips.app.exporting import export_directory
from fips.calibration.inputs import CalibrationData
from fips.cli import main
from fips.config import CompressionConfig, DataConfig
from fips.errors import BackendError, ConfigError, OutputError, ShapeError
from fips.estimate import MemoryNeed, available_memory, calibration_memory
from fips.estimate import memory as memory_module
from fips.files.manifest import MANIFEST, complete_directory, require_free
from fips.files.output import SCRATCH, Output
from fips.kernels import backend, cpu
from fips.layers.linear import FactoredLinear, factored_layers
from fips.methods.registry import method_of
from fips.methods.workbench import Workbench
from fips.models.transformers import build_empty
from fips.plan.plan import plan_compression
from fips.recipes import load_recipe
from fips.signals import Stopped, stoppable, uninterrupted
from fips.storage import checkpoint
from fips.storage.work import kept_work

Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def packed() -> PreTrainedModel:
    """A small model of floating values."""
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    return model


def integers(family: str = "llama") -> PreTrainedModel:
    """A small model of 8-bit values."""
    model = tiny_model(family)
    fips.compress(model, batches_for(model), CompressionConfig(method="magnitude", bits=8.0, values="int8"))
    return model


def files_of(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


class Broken:
    """A tokenizer that cannot be written."""

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "half.json").write_text("{")
        raise RuntimeError("the vocabulary is gone")


# The output, before the work


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources whose weights were read; none may be."""
    read: list[str] = []
    for name in ("dense", "model"):
        monkeypatch.setattr(sources.Source, name, lambda source: read.append(source.name))
    return read


BAD: dict[str, Callable[[Path], Path]] = {
    "a parent that is a file": lambda root: root / "file" / "out",
    "a parent of a parent that is a file": lambda root: root / "file" / "sub" / "out",
    "proc": lambda _: Path("/proc/fips-out"),
    "a name too long": lambda root: root / ("n" * 300),
    "a directory with something in it": lambda root: root / "full",
    "a link to it": lambda root: root / "link",
    "a file": lambda root: root / "file",
    "a loop of links": lambda root: root / "loop",
}


def take_places(root: Path) -> None:
    """What the cases of ``BAD`` find there."""
    (root / "file").write_text("mine")
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("mine")
    (root / "link").symlink_to(root / "full")
    (root / "loop").symlink_to(root / "loop")


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["compress", "compare", "export", "demo"])
@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_refused_before_weights_are_read(
    case: str,
    command: str,
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    packed: PreTrainedModel,
    tmp_path: Path,
    readers: list[str],
    capsys: Capture,
) -> None:
    take_places(tmp_path)
    fips.save(packed, tmp_path / "packed")
    before = sorted(tmp_path.rglob("*"))
    data = [str(llama_directory), "--data", str(text), "--sequence-length", "16"]
    arguments = {
        "compress": [*data, "--bits", "8.0"],
        "compare": data,
        "export": [str(tmp_path / "packed")],
        "demo": [],
    }[command]
    assert main([command, *arguments, "--output", str(BAD[case](tmp_path))]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "work directory" not in captured.err
    assert "--work" not in captured.err
    assert readers == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", [case for case in BAD if case != "a loop of links"])
def test_work_that_cannot_be_kept_is_refused_before_weights_are_read(
    case: str,
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    readers: list[str],
    capsys: Capture,
) -> None:
    take_places(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["compress", str(llama_directory), "--data", str(text), "--sequence-length", "16", "--bits", "8.0"]
    assert main([*command, "--output", str(tmp_path / "out"), "--work", str(BAD[case](tmp_path))]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "--work" in captured.err
    assert readers == []
    assert sorted(tmp_path.rglob("*")) == before


def test_work_is_kept_in_a_directory_given_as_text(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = CompressionConfig(bits=6.0, method="gptq")
    fips.compress(model, batches_for(model), config, work=str(tmp_path / "work"))
    assert (tmp_path / "work" / "run.json").is_file()


def test_a_file_system_without_room_is_refused_with_both_numbers(
    packed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    fields = {"f_bavail": 3, "f_frsize": 1000, "f_blocks": real.f_blocks}
    monkeypatch.setattr(os, "statvfs", lambda _: type("Usage", (), fields))
    with pytest.raises(OutputError, match=r"needs about .*, its file system has 3,000 bytes free"):
        fips.save(packed, tmp_path / "a" / "out")
    with Output(tmp_path / "out", needed=3000):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_file_sizes_is_found_before_the_work(tmp_path: Path) -> None:
    here, there = FORK.Pipe()

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        Output(tmp_path / "out", needed=15000).discard()
        try:
            Output(tmp_path / "out", needed=30000)
        except Exception as error:
            there.send((type(error).__name__, str(error)))

    process = FORK.Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert here.poll()
    name, message = here.recv()
    assert name == "OutputError"
    assert "20000 bytes" in message
    assert list(tmp_path.iterdir()) == []


def test_parents_that_were_made_vanish_after_a_failure_and_stay_after_success(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), complete_directory(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with complete_directory(tmp_path / "a" / "b" / "out") as scratch:
        (scratch / "x").write_text("x")
    assert files_of(tmp_path / "a" / "b") == {"out"}


def test_an_existing_directory_stays_the_same_one(packed: PreTrainedModel, tmp_path: Path) -> None:
    """It may be a mount point or somebody's working directory, which no rename can replace."""
    place = tmp_path / "out"
    place.mkdir(mode=0o750)
    (tmp_path / "link").symlink_to(place)
    inode = place.stat().st_ino
    fips.save(packed, tmp_path / "link")
    assert (place.stat().st_ino, place.stat().st_mode & 0o777) == (inode, 0o750)
    assert {MANIFEST, "config.json", "model.safetensors"} <= files_of(place)
    assert SCRATCH not in files_of(place)
    fips.load(place)


def test_the_working_directory_may_be_the_output(
    packed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fips.save(packed, ".")
    assert "config.json" in os.listdir(".")
    assert files_of(tmp_path) == {"here"}
    fips.save(packed, "nowhere/../../there")
    fips.load(tmp_path / "there")


def test_a_long_name_that_the_system_takes_is_taken(packed: PreTrainedModel, tmp_path: Path) -> None:
    place = tmp_path / ("ä" * 120)  # 240 bytes
    fips.save(packed, place)
    fips.load(place)
    assert files_of(tmp_path) == {place.name}


def test_the_manifest_moves_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    moved: list[str] = []
    rename = Path.rename

    def record(path: Path, target: Path) -> Path:
        moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", record)
    with complete_directory(tmp_path / "out") as scratch:
        for name in (MANIFEST, "config.json", "z", "a"):
            (scratch / name).write_text("x")
    assert moved == ["a", "z", "config.json", MANIFEST]


@pytest.mark.parametrize("inner", ["dense", "new/dense", "../link/dense"])
def test_nothing_is_written_into_a_compressed_directory(inner: str, tmp_path: Path) -> None:
    """It would not be among the files of the manifest, and the directory could not be loaded any more."""
    with complete_directory(tmp_path / "model") as scratch:
        (scratch / MANIFEST).write_text("{}")
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(OutputError, match=r"lies in the compressed model `.*model`.*choose another place"):
        require_free(tmp_path / "model" / inner)
    with (
        pytest.raises(OutputError, match=r"lies in the compressed model"),
        kept_work(tmp_path / "model" / inner, tmp_path / "out", first=True, keep=False),
    ):
        pass
    assert files_of(tmp_path / "model") == {MANIFEST}


# Other runs, alive and dead


def test_a_second_run_to_the_same_place_is_refused_at_once(tmp_path: Path) -> None:
    with Output(tmp_path / "out") as first:
        with pytest.raises(OutputError, match="another run is writing"):
            require_free(tmp_path / "out")
        assert first.scratch.is_dir()
        first.commit()
    assert files_of(tmp_path) == {"out"}


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_run_left_is_named_and_removed(exists: bool, tmp_path: Path, caplog: Log) -> None:
    place = tmp_path / "out"
    if exists:
        place.mkdir()

    def write_half() -> None:
        output = Output(place)
        (output.scratch / "half.safetensors").write_text("x" * 1000)
        (output.scratch / "folder").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=write_half)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with caplog.at_level(logging.WARNING), complete_directory(place) as scratch:
        assert list(scratch.iterdir()) == []
        (scratch / "a").write_text("x")
    assert "half.safetensors" in caplog.text
    assert str(scratch) in caplog.text
    assert files_of(place) == {"a"}
    assert files_of(tmp_path) == {"out"}


def test_a_killed_run_that_left_nothing_is_not_worth_a_word(tmp_path: Path, caplog: Log) -> None:
    output = Output(tmp_path / "out")
    os.close(output._lock)  # as the end of its process would
    with caplog.at_level(logging.WARNING), complete_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("x")
    assert not caplog.records


def test_a_complete_model_that_lacks_only_its_name_is_not_removed(tmp_path: Path) -> None:
    output = Output(tmp_path / "out")
    (output.scratch / MANIFEST).write_text("{}")
    os.close(output._lock)  # as the end of its process would
    with pytest.raises(OutputError, match=r"complete model of a run that was killed.*mv "):
        require_free(tmp_path / "out")
    assert (output.scratch / MANIFEST).is_file()


def test_a_name_that_was_taken_meanwhile_costs_nothing(packed: PreTrainedModel, tmp_path: Path) -> None:
    with Output(tmp_path / "out") as output:
        checkpoint.write_model(packed, output)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        with pytest.raises(OutputError, match=r"out-unfinished`") as caught:
            output.commit()
    assert "everything is complete" in str(caught.value)
    fips.load(tmp_path / "out-unfinished")
    assert files_of(tmp_path / "out") == {"mine"}


# Failures while writing


def test_a_tokenizer_that_cannot_be_written_leaves_a_model_that_loads(packed: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"vocabulary is gone.*out-unfinished`"):
        fips.save(packed, tmp_path / "out", processor=Broken())
    assert files_of(tmp_path) == {"out-unfinished"}
    batch = batches_for(packed)[0]
    with torch.no_grad():
        assert torch.equal(fips.load(tmp_path / "out-unfinished")(**batch).logits, packed(**batch).logits)
    fips.save(packed, tmp_path / "out")  # and the one in memory is as it was


def test_a_processor_that_is_none_is_refused_before_writing(packed: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(fips.FipsError, match="`processor` must be a tokenizer"):
        fips.save(packed, tmp_path / "out", processor="gpt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("odd"), MemoryError()]
)
def test_weights_that_cannot_be_written_leave_nothing_half_written(
    error: Exception, packed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OutputError, match="cannot write the weights"):
        fips.save(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_reports_late_is_noticed(
    packed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="quota"):
        fips.save(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_report_or_card_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: PreTrainedModel, caplog: Log
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "write_card", fail)
    fips.save(packed, tmp_path / "out")
    assert "no report or no model card" in caplog.text
    fips.load(tmp_path / "out")


def test_generation_settings_that_transformers_refuses_are_written(tmp_path: Path, packed: PreTrainedModel) -> None:
    settings = packed.generation_config
    before = (settings.temperature, settings.do_sample)
    settings.temperature, settings.do_sample = 0.6, False  # as in many published models
    try:
        fips.save(packed, tmp_path / "out")
        export_directory(str(tmp_path / "out"), tmp_path / "dense", fmt="dense")
    finally:
        settings.temperature, settings.do_sample = before
    for name in ("out", "dense"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["temperature"] == 0.6


def compress_command(model: Path, data: Path, output: Path) -> list[str]:
    return [
        "compress", str(model), "--data", str(data), "--method", "magnitude", "--bits", "9.6", "--output",
        str(output), "--sequence-length", "16", "--num-samples", "8", "--batch-size", "4",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_the_model_elsewhere_when_its_output_fails(
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    write, failed = checkpoint.save_file, []

    def fail_once(*arguments: Any, **options: Any) -> None:
        if not failed:
            failed.append(True)
            raise OSError(errno.EIO, "Input/output error")
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", fail_once)
    assert main(compress_command(llama_directory, text, tmp_path / "out")) == 1
    (place,) = tmp_path.iterdir()
    assert place.name.startswith("out-rescued-")
    assert f"complete in `{place}` instead" in capsys.readouterr().err
    assert (place / "tokenizer.json").is_file()
    fips.load(place)


def test_a_tokenizer_is_written_before_weights_are_read(
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    readers: list[str],
    capsys: Capture,
) -> None:
    original = sources.processor_of

    def broken(*arguments: Any, **options: Any) -> Any:
        processor = original(*arguments, **options)
        processor.save_pretrained = Broken().save_pretrained
        return processor

    monkeypatch.setattr(sources, "processor_of", broken)
    assert main(compress_command(llama_directory, text, tmp_path / "out")) == 1
    assert "vocabulary is gone" in capsys.readouterr().err
    assert readers == []
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_goes_on_from_the_runs_that_are_finished(
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    asked: list[str] = []
    compress, evaluate = app_compare.compress, app_compare.evaluate

    def third_fails(model: torch.nn.Module, batches: Any, config: fips.CompressionConfig, **options: Any) -> Any:
        asked.append(f"{config.method} {config.bits:g}")
        if len(asked) == 3:
            raise fips.FipsError("the third is broken")
        return compress(model, batches, config, **options)

    def evaluated(*arguments: Any, **options: Any) -> Any:
        asked.append("evaluate")
        return evaluate(*arguments, **options)

    def run(output: str, methods: str, *options: str) -> int:
        command = ["compare", str(llama_directory), "--data", str(text), "--output", str(tmp_path / output)]
        return main([*command, "--methods", methods, "--bits", "9.6,11.2", "--sequence-length", "16", *options])

    monkeypatch.setattr(app_compare, "compress", third_fails)
    assert run("out", "gptq,magnitude") == 1
    assert f"is in `{tmp_path}/out.work`: the command that began it goes on from there" in capsys.readouterr().err
    assert asked == ["gptq 9.6", "gptq 11.2", "magnitude 9.6"]
    monkeypatch.setattr(app_compare, "evaluate", evaluated)
    asked[:] = ["", "", "", ""]
    assert run("out", "gptq,magnitude", "--num-samples", "3") == 1
    assert "out.work` belongs to a run with other data" in capsys.readouterr().err
    assert run("out", "gptq,magnitude,svd") == 0
    again = ["magnitude 9.6", "magnitude 11.2", "svd 9.6", "svd 11.2"]
    assert asked[4:] == [word for name in again for word in (name, "evaluate")]
    assert not (tmp_path / "out.work").exists()
    assert run("undisturbed", "gptq,magnitude,svd") == 0
    found, wanted = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("out", "undisturbed"))
    for each in (*found["runs"], *wanted["runs"]):
        assert each.pop("seconds") > 0
    assert found == wanted
    assert all(run["against"]["kl"] > 0 for run in found["runs"])


# Measurements after the work


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8.0},
        {"bits": 8.0, "method": "wanda"},
        {"budget": 0.5, "method": "fips-paper", "reconstruction": {"steps": 2}},
    ],
    ids=lambda settings: str(settings.get("method", "fips")),
)
def test_measurements_that_fail_cost_nothing_but_themselves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Workbench, "errors", fail)
    monkeypatch.setattr("fips.methods.sweep.block_errors", fail)
    for name in ("environment", "peak_memory_bytes"):
        monkeypatch.setattr(sys.modules["fips.compression"], name, fail)
    model = tiny_model("llama")
    report = fips.compress(model, batches_for(model), CompressionConfig(layers="mlp", **settings))
    assert len(factored_layers(model)) == 9
    assert report.peak_memory_bytes is None
    assert {group["relative_error_final"] for group in report.groups} == {None}
    assert {len(group["blocks"]) for group in report.groups} == {3}
    assert "could not be measured" in caplog.text
    fips.save(model, tmp_path / "out")
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()
    assert fips.load(tmp_path / "out").fips_report.to_dict() == report.to_dict()


def test_data_that_describes_itself_in_prose_does_not_matter() -> None:
    class Described(list[Any]):
        description = "a fine data set"

    model = tiny_model("llama")
    report = fips.compress(model, Described(batches_for(model)), quick_settings())
    assert report.data == {}


@pytest.fixture
def failing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip("needs the compiled kernels")

    def fail(*_: Any, **__: Any) -> None:
        raise BackendError("this library only pretends")

    backend.say_once.cache_clear()
    monkeypatch.setenv("FIPS_RUNTIME", "packed")
    for name in ("multiply", "multiply_columns"):
        monkeypatch.setattr(cpu, name, fail)


@pytest.mark.usefixtures("failing_kernel")
def test_a_kernel_that_fails_is_replaced_by_torch_with_one_warning(caplog: Log) -> None:
    model = integers()
    layer = next(iter(factored_layers(model).values()))
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert caplog.text.count("only pretends") == 1


@pytest.mark.usefixtures("failing_kernel")
def test_what_torch_refuses_too_is_no_fault_of_the_kernel() -> None:
    layer = copy.deepcopy(next(iter(factored_layers(integers()).values())))  # a copy knows of no failure yet
    with torch.no_grad(), pytest.raises(ShapeError, match="do not fit 32 features"):
        layer(torch.randn(3, layer.in_features + 1))


# Signals


def test_a_signal_becomes_one_exception_and_the_next_one_nothing() -> None:
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)  # disturbs nothing

    with pytest.raises(Stopped) as caught, stoppable():
        work()
    assert caught.value.exit_code == 143


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def _interrupts_raise() -> Iterator[None]:
    """A shell's background jobs, and what starts tests in one, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_raise")
def test_a_signal_waits_for_what_must_not_be_interrupted() -> None:
    done = []

    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append(True)

    with pytest.raises(KeyboardInterrupt), uninterrupted():
        work()
    assert done


@pytest.mark.usefixtures("_interrupts_raise")
def test_a_signal_while_the_directory_gets_its_name_leaves_it_complete(
    packed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == f".out{SCRATCH}":
            signal.raise_signal(signal.SIGINT)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        fips.save(packed, tmp_path / "out")
    assert any("is complete" in note for note in caught.value.__notes__)
    fips.load(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_in_the_middle_of_a_file_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Twice: the second arrives while the first is being cleaned up after."""
    script = f"""
import sys, time, typer
from pathlib import Path
from fips.cli import run
from fips.files import output

def write() -> None:
    with output.complete_directory(Path({str(tmp_path / "out")!r})) as scratch:
        with (scratch / "model.safetensors").open("wb") as file:
            file.write(b"x" * 1000)
            print("writing", flush=True)
            time.sleep(60)

remove = output.shutil.rmtree
def slowly(*arguments, **options):
    print("cleaning", flush=True)
    time.sleep(1)
    remove(*arguments, **options)
output.shutil.rmtree = slowly
run.app = lambda **_: write()
sys.exit(run.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for word in ("writing", "cleaning"):
        assert process.stdout.readline().strip() == word
        process.send_signal(number)
    time.sleep(0.1)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_after_the_work_is_not_told_as_if_nothing_was_written(
    packed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def run(**_: Any) -> None:
        fips.save(packed, tmp_path / "out")
        raise end

    monkeypatch.setattr("fips.cli.run.app", run)
    for end in (Stopped(signal.SIGTERM), KeyboardInterrupt(), fips.FipsError("no table")):
        main([])
        cause = "error: no table" if isinstance(end, fips.FipsError) else "interrupted: "
        err = capsys.readouterr().err
        assert err.startswith(cause)
        assert err.endswith(f"`{tmp_path / 'out'}` is complete\n")
        shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("fips.cli.run.app", lambda **_: (_ for _ in ()).throw(Stopped(signal.SIGTERM)))
    assert main([]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "interrupted: nothing was written\n"  # by this command


@pytest.mark.slow
@pytest.mark.parametrize(("place", "options"), [("/dev/full", []), ("pipe", ["--json"])])
def test_a_standard_output_that_takes_nothing_is_told_last(
    packed: PreTrainedModel, tmp_path: Path, place: str, options: list[str]
) -> None:
    fips.save(packed, tmp_path / "packed")
    if place == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(place, os.O_WRONLY)
    with (tmp_path / "said").open("w+") as err:
        command = ["export", tmp_path / "packed", "--output", tmp_path / "out", *options]
        assert start_fips(*command, stdout=writer, stderr=err.fileno()).wait() == 1
        os.close(writer)
        err.seek(0)
        said = err.read()
    complete = f"error: cannot write to standard output: No space left on device; `{tmp_path / 'out'}` is complete"
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert (complete in said) == (place != "pipe")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_a_terminal_that_is_gone_does_not_cost_the_work(
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fips.cli.console.stderr.print", gone)
    command = compress_command(llama_directory, text, tmp_path / "out")
    command[command.index("magnitude")] = "wanda"  # which reports while it measures, before anything is found
    assert main(command) == 0
    fips.load(tmp_path / "out")


# Memory


def text_examples(length: int) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda count: {"input_ids": torch.empty(count, length, dtype=torch.int64, device="meta")}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_the_estimate_counts_every_tensor_of_a_real_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same counter around a run on the CPU sees what the estimate says."""
    model = tiny_model(family)
    config = CompressionConfig(bits=8.0, precision="float32")
    plan = plan_compression(model, config)
    batch = batches_for(model, count=1, batch=8)[0]
    empty = build_empty(model.config)
    examples = lambda count: {key: value[:1].to("meta").expand(count, *value.shape[1:]) for key, value in batch.items()}  # noqa: E731
    need = calibration_memory(empty, plan, config, examples, device=torch.device("cpu"))
    assert need is not None
    model.requires_grad_(False)
    model.config.use_cache = False
    known = [*model.parameters(), *model.buffers(), *batch.values()]
    with memory_module._Counted(known) as counted:
        method = method_of(config)
        groups = memory_module._at_work(plan, method)
        data = CalibrationData(model, [batch, batch], seed=0)
        bench = Workbench(model, config, data, torch.device("cpu"), method.needs, influence_examples=1)
        bench.input_moments("all", groups, hold=method.holds_out)
        bench.shared_influence(groups)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert need.total(8) == pytest.approx(counted.peak + stored, rel=0.05)


@pytest.mark.slow
def test_memory_grows_with_the_text_and_not_with_its_square() -> None:
    """Fused attention holds no scores."""
    model = build_empty(tiny_model("llama").config)
    config = CompressionConfig(bits=8.0)
    plan = plan_compression(model, config)
    needs = [calibration_memory(model, plan, config, text_examples(n), device=torch.device("cpu")) for n in (512, 1024)]
    assert needs[0] is not None
    assert needs[1] is not None
    assert needs[1].per_example == pytest.approx(2 * needs[0].per_example, rel=0.05)


def test_the_number_to_use_leaves_room_and_is_one_where_one_can_fit() -> None:
    need = MemoryNeed(fixed=100, per_example=50)
    assert need.fits(4, 300)
    assert not need.fits(5, 300)
    assert need.largest(900) == 10
    assert need.largest(160) == 1
    assert need.largest(140) == 0


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "available_memory", lambda *_, **__: 30_000_000)
    monkeypatch.setattr(fitting, "calibration_memory", lambda *_, **__: MemoryNeed(1_000_000, 4_000_000))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_batch_size_that_cannot_fit_is_refused_with_the_one_that_does(
    dry: list[str],
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    readers: list[str],
    capsys: Capture,
) -> None:
    command = ["compress", str(llama_directory), "--data", str(text), "--bits", "8.0", "--output"]
    assert main([*command, str(tmp_path / "out"), "--batch-size", "32", *dry]) == 2
    err = capsys.readouterr().err
    assert "`batch_size` 32 does not fit" in err
    assert "30.0 MB are free; use at most `--batch-size 4`" in err
    assert err.count("\n") == 1
    assert readers == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("little_memory")
def test_a_batch_size_nobody_chose_is_lowered_aloud(
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    caplog: Log,
) -> None:
    command = compress_command(llama_directory, text, tmp_path / "out")[:-2]
    assert main([*command[:-2], "--num-samples", "200"]) == 0
    assert "calibrating with batches of 4" in caplog.text
    assert json.loads((tmp_path / "out" / "fips_report.json").read_text())["data"]["batch_size"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("planned", [False, True])
def test_where_not_even_one_example_fits_a_run_is_refused_and_a_plan_is_not(
    planned: bool, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    monkeypatch.setattr(fitting, "available_memory", lambda *_, **__: 1000)
    model = build_empty(tiny_model("llama").config)
    config, data = CompressionConfig(bits=8.0), DataConfig(source="x", sequence_length=16)
    plan, place = plan_compression(model, config), torch.device("cpu")
    if planned:
        found, _ = fitting.fitting_data(model, plan, config, data, device=place, chosen=False, only_planned=True)
        assert found == data.replace(batch_size=16)  # one for every part of the moments
        assert "needs a machine with more memory" in caplog.text
    else:
        with pytest.raises(ConfigError, match="one alone about"):
            fitting.fitting_data(model, plan, config, data, device=place, chosen=False)


@pytest.mark.slow
def test_llama_1b_with_texts_of_2048_tokens_is_refused_at_the_default_batch_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(fitting, "available_memory", lambda *_, **__: 6 * 10**9)
    monkeypatch.setattr("fips.app.forecast.operations", lambda *_, **__: None)  # how long it takes is not asked here
    monkeypatch.setattr("fips.estimate.memory.has_bfloat16", lambda device: False)  # passes in float32 on any machine
    architecture = load_recipe("paper-llama-3.2-1b").architecture
    (tmp_path / "config.json").write_text(json.dumps({**architecture, "max_position_embeddings": 131072}))
    (tmp_path / "x.txt").write_text("some text")
    command = ["compress", str(tmp_path), "--bits", "5.6", "--dry-run", "--data", str(tmp_path / "x.txt")]
    command += ["--sequence-length", "2048"]
    assert main([*command, "--batch-size", "32"]) == 2
    assert "texts of 2048 tokens need about" in capsys.readouterr().err
    assert main([*command, "--batch-size", "1"]) == 0


@pytest.mark.slow
def test_weights_that_stay_in_their_files_do_not_need_memory(
    llama_directory: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """An 8B checkpoint of 16 GB, mapped on a CPU, was refused on a machine with 20 GB."""
    source = sources.Source(str(llama_directory))
    empty, model = source.empty(), source.dense()
    own = sum(parameter.nbytes for parameter in model.parameters())
    assert source.mapped_bytes(empty) == own
    assert own == sum(parameter.nbytes for parameter in model.parameters() if in_a_weights_file(parameter))
    config, data = CompressionConfig(bits=8.0), DataConfig(source=str(text), sequence_length=16, batch_size=1)
    plan, place = plan_compression(empty, config), torch.device("cpu")
    counted, need = (
        calibration_memory(empty, plan, config, fitting.examples_of(empty, data), device=place, mapped=mapped)
        for mapped in (0, own)
    )
    assert counted is not None
    assert need is not None
    assert need.mapped == own
    assert counted.total(1) - need.total(1) == own - plan.factored.bytes
    monkeypatch.setattr(fitting, "available_memory", lambda *_, **__: (counted.total(1) + need.total(1)) // 2)
    command = ["compress", str(llama_directory), "--data", str(text), "--bits", "8.0", "--sequence-length", "16"]
    command += ["--batch-size", "1", "--num-samples", "8", "--output", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    assert "of weights that stay in their files" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="one alone about"):
        fitting.fitting_data(empty, plan, config, data, device=place, chosen=True)


def in_a_weights_file(tensor: torch.Tensor) -> bool:
    """Whether its memory is that of a mapped file."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    places = [line.split(" ", 1)[0].split("-") for line in lines if line.endswith(".safetensors")]
    return any(int(first, 16) <= tensor.data_ptr() < int(last, 16) for first, last in places)


def test_weights_that_are_read_into_memory_are_not_mapped(llama_directory: Path, tmp_path: Path) -> None:  # noqa: F811
    source = sources.Source(str(llama_directory))
    empty = source.empty()
    assert replace(source, device=torch.device("cuda")).mapped_bytes(empty) == 0
    assert source.mapped_bytes(source.empty().half()) == 0  # converted while they are read
    (tmp_path / "config.json").write_bytes((llama_directory / "config.json").read_bytes())
    unseen = replace(source, name=str(tmp_path))
    assert unseen.mapped_bytes(empty) == source.mapped_bytes(empty)
    assert unseen.mapped_bytes(source.empty().half()) == 0
    (tmp_path / "pytorch_model.bin").touch()
    assert unseen.mapped_bytes(empty) == 0
    shutil.copytree(llama_directory, tmp_path / "trained")
    (tmp_path / "trained" / "training_args.bin").touch()  # a Trainer leaves it beside the weights
    assert replace(source, name=str(tmp_path / "trained")).mapped_bytes(empty) == source.mapped_bytes(empty)
    shutil.copytree(llama_directory, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert replace(source, name=str(tmp_path / "cut")).mapped_bytes(empty) == 0


def test_mapped_files_take_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_address_space_bytes", lambda: 10_000)
    assert available_memory(torch.device("cpu")) == 10_000
    assert available_memory(torch.device("cpu"), mapped=4_000) == 6_000
    assert available_memory(torch.device("cpu"), mapped=40_000) == 0


def test_other_users_can_read_what_this_one_writes(tmp_path: Path) -> None:
    """Writers of safetensors give their files to their owner alone."""
    mask = os.umask(0o022)
    try:
        with Output(tmp_path / "out") as output:
            file = output.scratch / "model.safetensors"
            file.touch(mode=0o600)
            script = output.scratch / "run.sh"
            script.touch(mode=0o700)
            output.commit()
        os.umask(0o077)
        with Output(tmp_path / "own") as output:
            (output.scratch / "model.safetensors").touch(mode=0o600)
            output.commit()
    finally:
        os.umask(mask)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert found["model.safetensors"] == 0o644
    assert found["run.sh"] == 0o744
    assert (tmp_path / "own" / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_control_group_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (available_memory(torch.device("cpu")) or 0) > 10**8
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    monkeypatch.setattr(memory_module, "_control_groups", lambda: [tmp_path])
    assert available_memory(torch.device("cpu")) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert (available_memory(torch.device("cpu")) or 0) > 10**8


# Training integers


def step(model: Any) -> None:
    ids = torch.randint(3, 64, (2, 8))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("loaded", [False, True])
def test_training_integers_says_once_what_stays(loaded: bool, tmp_path: Path, caplog: Log) -> None:
    model = integers()
    if loaded:
        fips.save(model, tmp_path / "out")
        model = fips.load(tmp_path / "out")
    with torch.no_grad():
        model.train()(input_ids=torch.ones(1, 4, dtype=torch.long))  # no training
    assert caplog.text == ""
    step(model)
    step(model)
    assert caplog.text.count("training leaves the integers and scales of 21 packed layers as they are") == 1
    assert "fips.prepare_qat(model)" in caplog.text
    kept = sum(layer.kept for layer in factored_layers(model).values())
    assert f"{kept:,} of {kept + sum(p.numel() for p in model.parameters()):,} numbers" in caplog.text


def test_the_trainer_is_told_too(tmp_path: Path, caplog: Log) -> None:
    from test_integration_training import train

    train(integers(), tmp_path, steps=2)
    assert caplog.text.count("training leaves the integers") == 1


@pytest.mark.parametrize("case", ["floating values", "frozen", "dense again"])
def test_nothing_is_said_where_nothing_is_left_alone(case: str, packed: PreTrainedModel, caplog: Log) -> None:
    model = packed if case == "floating values" else integers()
    if case == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
    if case == "dense again":
        fips.merge(model)
        assert not model._forward_pre_hooks
    step(model)
    assert "training leaves" not in caplog.text


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj", "gate_proj", "down_proj"], "all-linear"])
def test_lora_is_left_in_peace(targets: Any, caplog: Log) -> None:
    peft = pytest.importorskip("peft")

    base = integers()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    step(model)
    assert any(isinstance(module, FactoredLinear) for module in model.modules())
    assert "training leaves" not in caplog.text
    if targets == "all-linear":  # packed layers are linear ones, too; the head is left out
        adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
        assert len(adapted) == len(factored_layers(integers())) == 21
