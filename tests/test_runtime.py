"""How a layer chooses its way: every way gives the same result; the default measures nothing, what is measured is
measured once and remembered."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from accelerate import cpu_offload
from conftest import batches_for, quick_settings, tiny_model
from test_kernels import TOLERANCE, assert_close, inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fips
from fips.errors import BackendError, ConfigError, ShapeError
from fips.formats.packed import SLICE, in_place
from fips.formats.patterns import pattern_named
from fips.formats.values import values_named
from fips.kernels import backend as backends
from fips.kernels import cpu, runtime, timings, ways
from fips.kernels.defaults import default_way, merging_pays
from fips.kernels.runtime import FRUGAL, POLICIES, LayerRuntime
from fips.layers.linear import FactoredLinear, SharedBasis, factored_layers

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")


def make_layer(role: str = "up", *, basis: bool = True, dtype: torch.dtype = torch.float32) -> FactoredLinear:
    generator = torch.Generator().manual_seed(0)
    width, rank, hidden = 48, (32 if basis else 48), 96
    shared = SharedBasis(width, rank) if basis else None
    if shared is not None:
        nn.init.orthogonal_(shared.weight, generator=generator)
        shared.to(dtype)
    factor = torch.randn(rank, hidden, generator=generator)
    mask = torch.rand(rank, hidden, generator=generator) < 0.4
    layer = FactoredLinear.from_factor(shared, factor, mask, role=role, fmt="bitmask", dtype=dtype)  # type: ignore[arg-type]
    layer.bias = nn.Parameter(torch.randn(layer.out_features, generator=generator).to(dtype))
    return layer.eval()


def expected(layer: FactoredLinear, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return x.double() @ layer.dense_weight().double().T + layer.bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", [True, False])
@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_way_computes_the_same(policy: str, role: str, basis: bool, dtype: torch.dtype) -> None:
    layer = make_layer(role, basis=basis, dtype=dtype)
    layer.runtime.policy = policy
    for shape in ((48,), (1, 48), (3, 48), (2, 9, 48), (70, 48), (0, 48)):
        features = layer.in_features
        x = inputs(torch.Size(shape[:-1]).numel(), features, dtype).view(*shape[:-1], features)
        with torch.no_grad():
            y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], layer.out_features)
        if y.numel():
            assert_close(y, expected(layer, x), TOLERANCE[dtype])


def test_training_changes_values_on_a_fixed_support() -> None:
    layer = make_layer("up")
    x, target = inputs(20, 48, torch.float32), inputs(20, 96, torch.float32)
    mask = layer.mask()
    assert layer.basis is not None
    optimizer = torch.optim.Adam([*layer.parameters(), *layer.basis.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(layer.mask(), mask)
    with torch.no_grad():  # what was prepared before the steps is not used after them
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])


def test_gradients_equal_those_of_the_dense_product() -> None:
    for role in ("up", "down"):
        layer = make_layer(role)
        assert layer.basis is not None
        x = inputs(6, layer.in_features, torch.float32).requires_grad_()
        weights = inputs(6, layer.out_features, torch.float32)
        wanted_of = (x, layer.values, layer.bias, layer.basis.weight)
        got = torch.autograd.grad((layer(x) * weights).sum(), wanted_of)
        plain = nn.functional.linear(x, layer.dense_weight(), layer.bias)
        wanted = torch.autograd.grad((plain * weights).sum(), wanted_of)
        for actual, gradient in zip(got, wanted, strict=True):
            assert_close(actual, gradient.double(), TOLERANCE[torch.float32])


@needs_library
def test_the_frugal_ways_keep_no_dense_copy() -> None:
    layer = make_layer()
    for policy in ("auto", "measure", *FRUGAL):
        layer.runtime.policy = policy
        with torch.no_grad():
            for tokens in (1, 16, 200):
                layer(inputs(tokens, 48, torch.float32))
        assert layer.runtime.extra_bytes <= 4 * layer.factor_shape[0]
    layer.runtime.policy = "merged"
    with torch.no_grad():
        layer(inputs(1, 48, torch.float32))
    assert layer.runtime.extra_bytes >= 4 * 48 * 96  # and says what it costs
    layer.runtime.policy = "auto"
    assert layer.runtime.extra_bytes < 4 * 48 * 96


def test_a_merged_weight_follows_the_values() -> None:
    layer = make_layer()
    layer.runtime.policy = "merged"
    x = inputs(3, 48, torch.float32)
    with torch.no_grad():
        layer(x)
        layer.values.mul_(2)
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        layer.load_state_dict({name: tensor * 0 for name, tensor in layer.state_dict().items() if name != "pattern"},
                              strict=False)  # fmt: skip
        assert torch.equal(layer(x), torch.zeros(3, 96))


@needs_library
def test_moved_and_reloaded_tensors_are_noticed() -> None:
    layer = make_layer()
    layer.runtime.policy = "packed"
    x = inputs(3, 48, torch.float32)
    with torch.no_grad():
        layer(x)
        other = make_layer("up")
        mask = torch.zeros(32, 96, dtype=torch.bool)
        mask.view(-1)[: layer.values.numel()] = True
        packed = FactoredLinear.from_factor(other.basis, torch.randn(32, 96), mask, role="up", fmt="bitmask")
        layer.load_state_dict({"pattern": packed.pattern, "values": packed.values, "bias": other.bias}, strict=False)
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        layer.to(torch.bfloat16)
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])


@needs_library
@pytest.mark.parametrize("basis", [True, False])
def test_what_is_remembered_of_a_layer_follows_it(basis: bool) -> None:
    """Every tensor put in place of another counts in the next call, in whatever way it got there."""
    layer = make_layer(basis=basis)
    layer.runtime.policy = "packed"
    x = inputs(3, 48, torch.float32)
    with torch.no_grad():
        layer(x)
        made = layer.runtime._held.product
        layer(x)
        assert layer.runtime._held.product is made
        layer.values = nn.Parameter(2 * layer.values)
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        layer.bias = None
        layer.bias = nn.Parameter(torch.ones(96))
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        if layer.basis is not None:
            layer.basis.weight = nn.Parameter(layer.basis.weight.flip(0))
            assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        tripled = 3 * layer.values
        del layer.values
        layer.values = tripled  # a plain attribute, as FSDP and parametrizations leave it
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        layer.values = tripled + 1
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])


@needs_library
@pytest.mark.parametrize("basis", [True, False])
@pytest.mark.parametrize("role", ["up", "down"])
def test_repeated_calls_follow_their_layer(role: str, basis: bool) -> None:
    """The second call of a shape takes a shorter way: the same bits, and every change of the layer is seen."""
    layer = make_layer(role, basis=basis)
    layer.runtime.policy = "packed"
    x = inputs(3, layer.in_features, torch.float32)
    with torch.no_grad():
        first = layer(x)
        assert layer.runtime._held.repeats
        assert torch.equal(layer(x), first)
        assert_close(layer(2 * x), expected(layer, 2 * x), TOLERANCE[torch.float32])
        strided = torch.stack((x, x), -1)[..., 0]
        assert torch.equal(layer(strided), first)
        layer.values.mul_(2)
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        layer.values.data = layer.values.data.flip(0)
        assert layer.bias is not None
        layer.bias.data = layer.bias.data + 1
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        layer.pattern.copy_(pattern_named("bitmask").pack(layer.factor(), layer.mask().flip(0))[1])
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer(x).sum().backward()  # the shorter way records no gradients and must not be taken
    assert layer.values.grad is not None
    layer.runtime.policy = "decode"
    assert not layer.runtime._held.repeats


@needs_library
def test_only_few_shapes_are_remembered() -> None:
    layer = make_layer()
    layer.runtime.policy = "packed"
    with torch.no_grad():
        for tokens in range(1, 40):
            layer(inputs(tokens, 48, torch.float32))
            assert len(layer.runtime._held.repeats) <= 8
        before = dict(layer.runtime._held.repeats)
        layer(inputs(cpu.Repeat.MOST + 1, 48, torch.float32))
        assert layer.runtime._held.repeats == before


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that operations make."""

    nbytes = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        result = func(*args, **(kwargs or {}))  # type: ignore[operator]
        if isinstance(result, Tensor):
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


