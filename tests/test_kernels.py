"""Every kernel against a float64 product: formats, types, odd shapes, empty and full rows, strides."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor

from fips.errors import BackendError, ConfigError, ShapeError
from fips.formats.masks import nm_mask
from fips.formats.packed import Packed, to_dense
from fips.formats.patterns import pattern_named
from fips.formats.rotation import rotate
from fips.formats.values import integers, pack_integers, unpack_integers, values_named
from fips.kernels import cpu, ops, reference

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")

FORMATS = ["full", "bitmask", "2:4", "1:4", "4:8", "2:8", "4:16", "8:16", "2:16", "1:2", "block4", "block8"]
SHAPES = [(1, 1), (13, 77), (5, 63), (8, 20), (65, 130), (31, 257), (40, 48), (33, 80), (7, 64), (300, 208)]
TOLERANCE = {torch.float32: (5e-6, 3e-5), torch.float16: (2e-3, 2e-2), torch.bfloat16: (1e-2, 1e-1)}
"""Relative Frobenius error and worst element over RMS."""


def example(
    fmt: str, shape: tuple[int, int], *, dtype: torch.dtype = torch.float32, axis: int = 1, seed: int = 0
) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.bool)
    if pattern_named(fmt).block > 1:
        size = pattern_named(fmt).block
        grid = (shape[0] // size, shape[1]) if axis == 0 else (shape[0], shape[1] // size)
        mask = (torch.rand(grid, generator=generator) < 0.4).repeat_interleave(size, axis)
    elif fmt == "bitmask":
        mask = torch.rand(shape, generator=generator) < 0.3
        if shape[0] > 3:
            mask[2], mask[3] = False, True  # an empty and a full row
    elif fmt != "full":
        mask = nm_mask(matrix.abs(), n=int(fmt.partition(":")[0]), m=int(fmt.partition(":")[2]), dim=1)
    scales = None
    if dtype == torch.int8:
        scales, _ = integers(8).fitted_scales(matrix, mask, torch.float32)
        matrix = integers(8).quantize(matrix, scales)
    else:
        matrix = matrix.to(dtype)
    block_axis = 0 if axis == 0 else 1
    values, pattern = pattern_named(fmt).pack(matrix, mask, block_axis)
    return Packed(values, pattern, scales, shape, fmt, block_axis, "float" if scales is None else "int8")  # type: ignore[arg-type]


def exact(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    wide = Packed(
        packed.values_Z.double(),
        packed.pattern,
        None if packed.scales_N is None else packed.scales_N.double(),
        packed.shape,
        packed.fmt,
        packed.block_axis,
    )
    dense = to_dense(wide)
    return x.double() @ dense.T + (0 if bias is None else bias.double())


def assert_close(actual: Tensor, expected: Tensor, tolerance: tuple[float, float]) -> None:
    difference = actual.double() - expected
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    assert difference.norm() / expected.norm().clamp_min(1e-30) < tolerance[0]
    assert difference.abs().max() / scale < tolerance[1]


def inputs(tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def fits(fmt: str, shape: tuple[int, int], axis: int) -> bool:
    unit = pattern_named(fmt).group
    return shape[axis if pattern_named(fmt).block > 1 else 1] % unit == 0


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.slow
def test_every_path_agrees_with_float64(fmt: str, values: torch.dtype, isa: str) -> None:
    blocked = [(fmt, 0) for fmt in ("block4", "block8")]  # the values of a row do not lie together
    for axis in (0, 1) if pattern_named(fmt).block > 1 else (1,):
        packed = example(fmt, (96, 160), dtype=values, axis=axis)
        prepared = cpu.prepare(packed)
        ran = 0
        for path in cpu.PATHS:
            for tokens in (1, 2, 3, 4, 5, 16, 17, 37, 70):
                for dtype in TOLERANCE:
                    x, bias = inputs(tokens, 160, dtype), inputs(1, 96, dtype)[0]
                    try:
                        y = cpu.multiply(x, prepared, bias, path=path, isa=isa)
                    except BackendError:
                        assert path != "auto"
                        assert path != "tiles" or isa == "portable" or (fmt, axis) in blocked
                        continue
                    assert y.dtype == dtype
                    assert_close(y, exact(x, packed, bias), TOLERANCE[dtype])
                    ran += 1
        assert ran >= 27


def narrow(packed: Packed, bits: int) -> Packed:
    """The matrix with its int8 values shortened to their highest bits."""
    values = packed.values_Z >> (8 - bits)
    return replace(packed, values_Z=pack_integers(values, bits=bits), value_format=f"int{bits}", count=values.numel())


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.slow
def test_integers_of_few_bits_agree_with_float64(fmt: str, bits: int, isa: str) -> None:
    for shape in ((96, 160), *SHAPES):
        if not fits(fmt, shape, 1):
            continue
        packed = narrow(example(fmt, shape, dtype=torch.int8), bits)
        integers_Z = unpack_integers(packed.values_Z, bits=bits, count=packed.count)
        wide = replace(packed, values_Z=integers_Z, value_format="int8", count=0)
        prepared = cpu.prepare(packed)
        for tokens in (1, 4, 33):
            for dtype in (torch.float32, torch.bfloat16):
                x = inputs(tokens, shape[1], dtype)
                for path in ("auto",) if isa == "portable" else ("auto", "tiles"):
                    y = cpu.multiply(x, prepared, path=path, isa=isa)
                    assert_close(y, exact(x, wide), TOLERANCE[dtype])
                assert_close(reference.multiply(x, packed), exact(x, wide), TOLERANCE[dtype])


def grouped(packed: Packed, bits: int, group: int) -> Packed:
    """The matrix with integers of some bits and random group scales, some of them 0."""
    packed = packed if bits == 8 else narrow(packed, bits)
    rows, cols = packed.shape
    count = rows * -(-cols // group)
    scales = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(group), dtype=torch.uint8)
    return replace(packed, value_format=f"int{bits}g{group}", group_scales=scales)


def exact_grouped(x: Tensor, packed: Packed) -> Tensor:
    assert packed.scales_N is not None
    return x.double() @ to_dense(replace(packed, scales_N=packed.scales_N.double())).T


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 32), (8, 32), (4, 64), (5, 128), (8, 128)])
@pytest.mark.parametrize("fmt", ["full", "bitmask", "4:16", "2:4", "block4"])
@pytest.mark.slow
def test_group_scales_on_every_path(fmt: str, bits: int, group: int, isa: str) -> None:
    for shape in ((96, 160), (40, 384), *SHAPES):
        for axis in (0, 1) if fmt == "block4" else (1,):
            if not fits(fmt, shape, axis):
                continue
            packed = grouped(example(fmt, shape, dtype=torch.int8, axis=axis), bits, group)
            prepared = cpu.prepare(packed)
            for tokens in (1, 2, 3, 4, 7, 33):
                dtype = torch.bfloat16 if tokens in (3, 7) else torch.float32
                x = inputs(tokens, shape[1], dtype)
                expected = exact_grouped(x, packed)
                assert_close(reference.multiply(x, packed), expected, TOLERANCE[dtype])
                for path in cpu.PATHS:
                    try:
                        y = cpu.multiply(x, prepared, path=path, isa=isa)
                    except BackendError:
                        assert path in ("direct", "tiles")
                        continue
                    assert_close(y, expected, TOLERANCE[dtype])


def rounded_inputs(x: Tensor, rotation: int) -> Tensor:
    """Inputs in 8 bits, 64 of the turned ones with one scale, as they then count, in float64."""
    turned = rotate(x.double(), rotation)
    blocks = torch.nn.functional.pad(turned, (0, -x.shape[1] % 64)).view(len(x), -1, 64)
    step = (blocks.abs().amax(2, keepdim=True) / 127).clamp_min(1e-30)
    rounded = ((blocks / step).round() * step).flatten(1)[:, : x.shape[1]]
    return rotate(rounded, rotation)  # the turn is its own inverse


ROUNDS_MANY = "FIPS_BRIDGE" not in os.environ
"""Whether registers of 256 bits multiply many tokens in 8 bits: those of x86 do, see test_arm.py for the others."""


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(
    ("values", "rotation"),
    [("int8", 1), ("int4", 1), ("int4g16", 1), ("int2g32", 1), ("int3g32", 1), ("int5g16", 1), ("int8g32", 1),
     ("int4g64", 1), ("int6g128", 1), ("nl2g16", 1), ("nl4", 64),
     ("nl3g64", 16), ("int3", 1), ("int5g64", 1), ("nl2g128", 1), ("nl5g64", 64)],
)  # fmt: skip
@pytest.mark.parametrize("fmt", ["full", "bitmask", "2:4"])
@pytest.mark.parametrize("isa", cpu.isa_names())
def test_inputs_of_8_bits_share_a_scale_64_at_a_time(isa: str, fmt: str, values: str, rotation: int) -> None:
    numbers = values_named(values)
    for shape in ((40, 384), (150, 64 * 9 + 32), (33, 2048 + 128), (43, 320), (14, 4096 + 64)):
        if shape[1] % rotation:
            continue
        packed = example(fmt, shape, dtype=torch.int8)
        if numbers.levels:
            packed = leveled(packed, values, rotation)
        elif numbers.scale_group:
            packed = grouped(packed, numbers.bits or 8, numbers.scale_group)
        elif numbers.bits != 8:
            packed = narrow(packed, numbers.bits or 8)
        prepared = cpu.prepare(packed)
        weight = to_dense(replace(packed, scales_N=torch.ones_like(packed.scales_N, dtype=torch.float64))).double()
        for tokens in (*range(1, 9), 16, 24, 37, 130):
            x = inputs(tokens, shape[1], torch.float32) * torch.logspace(-2, 2, shape[1])  # blocks differ
            exact_y = exact_grouped(x, packed)
            wanted = rounded_inputs(x, rotation).double() @ weight.T * packed.scales_N.double()
            for path in ("auto", "tiles"):
                try:
                    y = cpu.multiply(x, prepared, path=path, activation_bits=8, isa=isa).double()
                except BackendError:
                    assert isa == "portable"
                    continue
                few = path == "auto" and tokens <= 4
                tiles = path == "tiles" or fmt == "full"  # of the others so little is kept that zeros are skipped
                with_256 = fmt == "full" and shape[1] % 64 == 0 if few else tiles and ROUNDS_MANY
                rounds = isa.startswith("avx512") or (isa in ("avx2", "avx_vnni") and with_256)
                allowed = [wanted] if rounds else [exact_y]
                allowed += [wanted] if isa == "amx" else []  # sums whole rows, so it rounds less
                assert min(float((y - one).norm() / exact_y.norm()) for one in allowed) < 1e-3
                assert float((y - exact_y).norm() / exact_y.norm()) < 2e-2


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 16, 64])
def test_the_largest_integers_beside_the_largest_inputs_of_8_bits(group: int, bits: int, isa: str) -> None:
    """Sums of products have room for them, whatever the signs."""
    rows, cols, most = 30, 320, 1 << (bits - 1)
    ends = torch.tensor([-most, most - 1], dtype=torch.int8)
    generator = torch.Generator().manual_seed(bits)
    numbers = ends[torch.randint(0, 2, (rows, cols), generator=generator)]
    numbers[:4] = ends[torch.tensor([[0], [1], [0], [1]])]
    groups = rows * -(-cols // group) if group else 0
    packed = Packed(
        numbers.flatten() if bits == 8 else pack_integers(numbers.flatten(), bits=bits),
        torch.empty(0, dtype=torch.uint8), torch.ones(rows), (rows, cols), "full",
        value_format=f"int{bits}" + (f"g{group}" if group else ""), count=0 if bits == 8 else numbers.numel(),
        group_scales=torch.randint(1, 256, (groups,), generator=generator).to(torch.uint8) if group else None,
    )  # fmt: skip
    for tokens in (1, 4, *range(5, 10), 37):
        x = torch.randint(0, 2, (tokens, cols), generator=generator) * 254.0 - 127.0
        x[0], x[-1] = 127.0, -127.0
        y = cpu.multiply(x, cpu.prepare(packed), isa=isa, activation_bits=8).double()
        expected = x.double() @ to_dense(packed).double().T
        assert float((y - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), tokens


def leveled(packed: Packed, values: str, rotation: int = 1) -> Packed:
    """The matrix of int8 values with their highest bits as codes of levels, and random group scales where there are."""
    numbers = values_named(values)
    assert numbers.bits is not None
    packed = narrow(packed, numbers.bits)
    if numbers.scale_group is not None:
        packed = grouped(replace(packed, value_format="int8"), 8, numbers.scale_group)
    return replace(packed, value_format=values, rotation=rotation)


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize(
    ("values", "rotation"),
    [("nl2", 4), ("nl2g16", 1), ("nl3g16", 16), ("nl5g32", 1), ("nl4", 64), ("nl4g64", 1), ("nl5g128", 64), ("nl5", 1)],
)
@pytest.mark.parametrize("fmt", ["full", "bitmask", "2:4", "block4"])
@pytest.mark.slow
def test_levels_and_turned_columns_on_every_path(fmt: str, values: str, rotation: int, isa: str) -> None:
    for shape in ((96, 192), (40, 384), (13, 64 if fmt == "full" else 128)):
        for axis in (0, 1) if fmt == "block4" else (1,):
            if not fits(fmt, shape, axis):
                continue
            packed = leveled(example(fmt, shape, dtype=torch.int8, axis=axis), values, rotation)
            prepared = cpu.prepare(packed)
            bias = inputs(1, shape[0], torch.float32)[0]
            for tokens in (1, 2, 3, 4, 7, 33):
                dtype = {3: torch.bfloat16, 7: torch.bfloat16, 2: torch.float16}.get(tokens, torch.float32)
                x = inputs(tokens, shape[1], dtype)
                expected = exact_grouped(x, packed) + bias.to(dtype).double()
                assert_close(reference.multiply(x, packed, bias), expected, TOLERANCE[dtype])
                ran = 0
                for path in cpu.PATHS:
                    with contextlib.suppress(BackendError):
                        assert_close(cpu.multiply(x, prepared, bias, path=path, isa=isa), expected, TOLERANCE[dtype])
                        ran += 1
                assert ran >= 2


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
def test_what_is_not_finite_stays_so_in_turned_columns(isa: str) -> None:
    packed = leveled(example("full", (72, 192), dtype=torch.int8), "nl4", 64)
    for dtype in TOLERANCE:
        x = strange_tokens(192, dtype)
        for path in cpu.PATHS:
            for part in (slice(0, 3), slice(0, 10)):
                with contextlib.suppress(BackendError):
                    y = cpu.multiply(x[part], cpu.prepare(packed), path=path, isa=isa)
                    assert torch.equal(y.isfinite().all(1), x[part].isfinite().all(1))
                    assert torch.equal(y.isfinite().any(1), x[part].isfinite().all(1))


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
def test_group_scales_and_tokens_with_inf(isa: str) -> None:
    packed = grouped(example("bitmask", (24, 80), dtype=torch.int8), 4, 32)
    x = inputs(5, 80, torch.float32)
    x[1, 5], x[3, 7], x[4] = float("nan"), float("inf"), x[4] * 1e35
    y, dense = cpu.multiply(x, cpu.prepare(packed), isa=isa), torch.nn.functional.linear(x, to_dense(packed))
    assert torch.equal(y.isfinite(), dense.isfinite())
    assert_close(y[[0, 2]], exact_grouped(x[[0, 2]], packed), TOLERANCE[torch.float32])
    assert_close(y[4:], exact_grouped(x[4:], packed), TOLERANCE[torch.float32])


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.slow
def test_odd_shapes(fmt: str, shape: tuple[int, int], isa: str) -> None:
    for values in (torch.float32, torch.bfloat16, torch.int8):
        for axis in (0, 1) if pattern_named(fmt).block > 1 else (1,):
            if not fits(fmt, shape, axis):
                continue
            packed = example(fmt, shape, dtype=values, axis=axis, seed=1)
            for tokens in (1, 3, 6, 33):
                for dtype in (torch.float32, torch.bfloat16):
                    x = inputs(tokens, shape[1], dtype)
                    y = cpu.multiply(x, cpu.prepare(packed), isa=isa)
                    assert_close(y, exact(x, packed), TOLERANCE[dtype])


@needs_library
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8])
def test_many_tokens_in_several_passes(values: torch.dtype) -> None:
    packed = example("bitmask", (520, 1100), dtype=values)
    for tokens in (513, 700):
        x = inputs(tokens, 1100, torch.bfloat16)
        assert_close(cpu.multiply(x, cpu.prepare(packed)), exact(x, packed), TOLERANCE[torch.bfloat16])


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
def test_the_number_of_threads_changes_no_bit(values: torch.dtype, isa: str) -> None:
    prepared = cpu.prepare(example("bitmask", (431, 520), dtype=values))
    threads = torch.get_num_threads()
    try:
        for tokens in (1, 16, 77, 701):
            x = inputs(tokens, 520, torch.bfloat16)
            x[tokens // 2, 3] = 1e30  # beside it fixed point would lose all others of the token
            results = []
            for count in (1, 2, 5):  # rows, tokens, and who packs them, are shared in another way each time
                torch.set_num_threads(count)
                results.append(cpu.multiply(x, prepared, isa=isa))
            assert all(torch.equal(result, results[0]) for result in results[1:])
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("fmt", ["full", "bitmask", "4:16", "block8"])
@pytest.mark.slow
def test_long_rows_are_multiplied_in_parts(fmt: str, values: torch.dtype, isa: str) -> None:
    packed = example(fmt, (205, 2576), dtype=values)
    prepared = cpu.prepare(packed)
    for tokens in (5, 16, 24, 150):
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(tokens, 2576, dtype)
            assert_close(cpu.multiply(x, prepared, isa=isa), exact(x, packed), TOLERANCE[dtype])
    if values == torch.int8 and fmt in ("full", "bitmask"):
        short = narrow(packed, 4)
        integers_Z = unpack_integers(short.values_Z, bits=4, count=short.count)
        wide = replace(short, values_Z=integers_Z, value_format="int8", count=0)
        for tokens in (5, 150):
            x = inputs(tokens, 2576, torch.bfloat16)
            assert_close(cpu.multiply(x, cpu.prepare(short), isa=isa), exact(x, wide), TOLERANCE[torch.bfloat16])


@needs_library
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kept", [False, True])
def test_all_empty_and_all_full(kept: bool, values: torch.dtype) -> None:
    matrix = torch.randn(37, 70)
    mask = torch.full((37, 70), kept)
    scales = integers(8).fitted_scales(matrix, mask, torch.float32)[0] + 1e-9 if values == torch.int8 else None
    stored = matrix.to(values) if scales is None else integers(8).quantize(matrix, scales)
    kind = "float" if scales is None else "int8"
    packed = Packed(*pattern_named("bitmask").pack(stored, mask), scales, (37, 70), "bitmask", 1, kind)
    for tokens in (1, 4, 20):
        x = inputs(tokens, 70, torch.float32)
        y = cpu.multiply(x, cpu.prepare(packed))
        if kept:
            assert_close(y, exact(x, packed), TOLERANCE[torch.float32])
        else:
            assert torch.equal(y, torch.zeros(tokens, 37))


@needs_library
def test_leading_dimensions_and_strides() -> None:
    packed = example("4:16", (48, 64), dtype=torch.bfloat16)
    prepared = cpu.prepare(packed)
    wide = inputs(30, 128, torch.bfloat16).view(5, 6, 128)
    for x in (wide[..., :64], wide[..., ::2], wide.transpose(0, 1)[..., 64:], wide[:1, :1, :64], wide[:0, :, :64]):
        y = cpu.multiply(x, prepared)
        assert y.shape == (*x.shape[:-1], 48)
        if x.numel():
            assert_close(y, exact(x, packed), TOLERANCE[torch.bfloat16])


@needs_library
def test_zero_tokens_stay_zero_and_large_ones_are_kept() -> None:
    packed = example("bitmask", (40, 64), dtype=torch.int8)
    x = torch.zeros(6, 64)
    x[1, 5], x[2] = 1e30, 1e-30
    y = cpu.multiply(x, cpu.prepare(packed))
    assert torch.equal(y[0], torch.zeros(40))
    for row in (1, 2):
        assert_close(y[row], exact(x[row], packed), TOLERANCE[torch.float32])


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (13, 77), (5, 300), (1, 1)])
def test_products_with_the_columns_of_a_dense_matrix(shape: tuple[int, int], values: torch.dtype, isa: str) -> None:
    packed = example("full", shape, dtype=values)
    dense = to_dense(packed).double()
    for tokens in (1, 2, 3, 4):
        for dtype in TOLERANCE:
            x = inputs(tokens, shape[0], dtype)
            y = cpu.multiply_columns(x, cpu.prepare(packed), isa=isa)
            assert_close(y, x.double() @ dense, TOLERANCE[dtype])


@needs_library
def test_the_instruction_set_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_library", "_available", "_reason", "_best"):
        monkeypatch.setattr(cpu, name, getattr(cpu, name))  # put back afterwards
    monkeypatch.setenv("FIPS_ISA", "portable")
    cpu._load()
    assert cpu.isa_names() == ("portable",)
    packed, x = example("4:16", (48, 64)), inputs(6, 64, torch.float32)
    assert torch.equal(cpu.multiply(x, cpu.prepare(packed)), cpu.multiply(x, cpu.prepare(packed), isa="portable"))
    monkeypatch.setenv("FIPS_ISA", "mmx")
    with pytest.raises(ConfigError, match="known: portable, avx2"):
        cpu._load()


@needs_library
@pytest.mark.parametrize("isa", cpu.ISAS)
def test_in_place_of_an_instruction_set_that_is_missing_the_next_worse_one_runs(isa: str) -> None:
    there = [name for name in cpu.isa_names() if cpu.ISAS.index(name) <= cpu.ISAS.index(isa)]
    prepared, x = cpu.prepare(narrow(example("full", (24, 192), dtype=torch.int8), 5)), inputs(3, 192, torch.bfloat16)
    wanted = cpu.multiply(x, prepared, isa=there[-1], activation_bits=8)
    assert torch.equal(cpu.multiply(x, prepared, isa=isa, activation_bits=8), wanted)


@needs_library
def test_a_damaged_pattern_is_refused() -> None:
    packed = example("bitmask", (40, 64))
    packed.pattern[3] ^= 1
    with pytest.raises(BackendError, match="entries"):
        cpu.prepare(packed)


@needs_library
def test_what_has_no_kernel_is_said() -> None:
    three = Packed(torch.zeros(21), torch.zeros(3, dtype=torch.uint8), None, (1, 49), "3:7")
    here, compiled = torch.device("cpu"), cpu.CpuBackend()
    assert "pattern 3:7" in str(compiled.supports(three, here, torch.float32))
    assert "inputs are torch.float64" in str(compiled.supports(example("full", (4, 4)), here, torch.float64))
    assert "on meta" in str(compiled.supports(example("full", (4, 4)), torch.device("meta"), torch.float32))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_reference_agrees_with_float64(fmt: str) -> None:
    for values in (torch.float32, torch.bfloat16, torch.int8):
        packed = example(fmt, (96, 160), dtype=values)
        x = inputs(5, 160, torch.float32)
        assert_close(reference.multiply(x, packed), exact(x, packed), TOLERANCE[torch.float32])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_of_the_operator(fmt: str, axis: int) -> None:
    packed = example(fmt, (96, 160), axis=axis)
    x = inputs(7, 160, torch.float32).requires_grad_()
    values = packed.values_Z.clone().requires_grad_()
    bias = torch.zeros(96, requires_grad=True)
    trained = Packed(values, packed.pattern, None, packed.shape, packed.fmt, packed.block_axis)
    weights = inputs(7, 96, torch.float32)
    got = torch.autograd.grad((ops.packed_linear(x, trained, bias) * weights).sum(), (x, values, bias))
    wanted = torch.autograd.grad((reference.multiply(x, trained, bias) * weights).sum(), (x, values, bias))
    for actual, expected in zip(got, wanted, strict=True):
        assert_close(actual, expected.double(), TOLERANCE[torch.float32])


def test_the_operator_compiles() -> None:
    packed = example("bitmask", (96, 160))
    x = inputs(6, 160, torch.float32)
    sample = (x, packed.values_Z, packed.pattern, None, None, [96, 160], "bitmask", 1, "float", 0, 1, None, None, None)
    torch.library.opcheck(torch.ops.fips.packed_linear, sample, test_utils=("test_schema", "test_faketensor"))


def strange_tokens(cols: int, dtype: torch.dtype) -> Tensor:
    """Ten tokens: plain ones at 0 and 9, between them one each with NaN or Inf in some places."""
    x = inputs(10, cols, dtype)
    x[1, 5] = float("nan")
    x[2, cols - 1] = float("inf")
    x[3, :2] = torch.tensor([float("inf"), float("-inf")])
    x[4] = float("nan")
    x[5] = float("-inf")
    x[6, 0], x[6, -1] = float("nan"), float("inf")
    x[7, 64] = float("-inf")
    x[8, 3:70] = float("inf")
    return x


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8, 5])
@pytest.mark.parametrize("fmt", ["full", "bitmask", "4:16", "block4", "block8"])
def test_nan_and_inf_come_out_as_from_a_dense_layer(fmt: str, values: torch.dtype | int, isa: str) -> None:
    for axis in (0, 1) if pattern_named(fmt).block > 1 else (1,):
        packed = example(fmt, (72, 144), dtype=torch.int8 if isinstance(values, int) else values, axis=axis)
        packed = narrow(packed, values) if isinstance(values, int) else packed
        prepared = cpu.prepare(packed)
        for dtype in TOLERANCE:
            x, bias = strange_tokens(144, dtype), inputs(1, 72, dtype)[0]
            expected = torch.nn.functional.linear(x.double(), to_dense(packed).double(), bias.double())
            plain = torch.where(x.isfinite(), x, 0)
            for path in cpu.PATHS:
                for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 7), slice(4, 8), slice(0, 10)):
                    try:
                        y = cpu.multiply(x[part], prepared, bias, path=path, isa=isa)
                        unhurt = cpu.multiply(plain[part], prepared, bias, path=path, isa=isa)
                    except BackendError:
                        continue
                    assert torch.equal(y.isnan(), expected[part].isnan())
                    assert torch.equal(y.isinf(), expected[part].isinf())
                    assert torch.equal(y[y.isinf()].double(), expected[part][y.isinf()])
                    finite = x[part].isfinite().all(-1)
                    assert torch.equal(y[finite], unhurt[finite])


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("bits", [8, 4])
def test_huge_and_tiny_tokens_beside_integers(bits: int, isa: str) -> None:
    packed = example("bitmask", (72, 144), dtype=torch.int8)
    packed = packed if bits == 8 else narrow(packed, bits)
    prepared = cpu.prepare(packed)
    dense = to_dense(packed).double()
    for size in (1e-37, 1e-33, 1e-31, 1e-20, 1e20, 1e30, 1e34, 1e36):
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 3, 40):
                x = inputs(tokens, 144, torch.float32)
                x[0] *= size
                x = x.to(dtype)
                y = cpu.multiply(x, prepared, isa=isa)
                for row in (0, tokens - 1):
                    largest = x[row].abs().max().double()
                    assert_close(y[row] / largest, x[row].double() @ dense.T / largest, TOLERANCE[dtype])


@needs_library
def test_rows_of_scale_zero_and_halves_that_overflow() -> None:
    packed = example("bitmask", (40, 64), dtype=torch.int8)
    assert packed.scales_N is not None
    packed.scales_N[7] = 0
    x = inputs(6, 64, torch.float16) * 1000
    y = cpu.multiply(x, cpu.prepare(packed))
    assert torch.equal(y[:, 7], torch.zeros(6, dtype=torch.float16))
    huge, expected = cpu.multiply(10 * x, cpu.prepare(packed)), exact(10 * x, packed)
    assert bool(huge[expected.abs() > 66_000].isinf().all())
    assert bool(huge[expected.abs() < 65_000].isfinite().all())
    assert 0 < int(huge.isinf().sum()) < huge.numel()


WRONG_INPUTS = [(3, 63), (3, 65), (3, 0), (3, 8), (64, 3), (3, 128), (2, 3, 1), (), (0, 63)]


@needs_library
@pytest.mark.parametrize("shape", WRONG_INPUTS)
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    packed, whole = example("bitmask", (40, 64)), example("full", (64, 40))
    prepared, x = cpu.prepare(packed), torch.zeros(shape)
    again = cpu.Repeat(torch.zeros(3, 64), prepared, None, None)
    calls = [
        lambda: cpu.multiply(x, prepared),
        lambda: cpu.multiply_columns(x, cpu.prepare(whole)),
        lambda: again(x, packed, None),
        lambda: cpu.Repeat(x, prepared, None, None),
        lambda: reference.multiply(x, packed),
        lambda: cpu.CpuBackend().multiply(x, prepared, None),
        lambda: ops.packed_linear(x, packed, None),
    ]
    for call in calls:
        with pytest.raises(ShapeError, match=re.escape(f"{tuple(shape)} do not fit 64 features: want (..., 64)")):
            call()


@needs_library
def test_a_bias_of_another_size_is_refused_and_a_strided_one_is_read_right() -> None:
    packed = example("bitmask", (40, 64))
    prepared, x = cpu.prepare(packed), inputs(3, 64, torch.float32)
    for size in (0, 1, 39, 41, 80):
        for multiply in (cpu.multiply, cpu.Repeat):
            with pytest.raises(ShapeError, match=re.escape(f"({size},) does not fit 40 outputs")):
                multiply(x, prepared, torch.zeros(size), *([None] if multiply is cpu.Repeat else []))  # type: ignore[operator]
        with pytest.raises(ShapeError, match="40 outputs"):
            reference.multiply(x, packed, torch.zeros(size))
    wide = inputs(1, 80, torch.float32)[0]
    for bias in (wide[::2], wide[:1].expand(40), wide[:40].bfloat16()):
        assert_close(cpu.multiply(x, prepared, bias), exact(x, packed, bias), TOLERANCE[torch.float32])
        assert not cpu.Repeat.suits(x, bias)


@needs_library
def test_inputs_that_lie_elsewhere_or_are_no_floats_are_refused() -> None:
    prepared = cpu.prepare(example("bitmask", (40, 64)))
    with pytest.raises(ShapeError, match=r"floating-point inputs, got torch\.int64"):
        cpu.multiply(torch.zeros(3, 64, dtype=torch.int64), prepared)
    with pytest.raises(BackendError, match="on meta"):
        cpu.multiply(torch.zeros(3, 64, device="meta"), prepared)
    with pytest.raises(BackendError, match="float64"):
        cpu.multiply(torch.zeros(3, 64, dtype=torch.float64), prepared)


@needs_library
@pytest.mark.parametrize("fmt", FORMATS)
def test_stored_tensors_of_another_size_are_refused(fmt: str) -> None:
    for bits in (32, 8, 3):
        packed = example(fmt, (40, 64), dtype=torch.float32 if bits == 32 else torch.int8)
        packed = narrow(packed, 3) if bits == 3 else packed
        more = torch.zeros(packed.values_Z.numel() + 1, dtype=packed.values_Z.dtype)
        broken = [replace(packed, values_Z=more[:-2]), replace(packed, values_Z=more)]
        broken += [replace(packed, shape=shape) for shape in ((40, 128), (80, 64), (40, 32), (40, 0))]
        if packed.pattern.numel():
            broken += [replace(packed, pattern=packed.pattern[:-1]), replace(packed, pattern=packed.pattern.repeat(2))]
            broken += [replace(packed, pattern=packed.pattern.repeat(2)[::2])]
        if packed.scales_N is not None:
            broken += [replace(packed, scales_N=packed.scales_N[:-1])]
        if bits == 3:
            broken += [replace(packed, value_format=wrong) for wrong in ("int2", "int4", "int8")]
            broken += [replace(packed, count=packed.count + 8)]
        for wrong in broken:
            with pytest.raises(BackendError):
                cpu.prepare(wrong)


@needs_library
@pytest.mark.parametrize("fmt", ["2:8", "4:16"])
def test_numbers_that_are_no_code_are_refused(fmt: str) -> None:
    packed = example(fmt, (40, 64))
    packed.pattern.fill_(255)
    with pytest.raises(BackendError, match="entries"):
        cpu.prepare(packed)


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("fmt", ["bitmask", "block4", "block8"])
def test_a_pattern_changed_behind_torch_reads_nothing_that_is_not_there(fmt: str, isa: str) -> None:
    """Values lie at the end of a page that is followed by one nobody may read."""
    for values in (torch.float32, torch.bfloat16, torch.int8, 6, "nl5"):
        for axis in (0, 1) if pattern_named(fmt).block > 1 else (1,):
            dtype = values if isinstance(values, torch.dtype) else torch.int8
            packed = example(fmt, (48, 160), dtype=dtype, axis=axis)
            packed = narrow(packed, 6) if values == 6 else leveled(packed, "nl5", 16) if values == "nl5" else packed
            packed = replace(packed, values_Z=at_the_end_of_a_page(packed.values_Z))
            prepared, kept = cpu.prepare(packed), packed.pattern.clone()
            for tokens in (1, 4, 9):
                x = inputs(tokens, 160, torch.float32)
                y = cpu.multiply(x, prepared, isa=isa)
                packed.pattern.numpy().fill(255)  # unseen by the version that torch counts
                with pytest.raises(BackendError, match="the pattern do not fit"):
                    cpu.multiply(x, prepared, isa=isa)
                packed.pattern.numpy()[:] = kept.flip(0).numpy()  # fits, or not: never more than an error
                with contextlib.suppress(BackendError):
                    cpu.multiply(x, prepared, isa=isa)
                packed.pattern.numpy()[:] = kept.numpy()
                assert torch.equal(cpu.multiply(x, prepared, isa=isa), y)


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", ["int2", "int3", "int4", "int5", "int6", "int7", "nl2", "nl3", "nl4", "nl5"])
def test_no_byte_behind_whole_rows_is_read(values: str, isa: str) -> None:
    numbers = values_named(values)
    whole = example("full", (24, 192), dtype=torch.int8)
    packed = leveled(whole, values) if numbers.levels else narrow(whole, numbers.bits or 8)
    packed = replace(packed, values_Z=at_the_end_of_a_page(packed.values_Z))
    for tokens in (1, 4):
        x = inputs(tokens, 192, torch.float32)
        assert_close(cpu.multiply(x, cpu.prepare(packed), isa=isa), exact_grouped(x, packed), TOLERANCE[torch.float32])
        cpu.multiply(x, cpu.prepare(packed), isa=isa, activation_bits=8)  # would end the process


def at_the_end_of_a_page(values: Tensor) -> Tensor:
    """A copy whose last byte is the last of readable memory."""
    pages = -(-values.nbytes // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    process = ctypes.CDLL(None, use_errno=True)
    assert process.mprotect(ctypes.c_void_p(whole.data_ptr() + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    end = pages * mmap.PAGESIZE
    copy = whole[end - values.nbytes : end].view(values.dtype)
    copy.copy_(values)
    return copy


def call_of(prepared: cpu.CpuMatrix, tokens: int = 3) -> tuple[cpu._Call, Tensor, Tensor]:
    rows, cols = prepared.packed.shape
    x, y = inputs(tokens, cols, torch.float32), torch.full((tokens, rows), 7.0)
    return cpu._call(x, y, None, None, 0, None), x, y


@needs_library
def test_every_avx512_instruction_of_the_kernels_has_its_emulation() -> None:
    root = Path(__file__).parents[1]
    folder = root / "src/fips/kernels/csrc"
    files = [path for path in folder.iterdir() if "512" in path.name or path.name == "amx.cpp"]
    assert len(files) > 8
    used = {name for path in files for name in re.findall(r"\b_mm512_\w+", path.read_text())}
    emulated = re.findall(r"#define (_mm512_\w+)", (root / "tests/emulation/immintrin.h").read_text())
    assert used <= set(emulated)
    for path in files:  # assembly cannot be emulated: only what is compiled for such processors may have it
        before = re.findall(r"(.*)\n\s*__asm__\(\"", path.read_text())
        assert all(re.fullmatch(r"#if .*defined\(__AVX512\w+\)", line) for line in before), path


@pytest.mark.slow
def test_the_library_is_chosen_by_a_variable(tmp_path: Path) -> None:
    """`off`, or another path; what cannot be had is told, and torch does the work."""
    copied = shutil.copy(cpu._library._name, tmp_path)
    program = "from fips.kernels import cpu; print(cpu.available(), cpu.unavailable_reason(), cpu._library)"

    def told(wish: str) -> str:
        environment = {**os.environ, "FIPS_KERNELS": wish}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert told("off") == "False FIPS_KERNELS=off None\n"
    assert told(str(copied)).startswith("True")
    assert str(copied) in told(str(copied))
    assert "cannot be loaded" in told(str(tmp_path / "missing.so"))


BIG = 2**62
CALL_LIES = [
    ("x", None), ("y", None), ("tokens", -1), ("tokens", 4), ("tokens", BIG), ("x_columns", 63), ("x_columns", 65),
    ("y_columns", 39), ("y_columns", 41), ("x_stride", -1), ("x_stride", 65), ("x_stride", BIG), ("y_stride", 39),
    ("y_stride", 41), ("y_stride", -BIG), ("x_length", 191), ("x_length", -1), ("x_length", BIG), ("y_length", 119),
    ("bias_length", 40), ("x_type", 3), ("x_type", -1), ("y_type", 3), ("y_type", -1), ("threads", 0),
    ("threads", 2**31 - 1), ("isa", -1), ("isa", 6),
    ("path", -1), ("path", 4), ("activation_bits", 0), ("activation_bits", 12),
]  # fmt: skip
MATRIX_LIES = [
    ("rows", -1), ("rows", 41), ("rows", BIG), ("cols", 0), ("cols", -64), ("cols", 65), ("cols", 128), ("cols", BIG),
    ("format", -1), ("format", 5), ("value_type", 4), ("value_type", -1), ("value_type", 1), ("values", None),
    ("num_values", -1), ("num_values", BIG), ("value_bytes", 0), ("value_bytes", -1), ("pattern_bytes", -1),
    ("value_bits", 1), ("value_bits", 9), ("value_bits", 64), ("num_scales", 1), ("m", -4), ("n", 99),
    ("scale_group", 32), ("scale_group", -1), ("num_group_scales", 80), ("group_scales", 4096), ("levels", 4096),
    ("num_levels", 16), ("num_levels", -1), ("rotation", 0), ("rotation", -4), ("rotation", 8), ("rotation", 256),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_library_believes_no_argument(fmt: str) -> None:
    """One wrong number at a time in what the C interface is told; nothing is written."""
    prepared = cpu.prepare(example(fmt, (40, 64), dtype=torch.int8))
    library = cpu._require()
    matrix_lies = list(MATRIX_LIES)
    if prepared.row_start is not None:
        matrix_lies += [("row_start", None), ("num_starts", 39), ("num_starts", 41), ("pattern", None)]
        matrix_lies += [("num_values", prepared.packed.kept - 8)]
    for where, lies in (("call", CALL_LIES), ("matrix", matrix_lies)):
        for name, value in lies:
            call, x, y = call_of(prepared)
            matrix = cpu._Matrix.from_buffer_copy(prepared.struct)
            if (name in ("m", "n")) and ":" not in fmt and (name == "n" or pattern_named(fmt).block == 1):
                continue  # not looked at
            setattr(call if where == "call" else matrix, name, value)
            status = library.fips_multiply(ctypes.byref(matrix), ctypes.byref(call))
            assert status in (-1, -2), (name, value, status)
            if name not in ("x", "y"):
                place = (ctypes.byref(matrix), ctypes.byref(call), x.data_ptr(), y.data_ptr())
                assert library.fips_multiply_again(*place) in (-1, -2)
            assert torch.equal(y, torch.full_like(y, 7.0)), name
    assert library.fips_multiply(None, None) == -2
    assert library.fips_multiply_again(prepared.reference, None, None, None) == -2
    call, _, _ = call_of(prepared)
    assert library.fips_multiply_again(prepared.reference, ctypes.byref(call), None, None) == -2


@needs_library
def test_the_library_checks_products_with_columns_and_starts_too() -> None:
    library = cpu._require()
    prepared = cpu.prepare(example("full", (64, 40)))
    for name, value in CALL_LIES:
        if name in ("isa", "path"):
            continue
        x, y = inputs(3, 64, torch.float32), torch.full((3, 40), 7.0)
        call = cpu._call(x, y, None, None, 0, None)
        setattr(call, name, value)
        assert library.fips_multiply_columns(prepared.reference, ctypes.byref(call)) in (-1, -2), (name, value)
        assert torch.equal(y, torch.full_like(y, 7.0)), name
    assert library.fips_multiply_columns(None, None) == -2
    counted = cpu.prepare(example("bitmask", (40, 64)))
    starts = torch.full((41,), 7, dtype=torch.int32)
    for length in (-1, 0, 39, 41, BIG):
        assert library.fips_row_starts(counted.reference, starts.data_ptr(), length) == -2
    assert library.fips_row_starts(counted.reference, None, 40) == -2
    assert library.fips_row_starts(None, starts.data_ptr(), 40) == -2
    assert torch.equal(starts, torch.full((41,), 7, dtype=torch.int32))
    assert library.fips_row_starts(counted.reference, starts.data_ptr(), 40) == counted.packed.kept
    assert starts[40] == 7


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
def test_starts_that_lead_beyond_the_values_are_refused(isa: str) -> None:
    for fmt in ("bitmask", "block8"):
        prepared = cpu.prepare(example(fmt, (40, 64)))
        assert prepared.row_start is not None
        right = prepared.row_start.clone()
        for row in (0, 17, 39):
            for start in (prepared.packed.kept, 2**31 - 1, -1):
                prepared.row_start.copy_(right)
                prepared.row_start[row] = start
                x = inputs(3, 64, torch.float32)
                with pytest.raises(BackendError):
                    cpu.multiply(x, prepared, isa=isa)


MEMORY_SCRIPT = """
import os, resource
import torch
from fips.kernels import cpu
from test_kernels import example, narrow
torch.set_num_threads(1)

