"""Packed MLP layers beside torch's dense bfloat16 ones on a GPU, at the sizes of Llama-3.2-1B and Llama-3.1-8B.

    python benchmarks/gpu_layers.py --output benchmarks/results/gpu-layers.json

Every layer exists in many copies, visited in turn, so that weights come from memory and not from the cache. `graph_s`:
one call of every copy, replayed as a CUDA graph and timed by events, which is what the kernels take. `call_s`: the same
calls from Python by the clock, which is what a model waits for without graphs. Ways run in random order; medians of one
call, with quartiles of the graphs. `chosen` is the way that the policy `auto` takes. Weights and supports are random.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from generation import random_layer
from output import result_file
from torch import Tensor
from torch.nn.functional import linear

from fips.formats.patterns import BITMASK, FULL
from fips.layers.linear import FactoredLinear
from fips.record import environment

SHAPES = {"llama-1b": (2048, 8192), "llama-8b": (4096, 14336)}
KINDS = {
    "int4g64": (FULL, 1.0, "int4g64"),
    "tc4g64": (FULL, 1.0, "tc4g64"),
    "nl5g64": (FULL, 1.0, "nl5g64"),
    "int8": (FULL, 1.0, "int8"),
    "int4, half kept": (BITMASK, 0.5, "int4"),
}
TOKENS = (1, 4, 16, 64, 512)
WAYS = ("packed", "decode")
Layer = Callable[[Tensor], Tensor]


def make_layers(shape: tuple[int, int], kind: tuple[str, float, str], *, role: str, copies: int) -> list[Layer]:
    fmt, density, values = kind
    if fmt == FULL:
        return [whole_layer(shape, values, role=role, seed=seed) for seed in range(copies)]
    factor = torch.randn(shape, device="cuda")
    mask = torch.rand(shape, device="cuda") < density
    layer = FactoredLinear.from_factor(None, factor, mask, role=role, fmt=fmt, values=values, dtype=torch.bfloat16)
    return [copy.deepcopy(layer.cuda()) for _ in range(copies)]


def whole_layer(shape: tuple[int, int], values: str, *, role: str, seed: int) -> Layer:
    """A layer that leaves no entry out, of random codes."""
    rows, cols = shape[::-1] if role == "up" else shape
    generator = torch.Generator("cuda").manual_seed(seed)
    return random_layer(rows, cols, role=role, values=values, rotation=1, generator=generator)


def set_policy(layers: Sequence[Any], policy: str) -> None:
    for layer in layers:
        layer.runtime.policy = policy


def captured(layers: Sequence[Layer], x: Tensor) -> torch.cuda.CUDAGraph:
    for layer in layers:
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    return graph


def alternate(graphs: dict[str, torch.cuda.CUDAGraph], *, runs: int) -> dict[str, list[float]]:
    """Seconds of every replay."""
    order, events = random.Random(0), []
    for run in range(runs + 2):
        for name, graph in order.sample(list(graphs.items()), len(graphs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events += [(name, start, end)] if run > 1 else []
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for which, a, b in events if which == name] for name in graphs}


def call_seconds(layers: Sequence[Layer], x: Tensor, *, runs: int) -> float:
    """Median seconds of a call from Python, the device's part in it where that is longer."""
    taken = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for layer in layers:
            layer(x)
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) / len(layers))
    return statistics.median(taken)


@torch.inference_mode()
def measure(layers: list[Layer], dense: list[Layer], x: Tensor, *, runs: int) -> dict[str, Any]:
    graphs, calls = {"dense": captured(dense, x)}, {"dense": call_seconds(dense, x, runs=3)}
    for way in WAYS:
        set_policy(layers, way)
        graphs[way], calls[way] = captured(layers, x), call_seconds(layers, x, runs=3)
    taken = {name: [run / len(dense) for run in found] for name, found in alternate(graphs, runs=runs).items()}
    set_policy(layers, "auto")
    first: Any = layers[0]
    medians = {name: statistics.median(found) for name, found in taken.items()}
    return {
        "tokens": x.shape[0],
        "speedup": medians["dense"] / min(medians[way] for way in WAYS),
        "chosen": first.runtime.way(x, first.product()),
        "graph_s": medians,
        "graph_quartiles_s": {name: statistics.quantiles(found, n=4)[::2] for name, found in taken.items()},
        "call_s": calls,
        "stored_bytes": first.packed().nbytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("--megabytes", type=int, default=500, help="dense bfloat16 weights visited in turn")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    torch.manual_seed(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, Any]] = []
    record = {
        "benchmark": "packed and dense layers on a GPU",
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "environment": {**environment(torch.device("cuda")), "triton": triton.__version__, "cuda": torch.version.cuda},
        "results": rows,
    }
    for model, shape in SHAPES.items():
        copies = max(2, args.megabytes * 10**6 // (shape[0] * shape[1] * 2))
        for role in ("up", "down"):
            size = shape[::-1] if role == "up" else shape
            dense: list[Layer] = [
                partial(linear, weight=torch.randn(size, device="cuda", dtype=torch.bfloat16)) for _ in range(copies)
            ]
            for name in args.kinds:
                layers = make_layers(shape, KINDS[name], role=role, copies=copies)
                for tokens in TOKENS:
                    x = torch.randn(tokens, size[1], device="cuda", dtype=torch.bfloat16)
                    row = measure(layers, dense, x, runs=args.runs)
                    rows.append({"model": model, "role": role, "kind": name, "copies": copies, **row})
                    times = " ".join(f"{way} {1e6 * seconds:.1f}" for way, seconds in row["graph_s"].items())
                    calls = " ".join(f"{1e6 * seconds:.0f}" for seconds in row["call_s"].values())
                    print(model, role, name, tokens, "us:", times, "| calls", calls, "|", row["chosen"], flush=True)
                    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