@pytest.mark.slow
@pytest.mark.parametrize("values", ["float", "tc4g64", "int3"])
def test_decoding_takes_memory_for_some_rows_at_a_time(values: str) -> None:
    """Whatever the size of the matrix; the numbers are those of the product with the whole."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-2, 2, (1024, 8192), generator=generator).to(torch.int8)
    whole = torch.ones_like(codes, dtype=torch.bool)
    if values == "float":
        layer = FactoredLinear.from_factor(None, codes.float(), whole, role="up", fmt="full", dtype=torch.bfloat16)
    else:
        groups = torch.randint(1, 256, (8192 * 16,), generator=generator).to(torch.uint8)
        layer = FactoredLinear.from_integers(
            None, codes, whole, torch.rand(8192), role="up", fmt="full", values=values,
            group_scales=groups if values.endswith("g64") else None,
        )  # fmt: skip
    layer.runtime.policy = "decode"
    x = inputs(6, 1024, torch.float32)
    with torch.no_grad():
        with Largest() as seen:
            y = layer(x)
        assert seen.nbytes <= 10 * SLICE < layer.dense_weight().nbytes
        assert torch.equal(y, nn.functional.linear(x, layer.factor().float()))
        merged = copy.deepcopy(layer)
        merged.runtime.policy = "merged"
        with Largest() as seen:
            merged(x)
        assert seen.nbytes == layer.dense_weight().nbytes


@pytest.mark.parametrize("role", ["up", "down"])
def test_merging_for_one_call_forms_some_rows_at_a_time(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, other = make_layer(role), make_layer(role)
    layer.runtime.policy, other.runtime.policy = "merge", "merged"
    x = inputs(7, layer.in_features, torch.float32)
    with torch.no_grad():
        wanted = other(x)
        monkeypatch.setattr(ways, "SLICE", 1)
        with Largest() as seen:
            y = layer(x)
        assert seen.nbytes < 4 * layer.in_features * layer.out_features
        assert_close(y, wanted.double(), TOLERANCE[torch.float32])


def test_copies_and_pickles_prepare_their_own() -> None:
    layer = make_layer()
    layer.runtime.policy = "decode"
    x = inputs(3, 48, torch.float32)
    with torch.no_grad():
        y = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.runtime is not layer.runtime
            assert other.runtime.policy == "decode"
            assert torch.equal(other(x), y)


def test_choices_are_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_CACHE", str(tmp_path))
    runtime._timings.forget()
    layer = make_layer()
    layer.runtime.policy = "measure"
    calls: list[tuple[str, ...]] = []
    measure = timings.measure
    monkeypatch.setattr(timings, "measure", lambda ways, compute: calls.append(ways) or measure(ways, compute))
    with torch.no_grad():
        for tokens in (3, 4, 3):  # one power of two
            layer(inputs(tokens, 48, torch.float32))
        assert len(calls) == 1
        layer(inputs(5, 48, torch.float32))
        assert len(calls) == 2
        stored = json.loads(runtime.timings_file().read_text())
        assert len(stored["seconds"]) == 2
        runtime._timings.forget()  # as a new process
        layer(inputs(4, 48, torch.float32))
        assert len(calls) == 2
    runtime._timings.forget()


def kept_whole(values: str, rows: int = 96, cols: int = 64) -> FactoredLinear:
    numbers = values_named(values)
    layer = FactoredLinear(None, role="up", hidden=rows, kept=rows * cols, fmt="full", width=cols, values=values)
    nn.init.constant_(layer.values, 1.0) if numbers.bits is None else layer.values.zero_()
    return layer


@needs_library
@pytest.mark.parametrize(
    ("level", "values", "packed_up_to"),
    [
        ("avx512", "float", 4096), ("avx512_bf16", "tc4g64", 4096), ("amx", "int8", 4096), ("avx2", "int4", 4096),
        ("avx2", "tc4g64", 4096), ("avx2", "float", 4), ("avx_vnni", "tc4g64", 4096), ("avx_vnni", "float", 4),
        ("portable", "int4", 32), ("portable", "tc2", 32),
        ("portable", "int8", 0), ("portable", "float", 0), ("neon", "tc4g64", 32), ("neon", "int8", 4),
    ],
)  # fmt: skip
def test_the_default_measures_nothing(
    level: str, values: str, packed_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed timings say up to how many tokens packed bytes are read; nobody runs a layer to find out."""
    monkeypatch.setattr(timings, "measure", lambda ways, compute: pytest.fail("measured"))
    monkeypatch.setattr(cpu, "isa_names", lambda: ("portable", level))
    layer = kept_whole(values)
    with torch.no_grad():
        for tokens in (0, 1, 2, 4, 8, 32, 64, 4096):
            way = layer.runtime.way(torch.zeros(tokens, 64), layer.product())
            assert way == ("packed" if max(1, tokens) <= packed_up_to else "decode"), tokens
    values_of = torch.zeros(4096, 64, requires_grad=True)  # decoding would keep the dense matrix for the way back
    assert layer.runtime.way(values_of, layer.product()) == "packed"


