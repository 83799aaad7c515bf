"""What the compiler makes of the Triton kernels for a GPU, without one: instructions per entry of the packed matrix.

    python benchmarks/gpu_code.py --output benchmarks/results/gpu-code.json

A product of few tokens is as fast as the memory only while there are few instructions per entry. An H100 issues about
28.7e12 a second (132 processors x 4 x 32 lanes x 1.7 GHz) and reads 3.35e12 bytes: a dense bfloat16 entry takes as long
as 17 instructions. Counted is the longest loop, the one over tiles, and the turns of that in it; stalls are not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from output import result_file
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fips.formats.packed import Packed
from fips.formats.values import values_named
from fips.kernels import triton_kernel, triton_words
from fips.record import environment

ROWS, COLUMNS, WARPS = 128, 4096, triton_kernel.WARPS
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32"}
CASES = [
    *(("full", values) for values in ("int4g64", "int5g64", "int8", "nl4g64", "nl5g64", "tc2g64", "tc3g64", "tc4g64")),
    *(("bitmask", values) for values in ("int4", "int6", "int8", "float")),
    *(("4:16", values) for values in ("int4", "int8", "float")),
    ("2:4", "float"),
    *(("block8", values) for values in ("int8", "float")),
]
FEW_CASES = {
    "bfloat16": [("full", "tc4g64"), ("4:16", "float")],
    "float32": [("full", "int4"), ("block8", "float")],
}
TOKENS = (1, 16, 64)
POINTERS = (
    *("x_ptr", "values", "pattern", "starts", "table", "scales", "group_scales", "bias", "y_ptr", "dense", "counts"),
    *("sums", "levels", "history", "words"),
)
ALIGNED = (*POINTERS, "rows", "cols", "stride_t", "split_columns", "split_eights")


def example(fmt: str, values: str) -> Packed:
    """Stored tensors of the right types; what is in them does not matter to a compiler."""
    numbers = values_named(values)
    stored = torch.zeros(64, dtype=numbers.dtype or torch.bfloat16)
    scales = torch.zeros(ROWS, dtype=torch.bfloat16) if numbers.scaled else None
    pattern = torch.zeros(0 if fmt == "full" else 64, dtype=torch.uint8)
    groups = torch.zeros(64, dtype=torch.uint8) if numbers.scale_group else None
    return Packed(stored, pattern, scales, (ROWS, COLUMNS), fmt, 0 if fmt == "block8" else 1, values, 64, groups)


def pointers(packed: Packed, inputs: torch.dtype) -> dict[str, torch.dtype]:
    values, pattern = triton_kernel.TileLayout.of(packed).read(packed)
    words = triton_words.WordMatrix.fits(packed)
    return {
        **dict.fromkeys(("x_ptr", "y_ptr", "bias", "dense"), inputs),
        "scales": torch.bfloat16,
        **dict.fromkeys(("group_scales", "history"), torch.uint8),
        "levels": torch.float32 if words else torch.int8,
        **dict.fromkeys(("starts", "table", "counts", "words"), torch.int32),
        "sums": torch.float32,
        "values": values.dtype,
        "pattern": pattern.dtype if pattern.numel() else torch.int32,  # of the table that stands for it
    }


def compiled(
    kernel: Any, packed: Packed, constants: dict[str, Any], capability: int, inputs: torch.dtype, warps: int
) -> Any:
    types = pointers(packed, inputs)
    signature = {
        name: "constexpr" if name in constants else f"*{TYPES[types[name]]}" if name in POINTERS else "i32"
        for name in kernel.arg_names
    }
    places = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in ALIGNED if name in places and name not in constants},
    )
    options = {"num_warps": warps, "num_stages": triton_kernel.STAGES}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def kernels(packed: Packed, tokens: tuple[int, ...]) -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Name, kernel, constants and entries of S in one tile."""
    if triton_words.WordMatrix.fits(packed):
        yield from word_kernels(packed, tokens)
        return
    layout, scaled = triton_kernel.TileLayout.of(packed), packed.scales_N is not None
    common, tile = layout.constants(), layout.GROUP * layout.GROUPS
    groups = layout.meanings()
    for count in tokens:
        constants = {**common, **groups, "SCALED": scaled, "BIASED": True, "ALONE": True, "WIDE": False, "stride_k": 1}
        constants |= {"BLOCK_T": max(16, count), "ROWS": triton_kernel.ROWS, "UNROLL": triton_kernel.UNROLL}
        yield f"multiply, {count} tokens", triton_kernel._multiply_kernel, constants, triton_kernel.ROWS * tile
    yield (
        "decode",
        triton_kernel._decode_kernel,
        common | groups | {"SCALED": scaled, "ROWS": triton_kernel.DECODED_ROWS},
        triton_kernel.DECODED_ROWS * tile,
    )
    if layout.counts:
        yield "count", triton_kernel._count_kernel, common | {"ROWS": triton_kernel.ROWS}, triton_kernel.ROWS * tile


