"""The Triton kernel against a float64 product; on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install fips[gpu]")

from dataclasses import replace

from test_kernels import FORMATS, TOLERANCE, assert_close, exact, example, inputs, narrow

from fips.kernels import gpu
from fips.kernels.reference import Packed, in_place, to_dense
from fips.storage.packing import BLOCKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(packed: Packed) -> Packed:
    scales = None if packed.scales_N is None else packed.scales_N.to(DEVICE)
    values, pattern = packed.values_Z.to(DEVICE), packed.pattern.to(DEVICE)
    return replace(packed, values_Z=values, pattern=pattern, scales_N=scales)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_triton_kernel_agrees_with_float64(fmt: str, values: torch.dtype) -> None:
    for axis in (0, 1) if fmt in BLOCKS else (1,):
        packed = example(fmt, (72, 144), dtype=values, axis=axis)
        prepared = gpu.prepare(moved(packed))
        for dtype, tokens in ((torch.float32, 1), (torch.bfloat16, 17), (torch.float16, 3)):
            x, bias = inputs(tokens, 144, dtype), inputs(1, 72, dtype)[0]
            y = gpu.multiply(x.to(DEVICE), prepared, bias.to(DEVICE)).cpu()
            # values are brought to the type of x before the product
            held = Packed(packed.values_Z.to(dtype).double() if values != torch.int8 else packed.values_Z,
                          packed.pattern, packed.scales_N, packed.shape, packed.fmt, packed.block_axis)  # fmt: skip
            assert_close(y, exact(x, held, bias), TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("fmt", FORMATS)
def test_narrow_integers_are_cut_out_of_their_bytes(fmt: str, bits: int) -> None:
    packed = narrow(example(fmt, (72, 144), dtype=torch.int8), bits)
    assert in_place(packed).abs().amax() > 0
    x = inputs(5, 144, torch.float32)
    y = gpu.multiply(x.to(DEVICE), gpu.prepare(moved(packed))).cpu()
    assert packed.scales_N is not None
    assert_close(
        y, x.double() @ to_dense(replace(packed, scales_N=packed.scales_N.double())).T, TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("shape", [(1, 1), (13, 77), (65, 130)])
def test_odd_shapes_and_strides(shape: tuple[int, int]) -> None:
    packed = example("bitmask", shape)
    prepared = gpu.prepare(moved(packed))
    x = inputs(10, 2 * shape[1], torch.float32).view(5, 2, -1)[..., ::2]
    y = gpu.multiply(x.to(DEVICE), prepared).cpu()
    assert y.shape == (5, 2, shape[0])
    assert_close(y, exact(x, packed), TOLERANCE[torch.float32])
