"""One packed layer computed in two ways, from its packed bytes and by decoding: what the defaults of fips are made of.

    python benchmarks/ways.py --out benchmarks/results/ways-zen4.json
    FIPS_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python ...

Matrices have random codes and supports. Medians of runs that take turns; `packed` reads the packed bytes, `decode`
writes out some rows at a time and multiplies by them with torch. See ``fips.kernels.defaults``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from statistics import median

import torch
from output import result_file
from torch import Tensor

from fips.formats.patterns import pattern_named
from fips.formats.values import values_named
from fips.kernels import cpu
from fips.layers.linear import FactoredLinear
from fips.record import environment

KINDS = {  # pattern, share of entries kept, values, columns of a block that is turned
    "int4": ("full", 1.0, "int4", 1),
    "int8": ("full", 1.0, "int8", 1),
    "int4g64": ("full", 1.0, "int4g64", 1),
    "nl4": ("full", 1.0, "nl4", 64),
    "nl4g64": ("full", 1.0, "nl4g64", 64),
    "tc2": ("full", 1.0, "tc2", 64),
    "tc4": ("full", 1.0, "tc4", 64),
    "tc4g64": ("full", 1.0, "tc4g64", 64),
    "bf16": ("full", 1.0, "float", 1),
    "bitmask int6 0.6": ("bitmask", 0.6, "int6", 1),
    "bitmask bf16 0.25": ("bitmask", 0.25, "float", 1),
    "bitmask bf16 0.6": ("bitmask", 0.6, "float", 1),
    "4:16 bf16": ("4:16", 0.25, "float", 1),
    "block8 bf16 0.5": ("block8", 0.5, "float", 1),
}


def random_layer(name: str, rows: int, cols: int, role: str) -> FactoredLinear:
    fmt, share, values, rotation = KINDS[name]
    numbers, layout, generator = values_named(values), pattern_named(fmt), torch.Generator().manual_seed(0)
    width, hidden = (cols, rows) if role == "up" else (rows, cols)
    size, kept, pattern = rows * cols, rows * cols, None
    if fmt == "bitmask":
        mask = torch.rand(rows, cols, generator=generator) < share
        kept, pattern = int(mask.sum()), layout.pack(mask, mask)[1]
    elif fmt.startswith("block"):
        wanted = torch.rand(size // layout.block, generator=generator) < share
        kept, pattern = layout.block * int(wanted.sum()), pattern_named("bitmask").pack(wanted, wanted)[1]
    elif fmt != "full":
        order = torch.rand(size // layout.group, layout.group, generator=generator).argsort(1)
        mask = (order < (layout.group_kept or 0)).view(rows, cols)
        kept, pattern = int(mask.sum()), layout.pack(mask, mask)[1]
    layer = FactoredLinear(
        None, role=role, hidden=hidden, kept=kept, fmt=fmt, width=width, values=values, rotation=rotation,
        dtype=torch.bfloat16,
    )  # fmt: skip
    if pattern is not None:
        layer.pattern = pattern
    if numbers.bits is None:
        layer.values.data = torch.randn(kept, generator=generator).bfloat16()
        return layer
    layer.values = torch.randint(0, 256, layer.values.shape, generator=generator).to(layer.values.dtype)
    layer.scales = torch.full_like(layer.scales, 0.01)
    if numbers.scale_group:
        layer.group_scales = torch.randint(8, 24, layer.group_scales.shape, generator=generator).to(torch.uint8)
    return layer


@torch.inference_mode()
def compare(layer: FactoredLinear, x: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of both ways."""
    seconds: dict[str, list[float]] = {"packed": [], "decode": []}
    for index in range(rounds + 1):
        for way, runs in seconds.items():
            layer.runtime.policy = way
            layer(x[:1])
            started = time.perf_counter()
            layer(x)
            if index:
                runs.append(time.perf_counter() - started)
    return {way: 1000 * median(runs) for way, runs in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="*", default=(1, 8, 16, 32, 64, 128, 512))
    parser.add_argument("--shapes", nargs="*", default=("2048x2048", "8192x2048", "2048x8192"))
    parser.add_argument("--kinds", nargs="*", default=tuple(KINDS))
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        for name in args.kinds:
            layer = random_layer(name, rows, cols, "up" if rows >= cols else "down")
            for tokens in args.tokens:
                for dtype in (torch.float32, torch.bfloat16):
                    if dtype == torch.bfloat16 and "avx512" not in cpu.isa_names():
                        continue
                    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
                    times = compare(layer, x, args.rounds)
                    kind = str(dtype).removeprefix("torch.")
                    found.append(
                        {"shape": shape, "kind": name, "inputs": kind, "tokens": tokens, "milliseconds": times}
                    )
                    print(shape, name, kind, tokens, {way: round(time, 2) for way, time in times.items()}, flush=True)
    fields = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cpu")), "kernels": list(cpu.isa_names())},
        "threads": args.threads,
        "results": found,
    }
    args.out.write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    main()
