"""Other constants of the Triton kernels for whole matrices: microseconds of a product, by CUDA graphs.

    python benchmarks/gpu_tuning.py --output benchmarks/results/gpu-tuning.json

Matrices of the sizes of Llama-3.2-1B, and one of Llama-3.1-8B, each in many copies that are visited in turn, so that
their codes come from memory. `gpu_layers.py` times the kernels as they are. Codes are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from typing import Any

import torch
import triton
from gpu_layers import alternate, captured, whole_layer
from output import result_file

from fips.kernels import triton_kernel, triton_words
from fips.record import environment

SHAPES = ((8192, 2048), (2048, 8192), (2048, 2048), (512, 2048), (14336, 4096))
VALUES = ("int4g64", "tc4g64", "nl5g64", "tc3g64", "int8")
FEW = [{"ROWS": rows, "WARPS": warps} for rows, warps in ((2, 4), (4, 4), (8, 4), (2, 8), (4, 2))]
MANY = [
    *(
        {"TILE_ROWS": rows, "TILE_EIGHTS": eights, "TILE_WARPS": warps}
        for rows, eights, warps in ((64, 16, 4), (64, 32, 4), (64, 16, 8), (64, 32, 8), (128, 16, 8), (64, 8, 4))
    ),
    *({"PROGRAMS": programs, "MOST_SPLITS": splits} for programs, splits in ((2, 8), (4, 8), (8, 16))),
]
FEW_TOKENS, MANY_TOKENS, RUNS = (1, 2, 4), (4, 16, 32, 64), 7


@torch.inference_mode()
def measure(shape: tuple[int, int], values: str, tokens: int, change: dict[str, int], copies: int) -> dict[str, Any]:
    few = "ROWS" in change
    wanted = change | dict.fromkeys(("FEW_TOKENS", "FEW_TOKENS_OF_LARGE"), 8 if few else 0)
    kept = {name: getattr(triton_words, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(triton_words, name, value)
        rows, cols = shape
        layers: list[Any] = [whole_layer((cols, rows), values, role="up", seed=seed) for seed in range(copies)]
        matrices = [triton_kernel.prepare(layer.packed()) for layer in layers]
        products = [partial(triton_kernel.multiply, prepared=matrix) for matrix in matrices]
        x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
        taken = alternate({"packed": captured(products, x)}, runs=RUNS)["packed"]
        found: dict[str, Any] = {"us": round(1e6 * statistics.median(taken) / copies, 2)}
    except Exception as problem:  # a program too large for the device says so when it is launched
        found = {"error": repr(problem)[:200]}
    finally:
        for name, value in kept.items():
            setattr(triton_words, name, value)
    return {"rows": shape[0], "columns": shape[1], "values": values, "tokens": tokens, "conf": change, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("--values", nargs="+", default=list(VALUES))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    record = {
        "benchmark": "constants of the Triton kernels",
        "command": " ".join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cuda")), "triton": triton.__version__},
        "results": rows,
    }
    for shape in SHAPES:
        copies = max(8, min(64, 400_000_000 // (shape[0] * shape[1])))
        for values in args.values:
            cases = [(tokens, change) for tokens in FEW_TOKENS for change in FEW]
            cases += [(tokens, change) for tokens in MANY_TOKENS for change in MANY]
            rows += [measure(shape, values, tokens, change, copies) for tokens, change in cases]
            print(shape, values, *(f"{row['tokens']} {row['conf']} {row.get('us')};" for row in rows[-len(cases) :]))
            args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
