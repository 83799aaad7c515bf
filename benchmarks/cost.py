"""How the solver's time and memory grow with the width: synthetic layers, p = 3.5 d, float32, this machine.

    python benchmarks/cost.py --output benchmarks/results/solver-cost.json

One gated group is 12 matrices (4 blocks of gate, up, down). Per matrix: the decompositions of both metrics, once, one
pruning of 40 iterations with its refit and one rounding along the longer side; the search repeats the last two for
every structure and size it solves. Widths beyond --limit are not run: their times are the measured seconds per
operation of the largest width that was, times their operations.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fips.report.record import environment
from fips.solve.alternate import prune
from fips.solve.problems import LayerProblem
from fips.solve.rounding import round_factor
from fips.solve.supports import ByteBudget

RATIO, MATRICES, ITERATIONS, REFIT = 3.5, 12, 40, 30
WIDTHS = (512, 1024, 2048, 4096)
MODELS = {"Llama-3.2-1B": (2048, 8192, 48), "Llama-3.1-8B": (4096, 14336, 96)}
PRUNINGS, ROUNDINGS = 5, 7
"""Most that a layer needs: two widths at two sizes each and the final one; some factors kept whole are rounded too."""
TIMES = (1, PRUNINGS, ROUNDINGS)
PARTS = ("decompose_s", "prune_s", "round_s")


def metric(size: int, generator: torch.Generator) -> torch.Tensor:
    samples = torch.randn(2 * size, size, generator=generator) * torch.logspace(0, -2, size)
    return samples.T @ samples / (2 * size)


def measure(width: int) -> dict[str, Any]:
    """Seconds of one matrix in a process of its own."""
    generator = torch.Generator().manual_seed(0)
    columns = int(RATIO * width)
    weight = torch.randn(width, columns, generator=generator)
    left, right = metric(width, generator), metric(columns, generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    problem = LayerProblem(weight, left, right)
    prepared = time.perf_counter()
    found = prune([problem], ByteBudget(total=0.5 * weight.numel(), value_bytes=5 / 8))
    pruned = time.perf_counter()
    round_factor(problem, found.factors_RF[0], found.masks_RF[0], axis=1, bits=5, dtype=torch.bfloat16)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "width": width,
        "columns": columns,
        "decompose_s": prepared - started,
        "prune_s": pruned - prepared,
        "round_s": done - pruned,
        "peak_bytes": 1024 * peak,
        "peak_bytes_of_the_solver": 1024 * (peak - before),
    }


def operations(width: int, columns: int) -> tuple[float, float, float]:
    """Floating-point operations of the decompositions, of one pruning and of one rounding of a matrix."""
    decompose = 9.0 * (columns**3 + width**3)
    product = 2.0 * width * columns * (width + columns)
    return decompose, product * (2 * ITERATIONS + REFIT), columns**3 + 2.0 * width * columns**2


def seconds(row: dict[str, Any]) -> float:
    """Of one matrix in the search and the final solve."""
    return sum(float(row[name]) * times for name, times in zip(PARTS, TIMES, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1024)
    parser.add_argument("--one", type=int, help="measure this width and print it")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows: list[dict[str, Any]] = []
    for width in WIDTHS:
        if width <= args.limit:
            command = [sys.executable, __file__, "--output", str(args.output), "--one", str(width)]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            row["measured"] = True
        else:
            row = extrapolate(rows, width, int(RATIO * width))
        row["group_s"] = MATRICES * seconds(row)
        rows.append(row)
        print(row, flush=True)
    models = {
        name: sum(
            count * seconds(part) for part in [extrapolate([row for row in rows if row["measured"]], width, columns)]
        )
        for name, (width, columns, count) in MODELS.items()
    }
    flops = {
        name: count * sum(part * times for part, times in zip(operations(width, columns), TIMES, strict=True))
        for name, (width, columns, count) in MODELS.items()
    }
    result = {
        "benchmark": "cost of the solver",
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(torch.device("cpu")),
        "rows": rows,
        "whole_model_seconds_on_this_cpu_extrapolated": models,
        "whole_model_operations": flops,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def extrapolate(rows: list[dict[str, Any]], width: int, columns: int) -> dict[str, Any]:
    last = [row for row in rows if row["measured"]][-1]
    known, wanted = operations(last["width"], last["columns"]), operations(width, columns)
    return {
        "width": width,
        "columns": columns,
        **{name: last[name] * more / less for name, more, less in zip(PARTS, wanted, known, strict=True)},
        "measured": False,
    }


if __name__ == "__main__":
    main()
