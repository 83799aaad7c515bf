"""How the time of the default solver grows with the width: one layer, its structures tried and the best solved.

    python benchmarks/layer_cost.py --output benchmarks/results/layer-cost.json

Of each width d a matrix that reads d and one that reads 3.5 d inputs, random, as `method: fips` does at 4.25 bits, in
turned columns: the moment of half of the data is factorised for the trials, that of all for the solution, which is then
made better in sweeps. Weights are float32. ``exponent`` is the slope of the line through the logarithms of width and
seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from datetime import date
from typing import Any

import torch
from output import result_file

import fips
from fips.formats.rotation import widest_rotation
from fips.methods.fips.settings import SWEEPS, FipsConfig
from fips.methods.fips.stages import NEAR_BITS
from fips.record import environment, peak_memory_bytes
from fips.solve.oneshot import OneShot
from fips.solve.structures import Choice, Pricing

RATIO, BITS = 3.5, 4.25
WIDTHS = (512, 1024, 2048, 4096)
PRICING = Pricing(value=2.0, basis_entry=2.0, row_scale=2.0)


def moment(size: int, generator: torch.Generator) -> torch.Tensor:
    """Positive definite, with a few strong directions."""
    strong = torch.randn(size, min(size, 256), generator=generator)
    found = strong @ strong.T
    found.diagonal().add_(0.1 * size)
    return found


def measure(width: int, inputs: int) -> dict[str, float]:
    """Seconds of one layer in this process."""
    generator = torch.Generator().manual_seed(0)
    outputs = width if inputs > width else int(RATIO * width)
    weight_DF = torch.randn(width, int(RATIO * width), generator=generator)
    moment_II, held_II = moment(inputs, generator), moment(inputs, generator)
    axis: Any = 1 if inputs > width else 0
    config = fips.CompressionConfig(bits=BITS, layers="mlp")
    assert isinstance(config, FipsConfig)
    near = [values for values in config.value_choices if abs((values.bits or 0) - BITS) <= NEAR_BITS]
    choices = [Choice(False, "unstructured", values.name) for values in near]
    size = BITS / 8 * weight_DF.numel()
    shared: dict[str, Any] = {"rotation": widest_rotation(inputs), "sweeps": SWEEPS}
    power_O = torch.ones(outputs)
    seconds = {}
    begin = time.perf_counter()
    trial = OneShot(weight_DF, moment_II, power_O, axis, PRICING, torch.bfloat16, held_II, **shared)
    points = trial.trials(choices, size)
    del trial, held_II
    seconds["trials"] = time.perf_counter() - begin
    best = min((point for point in points if point.bytes <= size), key=lambda point: point.loss)
    begin = time.perf_counter()
    OneShot(weight_DF, moment_II, power_O, axis, PRICING, torch.bfloat16, **shared).solve(best.choice, size)
    seconds["solution"] = time.perf_counter() - begin
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    return {**rounded, "peak_bytes": peak_memory_bytes(torch.device("cpu"))}


def exponent(widths: list[int], seconds: list[float]) -> float:
    x, y = [math.log(width) for width in widths], [math.log(value) for value in seconds]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - middle_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--one", type=int, nargs=2, metavar=("WIDTH", "INPUTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        sys.stdout.write(json.dumps(measure(*args.one)) + "\n")
        return
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "benchmark": "time of one layer by width, default solver",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(torch.device("cpu")),
        "layers": rows,
    }
    for width in args.widths:
        for role, inputs in (("up", width), ("down", int(RATIO * width))):
            command = [sys.executable, __file__, "--output", str(args.output), "--one", str(width), str(inputs)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"width": width, "role": role, "inputs": inputs, **json.loads(done.stdout)})
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    for role in ("up", "down"):
        own = [row for row in rows if row["role"] == role]
        seconds = [row["trials"] + row["solution"] for row in own]
        record[f"exponent_{role}"] = round(exponent([row["width"] for row in own], seconds), 2)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
