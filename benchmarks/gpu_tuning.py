"""Other constants of the Triton kernels, one or two changed at a time: microseconds of a product, by CUDA graphs.

    python benchmarks/gpu_tuning.py --output benchmarks/results/gpu-tuning.json

The matrices are those of Llama-3.2-1B in `gpu_layers.py`, which times the kernels as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_layers import KINDS, SHAPES, alternate, captured, make_layers

from fips.formats.packed import to_dense
from fips.kernels import triton_kernel
from fips.record import environment

CHANGES: tuple[dict[str, int], ...] = (
    {}, {"UNROLL": 2}, {"UNROLL": 8}, {"UNROLL": 32}, {"STAGES": 1}, {"STAGES": 2}, {"STAGES": 3}, {"STAGES": 5},
    {"TILE_COLUMNS": 256}, {"TILE_COLUMNS": 512}, {"ROWS": 32}, {"ROWS": 128}, {"ROWS": 128, "WARPS": 8},
    {"WARPS": 2}, {"WARPS": 8}, {"PROGRAMS": 1}, {"PROGRAMS": 2}, {"PROGRAMS": 8, "MOST_SPLITS": 16},
    {"MOST_TOKENS": 128},
)  # fmt: skip
COPIES, RUNS = 20, 9


@torch.inference_mode()
def measure(kind: str, role: str, tokens: int, change: dict[str, int]) -> dict[str, Any]:
    kept = {name: getattr(triton_kernel, name) for name in change}
    try:
        for name, value in change.items():
            setattr(triton_kernel, name, value)
        torch.manual_seed(0)
        layers: list[Any] = make_layers(SHAPES["llama-1b"], KINDS[kind], role=role, copies=COPIES)
        matrices = [triton_kernel.prepare(layer.packed()) for layer in layers]
        products = [partial(triton_kernel.multiply, prepared=matrix) for matrix in matrices]
        x = torch.randn(tokens, layers[0].in_features, device="cuda", dtype=torch.bfloat16)
        wanted = x.double() @ to_dense(layers[0].packed()).double().T
        error = ((products[0](x).double() - wanted).norm() / wanted.norm()).item()
        taken = alternate({"packed": captured(products, x)}, runs=RUNS)["packed"]
        found = {"us": round(1e6 * statistics.median(taken) / COPIES, 2), "err": error, "splits": matrices[0].splits}
    except Exception as problem:  # a program too large for the device says so when it is launched
        found = {"error": repr(problem)[:200]}
    finally:
        for name, value in kept.items():
            setattr(triton_kernel, name, value)
    return {"kind": kind, "role": role, "tokens": tokens, "conf": change, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    record = {
        "benchmark": "constants of the Triton kernels",
        "command": " ".join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cuda")), "triton": triton.__version__},
        "results": rows,
    }
    for kind in KINDS:
        for role in ("up", "down"):
            for tokens in args.tokens:
                rows += [measure(kind, role, tokens, change) for change in CHANGES]
                print(
                    kind, role, tokens, *(f"{row['conf']} {row.get('us')}" for row in rows[-len(CHANGES) :]), sep="; "
                )
                args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
