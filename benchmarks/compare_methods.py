"""All methods on real models at equal stored bits, without gradient steps unless a method says so.

    python benchmarks/compare_methods.py vit --models ../shared/models --data ../shared/data --output benchmarks/results

One process, examples kept in memory. Images: calibrated on the training folder, scored on all of the validation
folder. Stories: calibrated on the first fifth of the text, scored on the rest, every token once, windows of 512 that
never cross a story; stories with characters the tokenizer does not know are left out of both. Demo: calibrated and
scored on the modules of the interpreter's standard library that `fips demo` uses. Finished runs are kept beside the
result until all are there: the same command goes on from them, and one with fewer sizes or methods ends with them.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import field_methods  # noqa: F401 - `rtn`, `field-gptq` and `awq`
import torch
from output import result_directory
from paper_recipe import SEPARATOR, STORY_WINDOWS, story_job
from transformers import PreTrainedModel

from fips.app.compare import Comparison, Run, compare, write_comparison
from fips.config import DataConfig
from fips.data import Batches, load_batches
from fips.demo.corpus import calibration_files, copy_files, held_out_files
from fips.demo.run import EVALUATION_WINDOWS, MODEL_DIRECTORY, WINDOW
from fips.models.tasks import task_of
from fips.models.transformers import load_dense, load_processor, model_kind
from fips.record import environment
from fips.storage.work import WorkDirectory

IMAGE_MODELS = {"vit": "vit-tiny-tinyimagenet", "dinov2-small": "dinov2-small"}
PROTEINS = {"sequence_length": 160, "document_separator": "\n"}
TEXTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smollm2-135m": (
        {"source": "text/wikitext2_valid.txt", "num_samples": 128, "sequence_length": 512},
        {"source": "text/wikitext2_test.txt", "num_samples": 24, "sequence_length": 512},
    ),
    "antiberty": (
        {**PROTEINS, "source": "antibodies/calibration.txt", "num_samples": 512},
        {**PROTEINS, "source": "antibodies/test.txt", "num_samples": 256},
    ),
}
"""Calibration and evaluation data of language models and encoders, under the folder of data."""
METHODS = (
    "fips,fips+values=float,no-sharing,no-sharing+values=float,sparsegpt,sparsegpt+values=int8,"
    "wanda,magnitude,svd-llm,basis-sharing,svd"
)


def settings(name: str, models: Path, data: Path, scratch: Path) -> tuple[str, DataConfig, DataConfig]:
    """Model, calibration data and evaluation data."""
    if name in TEXTS:
        calibration, evaluation = (
            DataConfig(**{**fields, "source": str(data / str(fields["source"]))}, batch_size=8)
            for fields in TEXTS[name]
        )
        return str(models / name), calibration, evaluation
    if name in IMAGE_MODELS:
        images = data / "tiny-imagenet"
        calibration = DataConfig(source=str(images / "train"), num_samples=1024, batch_size=64)
        return (
            str(models / IMAGE_MODELS[name]),
            calibration,
            DataConfig(source=str(images / "validation"), batch_size=100),
        )
    if name == "demo":
        source = copy_files(calibration_files(seed=0), scratch / "calibration")
        held_out = copy_files(held_out_files(), scratch / "held-out")
        calibration = DataConfig(source=str(source), num_samples=256, sequence_length=WINDOW, batch_size=8)
        return (
            str(MODEL_DIRECTORY),
            calibration,
            DataConfig(source=str(held_out), num_samples=EVALUATION_WINDOWS, sequence_length=WINDOW, batch_size=16),
        )
    story_job(name, models, data, scratch)
    text = {"sequence_length": 512, "document_separator": SEPARATOR, "batch_size": 16}
    calibration = DataConfig(source=str(scratch / "calibration.txt"), num_samples=STORY_WINDOWS[name], **text)
    return str(models / name), calibration, DataConfig(source=str(scratch / "evaluation.txt"), **text)


def in_memory(batches: Batches) -> Batches:
    """The same batches, each made once."""
    cached = functools.cache(lambda chunk: batches.collate(chunk))
    chunks = [tuple(chunk) for chunk in batches.chunks]
    return replace(batches, chunks=chunks, collate=lambda chunk: dict(cached(chunk)))


def load_examples(source: str, model: PreTrainedModel, *parts: tuple[DataConfig, str]) -> list[Batches]:
    """Batches in memory for a model that was read from ``source``: of every part its data and the purpose."""
    kind = model_kind(model)
    options: dict[str, Any] = {"processor": load_processor(source, kind), "kind": kind, "task": task_of(model)}
    return [in_memory(load_batches(data, purpose=purpose, **options)) for data, purpose in parts]


def overfit_of(ratios: Collection[float]) -> dict[str, float] | None:
    """Of layers the error on data held out over that on the data fitted; None where nothing was held out."""
    return {"median": median(ratios), "largest": max(ratios)} if ratios else None


def measure(args: argparse.Namespace, scratch: Path, store: WorkDirectory) -> Comparison:
    source, calibration, evaluation = settings(args.name, args.models, args.data, scratch)
    evaluation = evaluation.replace(num_samples=args.eval_samples or evaluation.num_samples)
    model = load_dense(source, dtype="auto", device=torch.device("cpu"))
    kind = model_kind(model)
    options: dict[str, Any] = {"processor": load_processor(source, kind), "kind": kind, "task": task_of(model)}
    if kind == "text":
        options["context_length"] = model.config.max_position_embeddings

    def examples(seed: int) -> Batches:
        return in_memory(load_batches(calibration.replace(seed=seed), purpose="calibration", **options))

    scored = in_memory(load_batches(evaluation, purpose="evaluation", **options))
    latest = functools.lru_cache(maxsize=1)(examples)

    def on_run(run: Run) -> None:
        print(run.seed, run.bits, run.method, run.quality, run.relative_error, run.seconds, flush=True)

    return compare(
        model, latest, scored, methods=args.methods.split(","), sizes=[float(part) for part in args.bits.split(",")],
        seeds=[int(part) for part in args.seeds.split(",")], layers=args.layers, on_run=on_run,
        store=store,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*IMAGE_MODELS, "demo", *STORY_WINDOWS, *TEXTS))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=result_directory, required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--bits", default="9.6,8,6.4,4.8")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--layers", default="mlp", help="mlp, blocks or all")
    parser.add_argument("--eval-samples", type=int, help="images or windows scored; default: all of the benchmark's")
    parser.add_argument("--suffix", default="", help="added to the name of the result directory")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    directory = args.output / f"compare-{args.name}{args.suffix}"
    made_of = {"name": args.name, "layers": args.layers, "eval_samples": args.eval_samples, "commit": commit}
    store = WorkDirectory(directory.with_name(f"{directory.name}.work"), made_of)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(args, Path(scratch), store)
    facts = {
        "benchmark": f"methods at equal stored bits, {args.name}",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "environment": environment(torch.device("cpu")),
    }
    write_comparison(result, directory, facts=facts)
    shutil.rmtree(store.path)
    print(json.dumps(result.rows(), indent=1))


if __name__ == "__main__":
    main()