def multiply(values, megabytes):
    packed = example("bitmask", (32, 4096), dtype=torch.int8)
    prepared = cpu.prepare(narrow(packed, 4) if values == "int4" else packed)
    x = torch.zeros(4096, 4096)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
    try:
        cpu.multiply(x, prepared)
        result = "done"
    except MemoryError as error:
        result = f"MemoryError {error}"
    print(values, megabytes, result, "then", *cpu.multiply(x[:1], prepared).shape, flush=True)

for values in ("int8", "int4"):
    for megabytes in (4, 30):
        pid = os.fork()  # every case has a limit of its own
        if pid == 0:
            multiply(values, megabytes)
            os._exit(0)
        os.waitpid(pid, 0)
"""


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs address space itself")
@pytest.mark.slow
def test_no_memory_is_a_memory_error_and_little_is_needed() -> None:
    """The inputs are 64 MiB, and once were laid out anew as a whole."""
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    outcomes = ("4 MemoryError no memory", "30 done")
    wanted = [f"{values} {outcome}" for values in ("int8", "int4") for outcome in outcomes]
    for line, start in zip(lines, wanted, strict=True):
        assert line.startswith(start), line
        assert line.endswith(" then 1 32")


@needs_library
def test_scratch_is_counted_bounded_and_given_back() -> None:
    prepared = cpu.prepare(example("bitmask", (32, 1024), dtype=torch.bfloat16))
    cpu.free_scratch()
    assert cpu.scratch_bytes() == 0
    cpu.multiply(inputs(64, 1024, torch.float32), prepared)
    small = cpu.scratch_bytes()
    assert 0 < small <= 8 << 20
    cpu.multiply(inputs(64, 1024, torch.float32), prepared)
    assert cpu.scratch_bytes() == small  # kept for the next call
    cpu.multiply(torch.zeros(6000, 1024), prepared)
    assert cpu.scratch_bytes() <= 9 * torch.get_num_threads() << 20  # each took tokens of its own
    assert cpu.free_scratch() > 0
    long = cpu.prepare(example("bitmask", (2, 60_000)))
    cpu.multiply(torch.zeros(64, 60_000), long)
    assert cpu.scratch_bytes() == 0  # more than is kept
    cpu.multiply(inputs(64, 1024, torch.float32), prepared)
    with ThreadPoolExecutor(3) as pool:  # of threads that live on
        barrier = Barrier(3)
        list(pool.map(lambda _: (cpu.multiply(inputs(64, 1024, torch.float32), prepared), barrier.wait()), range(3)))
        assert cpu.scratch_bytes() == 4 * small
        assert cpu.free_scratch() == 4 * small
        assert cpu.scratch_bytes() == 0
        list(pool.map(lambda _: (cpu.multiply(inputs(64, 1024, torch.float32), prepared), barrier.wait()), range(3)))
    for _ in range(500):  # what ended threads kept goes with them, a moment after Python has seen the end of them
        if cpu.scratch_bytes() == 0:
            break
        time.sleep(0.01)
    assert cpu.scratch_bytes() == 0


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8])
def test_tokens_laid_out_in_parts_are_the_same_tokens(values: torch.dtype, isa: str) -> None:
    prepared = cpu.prepare(example("bitmask", (8, 20_000), dtype=values))  # 104 tokens at a time, or fewer
    x = inputs(300, 20_000, torch.bfloat16)
    whole = cpu.multiply(x, prepared, isa=isa, path="tokens")
    parts = [cpu.multiply(part, prepared, isa=isa, path="tokens") for part in x.split(75)]
    assert torch.equal(whole, torch.cat(parts))


def test_every_flag_of_the_compiler_is_asked_for() -> None:
    """An instruction set is used only where the processor has all that its code was compiled with."""
    root = Path(__file__).parents[1]
    build = (root / "CMakeLists.txt").read_text()
    flags = set(re.findall(r"(?<=\s)-m([a-z0-9-]+)(?=[\s)])", build)) - {"prefer-vector-width"}
    source = (root / "src/fips/kernels/csrc/dispatch.cpp").read_text()
    asked = source[source.index("bool may_use_amx()") : source.index("int detect() { return 1 << FIPS_PORTABLE; }")]
    names = set(re.findall(r'HAS\("(\w+)"\)', asked)) | set(re.findall(r"\b(amx_\w+) =", asked))
    assert {"avx2", "bmi", "bmi2", "popcnt", "avx512f", "avx512bf16", "amx-tile"} <= flags
    assert {flag.replace("-", "_") for flag in flags} <= names
    for name in re.findall(r"\b(amx_\w+) =", asked):
        assert re.search(rf"return .*\b{name}\b", asked), name
