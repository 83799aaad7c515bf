"""One or a few tokens through layers that stay dense in bfloat16: the kernels beside torch, in turn.

    python benchmarks/dense_layers.py --out benchmarks/results/dense-layers.json

Shapes are those of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B, heads included. ``DenseLinear`` takes the kernels for
as many tokens as its ``MOST``; here they are taken for all. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from output import result_file
from torch import Tensor
from torch.nn.functional import linear

from fips.kernels.basis import BasisRuntime
from fips.record import environment

SHAPES = [(576, 576), (576, 1536), (49152, 576), (2048, 2048), (128256, 2048), (4096, 4096), (128256, 4096)]
TOKENS = [1, 2, 4]
ROUNDS = 7


def seconds(work: Callable[[], Tensor], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


@torch.inference_mode()
def measure(rows: int, cols: int, tokens: int) -> dict[str, float]:
    weight = torch.randn(rows, cols).to(torch.bfloat16)
    x, runtime = torch.randn(1, tokens, cols).to(torch.bfloat16), BasisRuntime()
    times = max(3, 200_000_000 // (rows * cols))
    pairs = [
        (
            seconds(lambda: linear(x, weight), times),
            seconds(lambda: runtime.multiply(x, weight, expand=True), times),
        )
        for _ in range(ROUNDS)
    ]
    return {
        "rows": rows, "cols": cols, "tokens": tokens, "torch_s": median(pair[0] for pair in pairs),
        "kernels_s": median(pair[1] for pair in pairs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    results = [measure(rows, cols, tokens) for rows, cols in SHAPES for tokens in TOKENS]
    record = {
        "benchmark": "layers that stay dense", "command": f"python benchmarks/dense_layers.py --out {args.out}",
        "environment": environment(torch.device("cpu")), "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
