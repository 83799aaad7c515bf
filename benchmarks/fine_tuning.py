"""Training a compressed model afterwards: its head alone, or all of it by `fips.prepare_qat`, on labels or a teacher.

    python benchmarks/fine_tuning.py vit --models ../shared/models --data ../shared/data --bits 2.25 \
        --values nl2g64 auto --ways none head labels teacher --out benchmarks/results/fine-tuning-vit.json

`none` is the model as compressed; `head` trains its classifier, or the head of a language model (a copy of its own
where it is the embedding too); `rest` all but the packed numbers, which is what trains without `prepare_qat`; `labels`
everything but embeddings, on labels (of language models: the next token); `teacher` the same, to predict what the
original does on the same examples. The rows `original` say what the dense model does as it is and with its head alone
trained. With `--new-head` both get a new classifier for other classes, with `--turned` one that tells by how many
quarters an image is turned. With `--text` a language model is calibrated and trained on the first nine tenths of
another text and scored on the last. One pass over the examples per epoch, AdamW, warm-up over a tenth of the steps,
then cosine. Scored on other data. The file is written after every run, and a later call goes on where it ended.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import compare_methods
import torch
from output import result_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import fips
from fips.config import DataConfig
from fips.data import Batches
from fips.evaluation import evaluate
from fips.models.transformers import load_dense, model_kind
from fips.plan.footprint import state_bytes
from fips.record import environment

HEADS = ("classifier", "lm_head")


def loss_of(model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module | None) -> Tensor:
    """Of labels, or the divergence from the teacher's predictions."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits.float()
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(**inputs).logits.float().log_softmax(-1).flatten(0, -2)
        ours = logits.log_softmax(-1).flatten(0, -2)
        return kl_div(ours, wanted, log_target=True, reduction="batchmean")
    if "labels" in batch and batch["labels"].dim() == 1:
        return cross_entropy(logits, batch["labels"])
    return cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


def train(
    model: nn.Module, batches: list[dict[str, Tensor]], rate: float, epochs: int, teacher: nn.Module | None
) -> list[float]:
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses, order = [], random.Random(0)
    model.eval()  # no dropout: the examples are few and the model is known
    for _ in range(epochs):
        for batch in order.sample(batches, len(batches)):
            loss = loss_of(model, batch, teacher)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % 10 == 0:
                print(len(losses), steps, sum(losses[-10:]) / 10, flush=True)
    return losses


def own_head(model: nn.Module) -> nn.Module:
    """The classifier, or the head of a language model, whose weight is made its own where an embedding has it too."""
    if hasattr(model, "classifier"):
        return model.classifier
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return head