def test_the_default_on_a_gpu_and_of_other_backends() -> None:
    packed = {values: kept_whole(values).product() for values in ("int4", "tc4", "int8", "float")}
    pruned = make_layer(basis=False).product()
    ways = ("packed", "decode", "merged")
    for name, product, few in (
        *(("triton", packed[values], 64) for values in ("int4", "int8")),
        ("triton", packed["tc4"], 32), ("triton", pruned, 16), ("triton", packed["float"], 0),
        *(("another", product, 1 << 20) for product in (*packed.values(), pruned)),
    ):  # fmt: skip
        backend = type("Named", (backends.Reference,), {"name": name})()
        for tokens in (1, 16, 32, 64, 1 << 20):
            way = default_way(ways, product, backend, tokens, grad=False)
            assert way == ("packed" if tokens <= few else "decode")


def test_merging_is_the_default_where_it_is_fewer_operations() -> None:
    """48 x 32 and 32 x 96 for every token, or 48 x 32 x 96 once and 48 x 96 for every token: never with rank 32; with
    rank 48 from some hundred tokens on."""
    assert not merging_pays(make_layer().product(), 1 << 30)
    assert not merging_pays(make_layer(basis=False).product(), 1 << 30)
    for role in ("up", "down"):
        shared = SharedBasis.of(torch.eye(48), torch.float32)
        factor = torch.ones(48, 96)
        layer = FactoredLinear.from_factor(shared, factor, factor > 0, role=role, fmt="full")  # type: ignore[arg-type]
        product = layer.product()
        assert [merging_pays(product, tokens) for tokens in (64, 128, 256, 1024)] == [False, False, True, True]
        with torch.no_grad():
            assert layer.runtime.way(torch.zeros(1024, layer.in_features), product) == "merge"


