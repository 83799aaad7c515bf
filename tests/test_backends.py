"""A backend is one class: registered, it multiplies for layers that it supports, and says why not for others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import batches_for, quick_settings, tiny_model
from test_kernels import TOLERANCE, assert_close, example, inputs
from torch import Tensor, nn

import fips
from fips.errors import ConfigError
from fips.kernels import cpu, ops, reference, registry
from fips.kernels.backend import Backend, PreparedMatrix
from fips.kernels.reference import Packed
from fips.kernels.validity import Snapshot
from fips.layers.linear import FactoredLinear, factored_layers

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")


class Wide(Backend):
    """The toy: multiplies in float64 by matrices that have more rows than columns."""

    name = "wide"

    def __init__(self) -> None:
        self.calls = 0

    def supports(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype != torch.float32:
            return f"inputs are {dtype}; known: float32"
        return None if packed.shape[0] > packed.shape[1] else "has no more rows than columns"

    def multiply(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, *, activation_bits: int | None = None
    ) -> Tensor:
        self.calls += 1
        y = x.double() @ reference.to_dense(prepared.packed).double().T
        return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.fixture
def toy() -> Iterator[Wide]:
    backend = Wide()
    registry.register(backend)
    yield backend
    if backend in registry.backends():
        registry.unregister("wide")


@pytest.fixture(autouse=True)
def _packed_wherever_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIPS_RUNTIME", "packed")


def outputs(model: nn.Module, length: int) -> Tensor:
    batch = {"input_ids": batches_for(model)[0]["input_ids"][:1, :length]}
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def test_a_toy_backend_multiplies_for_a_loaded_model(tmp_path: Path, toy: Wide) -> None:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    fips.save(model, tmp_path / "out")
    registry.unregister("wide")
    loaded = fips.load(tmp_path / "out")
    before = [outputs(loaded, length) for length in (1, 7)]
    registry.register(toy)
    toy.calls = 0
    for length, wanted in zip((1, 7), before, strict=True):
        for _ in range(2):  # what calls of another backend had found out is not used
            assert_close(outputs(loaded, length), wanted.double(), (1e-5, 1e-4))
    layers = factored_layers(loaded).values()
    supported = [layer for layer in layers if layer.backends()["wide"] == "yes"]
    assert supported
    assert {layer.backends()["wide"] for layer in layers} == {"yes", "has no more rows than columns"}
    assert toy.calls == 4 * len(supported)
    registry.unregister("wide")
    for length, wanted in zip((1, 7), before, strict=True):
        assert torch.equal(outputs(loaded, length), wanted)
    assert toy.calls == 4 * len(supported)


@pytest.mark.parametrize("policy", ["measure", "speed"])
def test_measurements_of_one_backend_are_not_those_of_another(
    policy: str, toy: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIPS_CACHE", str(tmp_path))
    monkeypatch.delenv("FIPS_RUNTIME")
    layer, x = layer_of(64, 32), inputs(3, 32, torch.float32)
    layer.runtime.policy = policy
    signature = layer.product().signature(x)
    with torch.no_grad():
        y = layer(x)
    assert toy.calls > 3  # it was measured
    registry.unregister("wide")
    assert layer.product().signature(x) != signature
    with torch.no_grad():
        assert_close(layer(x), y.double(), TOLERANCE[torch.float32])


def layer_of(outputs: int, features: int) -> FactoredLinear:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(features, outputs, generator=generator)
    mask = torch.rand(factor.shape, generator=generator) < 0.5
    return FactoredLinear.from_factor(None, factor, mask, role="up", fmt="bitmask").eval()


@pytest.mark.slow
def test_gradients_and_traced_graphs_use_it_too(toy: Wide) -> None:
    layer, x = layer_of(64, 32), inputs(3, 32, torch.float32)
    wanted = x.double() @ layer.dense_weight().double().T
    assert_close(layer(x).detach(), wanted.detach(), TOLERANCE[torch.float32])
    layer(x).sum().backward()
    assert layer.values.grad is not None
    assert toy.calls == 2
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), wanted.detach(), TOLERANCE[torch.float32])
        assert toy.calls == 3
        copy.deepcopy(layer)(x)
        assert toy.calls == 4


def test_what_it_refuses_another_takes_and_the_reason_is_told(toy: Wide, caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of(64, 32)
    assert layer.backends()["wide"] == "yes"
    assert layer.backends(torch.bfloat16)["wide"] == "inputs are torch.bfloat16; known: float32"
    assert list(layer.backends()) == ["wide", "triton", "cpu", "reference"]
    assert layer.backends(torch.float64)["reference"] == "yes"
    assert "Triton" in layer.backends()["triton"] or "not on cuda" in layer.backends()["triton"]
    x = inputs(3, 32, torch.float64)
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "fips.kernels"):
        y = layer(x)
    assert_close(y, x @ layer.dense_weight().detach().double().T, (1e-6, 1e-6))
    assert toy.calls == 0
    assert "inputs are torch.float64; known: float32" in caplog.text


@needs_library
def test_a_basis_and_repeated_calls_go_back_to_the_kernels(toy: Wide) -> None:
    layer, x = layer_of(64, 32), inputs(3, 32, torch.float32)
    with torch.no_grad():
        layer(x)
        assert not layer.runtime._held.repeats
        registry.unregister("wide")
        layer(x)
        assert layer.runtime._held.repeats
        registry.register(toy)
        calls = toy.calls
        layer(x)
        assert toy.calls == calls + 1


def test_names_are_taken_once_and_known(toy: Wide) -> None:
    with pytest.raises(ConfigError, match="backend 'wide' already"):
        registry.register(Wide())
    with pytest.raises(ConfigError, match="no backend 'narrow' to take out; known: wide, triton, cpu"):
        registry.unregister("narrow")
    with pytest.raises(ConfigError, match="known: wide"):
        registry.unregister("reference")


def test_every_backend_agrees_with_the_reference_where_it_supports() -> None:
    for fmt in ("full", "bitmask", "4:16", "block8"):
        packed, x = example(fmt, (24, 64)), inputs(3, 64, torch.float32)
        wanted = reference.multiply(x, packed).double()
        for backend in registry.backends():
            if backend.supports(packed, x.device, x.dtype) is None:
                prepared = backend.prepare(packed)
                assert_close(backend.multiply(x, prepared, None), wanted, TOLERANCE[torch.float32])
                assert torch.equal(backend.decode(prepared, torch.float32), reference.to_dense(packed))
                assert prepared.is_current(packed)
        assert_close(ops.packed_linear(x, packed, None), wanted, TOLERANCE[torch.float32])


def test_a_snapshot_sees_what_counts() -> None:
    place, content = torch.zeros(8), torch.zeros(8)
    seen = Snapshot(places=(place, None), contents=(None, content))
    place.add_(1)
    assert seen.holds()
    content.add_(1)
    assert not seen.holds()
    seen = Snapshot(places=(place,), contents=(content,))
    assert seen.equals(Snapshot(places=(place.detach(),), contents=(content,)))
    place.data = place.data.clone()
    assert not seen.holds()
    assert not seen.equals(Snapshot(places=(place,), contents=(content,)))
    place.data = place.data[:4]
    assert not Snapshot(places=(torch.zeros(8),)).equals(Snapshot(places=(place,)))


def test_one_node_of_a_graph_computes_what_the_layer_does() -> None:
    packed = example("bitmask", (24, 64), dtype=torch.int8)
    bias, x = inputs(1, 24, torch.float32)[0], inputs(3, 64, torch.float32)
    parts = (packed.values_Z, packed.pattern, packed.scales_N, None, bias, None, False)
    with torch.no_grad():
        y = ops.product_in_graph(x, parts, 24, ops.meaning_of(packed, 16))
    assert y is not None
    assert_close(y, x.double() @ reference.decode(packed, torch.float32).double().T + bias, TOLERANCE[torch.float32])
    assert ops.product_in_graph(x.requires_grad_(), parts, 24, "") is None  # a graph with gradients has an operator
    assert ops.product_in_graph(x, (*parts[:-1], True), 24, "") is None
