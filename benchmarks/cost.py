"""How the solver's time and memory grow with the width: synthetic layers, p = 3.5 d, float32, this machine.

    python benchmarks/cost.py --output benchmarks/results/solver-cost.json

One gated group is 12 matrices (4 blocks of gate, up, down). Of each width one `up` and one `down` layer are searched
and solved as `method: fips` does at 0.3 of the bytes, each in a process of its own; the times of a group are 8 and 4
times theirs, and that of the first trial of a shared basis on some columns of all 12. Parts that are not run (--limit,
--sharing-limit) have the measured seconds per operation of the largest width that was, times their operations.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from typing import Any

import torch
from output import result_file

from fips.record import environment, peak_memory_bytes
from fips.solve.allocate import allocate
from fips.solve.problems import LayerProblem
from fips.solve.search import COLUMNS, SAMPLE, GroupSearch
from fips.solve.structures import Choice, Pricing

RATIO, BLOCKS, ITERATIONS, REFIT, BYTES = 3.5, 4, 40, 30, 0.3
WIDTHS = (512, 1024, 2048, 4096)
MODELS = {"Llama-3.2-1B": (2048, 8192, 16), "Llama-3.1-8B": (4096, 14336, 32)}
"""Width, hidden width and blocks."""
PATTERNS = ("unstructured", "2:16", "4:16", "8:16")
CHOICES = [Choice(False, pattern, f"int{bits}") for pattern in PATTERNS for bits in (3, 4, 5, 6, 8)]
PRICING = Pricing(value=2.0, basis_entry=2.0, row_scale=2.0)
PRUNINGS = 4
"""Trials of a layer that prune, at most: two widths of values at two sizes below all kept."""
PARTS = ("up", "down", "sharing")


def metric(size: int, generator: torch.Generator) -> torch.Tensor:
    samples = torch.randn(2 * size, size, generator=generator) * torch.logspace(0, -2, size)
    return samples.T @ samples / (2 * size)


def problem(width: int, hidden: int, seed: int) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, hidden, generator=generator)
    return LayerProblem(weight, metric(width, generator), metric(hidden, generator))


def search_of(problems: list[LayerProblem], axes: list[Any]) -> GroupSearch:
    return GroupSearch(problems, axes, PRICING, torch.bfloat16)


def sampled_hidden(width: int, hidden: int) -> int:
    """Columns of every matrix that a shared basis is tried on."""
    return min(hidden, max(SAMPLE, math.ceil(COLUMNS * width / (3 * BLOCKS))))


def measure(part: str, width: int) -> dict[str, Any]:
    """Seconds and bytes of one layer, or of the trial of a shared basis, in this process."""
    hidden = int(RATIO * width)
    if part == "sharing":
        axes = [0, 0, 1] * BLOCKS
        hidden = sampled_hidden(width, hidden)
        search = search_of([problem(width, hidden, seed) for seed in range(len(axes))], axes)
        before, started = peak(), time.perf_counter()
        search.first_ratio(Choice(True, "unstructured", "int5"), BYTES * 2 * width * search.hidden)
        return {"seconds": time.perf_counter() - started, "peak_bytes": peak(), "solver_bytes": peak() - before}
    search = search_of([problem(width, hidden, 0)], [0 if part == "up" else 1])
    size = BYTES * 2 * width * hidden
    before, started = peak(), time.perf_counter()
    points = search.trials(CHOICES, size)
    search.forget()
    tried = time.perf_counter()
    ((choice, bytes_),) = allocate([points], size)
    search.solve(choice, bytes_)
    done = time.perf_counter()
    return {
        "seconds": done - started,
        "trials_s": tried - started,
        "final_s": done - tried,
        "trials": len(points),
        "peak_bytes": peak(),
        "solver_bytes": peak() - before,
    }


def peak() -> int:
    return peak_memory_bytes(torch.device("cpu"))


def pruning(width: int, hidden: int) -> float:
    """Floating-point operations of one pruning and its refit."""
    return 2.0 * width * hidden * (width + hidden) * (2 * ITERATIONS + REFIT)


def operations(part: str, width: int, hidden: int) -> float:
    """Of all trials of a layer, its final solve and its decompositions; or of the trial of a shared basis."""
    if part == "sharing":
        less = sampled_hidden(width, hidden)
        return 3 * BLOCKS * (3 * pruning(width, less) + 9.0 * (less**3 + width**3))
    sample = (width, min(SAMPLE, hidden)) if part == "up" else (min(SAMPLE, width), hidden)
    decompose = 9.0 * (hidden**3 + width**3 + sum(min(side, SAMPLE) ** 3 for side in sample))
    rounding = (PRUNINGS + 3) * (max(sample) ** 3 + 2.0 * sample[0] * sample[1] * max(sample))
    return decompose + PRUNINGS * pruning(*sample) + pruning(width, hidden) + rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("--limit", type=int, default=4096)
    parser.add_argument("--sharing-limit", type=int, default=2048)
    parser.add_argument("--one", nargs=2, metavar=("PART", "WIDTH"), help="measure one part and print it")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    rows: list[dict[str, Any]] = []
    for width in WIDTHS:
        hidden = int(RATIO * width)
        row: dict[str, Any] = {"width": width, "hidden": hidden}
        for part in PARTS:
            if width <= (args.sharing_limit if part == "sharing" else args.limit):
                command = [sys.executable, __file__, "--output", str(args.output), "--one", part, str(width)]
                row[part] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            else:
                row[part] = {"seconds": extrapolated(rows, part, width, hidden), "extrapolated": True}
        row["group_s"] = BLOCKS * (2 * row["up"]["seconds"] + row["down"]["seconds"]) + row["sharing"]["seconds"]
        rows.append(row)
        print(row, flush=True)
    models = {}
    for name, (width, hidden, blocks) in MODELS.items():
        counts = {"up": 2 * blocks, "down": blocks, "sharing": blocks / BLOCKS}
        models[name] = {
            "operations": sum(count * operations(part, width, hidden) for part, count in counts.items()),
            "seconds_on_this_cpu_extrapolated": sum(
                count * extrapolated(rows, part, width, hidden) for part, count in counts.items()
            ),
        }
    result = {
        "benchmark": "cost of the solver",
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(torch.device("cpu")),
        "rows": rows,
        "models": models,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def extrapolated(rows: list[dict[str, Any]], part: str, width: int, hidden: int) -> float:
    """Seconds of a part at another size, from the nearest size at or below it that was run, else the largest."""
    known = [row for row in rows if not row[part].get("extrapolated")]
    last = max((row for row in known if row["width"] <= width), key=lambda row: float(row["width"]))
    share = operations(part, width, hidden) / operations(part, last["width"], last["hidden"])
    return float(last[part]["seconds"] * share)


if __name__ == "__main__":
    main()