def test_the_fastest_way_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_CACHE", str(tmp_path))
    runtime._timings.forget()
    layer = make_layer()
    x = inputs(4, 48, torch.float32)
    seconds = {"packed": 2.0, "decode": 1.0, "merge": 3.0, "merged": 0.5}
    monkeypatch.setattr(timings, "measure", lambda ways, compute: {way: seconds[way] for way in ways})
    with torch.no_grad():
        layer.runtime.policy = "measure"
        assert layer.runtime.way(x, layer.product()) == "decode"
        layer.runtime.policy = "speed"
        assert layer.runtime.way(x, layer.product()) == "merged"
        monkeypatch.setenv("FIPS_RUNTIME", "merge")  # counts for layers made from now on
        assert make_layer().runtime.way(x, layer.product()) == "merge"
        assert layer.runtime.way(x, layer.product()) == "merged"
    runtime._timings.forget()


@needs_library
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_inputs_of_32_bits_are_rounded_to_8_only_where_asked(values: str, tokens: int) -> None:
    factor = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    layer = FactoredLinear.from_factor(
        None, factor, torch.ones_like(factor, dtype=torch.bool), role="up", fmt="full", values=values
    )
    layer.runtime.policy = "packed"
    x = inputs(tokens, 128, torch.float32)
    dense = layer.dense_weight().detach().T
    with torch.no_grad():
        exact = layer(x)
        layer.runtime.activation_bits = 8
        rounded = layer(x)
    assert_close(exact, x @ dense, TOLERANCE[torch.float32])
    step = x.abs().amax(-1, keepdim=True) / 126
    assert bool(((rounded - x @ dense).abs() <= step / 2 * dense.abs().sum(0) * 1.01).all())
    if "avx512" in cpu.isa_names():
        assert float((rounded - exact).norm() / exact.norm()) > 1e-4


