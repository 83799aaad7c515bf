"""Under autocast packed layers compute in the type of their input: in every way, with gradients and without."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import batches_for, tiny_model
from test_kernels import inputs
from test_runtime import make_layer
from torch import Tensor, nn

import fips
from fips.formats.values import values_named
from fips.kernels import cpu, reference
from fips.kernels.select import FRUGAL
from fips.layers.embedding import PackedEmbedding
from fips.layers.linear import FactoredLinear, factored_layers

WAYS = (*FRUGAL, "merged")


def turned_layer(values: str = "int4") -> FactoredLinear:
    """A layer whose columns are turned, which is a product of its own."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-7, 8, (64, 96), generator=generator).float()
    layer = FactoredLinear.from_factor(
        None, numbers, torch.ones(64, 96, dtype=torch.bool), role="up", fmt="full", values=values,
        scales=torch.rand(96, generator=generator) + 0.5, rotation=16,
    )  # fmt: skip
    layer.bias = nn.Parameter(torch.randn(96, generator=generator))
    assert values_named(values).scaled
    return layer.eval()


LAYERS = {
    "up": lambda: make_layer("up"),
    "down": lambda: make_layer("down"),
    "no basis": lambda: make_layer("up", basis=False),
    "turned": turned_layer,
}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_computes_in_the_type_of_its_input(
    way: str, kind: str, gradients: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(cpu, "_available", False)
    elif not cpu.available():
        pytest.skip(cpu.unavailable_reason())
    layer = LAYERS[kind]()
    layer.runtime.policy = way
    for tokens in (1, 9):
        x = inputs(tokens, layer.in_features, torch.float32).requires_grad_(gradients)
        twin = copy.deepcopy(layer)  # nothing kept of one call serves the other
        with torch.set_grad_enabled(gradients):
            wanted = twin(x)
            with torch.autocast("cpu", torch.bfloat16):
                y, again = layer(x), layer(x)
        assert y.dtype == torch.float32
        assert torch.equal(y, wanted)
        assert torch.equal(again, wanted)
        if gradients:
            (gradient,), (expected,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), x)
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, expected)


def test_backward_passes_under_autocast_are_as_exact() -> None:
    packed = turned_layer().packed()
    x, grad = inputs(5, 64, torch.float32), inputs(5, 96, torch.float32)
    wanted, _ = reference.multiply_backward(grad, x, packed)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = reference.multiply_backward(grad, x, packed)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_compiled_layer_does_too(kind: str) -> None:
    layer = LAYERS[kind]()
    x = inputs(6, layer.in_features, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = compiled(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, wanted)


def test_dense_weights_and_rows_of_an_embedding_are_those_without() -> None:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), fips.CompressionConfig(bits=7, layers="all", values="int6"))
    embedding, ids = model.get_input_embeddings(), torch.arange(8)
    assert isinstance(embedding, PackedEmbedding)
    assert embedding.rotation > 1

    def found() -> list[Tensor]:
        with torch.no_grad():
            return [embedding(ids), *(layer.dense_weight() for layer in factored_layers(model).values())]

    wanted = found()
    with torch.autocast("cpu", torch.bfloat16):
        tried = found()
    for one, other in zip(tried, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
