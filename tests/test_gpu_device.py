"""What only a real GPU shows: every format at many lengths, streams, graphs, whole models and the choice of a way."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install fips[gpu]")

from conftest import batches_for, tiny_model
from test_gpu_kernel import moved
from test_kernels import FORMATS, TOLERANCE, assert_close, example, inputs, narrow
from torch import Tensor

import fips
from fips.formats.packed import Packed, to_dense
from fips.formats.patterns import pattern_named
from fips.kernels import registry, triton_kernel
from fips.kernels.runtime import timings_file
from fips.layers.linear import FactoredLinear, factored_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOKENS = (1, 2, 5, 16, 64, 197, 512)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VALUES = [*FLOATS, *(f"int{bits}" for bits in range(2, 9))]
EVERY_VALUE = ("full", "bitmask", "4:16", "block8")
CASES = [
    (fmt, axis, values)
    for fmt in FORMATS
    for axis in ((0, 1) if pattern_named(fmt).block > 1 else (1,))
    for values in (VALUES if fmt in EVERY_VALUE else ("int4", "bfloat16"))
]


def matrix(fmt: str, axis: int, values: str, shape: tuple[int, int]) -> Packed:
    packed = example(fmt, shape, dtype=FLOATS.get(values, torch.int8), axis=axis)
    bits = packed.bits and int(values.removeprefix("int"))
    return moved(narrow(packed, bits) if bits and bits < 8 else packed)


def dense_of(packed: Packed, dtype: torch.dtype) -> Tensor:
    """S in float64; floats rounded to the type of the inputs, as the kernel does."""
    if packed.scales_N is None:
        return to_dense(packed).to(dtype).double()
    return to_dense(replace(packed, scales_N=packed.scales_N.double()))


def layer_of(outputs: int, features: int, *, fmt: str = "full", values: str = "int4") -> FactoredLinear:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(features, outputs, generator=generator)
    mask = torch.rand(factor.shape, generator=generator) < (1.1 if fmt == "full" else 0.5)
    layer = FactoredLinear.from_factor(None, factor, mask, role="up", fmt=fmt, values=values, dtype=torch.bfloat16)
    return layer.to("cuda").eval()


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)))
@pytest.mark.slow
def test_every_length_agrees_with_the_decoded_matrix(number: int, case: tuple[str, int, str]) -> None:
    fmt, axis, values = case
    odd = (72, 80) if ":" in fmt else (40, 88) if "block" in fmt else (61, 77)
    packed = matrix(fmt, axis, values, (160, 576) if number % 2 else odd)
    dtype = (torch.bfloat16, torch.bfloat16, torch.float16)[number % 3]
    prepared, dense = triton_kernel.prepare(packed), dense_of(packed, dtype)
    assert torch.equal(triton_kernel.decode(prepared, torch.float32), to_dense(packed).float())
    bias = inputs(1, packed.shape[0], dtype)[0].cuda()
    for tokens in TOKENS:
        x = inputs(tokens, packed.shape[1], dtype).cuda()
        y = triton_kernel.multiply(x, prepared, bias)
        assert_close(y, x.double() @ dense.T + bias.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("case", [("full", "int3"), ("bitmask", "float32"), ("4:16", "bfloat16"), ("block8", "int8")])
@pytest.mark.slow
def test_nan_and_inf_come_out_as_from_a_dense_layer(case: tuple[str, str]) -> None:
    packed = matrix(case[0], 1, case[1], (64, 160))
    prepared = triton_kernel.prepare(packed)
    for dtype, tokens in product(FLOATS.values(), (5, 70)):
        x = inputs(tokens, 160, dtype).cuda()
        x[0, 3], x[1, 159], x[2, 7], x[4] = float("nan"), float("inf"), -float("inf"), 0
        y, dense = triton_kernel.multiply(x, prepared), torch.nn.functional.linear(x, to_dense(packed).to(dtype))
        for same in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(same(y), same(dense))
        assert not y[4].any()


@pytest.mark.parametrize("rows", [96, 24000])
def test_large_float32_inputs_keep_their_accuracy(rows: int) -> None:
    packed = matrix("full", 1, "int8", (rows, 256))
    x = torch.randn(33, 256, dtype=torch.float64).cuda().exp().mul(1000).float()
    y = triton_kernel.multiply(x, triton_kernel.prepare(packed))
    assert_close(y, x.double() @ dense_of(packed, torch.float32).T, TOLERANCE[torch.float32])


def test_a_product_waits_for_its_stream() -> None:
    packed = matrix("bitmask", 1, "int4", (2048, 2048))
    prepared, side = triton_kernel.prepare(packed), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        x = torch.zeros(3, 2048, device="cuda", dtype=torch.bfloat16)
        torch.cuda._sleep(20_000_000)
        x += inputs(3, 2048, torch.bfloat16).cuda(non_blocking=True)
        y = triton_kernel.multiply(x, prepared)
    side.synchronize()
    assert_close(y, x.double() @ dense_of(packed, torch.bfloat16).T, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("way", ["packed", "decode"])
def test_a_graph_repeats_a_layer(way: str) -> None:
    layer = layer_of(256, 192, fmt="bitmask")
    layer.runtime.policy = way
    x = inputs(3, 192, torch.bfloat16).cuda()
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(3):
            x.copy_(inputs(3 + seed, 192, torch.bfloat16)[:3])
            graph.replay()
            assert_close(y, x.double() @ layer.dense_weight().double().T, TOLERANCE[torch.bfloat16])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_may_be_on_a_gpu_that_is_not_the_current_one() -> None:
    layer = layer_of(256, 192, fmt="bitmask").to("cuda:1")
    x = inputs(3, 192, torch.bfloat16).to("cuda:1")
    for way in ("packed", "decode"):
        layer.runtime.policy = way
        with torch.inference_mode():
            assert_close(layer(x), x.double() @ layer.dense_weight().double().T, TOLERANCE[torch.bfloat16])


@pytest.mark.slow
def test_a_compiled_layer_is_one_node_of_a_graph() -> None:
    for values, rotation in (("tc4g64", 64), ("int5", 1)):
        shape = {"hidden": 192, "kept": 192 * 256, "width": 256}
        layer = FactoredLinear(None, role="up", fmt="full", values=values, rotation=rotation, **shape).cuda()
        layer.values = torch.randint(0, 256, layer.values.shape, dtype=torch.uint8).cuda()
        layer.scales.fill_(1e-3)
        if layer.value_format.scale_group:
            layer.group_scales.fill_(3)
        layer = layer.to(torch.bfloat16)
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
            for tokens in (1, 100, 1, 1):
                x = inputs(tokens, 256, torch.bfloat16).cuda()
                assert_close(compiled(x), x.double() @ layer.dense_weight().double().T, TOLERANCE[torch.bfloat16])


@pytest.mark.slow
def test_gradients_and_traced_graphs_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_RUNTIME", "packed")
    layer = layer_of(64, 96, fmt="bitmask", values="float")
    x = inputs(3, 96, torch.bfloat16).cuda().requires_grad_()
    layer(x).sum().backward()
    dense = layer.dense_weight().double()
    assert layer.values.grad is not None
    assert x.grad is not None
    assert_close(x.grad, dense.sum(0).expand(3, -1), TOLERANCE[torch.bfloat16])
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), x.double() @ dense.T, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("policy", ["auto", "packed", "decode", "speed"])
@pytest.mark.slow
def test_a_model_computes_on_a_gpu_what_it_does_on_a_cpu(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_RUNTIME", policy)
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), fips.CompressionConfig(method="magnitude", bits=3.0, values="int4"))
    batch = batches_for(model)[0]["input_ids"]
    with torch.inference_mode():
        wanted = model(input_ids=batch).logits
        moved_model = model.cuda()
        logits = moved_model(input_ids=batch.cuda()).logits
    for layer in factored_layers(moved_model).values():
        assert layer.backends()["triton"] == "yes"
        assert not layer.runtime._failed
    assert_close(logits.cpu(), wanted.double(), (1e-5, 1e-4))


def test_the_way_is_the_faster_one_and_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIPS_RUNTIME", raising=False)
    layer = layer_of(4096, 1024)
    layer.runtime.policy = "measure"
    with torch.inference_mode():
        for tokens in (1, 2048):
            x = inputs(tokens, 1024, torch.bfloat16).cuda()
            y, way = layer(x), layer.runtime.way(x, layer.product())
            seconds = json.loads(timings_file().read_text())["seconds"][layer.product().signature(x)]
            assert set(seconds) == {"packed", "decode"}
            assert seconds[way] <= 1.05 * min(seconds.values())
            assert_close(y, x.double() @ layer.dense_weight().double().T, TOLERANCE[torch.bfloat16])
    assert registry.choose(layer.packed(), x.device, x.dtype).name == "triton"
