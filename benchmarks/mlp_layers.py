"""Packed MLP layers beside torch's dense ones, in float32 and bfloat16: one shape per run, cold weights.

    python benchmarks/mlp_layers.py deit --output benchmarks/results/mlp-layers-deit.json

Every layer kind exists in many copies, visited in turn, so that weights come from memory as they do in a model; 12
layers share a basis. Dense and packed layers run alternately; medians and quartiles are kept. Weights and supports are
random: speed depends on them only through the number of kept entries. Stored bytes are those of the file, relative to
the dense bfloat16 matrix. Limits: bytes over the bandwidth of reading 1 GiB; flops (of basis and factor as dense
matrices) over the rate of torch's 4096^3 bfloat16 product.

Without AVX-512 torch's bfloat16 products are so slow that nobody wants them; with `--float32-only` all tokens are
float32. As on a machine with AVX2 and no more:

    FIPS_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python ...
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

import torch
from output import result_file
from torch import Tensor
from torch.nn.functional import linear

from fips.formats.patterns import BITMASK, FULL, pattern_named
from fips.kernels import cpu
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.record import environment

SHAPES = {"deit": (768, 3072, (1, 16, 197)), "llama": (2048, 8192, (1, 16, 512))}
# name: rank over width (None: no basis), format, density, values
Kind = tuple[float | None, str, float, str]
KINDS: dict[str, dict[str, Kind]] = {
    "0.25-0.30": {
        "int4, all kept": (None, FULL, 1.0, "int4"),
        "pruned, int6": (None, BITMASK, 0.6, "int6"),
        "pruned, int8": (None, BITMASK, 0.44, "int8"),
        "pruned, bf16": (None, BITMASK, 0.22, "float"),
        "pruned 4:16, bf16": (None, "4:16", 0.25, "float"),
        "basis r=0.47d, bf16": (0.47, BITMASK, 0.5, "float"),
        "basis r=0.47d, int8 all kept": (0.47, FULL, 1.0, "int8"),
        "basis r=0.33d, bf16": (0.33, BITMASK, 0.7, "float"),
    },
    "0.50-0.55": {
        "int8, all kept": (None, FULL, 1.0, "int8"),
        "pruned, bf16": (None, BITMASK, 0.47, "float"),
        "pruned, int8": (None, BITMASK, 0.9, "int8"),
        "basis r=0.75d, bf16": (0.75, BITMASK, 0.63, "float"),
        "basis r=0.94d, int8 all kept": (0.94, FULL, 1.0, "int8"),
    },
}
GROUP = 12
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def make_layers(width: int, hidden: int, kind: Kind, *, role: str, copies: int) -> list[FactoredLinear]:
    ratio, fmt, density, values = kind
    rank = width if ratio is None else round(ratio * width / 64) * 64
    factor = torch.randn(rank, hidden)
    mask = _mask(factor if role == "down" else factor.T, fmt, density)
    mask = mask if role == "down" else mask.T
    layers: list[FactoredLinear] = []
    basis: SharedBasis | None = None
    first: FactoredLinear | None = None
    for index in range(copies):
        if ratio is not None and index % GROUP == 0:
            basis = SharedBasis(width, rank)
            basis.weight.data = torch.randn(width, rank).to(torch.bfloat16)
        if first is None:
            first = layer = FactoredLinear.from_factor(
                basis, factor, mask, role=role, fmt=fmt, dtype=torch.bfloat16, values=values
            )
        else:
            layer = FactoredLinear(
                basis, role=role, hidden=hidden, kept=first.kept, fmt=fmt, dtype=torch.bfloat16,
                width=width if basis is None else None, values=first.kind,
            )  # fmt: skip
            layer.load_state_dict(first.state_dict())
        layer.runtime.policy = "packed"
        layers.append(layer)
    return layers


def _mask(matrix: Tensor, fmt: str, density: float) -> Tensor:
    pattern = pattern_named(fmt)
    if pattern.group_kept is not None and fmt != FULL:
        order = torch.rand(matrix.numel() // pattern.group, pattern.group).argsort(1)
        return (order < pattern.group_kept).view(matrix.shape)
    return torch.ones_like(matrix, dtype=torch.bool) if fmt == FULL else torch.rand(matrix.shape) < density


def cycle(layers: Sequence[Callable[..., Tensor]], x: Tensor) -> Callable[[int], Tensor]:
    return lambda index: layers[index % len(layers)](x)


def rounding(layers: Sequence[FactoredLinear]) -> list[FactoredLinear]:
    """Copies that are allowed to round their inputs to 8 bits."""
    copies = copy.deepcopy(layers)
    for layer in copies:
        layer.runtime.activation_bits = 8
    return list(copies)


def stored_bytes(layer: FactoredLinear) -> float:
    """Bytes of one layer in the file, with its share of the basis."""
    basis = 0 if layer.basis is None else layer.basis.weight.numel() * 2 / GROUP
    return layer.packed().nbytes() + basis


@torch.inference_mode()
def alternate(runs: dict[str, Callable[[int], Tensor]], *, seconds: float) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(0)
        run(1)
    begin, index, order = time.perf_counter(), 0, random.Random(0)
    while index < 7 or (time.perf_counter() - begin < seconds and index < 200):
        for name, run in order.sample(list(runs.items()), len(runs)):
            start = time.perf_counter()
            run(index)
            taken[name].append(time.perf_counter() - start)
        index += 1
    return taken


def limits(dtype: torch.dtype) -> dict[str, float]:
    buffer, a = torch.zeros(2**28), torch.randn(4096, 4096).to(dtype)
    read = min(alternate({"sum": lambda _: buffer.sum()}, seconds=2)["sum"])
    product = min(alternate({"product": lambda _: a @ a}, seconds=2)["product"])
    return {"bytes_per_s": 2**30 / read, f"{NAMES[dtype]}_flops_per_s": 2 * 4096**3 / product}


@torch.inference_mode()
def measure(shape: str, *, copies: int, seconds: float, float32_only: bool) -> list[dict[str, object]]:
    width, hidden, token_counts = SHAPES[shape]
    rows = []
    for role in ("up", "down"):
        out, inner = (hidden, width) if role == "up" else (width, hidden)
        dense = [torch.randn(out, inner, dtype=torch.bfloat16) for _ in range(copies)]
        wide = [weight.float() for weight in dense[: copies // 2]]
        for level, kinds in KINDS.items():
            for name, kind in kinds.items():
                layers = make_layers(width, hidden, kind, role=role, copies=copies)
                rounded = rounding(layers) if kind[3] != "float" else []
                for tokens in token_counts:
                    x = torch.randn(tokens, inner)
                    typed = x if float32_only else x.to(torch.bfloat16)
                    with torch.inference_mode():
                        for layer in (*layers, *rounded):
                            layer(typed)  # the first call of a layer prepares it
                    runs = {
                        "dense float32": cycle([partial(linear, weight=weight) for weight in wide], x),
                        "packed": cycle(layers, typed),
                    }
                    if not float32_only:
                        runs["dense bfloat16"] = cycle([partial(linear, weight=weight) for weight in dense], typed)
                    if rounded:
                        runs["packed, 8-bit inputs"] = cycle(rounded, typed)
                    rows.append(
                        summary(alternate(runs, seconds=seconds), layers[0])
                        | {"role": role, "level": level, "kind": name, "tokens": tokens}
                    )
                    print(role, name, tokens, rows[-1]["speedup"], rows[-1]["speedup_8_bit_inputs"], flush=True)
    return rows


def summary(taken: dict[str, list[float]], layer: FactoredLinear) -> dict[str, object]:
    medians = {name: statistics.median(runs) for name, runs in taken.items()}
    rank, (rows, cols) = layer.rank, layer.factor_shape
    basis = 0 if layer.basis is None else layer.width * rank
    best = min(median for name, median in medians.items() if name.startswith("dense"))
    return {
        "speedup": best / medians["packed"],
        "speedup_8_bit_inputs": best / medians["packed, 8-bit inputs"] if "packed, 8-bit inputs" in medians else None,
        "median_s": medians,
        "quartiles_s": {name: statistics.quantiles(runs, n=4)[::2] for name, runs in taken.items()},
        "stored_ratio": stored_bytes(layer) / (layer.in_features * layer.out_features * 2),
        "bytes_read": layer.packed().nbytes() + 2 * basis,
        "macs_per_token": rows * cols + basis,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("--megabytes", type=int, default=400, help="dense bfloat16 weights visited in turn")
    parser.add_argument("--seconds", type=float, default=0.4, help="per combination")
    parser.add_argument("--float32-only", action="store_true", help="float32 tokens, and no dense bfloat16 layers")
    args = parser.parse_args()
    torch.manual_seed(0)
    width, hidden, _ = SHAPES[args.shape]
    copies = max(4, args.megabytes * 10**6 // (width * hidden * 2))
    dtype = torch.float32 if args.float32_only else torch.bfloat16
    best = limits(dtype)
    rows = measure(args.shape, copies=copies, seconds=args.seconds, float32_only=args.float32_only)
    for row in rows:
        packed = row["median_s"]["packed"]
        row["of_bandwidth_limit"] = row["bytes_read"] / best["bytes_per_s"] / packed
        row["of_flop_limit"] = 2 * row["macs_per_token"] * row["tokens"] / best[f"{NAMES[dtype]}_flops_per_s"] / packed
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "environment": {**environment(torch.device("cpu")), "kernels": list(cpu.isa_names())},
        "shape": {"width": width, "hidden": hidden, "copies": copies},
        "limits": best,
        "results": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
