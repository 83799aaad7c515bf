"""Every kernel against a float64 product: formats, types, odd shapes, empty and full rows, strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fips.errors import BackendError, ConfigError
from fips.kernels import cpu, ops, reference
from fips.kernels.reference import Packed
from fips.solve.patterns import nm_mask
from fips.storage.packing import BLOCKS, pack, pack_integers, quantize_rows, row_scales, unpack_integers

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")

FORMATS = ["dense", "bitmask", "2:4", "1:4", "4:8", "2:8", "4:16", "8:16", "2:16", "1:2", "block4", "block8"]
SHAPES = [(1, 1), (13, 77), (5, 63), (8, 20), (65, 130), (31, 257), (40, 48), (33, 80), (7, 64), (300, 208)]
TOLERANCE = {torch.float32: (5e-6, 3e-5), torch.float16: (2e-3, 2e-2), torch.bfloat16: (1e-2, 1e-1)}
"""Relative Frobenius error and worst element over RMS."""


def example(
    fmt: str, shape: tuple[int, int], *, dtype: torch.dtype = torch.float32, axis: int = 1, seed: int = 0
) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.bool)
    if fmt in BLOCKS:
        size = BLOCKS[fmt]
        grid = (shape[0] // size, shape[1]) if axis == 0 else (shape[0], shape[1] // size)
        mask = (torch.rand(grid, generator=generator) < 0.4).repeat_interleave(size, axis)
    elif fmt == "bitmask":
        mask = torch.rand(shape, generator=generator) < 0.3
        if shape[0] > 3:
            mask[2], mask[3] = False, True  # an empty and a full row
    elif fmt != "dense":
        mask = nm_mask(matrix.abs(), n=int(fmt.partition(":")[0]), m=int(fmt.partition(":")[2]), dim=1)
    scales = None
    if dtype == torch.int8:
        scales = row_scales(matrix, mask)
        matrix = quantize_rows(matrix, scales)
    else:
        matrix = matrix.to(dtype)
    block_axis = 0 if axis == 0 else 1
    values, pattern = pack(matrix, mask, fmt=fmt, block_axis=block_axis)
    return Packed(values, pattern, scales, shape, fmt, block_axis)  # type: ignore[arg-type]


def exact(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    wide = Packed(
        packed.values_Z.double(),
        packed.pattern,
        None if packed.scales_N is None else packed.scales_N.double(),
        packed.shape,
        packed.fmt,
        packed.block_axis,
    )
    dense = reference.to_dense(wide)
    return x.double() @ dense.T + (0 if bias is None else bias.double())


def assert_close(actual: Tensor, expected: Tensor, tolerance: tuple[float, float]) -> None:
    difference = actual.double() - expected
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    assert difference.norm() / expected.norm().clamp_min(1e-30) < tolerance[0]
    assert difference.abs().max() / scale < tolerance[1]


def inputs(tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def fits(fmt: str, shape: tuple[int, int], axis: int) -> bool:
    unit = BLOCKS.get(fmt) or int(fmt.partition(":")[2] or 1)
    return shape[axis if fmt in BLOCKS else 1] % unit == 0


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_path_agrees_with_float64(fmt: str, values: torch.dtype, isa: str) -> None:
    blocked = [(fmt, 0) for fmt in BLOCKS]  # the values of a row do not lie together
    for axis in (0, 1) if fmt in BLOCKS else (1,):
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
    return replace(packed, values_Z=pack_integers(values, bits=bits), bits=bits, count=values.numel())


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("fmt", FORMATS)
def test_integers_of_few_bits_agree_with_float64(fmt: str, bits: int, isa: str) -> None:
    for shape in ((96, 160), *SHAPES):
        if not fits(fmt, shape, 1):
            continue
        packed = narrow(example(fmt, shape, dtype=torch.int8), bits)
        wide = replace(packed, values_Z=unpack_integers(packed.values_Z, bits=bits, count=packed.count), count=0)
        prepared = cpu.prepare(packed)
        for tokens in (1, 4, 33):
            for dtype in (torch.float32, torch.bfloat16):
                x = inputs(tokens, shape[1], dtype)
                for path in ("auto",) if isa == "portable" else ("auto", "tiles"):
                    y = cpu.multiply(x, prepared, path=path, isa=isa)
                    assert_close(y, exact(x, wide), TOLERANCE[dtype])
                assert_close(reference.multiply(x, packed), exact(x, wide), TOLERANCE[dtype])


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_odd_shapes(fmt: str, shape: tuple[int, int], isa: str) -> None:
    for values in (torch.float32, torch.bfloat16, torch.int8):
        for axis in (0, 1) if fmt in BLOCKS else (1,):
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
        for tokens in (1, 16, 77):
            x = inputs(tokens, 520, torch.bfloat16)
            results = []
            for count in (1, 2, 5):  # rows, and who packs the tokens, are shared in another way each time
                torch.set_num_threads(count)
                results.append(cpu.multiply(x, prepared, isa=isa))
            assert all(torch.equal(result, results[0]) for result in results[1:])
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("fmt", ["dense", "bitmask", "4:16", "block8"])
def test_long_rows_are_multiplied_in_parts(fmt: str, values: torch.dtype, isa: str) -> None:
    packed = example(fmt, (205, 2576), dtype=values)
    prepared = cpu.prepare(packed)
    for tokens in (5, 16, 24, 150):
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(tokens, 2576, dtype)
            assert_close(cpu.multiply(x, prepared, isa=isa), exact(x, packed), TOLERANCE[dtype])
    if values == torch.int8 and fmt in ("dense", "bitmask"):
        short = narrow(packed, 4)
        wide = replace(short, values_Z=unpack_integers(short.values_Z, bits=4, count=short.count), count=0)
        for tokens in (5, 150):
            x = inputs(tokens, 2576, torch.bfloat16)
            assert_close(cpu.multiply(x, cpu.prepare(short), isa=isa), exact(x, wide), TOLERANCE[torch.bfloat16])


@needs_library
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kept", [False, True])
def test_all_empty_and_all_full(kept: bool, values: torch.dtype) -> None:
    matrix = torch.randn(37, 70)
    mask = torch.full((37, 70), kept)
    scales = row_scales(matrix, mask) + 1e-9 if values == torch.int8 else None
    stored = matrix.to(values) if scales is None else quantize_rows(matrix, scales)
    packed = Packed(*pack(stored, mask, fmt="bitmask"), scales, (37, 70), "bitmask")
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
    packed = example("dense", shape, dtype=values)
    dense = reference.to_dense(packed).double()
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
def test_a_damaged_pattern_is_refused() -> None:
    packed = example("bitmask", (40, 64))
    packed.pattern[3] ^= 1
    with pytest.raises(BackendError, match="entries"):
        cpu.prepare(packed)


def test_what_has_no_kernel_is_said() -> None:
    three = Packed(torch.zeros(21), torch.zeros(3, dtype=torch.uint8), None, (1, 49), "3:7")
    assert not cpu.supports(three, torch.float32)
    assert not cpu.supports(example("dense", (4, 4)), torch.float64)


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
    sample = (x, packed.values_Z, packed.pattern, None, None, [96, 160], "bitmask", 1, 8, 0)
    torch.library.opcheck(torch.ops.fips.packed_linear, sample, test_utils=("test_schema", "test_faketensor"))
