"""The Triton kernels against a float64 product; on a GPU if there is one, else in Triton's interpreter.

Whether they compile for a GPU is seen without one, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install fips[gpu]")

from dataclasses import replace

from test_kernels import (
    FORMATS,
    TOLERANCE,
    assert_close,
    exact,
    exact_grouped,
    example,
    grouped,
    inputs,
    leveled,
    narrow,
)
from test_trellis import coded

from fips.errors import BackendError, ShapeError
from fips.formats.packed import Packed, in_place, to_dense
from fips.formats.patterns import pattern_named
from fips.formats.trellis import RUN
from fips.kernels import triton_kernel
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.models.sites import Role

pytestmark = pytest.mark.usefixtures("large_programs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = FORMATS if DEVICE == "cuda" else ["full", "bitmask", "2:4", "4:16", "block4"]
"""In the interpreter, which is slow, one format of every kind that the kernels tell apart."""


def moved(packed: Packed) -> Packed:
    scales = None if packed.scales_N is None else packed.scales_N.to(DEVICE)
    values, pattern = packed.values_Z.to(DEVICE), packed.pattern.to(DEVICE)
    groups = None if packed.group_scales is None else packed.group_scales.to(DEVICE)
    return replace(packed, values_Z=values, pattern=pattern, scales_N=scales, group_scales=groups)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.slow
def test_the_triton_kernel_agrees_with_float64(fmt: str, values: torch.dtype) -> None:
    for axis in (0, 1) if pattern_named(fmt).block > 1 else (1,):
        packed = example(fmt, (72, 144), dtype=values, axis=axis)
        prepared = triton_kernel.prepare(moved(packed))
        for dtype, tokens in ((torch.float32, 1), (torch.bfloat16, 17), (torch.float16, 3)):
            x, bias = inputs(tokens, 144, dtype), inputs(1, 72, dtype)[0]
            y = triton_kernel.multiply(x.to(DEVICE), prepared, bias.to(DEVICE)).cpu()
            # values are brought to the type of x before the product
            held = Packed(packed.values_Z.to(dtype).double() if values != torch.int8 else packed.values_Z,
                          packed.pattern, packed.scales_N, packed.shape, packed.fmt, packed.block_axis,
                          packed.value_format)  # fmt: skip
            assert_close(y, exact(x, held, bias), TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.slow
def test_narrow_integers_are_cut_out_of_their_bytes(fmt: str, bits: int) -> None:
    packed = narrow(example(fmt, (72, 144), dtype=torch.int8), bits)
    assert in_place(packed).abs().amax() > 0
    x = inputs(5, 144, torch.float32)
    y = triton_kernel.multiply(x.to(DEVICE), triton_kernel.prepare(moved(packed))).cpu()
    assert packed.scales_N is not None
    assert_close(
        y, x.double() @ to_dense(replace(packed, scales_N=packed.scales_N.double())).T, TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize(
    ("fmt", "bits", "group"),
    [("full", 4, 16), ("full", 8, 64), ("bitmask", 3, 32), ("bitmask", 4, 16), ("4:16", 8, 64), ("block4", 3, 32)],
)
@pytest.mark.slow
def test_group_scales(fmt: str, bits: int, group: int) -> None:
    for shape in ((72, 144), (24, 544)):
        packed = grouped(example(fmt, shape, dtype=torch.int8), bits, group)
        prepared = triton_kernel.prepare(moved(packed))
        for tokens, dtype in ((5, torch.float32), (3, torch.bfloat16)):
            x = inputs(tokens, shape[1], dtype)
            y = triton_kernel.multiply(x.to(DEVICE), prepared).cpu()
            assert_close(y, exact_grouped(x, packed), TOLERANCE[dtype])
        assert torch.equal(triton_kernel.decode(prepared, torch.float32).cpu(), to_dense(packed))


@pytest.mark.parametrize(("values", "rotation"), [("nl4g64", 16), ("nl3", 1), ("nl5", 16)])
@pytest.mark.parametrize("fmt", ["full", "bitmask"])
@pytest.mark.slow
def test_levels_and_turned_columns(fmt: str, values: str, rotation: int) -> None:
    packed = leveled(example(fmt, (72, 144), dtype=torch.int8), values, rotation)
    prepared = triton_kernel.prepare(moved(packed))
    for tokens, dtype in ((5, torch.float32), (3, torch.bfloat16)):
        x = inputs(tokens, 144, dtype)
        y = triton_kernel.multiply(x.to(DEVICE), prepared).cpu()
        assert_close(y, exact_grouped(x, packed), TOLERANCE[dtype])
    assert_close(
        triton_kernel.decode(prepared, torch.float32).cpu(), to_dense(packed).double(), TOLERANCE[torch.float32]
    )


def test_the_kernels_have_the_numbers_of_the_patterns() -> None:
    names = [("full", 1), ("bitmask", 1), ("2:4", 1), ("block4", 0), ("block4", 1)]
    numbers = [triton_kernel._FULL, triton_kernel._BITMASK, triton_kernel._NM, triton_kernel._BLOCK_ROWS,
               triton_kernel._BLOCK_COLS]  # fmt: skip
    assert [pattern_named(name).code(axis) for name, axis in names] == numbers


@pytest.mark.parametrize(
    ("name", "shape"),
    [("tc2g64", (5, 80)), ("tc4", (RUN + 2, 12))],  # rows of 12 columns are not read word by word
)
@pytest.mark.slow
def test_values_that_are_coded_together(shape: tuple[int, int], name: str) -> None:
    packed = coded(name, *shape, rotation=16 if shape[1] % 16 == 0 else 1)
    prepared = triton_kernel.prepare(moved(packed))
    for tokens, dtype in ((5, torch.float32), (3, torch.bfloat16)):
        x = inputs(tokens, shape[1], dtype)
        y = triton_kernel.multiply(x.to(DEVICE), prepared).cpu()
        assert_close(y, x.double() @ to_dense(packed).double().T, TOLERANCE[dtype])
    assert_close(
        triton_kernel.decode(prepared, torch.float32).cpu(), to_dense(packed).double(), TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("shape", [(1, 1), (13, 77), (65, 130)])
def test_odd_shapes_and_strides(shape: tuple[int, int]) -> None:
    packed = example("bitmask", shape)
    prepared = triton_kernel.prepare(moved(packed))
    x = inputs(10, 2 * shape[1], torch.float32).view(5, 2, -1)[..., ::2]
    y = triton_kernel.multiply(x.to(DEVICE), prepared).cpu()
    assert y.shape == (5, 2, shape[0])
    assert_close(y, exact(x, packed), TOLERANCE[torch.float32])


def test_inputs_that_do_not_fit_are_refused() -> None:
    prepared = triton_kernel.prepare(moved(example("bitmask", (24, 64))))
    for shape in ((3, 63), (3, 128), (3, 32), (64, 3), ()):
        with pytest.raises(ShapeError, match="do not fit 64 features"):
            triton_kernel.multiply(torch.zeros(shape, device=DEVICE), prepared)
    with pytest.raises(ShapeError, match="does not fit 24 outputs"):
        triton_kernel.multiply(torch.zeros(3, 64, device=DEVICE), prepared, torch.zeros(23, device=DEVICE))


@pytest.mark.parametrize("fmt", ["bitmask", "4:16", "block8", "full"])
def test_damaged_tensors_are_refused(fmt: str) -> None:
    for axis in (0, 1) if pattern_named(fmt).block > 1 else (1,):
        packed = moved(example(fmt, (24, 64), dtype=torch.int8, axis=axis))
        broken = [replace(packed, values_Z=packed.values_Z[:-8]), replace(packed, shape=(24, 128))]
        if fmt != "full":
            broken.append(replace(packed, pattern=packed.pattern[:-1]))
        if fmt in ("bitmask", "block8"):
            broken.append(replace(packed, pattern=torch.full_like(packed.pattern, 255)))
        for wrong in broken:
            with pytest.raises(BackendError, match=r"values|pattern|hold"):
                triton_kernel.prepare(wrong)


def test_a_token_with_nan_or_inf_hurts_itself_alone() -> None:
    for dtype in (torch.float32, torch.int8):
        packed = example("bitmask", (24, 64), dtype=dtype)
        x = inputs(5, 64, torch.float32)
        x[1, 5], x[3, 7] = float("nan"), float("inf")
        y = triton_kernel.multiply(x.to(DEVICE), triton_kernel.prepare(moved(packed))).cpu()
        dense = torch.nn.functional.linear(x, to_dense(packed))
        assert torch.equal(y.isfinite(), dense.isfinite())
        assert torch.equal(y.isnan(), dense.isnan())


@pytest.mark.parametrize("bits", [0, 3])
@pytest.mark.parametrize("fmt", KINDS)
@pytest.mark.slow
def test_splits_of_the_columns_add_up_and_decode_exactly(fmt: str, bits: int) -> None:
    for axis in (0, 1) if pattern_named(fmt).block > 1 else (1,):
        packed = example(fmt, (24, 544), dtype=torch.int8 if bits else torch.bfloat16, axis=axis)
        packed = narrow(packed, bits) if bits else packed
        x, bias = inputs(2, 544, torch.float32), inputs(1, 24, torch.float32)[0]
        prepared = triton_kernel.prepare(moved(packed), splits=2)
        assert prepared.splits == 2
        y, dense = triton_kernel.multiply(x.to(DEVICE), prepared, bias.to(DEVICE)).cpu(), to_dense(packed)
        assert_close(y, x.double() @ dense.double().T + bias.double(), TOLERANCE[torch.float32])
        assert torch.equal(triton_kernel.decode(prepared, torch.float32).cpu(), dense.float())


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("way", ["packed", "decode", "merge", "merged"])
def test_a_layer_takes_them_in_every_way(way: str, role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel.TritonBackend, "supports", lambda *_: None)  # on a CPU Triton's interpreter runs
    generator = torch.Generator().manual_seed(0)
    basis = SharedBasis.of(torch.randn(40, 32, generator=generator), torch.float32).to(
        DEVICE
    )  # a layer only borrows it
    factor_RF = torch.randn(32, 48, generator=generator)
    mask_RF = torch.rand(32, 48, generator=generator) < 0.4
    layer = FactoredLinear.from_factor(basis, factor_RF, mask_RF, role=role, fmt="bitmask", values="int4").to(DEVICE)
    layer.runtime.policy = way
    x = inputs(3, layer.in_features, torch.float32).to(DEVICE)
    with torch.no_grad():
        y = layer(x)
    assert layer.runtime._ways._prepared is not None
    assert isinstance(layer.runtime._ways._prepared[1], triton_kernel.TritonMatrix)
    assert_close(y.cpu(), (x.double() @ layer.dense_weight().double().T).cpu(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.slow
def test_it_compiles_for_a_gpu_without_one(dtype: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu_code.py"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(script), "--few", "--inputs", dtype, "--output", str(tmp_path / "code.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    programs = json.loads((tmp_path / "code.json").read_text())["results"]
    assert max(program["shared_bytes"] for program in programs) <= 99 << 10  # what small GPUs have