@needs_library
def test_inputs_of_16_bits_are_rounded_to_8_unless_they_have_to_be_exact() -> None:
    factor = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    layer = FactoredLinear.from_factor(
        None, factor, torch.ones_like(factor, dtype=torch.bool), role="up", fmt="full", values="int8"
    )
    layer.runtime.policy = "packed"

    def found(dtype: torch.dtype, bits: int | None, tokens: int) -> Tensor:
        layer.runtime.activation_bits = bits
        with torch.no_grad():
            return layer(inputs(tokens, 128, dtype))

    for tokens in (1, 40):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            default, coarse, exact = (found(dtype, bits, tokens) for bits in (None, 8, 16))
            assert torch.equal(default, exact if dtype == torch.float32 else coarse)
            if "avx512" in cpu.isa_names() and "amx" not in cpu.isa_names():
                assert not torch.equal(coarse, exact)


def test_other_activation_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_ACTIVATION_BITS", "8")
    assert LayerRuntime().activation_bits == 8
    assert pickle.loads(pickle.dumps(LayerRuntime())).activation_bits == 8
    monkeypatch.setenv("FIPS_ACTIVATION_BITS", "4")
    with pytest.raises(ConfigError, match="got 4"):
        LayerRuntime()


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: auto"):
        LayerRuntime("fast")


@pytest.mark.parametrize("role", ["up", "down"])
def test_compiled_and_exported_layers_agree(role: str) -> None:
    layer = make_layer(role)
    x = inputs(6, layer.in_features, torch.float32)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        assert_close(exported(x), expected(layer, x), TOLERANCE[torch.float32])
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected(layer, x), TOLERANCE[torch.float32])


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("values", ["float", "int4"])
def test_compiled_layers_prepare_once_and_round_inputs_where_asked(
    values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compiled function serves all layers, so what it keeps must be each one's own."""
    factor = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    layers = [
        FactoredLinear.from_factor(None, factor + index, factor > -1, role="up", fmt="bitmask", values=values)
        for index in range(3)
    ]
    prepared: list[object] = []
    prepare = cpu.prepare
    monkeypatch.setattr(cpu, "prepare", lambda packed: prepared.append(packed) or prepare(packed))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer in self.layers])

    x, model = inputs(6, 64, torch.float32), Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            y = compiled(x)
        assert len(prepared) == 3
        for layer, got in zip(layers, y, strict=True):
            assert_close(got, x.double() @ layer.dense_weight().double().T, TOLERANCE[torch.float32])
        if values == "float":
            layers[0].values.data = layers[0].values.data * 2
            assert_close(compiled(x)[0], 2 * y[0].double(), TOLERANCE[torch.float32])
            return
        for layer in layers:
            layer.runtime.policy = "packed"
            layer.runtime.activation_bits = 8
        wanted = model(x)
        assert torch.equal(compiled(x), wanted)
        if "avx512" in cpu.isa_names():
            assert not torch.equal(wanted, y)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    one = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert all(torch.equal(one(layer, x), got) for layer, got in zip(layers, wanted, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(prepared) == 3
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(one(layers[0], z).sum(), z)
    assert_close(gradient, layers[0].dense_weight().double().sum(0).expand(6, 64), TOLERANCE[torch.float32])


@needs_library
def test_a_compiled_layer_calls_again_what_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    layer = FactoredLinear.from_factor(None, factor, factor > -9, role="up", fmt="full", values="int4g32")

    def wanted(x: Tensor) -> Tensor:
        return x.double() @ layer.dense_weight().double().T

    calls: list[object] = []
    multiply = cpu.multiply
    monkeypatch.setattr(cpu, "multiply", lambda *args, **options: calls.append(args) or multiply(*args, **options))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for tokens in (1, 5, 1, 5):
            x = inputs(tokens, 64, torch.float32)
            assert_close(compiled(x), wanted(x), TOLERANCE[torch.float32])
        assert len(calls) == 2
        assert_close(compiled(x[::2]), wanted(x[::2]), TOLERANCE[torch.float32])
        layer.scales.mul_(2)
        assert_close(compiled(x), wanted(x), TOLERANCE[torch.float32])
        layer.values = layer.values.clone().neg_()
        assert_close(compiled(x), wanted(x), TOLERANCE[torch.float32])
    assert len(calls) == 5


def test_without_a_library_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x = inputs(6, 48, torch.float32)
    monkeypatch.setattr(cpu, "_available", False)
    with torch.no_grad():
        assert layer.runtime.way(x, layer.product()) != "packed"
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])


