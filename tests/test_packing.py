"""Packed formats: exact inverses with exactly the bytes that accounting predicts."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from fips.solve.patterns import nm_mask
from fips.storage.packing import code_bits, pack, pattern_bytes, unpack, unpack_mask

FORMATS = ["dense", "bitmask", "2:4", "1:4", "4:16", "8:16", "2:16", "3:7", "16:32"]


def example(fmt: str, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    m = int(fmt.partition(":")[2] or 11)
    matrix = torch.randn(13, 7 * m, generator=generator).to(dtype)
    if fmt == "dense":
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
    values, pattern = pack(matrix, mask, fmt=fmt)
    assert values.dtype == dtype
    assert pattern.dtype == torch.uint8
    assert values.numel() == int(mask.sum())
    assert pattern.numel() == pattern_bytes(size=matrix.numel(), fmt=fmt)
    shape = (matrix.shape[0], matrix.shape[1])
    assert torch.equal(unpack_mask(pattern, shape=shape, fmt=fmt), mask)
    assert torch.equal(unpack(values, pattern, shape=shape, fmt=fmt), matrix * mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 16), (8, 16), (2, 16), (3, 7)])
def test_codes_use_the_fewest_whole_bits(n: int, m: int) -> None:
    assert 2 ** (code_bits(n, m) - 1) < math.comb(m, n) <= 2 ** code_bits(n, m)
    size = 8 * m
    assert pattern_bytes(size=size, fmt=f"{n}:{m}") == code_bits(n, m)


def test_every_subset_has_its_own_code() -> None:
    subsets = list(combinations(range(6), 3))
    mask = torch.zeros(len(subsets), 6, dtype=torch.bool)
    for row, subset in enumerate(subsets):
        mask[row, list(subset)] = True
    _, pattern = pack(mask.float(), mask, fmt="3:6")
    assert torch.equal(unpack_mask(pattern, shape=(len(subsets), 6), fmt="3:6"), mask)


def test_gradients_reach_the_values_only() -> None:
    matrix, mask = example("bitmask")
    values, pattern = pack(matrix, mask, fmt="bitmask")
    values.requires_grad_(True)
    weights = torch.randn_like(matrix)
    (unpack(values, pattern, shape=(13, 77), fmt="bitmask") * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights[mask])


@pytest.mark.parametrize("fmt", ["dense", "2:4"])
def test_a_mask_without_the_promised_structure_is_refused(fmt: str) -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        pack(torch.zeros(2, 8), mask, fmt=fmt)


@pytest.mark.parametrize("fmt", ["csr", "4:2", "4:64", "a:b"])
def test_unknown_formats_are_refused(fmt: str) -> None:
    with pytest.raises(ValueError, match="unknown packed format"):
        pattern_bytes(size=16, fmt=fmt)
