"""Kernels that read whole matrices of codes word by word; on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install fips[gpu]")

from test_gpu_kernel import DEVICE, moved
from test_kernels import TOLERANCE, assert_close, example, grouped, inputs, leveled, narrow
from test_trellis import coded

from fips.formats.packed import Packed, to_dense
from fips.formats.trellis import RUN
from fips.kernels import triton_kernel, triton_words

pytestmark = pytest.mark.usefixtures("large_programs")
INTEGERS = [f"int{bits}" for bits in range(2, 9)]
LEVELS = ["nl2", "nl3g16", "nl4g64", "nl5", "nl5g32"]
CODED = ["tc2g64", "tc3", "tc4g16"]
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def matrix(values: str, rows: int, cols: int) -> Packed:
    if values.startswith("tc"):
        return coded(values, rows, cols)
    whole = example("full", (rows, cols), dtype=torch.int8)
    if values.startswith("nl"):
        return leveled(whole, values)
    bits, _, group = values.removeprefix("int").partition("g")
    if group:
        return grouped(whole, int(bits), int(group))
    return whole if bits == "8" else narrow(whole, int(bits))


def check(packed: Packed, tokens: int, dtype: torch.dtype) -> None:
    rows, cols = packed.shape
    prepared = triton_kernel.prepare(moved(packed))
    assert prepared.words is not None
    x, bias = inputs(tokens, cols, dtype), inputs(1, rows, dtype)[0]
    y = triton_kernel.multiply(x.to(DEVICE), prepared, bias.to(DEVICE)).cpu()
    assert packed.scales_N is not None
    dense = to_dense(replace(packed, scales_N=packed.scales_N.double()))
    assert_close(y, x.double() @ dense.T + bias.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("values", [*INTEGERS, "int4g32", "int6g64", *LEVELS, *CODED])
@pytest.mark.slow
def test_products_and_matrices_of_every_format(values: str) -> None:
    packed = matrix(values, 12, 320 if DEVICE == "cuda" else 128)
    for tokens, dtype in ((1, torch.bfloat16), (2, torch.float32), (33, torch.float16)):
        check(packed, tokens, dtype)
    decoded = triton_kernel.decode(triton_kernel.prepare(moved(packed)), torch.float32).cpu()
    assert torch.equal(decoded, to_dense(packed).float())


@pytest.mark.parametrize(("values", "shape"), [("tc3", (RUN + 8, 8)), ("int5", (76, 1096)), ("tc4g16", (RUN + 3, 144))])
@pytest.mark.slow
def test_several_programs_and_runs(values: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in (1, 40):
        check(matrix(values, *shape), tokens, torch.bfloat16)
    monkeypatch.setattr(triton_words, "_processors", lambda device: 64)  # columns are split between programs
    check(matrix(values, *shape), 5, torch.bfloat16)


def test_what_does_not_fit_goes_another_way() -> None:
    odd = matrix("int4", 6, 44)
    assert not triton_words.WordMatrix.fits(odd)
    assert triton_words.WordMatrix.fits(matrix("int4", 6, 48))
    for other in (example("bitmask", (8, 64), dtype=torch.int8), example("full", (8, 64))):
        assert not triton_words.WordMatrix.fits(other)
    assert triton_kernel.prepare(moved(odd)).words is None


def test_nan_and_inf_come_out_as_from_a_dense_layer() -> None:
    packed = matrix("int4g32", 8, 64)
    dense = to_dense(packed)
    for tokens in (4, 16):
        x = inputs(tokens, 64, torch.bfloat16)
        x[0, 3], x[1, 63], x[2, 7] = float("nan"), float("inf"), -float("inf")
        y = triton_kernel.multiply(x.to(DEVICE), triton_kernel.prepare(moved(packed))).cpu()
        wanted = torch.nn.functional.linear(x, dense.to(torch.bfloat16))
        for same in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(same(y), same(wanted))


def test_a_token_that_begins_anywhere() -> None:
    packed = matrix("int4", 8, 64)
    prepared = triton_kernel.prepare(moved(packed))
    x = inputs(1, 66, torch.bfloat16).to(DEVICE)
    for first in (0, 1, 2, 0):
        token = x[:, first : first + 64]
        y = triton_kernel.multiply(token, prepared).cpu()
        assert_close(y, token.cpu().double() @ to_dense(packed).double().T, TOLERANCE[torch.bfloat16])
