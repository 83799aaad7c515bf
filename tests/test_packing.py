"""Packed formats: exact inverses with exactly the bytes that accounting predicts."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from fips.formats.masks import nm_mask
from fips.formats.packed import Packed, dense_slices, to_dense
from fips.formats.patterns import BlockAxis, pattern_named
from fips.formats.values import integers, pack_integers, packed_length, unpack_integers, values_named

FORMATS = ["full", "bitmask", "2:4", "1:4", "4:16", "8:16", "2:16", "3:7", "16:32"]


def example(fmt: str, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    m = int(fmt.partition(":")[2] or 11)
    matrix = torch.randn(13, 7 * m, generator=generator).to(dtype)
    if fmt == "full":
        return matrix, torch.ones_like(matrix, dtype=torch.bool)
    if fmt == "bitmask":
        mask = torch.rand(matrix.shape, generator=generator) < 0.3
        mask[2], mask[3] = False, True  # an empty and a full row
        return matrix, mask
    return matrix, nm_mask(matrix.abs().float(), n=int(fmt.partition(":")[0]), m=m, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_unpack_inverts_pack_exactly(fmt: str, dtype: torch.dtype) -> None:
    matrix, mask = example(fmt, dtype=dtype)
    values, pattern = pattern_named(fmt).pack(matrix, mask)
    assert values.dtype == dtype
    assert pattern.dtype == torch.uint8
    assert values.numel() == int(mask.sum())
    assert pattern.numel() == pattern_named(fmt).nbytes(matrix.numel())
    shape = (matrix.shape[0], matrix.shape[1])
    assert torch.equal(pattern_named(fmt).unpack_mask(pattern, shape), mask)
    assert torch.equal(pattern_named(fmt).unpack(values, pattern, shape), matrix * mask)


def block_example(fmt: str, axis: BlockAxis) -> tuple[torch.Tensor, torch.Tensor]:
    """Odd number of rows, columns and blocks; an empty and a full line of blocks."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(5, 13, generator=generator) < 0.3
    blocks[1], blocks[2] = False, True
    mask = (
        blocks.repeat_interleave(pattern_named(fmt).block, dim=0)
        if axis == 0
        else blocks.repeat_interleave(pattern_named(fmt).block, dim=1)
    )
    return torch.randn(mask.shape, generator=generator), mask


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fmt", ["block4", "block8"])
def test_block_formats_invert_exactly_with_one_bit_per_block(fmt: str, axis: BlockAxis) -> None:
    matrix, mask = block_example(fmt, axis)
    values, pattern = pattern_named(fmt).pack(matrix, mask, axis)
    assert pattern.numel() == pattern_named(fmt).nbytes(matrix.numel()) == 9  # 65 blocks
    shape = (matrix.shape[0], matrix.shape[1])
    assert torch.equal(pattern_named(fmt).unpack_mask(pattern, shape, axis), mask)
    assert torch.equal(pattern_named(fmt).unpack(values, pattern, shape, axis), matrix * mask)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_entries_of_a_block_lie_together_and_blocks_are_row_major(axis: BlockAxis) -> None:
    matrix, mask = block_example("block4", axis)
    expected = []
    rows, cols = matrix.shape
    for i in range(0, rows, 4 if axis == 0 else 1):
        for j in range(0, cols, 1 if axis == 0 else 4):
            if mask[i, j]:
                expected += [matrix[i + k, j] if axis == 0 else matrix[i, j + k] for k in range(4)]
    values, _ = pattern_named("block4").pack(matrix, mask, axis)
    assert torch.equal(values, torch.stack(expected))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_split_block_and_an_odd_size_are_refused(axis: BlockAxis) -> None:
    matrix, mask = block_example("block4", axis)
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(ValueError, match=f"splits a block of 4 neighbours along axis {axis}"):
        pattern_named("block4").pack(matrix, mask, axis)
    with pytest.raises(ValueError, match="needs a multiple of 8 along axis"):
        pattern_named("block8").pack(torch.zeros(12, 12), torch.zeros(12, 12, dtype=torch.bool), axis)


def test_int8_rows_reach_127_and_err_by_half_a_step_at_most() -> None:
    matrix, mask = example("bitmask")
    matrix = matrix * torch.logspace(-6, 6, 13).unsqueeze(1)
    scales, _ = integers(8).fitted_scales(matrix, mask, torch.float32)
    quantized = integers(8).quantize(matrix * mask, scales)
    assert scales[2] == 0  # the empty row
    assert torch.equal(quantized[2], torch.zeros(77, dtype=torch.int8))
    assert quantized.abs().amax(1).tolist() == [0 if row == 2 else 127 for row in range(13)]
    error = (integers(8).dequantize(quantized, scales) - matrix * mask).abs()
    assert (error <= scales.unsqueeze(1) * 0.5001).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1003])
