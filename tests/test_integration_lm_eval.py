"""lm-eval in process, through our module and through its stock command: one local task, one answer."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, quick_settings, tiny_model
from fresh import python
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fips
from fips.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"),
]

WORDS = [f"w{index}" for index in range(3, 64)]
TASK = """
task: local_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def questions(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(WORDS), (count, 6), generator=generator).tolist()
    return [
        {"text": " ".join(WORDS[i] for i in row[:4]), "choices": [WORDS[i] for i in row[4:]], "answer": row[0] % 2}
        for row in ids
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    path = tmp_path_factory.mktemp("lm-eval") / "model"
    fips.save(model, path, processor=tokenizer())
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in questions()) + "\n")
    (folder / "local_words.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture(scope="module")
def accuracy(directory: Path) -> float:
    """Independent computation: the choice whose next-token logit is higher."""
    model, encode = fips.load(directory), tokenizer()
    hits = 0
    for question in questions():
        ids = torch.tensor([encode(question["text"])["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        scores = [logits[encode(choice)["input_ids"][0]].item() for choice in question["choices"]]
        hits += int(scores[1] > scores[0]) == question["answer"]
    return hits / len(questions())


@pytest.fixture
def _local_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the thousands of tasks that lm-eval brings takes most of a minute each time."""
    tasks = importlib.import_module("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


@pytest.mark.slow
@pytest.mark.usefixtures("_local_tasks_only")
def test_in_process_through_the_command_line(
    directory: Path, tasks: Path, accuracy: float, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert 0.2 < accuracy < 0.8  # neither answer is always right
    command = ["evaluate", str(directory), "--tasks", "local_words", "--include-path", str(tasks)]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["local_words"]["acc"] == pytest.approx(accuracy)
    assert set(result["local_words"]) == {"acc", "acc_stderr"}
    caplog.clear()
    assert main([*command, "--limit", "4"]) == 0
    assert "local_words" in capsys.readouterr().out
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


def harness_options(model: str, tasks: Path, results: Path) -> list[str]:
    return [
        "--model", "hf", "--model_args", model, "--device", "cpu", "--tasks", "local_words",
        "--include_path", str(tasks), "--output_path", str(results),
    ]  # fmt: skip


def written_accuracy(results: Path) -> float:
    (written,) = results.rglob("results_*.json")
    return float(json.loads(written.read_text())["results"]["local_words"]["acc,none"])


@pytest.mark.slow
def test_the_stock_command_gives_the_same_number(directory: Path, tasks: Path, accuracy: float, tmp_path: Path) -> None:
    """A process that does not know fips before it reads the directory."""
    options = harness_options(f"pretrained={directory},trust_remote_code=True", tasks, tmp_path)
    done = python("import runpy\nrunpy.run_module('lm_eval', run_name='__main__')", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert written_accuracy(tmp_path) == pytest.approx(accuracy)


@pytest.mark.slow
def test_our_module_gives_the_same_number(
    directory: Path, tasks: Path, accuracy: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m fips.lm_eval``, here."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *harness_options(f"pretrained={directory}", tasks, tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fips.lm_eval", run_name="__main__")
    assert not ended.value.code
    assert written_accuracy(tmp_path) == pytest.approx(accuracy)


@pytest.mark.usefixtures("_local_tasks_only")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such_task"], "knows no task `no_such_task`"),
        (["--tasks", "arc_easy", "--data", "x"], "either --data or --tasks"),
        ([], "give --data or --tasks"),
    ],
)
def test_wrong_use_is_one_line(
    directory: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(directory), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_local_tasks_only")
def test_data_that_cannot_be_fetched_is_told_with_what_to_do(
    directory: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**_: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    assert main(["evaluate", str(directory), "--tasks", "local_words", "--include-path", str(tasks)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot read the data of local_words: no route to the hub; run it once while online" in line


def test_a_missing_package_names_the_extra(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(directory), "--tasks", "arc_easy"]) == 1
    assert "fips[lm-eval]" in capsys.readouterr().err
