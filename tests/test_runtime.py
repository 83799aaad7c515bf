"""How a layer chooses its way: every way gives the same result, choices are measured once and remembered."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from test_kernels import TOLERANCE, assert_close, inputs
from torch import Tensor, nn

from fips.errors import ConfigError
from fips.kernels import cpu, runtime, timings
from fips.kernels.runtime import FRUGAL, POLICIES, LayerRuntime
from fips.nn import FactoredLinear, SharedBasis
from fips.storage.packing import ValueKind, pack

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")


def make_layer(role: str = "up", *, basis: bool = True, dtype: torch.dtype = torch.float32) -> FactoredLinear:
    generator = torch.Generator().manual_seed(0)
    width, rank, columns = 48, (32 if basis else 48), 96
    shared = SharedBasis(width, rank) if basis else None
    if shared is not None:
        nn.init.orthogonal_(shared.weight, generator=generator)
        shared.to(dtype)
    factor = torch.randn(rank, columns, generator=generator)
    mask = torch.rand(rank, columns, generator=generator) < 0.4
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
        for actual, reference in zip(got, wanted, strict=True):
            assert_close(actual, reference.double(), TOLERANCE[torch.float32])


@needs_library
def test_the_frugal_ways_keep_no_dense_copy() -> None:
    layer = make_layer()
    for policy in ("auto", *FRUGAL):
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
        layer.pattern.copy_(pack(layer.factor(), layer.mask().flip(0), fmt="bitmask")[1])
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


def test_the_fastest_way_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_CACHE", str(tmp_path))
    runtime._timings.forget()
    layer = make_layer()
    x = inputs(4, 48, torch.float32)
    seconds = {"packed": 2.0, "decode": 1.0, "merge": 3.0, "merged": 0.5}
    monkeypatch.setattr(timings, "measure", lambda ways, compute: {way: seconds[way] for way in ways})
    with torch.no_grad():
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
def test_inputs_are_rounded_to_8_bits_only_where_asked(values: ValueKind, tokens: int) -> None:
    factor = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    layer = FactoredLinear.from_factor(
        None, factor, torch.ones_like(factor, dtype=torch.bool), role="up", fmt="dense", values=values
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