def test_integers_of_few_bits_come_back_exactly(bits: int, count: int) -> None:
    limit = int(integers(bits).largest)
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(-limit - 1, limit + 1, (count,), generator=generator).to(torch.int8)
    packed = pack_integers(values, bits=bits)
    assert packed.numel() == packed_length(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_integers(packed, bits=bits, count=count), values)


def test_the_stream_of_integers_starts_at_the_lowest_bit() -> None:
    packed = pack_integers(torch.tensor([1, -1, 3], dtype=torch.int8), bits=3)
    assert packed.tolist() == [0b11_111_001, 0b0]  # 1, 7 and the low bits of 3; then its high bit, 0


def test_int8_clips_to_a_symmetric_range() -> None:
    quantized = integers(8).quantize(torch.tensor([[-9.0, 9.0, 1.0, 0.4]]), torch.tensor([0.01]))
    assert quantized.tolist() == [[-127, 127, 100, 40]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 16), (8, 16), (2, 16), (3, 7)])
def test_codes_use_the_fewest_whole_bits(n: int, m: int) -> None:
    assert (
        2 ** (pattern_named(f"{n}:{m}").group_bits - 1) < math.comb(m, n) <= 2 ** pattern_named(f"{n}:{m}").group_bits
    )
    size = 8 * m
    assert pattern_named(f"{n}:{m}").nbytes(size) == pattern_named(f"{n}:{m}").group_bits


def test_every_subset_has_its_own_code() -> None:
    subsets = list(combinations(range(6), 3))
    mask = torch.zeros(len(subsets), 6, dtype=torch.bool)
    for row, subset in enumerate(subsets):
        mask[row, list(subset)] = True
    _, pattern = pattern_named("3:6").pack(mask.float(), mask)
    assert torch.equal(pattern_named("3:6").unpack_mask(pattern, (len(subsets), 6)), mask)


def test_gradients_reach_the_values_only() -> None:
    matrix, mask = example("bitmask")
    values, pattern = pattern_named("bitmask").pack(matrix, mask)
    values.requires_grad_(True)
    weights = torch.randn_like(matrix)
    (pattern_named("bitmask").unpack(values, pattern, (13, 77)) * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights[mask])


@pytest.mark.parametrize("fmt", ["full", "2:4"])
def test_a_mask_without_the_promised_structure_is_refused(fmt: str) -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        pattern_named(fmt).pack(torch.zeros(2, 8), mask)


@pytest.mark.parametrize("fmt", ["csr", "4:2", "4:64", "a:b"])
def test_unknown_formats_are_refused(fmt: str) -> None:
    with pytest.raises(ValueError, match="unknown packed format"):
        pattern_named(fmt).nbytes(16)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("values", ["float", "int8", "int5", "int4", "int3g16", "nl3g64", "tc3", "tc2g32"])
@pytest.mark.parametrize("fmt", ["full", "bitmask", "2:4", "3:7", "block4"])
def test_rows_decoded_apart_are_those_of_the_whole(fmt: str, values: str, axis: BlockAxis) -> None:
    numbers, layout = values_named(values), pattern_named(fmt)
    if numbers.memory and fmt != "full":
        pytest.skip("values that leave no entry out")
    generator = torch.Generator().manual_seed(0)
    rows, cols = 1000, 56
    codes = torch.randn(rows, cols, generator=generator)
    if numbers.bits is not None:
        half = 1 << (numbers.bits - 1)
        codes = torch.randint(-half, half, (rows, cols), generator=generator).to(torch.int8)
    scores = torch.rand(rows, cols, generator=generator)
    mask = torch.ones_like(scores, dtype=torch.bool)
    if fmt == "bitmask":
        mask = scores < 0.3
    elif fmt == "block4":
        blocks = torch.rand(rows // 4, cols // 4, generator=generator) < 0.3
        mask = blocks.repeat_interleave(4, 0).repeat(1, 4)[:, :cols] if axis == 0 else mask
        mask = mask if axis == 0 else torch.cat([blocks] * 4).repeat_interleave(4, 1)
    elif fmt != "full":
        mask = nm_mask(scores, n=int(fmt[0]), m=int(fmt[2]), dim=1)
    kept_Z, pattern = layout.pack(codes, mask, axis)
    scales, groups = numbers.num_scales_of(rows, cols)
    packed = Packed(
        numbers.pack(kept_Z), pattern, torch.rand(scales, generator=generator) if scales else None, (rows, cols), fmt,
        axis, values, 0 if numbers.bits in (None, 8) else kept_Z.numel(),
        torch.randint(0, 256, (groups,), generator=generator).to(torch.uint8) if groups else None,
        4 if numbers.scaled else 1,
    )  # fmt: skip
    whole = to_dense(packed)
    for most in (1, 100 * cols, rows * cols):
        slices = list(dense_slices(packed, most))
        assert torch.equal(torch.cat([part for _, part in slices]), whole)
        assert [row for places, _ in slices for row in range(rows)[places]] == list(range(rows))
        assert len(slices) > 1 or most == rows * cols