@needs_library
@pytest.mark.parametrize("role", ["up", "down"])
def test_nothing_is_kept_of_offloaded_layers(role: str) -> None:
    layer = make_layer(role)
    x = inputs(3, layer.in_features, torch.float32)
    wanted = expected(layer, x)
    assert layer.basis is not None
    for module in (layer, layer.basis):
        cpu_offload(module, torch.device("cpu"))
    with torch.no_grad():
        assert_close(layer(x), wanted, TOLERANCE[torch.float32])
    assert layer.values.device.type == "meta"
    assert layer.runtime.extra_bytes == 0


@pytest.mark.parametrize("basis", [True, False])
@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("policy", POLICIES)
def test_inputs_of_another_width_are_refused_in_every_way(policy: str, role: str, basis: bool) -> None:
    layer = make_layer(role, basis=basis)
    layer.runtime.policy = policy
    right = layer.in_features
    with torch.no_grad():
        layer(inputs(3, right, torch.float32))  # what is remembered of it must not serve others
        for shape in ((3, right - 1), (3, right + 1), (3, 2 * right), (3, right // 2), (right, 3), (3, 0), (), (0, 7)):
            with pytest.raises(ShapeError, match=re.escape(f"{tuple(shape)} do not fit {right} features")):
                layer(torch.zeros(shape))
        with pytest.raises(ShapeError, match="floating-point"):
            layer(torch.zeros(3, right, dtype=torch.int64))
        layer.bias = nn.Parameter(torch.zeros(layer.out_features - 1))
        with pytest.raises(ShapeError, match=f"does not fit {layer.out_features} outputs"):
            layer(inputs(3, right, torch.float32))
    with pytest.raises(RuntimeError, match="do not fit"):  # as a dense layer's
        layer(torch.zeros(3, right + 1))


@needs_library
def test_values_cut_short_are_noticed() -> None:
    layer = make_layer(basis=False)
    layer.runtime.policy = "packed"
    x = inputs(3, 48, torch.float32)
    with torch.no_grad():
        layer(x)
        layer(x)
        layer.values.data = layer.values.data[:-40]  # where they were, but fewer
        with pytest.raises(BackendError, match="values"):
            layer(x)


def test_a_basis_refuses_other_widths() -> None:
    basis = SharedBasis.of(inputs(48, 32, torch.float32), torch.float32)
    with torch.no_grad():
        for tokens in (1, 40):
            assert basis(torch.zeros(tokens, 48)).shape == (tokens, 32)
            assert basis(torch.zeros(tokens, 32), expand=True).shape == (tokens, 48)
            with pytest.raises(ShapeError, match="48 features"):
                basis(torch.zeros(tokens, 32))
            with pytest.raises(ShapeError, match="32 features"):
                basis(torch.zeros(tokens, 48), expand=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("values", ["float", "int8", "int4"])
def test_a_token_with_nan_or_inf_hurts_itself_alone_in_every_way(values: str, policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    factor, mask = torch.randn(96, 64, generator=generator), torch.rand(96, 64, generator=generator) < 0.4
    layer = FactoredLinear.from_factor(None, factor, mask, role="up", fmt="bitmask", values=values)
    layer.runtime.policy = policy
    for tokens in (3, 20):
        x = inputs(tokens, 96, torch.float32)
        x[0, 3], x[1, 5] = float("nan"), float("inf")
        with torch.no_grad():
            y = layer(x)
            expected = nn.functional.linear(x, layer.dense_weight())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        assert not bool(y[:2].isfinite().any())
        assert_close(y[2:], expected[2:].double(), TOLERANCE[torch.float32])


def fresh_cache(monkeypatch: pytest.MonkeyPatch, place: Path) -> Path:
    """An empty place for timings, which the test may spoil."""
    monkeypatch.setenv("FIPS_CACHE", str(place))
    runtime._timings.forget()
    return runtime.timings_file()


SPOILT = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b'{"seconds": []}', b'{"seconds": null}', b"\xff\xfe\x00",
    b"[" * 100_000,
    *(b'{"seconds": {"KEY": ' + entry + b"}}" for entry in (
        b"3", b"null", b'{"decode": "fast"}', b'{"decode": NaN}', b'{"merged": 1e999}',
        b'{"decode": true, "packed": -1, "merge": Infinity}', b'{"packed": [], "decode": {}, "unheard of": 1}',
        b'{"packed": ' + b"9" * 5000 + b"}", b'{"packed": ' + b"9" * 400 + b"}",
    )),
]  # fmt: skip


@pytest.mark.parametrize("content", SPOILT)
def test_a_spoilt_file_of_timings_breaks_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fresh_cache(monkeypatch, tmp_path)
    layer, x = make_layer(), inputs(4, 48, torch.float32)
    layer.runtime.policy = "measure"
    path.write_bytes(content.replace(b"KEY", layer.product().signature(x).encode()))
    with torch.no_grad():
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
    stored = json.loads(path.read_text())["seconds"]
    assert all(0 < seconds < 100 for ways in stored.values() for seconds in ways.values())
    assert stored[layer.product().signature(x)].keys() >= {"decode", "merge"}
    runtime._timings.forget()


@pytest.mark.parametrize(
    "obstacle", ["directory", "pipe", "file above", "no home", "nothing may be written", "is huge"]
)
def test_no_place_for_timings_breaks_nothing(obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fresh_cache(monkeypatch, tmp_path / "cache")
    if obstacle == "directory":
        path.mkdir(parents=True)
    elif obstacle == "file above":
        path.parent.write_text("")
    elif obstacle == "no home":
        monkeypatch.delenv("FIPS_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(
            Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
        )
    elif obstacle == "nothing may be written":  # root may write anywhere
        monkeypatch.setattr(
            timings.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError("read-only"))
        )
    else:
        path.parent.mkdir(parents=True)
        if obstacle == "pipe":
            os.mkfifo(path)
        else:
            with path.open("wb") as file:
                file.truncate(timings.LARGEST_FILE + 1)
    layer, x = make_layer(), inputs(4, 48, torch.float32)
    layer.runtime.policy = "measure"
    with torch.no_grad():
        assert_close(layer(x), expected(layer, x), TOLERANCE[torch.float32])
    assert layer.product().signature(x) in runtime._timings._known()
    if path.parent.is_dir():
        assert [entry.name for entry in path.parent.iterdir()] == ([path.name] if path.exists() else [])
    runtime._timings.forget()


def test_writers_of_timings_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes keep what both measured; threads of one measure one after the other, each signature once."""
    path = fresh_cache(monkeypatch, tmp_path)
    ours, theirs = timings.Timings(), timings.Timings()
    ours._known(), theirs._known()
    monkeypatch.setattr(timings, "measure", lambda ways, compute: dict.fromkeys(ways, 1.0))
    ours.fastest("a", ("packed",), lambda way: torch.zeros(1))
    theirs.fastest("b", ("packed",), lambda way: torch.zeros(1))
    assert json.loads(path.read_text())["seconds"].keys() == {"a", "b"}
    inside, calls = [0], []

    def measure(ways: tuple[str, ...], compute: object) -> dict[str, float]:
        inside[0] += 1
        assert inside[0] == 1
        time.sleep(0.001)
        inside[0] -= 1
        calls.append(ways)
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(timings, "measure", measure)
    with ThreadPoolExecutor(8) as pool:
        names = [f"signature {i % 40}" for i in range(320)]
        list(pool.map(lambda name: ours.fastest(name, ("packed", "decode"), lambda way: torch.zeros(1)), names))
    assert len(calls) == 40
    assert len(json.loads(path.read_text())["seconds"]) == 42
    assert len(list(tmp_path.iterdir())) == 1
    runtime._timings.forget()


@needs_library
def test_threads_share_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First calls of several shapes at once, while one more thread changes policy and tensors."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for attempt in range(4):
            fresh_cache(monkeypatch, tmp_path / str(attempt))
            layer = make_layer("up" if attempt % 2 else "down", basis=attempt < 2)
            given = [inputs(tokens, layer.in_features, torch.float32) for tokens in (1, 2, 3, 5, 9, 17)]
            wanted = [expected(layer, x) for x in given]
            done = Event()

            def meddle(layer: FactoredLinear = layer, done: Event = done) -> None:
                while not done.is_set():
                    for policy in ("auto", "measure", "packed", "decode", "speed", "merged"):
                        layer.runtime.policy = policy
                        layer.values = nn.Parameter(layer.values.detach().clone())

            def call(index: int, layer: FactoredLinear = layer, given: list[Tensor] = given) -> list[Tensor]:
                with torch.no_grad():
                    return [layer(given[index]) for _ in range(40)]

            with ThreadPoolExecutor(7) as pool:
                meddler = pool.submit(meddle)
                results = [pool.submit(call, index) for index in range(6)]
                try:
                    for index, result in enumerate(results):
                        for y in result.result():
                            assert_close(y, wanted[index], TOLERANCE[torch.float32])
                finally:
                    done.set()
                meddler.result()
    finally:
        sys.setswitchinterval(interval)
        runtime._timings.forget()


def test_what_is_remembered_belongs_to_the_policy_it_was_found_under() -> None:
    layer = make_layer()
    layer.runtime.policy = "packed"
    before = layer.runtime._held
    layer.runtime.policy = "decode"
    assert layer.runtime._held is not before  # a call that began before ends in what is forgotten
    before = layer.runtime._held
    layer.runtime.activation_bits = 8
    assert layer.runtime._held is not before


@pytest.mark.parametrize(("name", "value"), [("FIPS_RUNTIME", "fast"), ("FIPS_ACTIVATION_BITS", "eight")])
def test_settings_that_are_no_setting_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"\${name}.*'{value}'"):
        LayerRuntime()


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
@pytest.mark.parametrize("basis", [True, False])
def test_ways_differ_by_the_rounding_of_float32_whatever_the_type_of_the_stored_numbers(
    basis: bool, values: str
) -> None:
    """Integers times scales are not rounded to the type of the scales, nor to that of the file."""
    generator = torch.Generator().manual_seed(0)
    shared = SharedBasis.of(torch.randn(48, 32, generator=generator), torch.bfloat16) if basis else None
    factor = torch.randn(32 if basis else 48, 96, generator=generator)
    layer = FactoredLinear.from_factor(
        shared, factor, torch.rand(factor.shape, generator=generator) < 0.5, role="up", fmt="bitmask",
        dtype=torch.bfloat16, values=values,
    )  # fmt: skip
    stored = layer.packed()
    wide = in_place(stored).double()
    exact_NK = wide if stored.scales_N is None else wide * stored.scales_N.double().unsqueeze(1)
    weight = exact_NK if shared is None else exact_NK @ shared.weight.detach().double().T
    assert_close(layer.dense_weight().detach(), weight, TOLERANCE[torch.float32])
    for tokens in (1, 30):
        x = inputs(tokens, 48, torch.float32)
        for policy in POLICIES:
            layer.runtime.policy = policy
            with torch.no_grad():
                assert_close(layer(x), x.double() @ weight.T, TOLERANCE[torch.float32])


def test_a_loaded_model_takes_the_ways_of_the_saved_one_and_gives_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one file of timings; other ways differ by float rounding.

    The loaded model is copied: torch's own dense layers round in another way where a mapped file does not lie as
    aligned as memory of one's own.
    """
    fresh_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("FIPS_RUNTIME", "measure")
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    fips.save(model, tmp_path / "out")
    batches = [{"input_ids": batches_for(model)[0]["input_ids"][:1, :length]} for length in (1, 3, 16)]
    with torch.no_grad():
        saved = [model(**batch).logits for batch in batches]
        runtime._timings.forget()  # as a new process
        monkeypatch.setattr(timings, "measure", lambda ways, compute: pytest.fail("measured again"))
        loaded = copy.deepcopy(fips.load(tmp_path / "out"))
        for batch, logits in zip(batches, saved, strict=True):
            assert torch.equal(loaded(**batch).logits, logits)
            for way in FRUGAL:
                for layer in factored_layers(loaded).values():
                    layer.runtime.policy = way
                assert_close(loaded(**batch).logits, logits.double(), (1e-5, 1e-4))
            for layer in factored_layers(loaded).values():
                layer.runtime.policy = "auto"
    runtime._timings.forget()