def word_kernels(packed: Packed, tokens: tuple[int, ...]) -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    common = triton_words.WordMatrix(packed).constants
    for count in tokens:
        if count <= triton_words.FEW_TOKENS_OF_LARGE:
            rows, eights = triton_words.ROWS, 32 * triton_words.WARPS
            constants = {"BIASED": True, "TOKENS": count, "ROWS": rows, "EIGHTS": eights}
            kernel = triton_words._few_kernel
        else:
            rows, eights = triton_words.TILE_ROWS, triton_words.TILE_EIGHTS
            constants = {"BIASED": True, "ALONE": True, "WIDE": False, "TOKENS": count, "ROWS": rows, "EIGHTS": eights}
            kernel = triton_words._many_kernel
        yield f"multiply, {count} tokens", kernel, common | constants, rows * eights * triton_words.EIGHT
    rows, eights = triton_words.DECODED_ROWS, 32 * triton_words.DECODING_WARPS
    constants = {"ROWS": rows, "EIGHTS": eights}
    yield "decode", triton_words._written_kernel, common | constants, rows * eights * triton_words.EIGHT


def tool(name: str, binary: bytes, *options: str) -> str:
    """What one of the binary tools beside Triton's compiler prints of a program."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def loops(code: str) -> list[tuple[int, int]]:
    """First and last line of what lies between a label and a branch back to it, longest first."""
    lines = [line.strip() for line in code.splitlines()]
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line))}
    found = {}
    for at, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*(\.L_x_\d+)", line)
        if match and labels.get(match[1], at) < at:
            found[labels[match[1]]] = at
    return sorted(found.items(), key=lambda loop: loop[0] - loop[1])


def instructions_per_tile(code: str, turns: int) -> int:
    """Of the longest loop; a loop in it is the one over the columns of a group, gone through ``turns`` times."""
    lines = [line.strip() for line in code.splitlines()]
    whole, *others = [loop for loop in loops(code) if loop[0] + 1 < loop[1]] or [(0, len(lines) - 1)]  # or no loop
    inner = next((loop for loop in others if whole[0] < loop[0] and loop[1] < whole[1]), None)
    count = _instructions(lines, whole)
    return count if inner is None else count + (turns - 1) * _instructions(lines, inner)


def _instructions(lines: list[str], loop: tuple[int, int]) -> int:
    return sum(line.startswith("/*") and ";" in line for line in lines[loop[0] : loop[1] + 1])


def measure(
    fmt: str, values: str, tokens: tuple[int, ...], capability: int, inputs: torch.dtype
) -> Iterator[dict[str, Any]]:
    packed = example(fmt, values)
    for name, kernel, constants, entries in kernels(packed, tokens):
        program = compiled(kernel, packed, constants, capability, inputs, WARPS)
        usage = tool("cuobjdump", program.asm["cubin"], "-res-usage")
        found = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}
        turns = triton_kernel.TileLayout.of(packed).GROUP // triton_kernel.UNROLL
        count = instructions_per_tile(tool("nvdisasm", program.asm["cubin"], "-c"), turns)
        yield {
            "capability": capability,
            "format": fmt,
            "values": "bfloat16" if values == "float" else values,
            "kernel": name,
            "instructions_per_entry": round(count * 32 * WARPS / entries, 2),
            "registers": found["REG"],
            "stack_bytes": found["STACK"],
            "shared_bytes": program.metadata.shared,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("--few", action="store_true", help="two formats, newest device, 16 tokens")
    parser.add_argument("--inputs", choices=("bfloat16", "float32"), default="bfloat16", help="type of the tokens")
    args = parser.parse_args()
    inputs = getattr(torch, args.inputs)
    cases, tokens, capabilities = (FEW_CASES[args.inputs], TOKENS[:2], (90,)) if args.few else (CASES, TOKENS, (80, 90))
    rows = []
    for capability in capabilities:
        for fmt, values in cases:
            for row in measure(fmt, values, tokens, capability, inputs):
                rows.append(row)
                print(row, flush=True)
    record = {
        "benchmark": "code of the Triton kernels",
        "command": " ".join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cpu")), "triton": triton.__version__},
        "results": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