def features(model: nn.Module, head: nn.Module, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What the head reads and has to say, so that training it alone needs one pass of the rest."""
    found: list[dict[str, Tensor]] = []
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
            x = seen.pop().float()
            if "input_ids" in batch:
                found.append({"x": x[:, :-1].flatten(0, 1), "labels": batch["input_ids"][:, 1:].flatten()})
            else:
                found.append({"x": x, "labels": batch["labels"]})
    handle.remove()
    return found


def train_head(model: nn.Module, batches: list[dict[str, Tensor]], rate: float, epochs: int) -> list[float]:
    head = own_head(model)
    found = features(model, head, batches)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(found), pct_start=0.1)
    losses = []
    for _ in range(epochs):
        for one in found:
            loss = cross_entropy(head(one["x"]), one["labels"])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def new_head(model: nn.Module, classes: int) -> nn.Module:
    torch.manual_seed(0)
    model.classifier = nn.Linear(model.classifier.in_features, classes)
    nn.init.normal_(model.classifier.weight, std=0.01)
    nn.init.zeros_(model.classifier.bias)
    model.config.num_labels = classes
    return model


def turned(images: Batches) -> Batches:
    """Every image turned by 0 to 3 quarters, which its number among the images decides; its label says how many."""

    def collate(numbers: Sequence[int]) -> dict[str, Tensor]:
        quarters = [random.Random(number).randrange(4) for number in numbers]
        pixels = images.collate(numbers)["pixel_values"]
        pixels = torch.stack([x.rot90(k, (-2, -1)) for x, k in zip(pixels, quarters, strict=True)])
        return {"pixel_values": pixels, "labels": torch.tensor(quarters)}

    return replace(images, collate=collate, max_label=3, class_names=None)


def settings(args: argparse.Namespace, scratch: Path) -> tuple[str, DataConfig, DataConfig, DataConfig]:
    """Model, calibration data, data to train on, evaluation data."""
    source, calibration, evaluation = compare_methods.settings(args.name, args.models, args.data, scratch)
    if args.text:
        text = (args.data / args.text).read_text()
        cut = text.index("\n", len(text) * 9 // 10)
        for name, part in (("first.txt", text[:cut]), ("last.txt", text[cut:])):
            (scratch / name).write_text(part)
        calibration = calibration.replace(source=str(scratch / "first.txt"))
        evaluation = evaluation.replace(source=str(scratch / "last.txt"))
    trained = calibration.replace(num_samples=args.examples, batch_size=args.batch)
    if args.name in compare_methods.TEXTS:
        trained = trained.replace(sequence_length=args.length, seed=1)
    return source, calibration, trained, evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--values", nargs="+", default=["auto"])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--ways", nargs="+", default=["none", "head", "labels", "teacher"])
    parser.add_argument("--new-head", action="store_true")
    parser.add_argument("--turned", action="store_true")
    parser.add_argument("--text", help="another text for a language model, under the folder of data")
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--eval-examples", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--head-epochs", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--head-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    args.new_head |= args.turned
    facts = {
        "benchmark": f"training after compression, {args.name}", "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]), "environment": environment(torch.device("cpu")),
    }  # fmt: skip
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        source, *data = settings(args, Path(scratch))
        original = load_dense(source, dtype="float32", device=torch.device("cpu"))
        labelled = "evaluation" if model_kind(original) == "image" else "calibration"
        if args.eval_examples:
            data[2] = data[2].replace(num_samples=args.eval_examples)
        examples, trained, scored = compare_methods.load_examples(
            source, original, *zip(data, ("calibration", labelled, "evaluation"), strict=True)
        )
        if args.turned:
            trained, scored = turned(trained), turned(scored)
        batches = list(trained)
        run_all(args, original, examples, batches, scored, runs, facts)


def run_all(
    args: argparse.Namespace, original: nn.Module, examples: Batches, batches: list[dict[str, Tensor]], scored: Batches,
    runs: list[dict[str, Any]], facts: dict[str, Any],
) -> None:  # fmt: skip
    classes = 1 + max(int(batch["labels"].max()) for batch in batches) if args.new_head else 0

    def note(values: str, way: str, work: Callable[[], tuple[nn.Module, list[float]]]) -> None:
        if any((one["bits"], one["values"], one["way"]) == (args.bits, values, way) for one in runs):
            return
        started = time.perf_counter()
        model, losses = work()
        seconds = time.perf_counter() - started
        against = None if args.new_head else original
        found = asdict(evaluate(model, scored, against=against))
        runs.append({
            "values": values, "bits": args.bits, "way": way, "bytes": state_bytes(model), "seconds": seconds,
            "losses": losses[:: max(len(losses) // 20, 1)], "quality": found,
        })  # fmt: skip
        print(json.dumps(runs[-1])[:700], flush=True)
        args.out.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")

    def dense_head() -> tuple[nn.Module, list[float]]:
        model = copy.deepcopy(original)
        if args.new_head:
            new_head(model, classes)
        return model, train_head(model, batches, args.head_rate, args.head_epochs)

    if not args.new_head:
        note("original", "none", lambda: (original, []))
    note("original", "head", dense_head)
    for values in args.values:
        small = copy.deepcopy(original)
        fips.compress(small, examples, fips.CompressionConfig(bits=args.bits, values=values, effort=args.effort))
        for way in args.ways:
            note(
                values,
                way,
                lambda small=small, way=way: work(args, copy.deepcopy(small), original, batches, way, classes),
            )


def work(
    args: argparse.Namespace, model: nn.Module, original: nn.Module, batches: list[dict[str, Tensor]], way: str,
    classes: int,
) -> tuple[nn.Module, list[float]]:  # fmt: skip
    if way == "none":
        return model, []
    losses = []
    if args.new_head:
        new_head(model, classes)
    if way == "head" or args.new_head:
        losses = train_head(model, batches, args.head_rate, args.head_epochs)
    if way == "head":
        return model, losses
    for name, parameter in model.named_parameters():
        if name.partition(".")[0] not in HEADS and "embed" in name:
            parameter.requires_grad_(False)
    if way != "rest":
        fips.prepare_qat(model)
    losses += train(model, batches, args.rate, args.epochs, original if way == "teacher" else None)
    return (model if way == "rest" else fips.finish_qat(model)), losses


if __name__ == "__main__":
    main()
