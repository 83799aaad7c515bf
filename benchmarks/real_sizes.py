"""Time and memory of compressions at the shapes of real models, weights and data random.

    python benchmarks/real_sizes.py --recipe paper-llama-3.2-1b --blocks 2 --windows 8 --tokens 2048 --batch-size 1 \
        --settings '{"bits": 4.25, "effort": "fast"}' '{"bits": 4.25}' --output benchmarks/results/real-sizes-1b.json

Every setting runs in a process of its own. On a CPU the weights come from a checkpoint on disk, as a user's do. Shapes
decide the time, numbers do not; quality is not looked at. ``whole_model_s`` says what all blocks and ``--full-windows``
windows would take: measuring grows with both, solving with the blocks, and training with blocks and steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from output import result_file
from random_checkpoint import write_checkpoint
from transformers import PreTrainedModel

import fips
from fips.methods.workbench import ProgressEvent
from fips.models.transformers import build_empty, config_from_fields, load_dense
from fips.recipes import load_recipe
from fips.record import peak_memory_bytes

STAGES = {
    "measure": "measuring",
    "try": "solving",
    "solve": "solving",
    "allot": "allotting",
    "record": "measuring",
    "reconstruct": "training",
}


def architecture(args: argparse.Namespace) -> tuple[Any, int]:
    """The configuration with the blocks asked for, and how many the model has."""
    fields = dict(load_recipe(args.recipe).architecture or {})
    if "depths" in fields:  # Swin: stages of different widths, of which none stands for all
        return config_from_fields(fields), sum(fields["depths"])
    whole = int(fields["num_hidden_layers"])
    fields["num_hidden_layers"] = args.blocks or whole
    return config_from_fields(fields), whole


def blocks_of(config: Any) -> int:
    return sum(config.depths) if hasattr(config, "depths") else int(config.num_hidden_layers)


def random_model(config: Any, device: torch.device) -> PreTrainedModel:
    model = build_empty(config).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    model.tie_weights()
    return model


def batches(config: Any, args: argparse.Namespace) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "vocab_size"):
        ids = torch.randint(0, config.vocab_size, (args.windows, args.tokens), generator=generator)
        return [{"input_ids": part} for part in ids.split(args.batch_size)]
    images = torch.randn(args.windows, 3, config.image_size, config.image_size, generator=generator)
    return [{"pixel_values": part} for part in images.split(args.batch_size)]


def measure(args: argparse.Namespace) -> None:
    """One compression, in this process; prints a line of JSON."""
    config, whole = architecture(args)
    device = torch.device(args.device)
    if args.source is None:
        model = random_model(config, device)
    else:
        model = load_dense(str(args.source), dtype="auto", device=device)
    spent: dict[str, float] = defaultdict(float)
    last = time.perf_counter()

    def progress(event: ProgressEvent) -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        spent[STAGES.get(event.stage, event.stage)] += now - last
        last = now

    loaded = peak_memory_bytes(torch.device("cpu"))
    asked = json.loads(args.one)
    metric = {} if asked.get("method") == "fips-paper" else {"metric": {"memory": args.memory}}
    settings = {"layers": "mlp", **metric, "activation_memory": args.memory // 2, **asked}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = last = time.perf_counter()
    report = fips.compress(
        model, batches(config, args), fips.CompressionConfig(**settings), progress=progress, work=args.work
    )
    seconds = time.perf_counter() - started
    layers = report.plan["layers"]
    share = args.full_windows / args.windows
    rest = seconds - spent["measuring"] - spent["solving"] - spent["training"]
    steps = asked.get("reconstruction", {}).get("steps", 0)
    training = spent["training"] * args.full_steps / steps if steps else 0.0
    scaled = (whole / blocks_of(config)) * (spent["measuring"] * share + spent["solving"] + training) + rest
    result = {
        "settings": json.loads(args.one),
        "seconds": round(seconds, 1),
        "stages_s": {name: round(value, 1) for name, value in spent.items()},
        "whole_model_s": round(scaled, 1),
        "bits": 8 * layers["factored"]["bytes"] / layers["dense"]["parameters"],
        "model_bytes_after": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_bytes": peak_memory_bytes(torch.device("cpu")),
        "peak_bytes_after_loading": loaded,
    }
    if device.type == "cuda":
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    sys.stdout.write(json.dumps(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="whose architecture it is")
    parser.add_argument("--blocks", type=int, help="blocks of the model; default: all")
    parser.add_argument("--windows", type=int, default=8, help="texts or images")
    parser.add_argument("--full-windows", type=int, default=128, help="of the run that is extrapolated to")
    parser.add_argument("--full-steps", type=int, default=600, help="training steps of that run, where there are any")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--memory", type=int, default=2 << 30, help="bytes of moments")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--settings", nargs="+", required=True, help="JSON objects")
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        measure(args)
        return
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    record: dict[str, Any] = {
        "benchmark": "time and memory at real sizes",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe": args.recipe,
        "blocks": blocks_of(architecture(args)[0]),
        "examples": {"windows": args.windows, "tokens": args.tokens, "full_windows": args.full_windows},
        "runs": [],
    }
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        more: list[str] = []
        if device.type == "cpu":
            write_checkpoint(architecture(args)[0], Path(scratch) / "model")
            more = ["--source", str(Path(scratch) / "model")]
        for number, setting in enumerate(args.settings):
            work = ["--work", str(Path(scratch) / f"work-{number}")]
            command = [sys.executable, *sys.argv, "--one", setting, *more, *work]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            record["runs"].append(json.loads(done.stdout.splitlines()[-1]))
            sys.stdout.write(json.dumps(record["runs"][-1]) + "\n")
            args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
