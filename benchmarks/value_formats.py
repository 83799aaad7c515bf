"""One matrix in every value format beside the dense product in bfloat16: time of a call, alternating, medians.

    python benchmarks/value_formats.py --threads 1 --out benchmarks/results/value-formats.json

The matrices have the shapes of an MLP of Llama-3.2-1B and random codes, all entries kept, columns turned in blocks of
64. Tokens are bfloat16 and rounded to 8 bits beside packed matrices, as they are in a model. Every instruction set
that the machine has is measured, `avx2` and the best by default. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from output import result_file

from fips.formats.packed import Packed
from fips.formats.values import values_named
from fips.kernels import cpu
from fips.record import environment

FORMATS = ("nl2", "tc2", "nl3", "tc3", "nl4", "tc4", "nl4g64", "tc4g64", "int4")
SHAPES = ((8192, 2048), (2048, 8192))
TOKENS = (1, 4, 32)


def random_matrix(name: str, rows: int, cols: int) -> cpu.CpuMatrix:
    values, generator = values_named(name), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (values.length(rows * cols),), generator=generator).to(torch.uint8)
    _, groups = values.num_scales_of(rows, cols)
    group_scales = torch.randint(1, 256, (groups,), generator=generator).to(torch.uint8) if groups else None
    return cpu.prepare(
        Packed(codes, torch.empty(0, dtype=torch.uint8), torch.ones(rows), (rows, cols), "full", value_format=name,
               count=rows * cols, rotation=64, group_scales=group_scales)
    )  # fmt: skip


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def measure(isa: str, rows: int, cols: int, rounds: int) -> list[dict[str, Any]]:
    matrices = {name: random_matrix(name, rows, cols) for name in FORMATS}
    dense = torch.randn(rows, cols).bfloat16()
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, cols).bfloat16()
        seconds: dict[str, list[float]] = {name: [] for name in (*FORMATS, "bfloat16")}
        for _ in range(rounds):
            for name, matrix in matrices.items():
                seconds[name].append(timed(partial(cpu.multiply, isa=isa, activation_bits=8), x, matrix))
            seconds["bfloat16"].append(timed(torch.nn.functional.linear, x, dense))
        milliseconds = {name: 1000 * median(times) for name, times in seconds.items()}
        found.append({"isa": isa, "rows": rows, "cols": cols, "tokens": tokens, "milliseconds": milliseconds})
        print(isa, rows, cols, tokens, {name: round(value, 2) for name, value in milliseconds.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isa", nargs="*", help="instruction sets; default: avx2 and the best of the machine")
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.isa or list(dict.fromkeys(("avx2", cpu.isa_names()[-1])))
    runs = [run for isa in names for shape in SHAPES for run in measure(isa, *shape, args.rounds)]
    fields = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(torch.device("cpu")),
        "threads": args.threads,
        "runs": runs,
    }
    args.out.write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    main()
