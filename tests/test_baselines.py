"""The methods to compare with do what their papers say: each beats a plainer one in the error that it minimises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import Tensor

import fips
from fips.formats.values import values_named
from fips.layers.linear import factored_layers
from fips.methods.gptq import gptq
from fips.methods.lowrank import shared_whitened_svd, truncated_svd, whitened_svd
from fips.methods.pruning import magnitude, sparsegpt, wanda

OUT, IN = 24, 60


def weight(seed: int = 0) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def moment(size: int = IN) -> Tensor:
    """An ill-conditioned second moment."""
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -1.5, size)
    mixed = samples @ torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return mixed.T @ mixed / (4 * size)


def error(exact_OI: Tensor, other_OI: Tensor) -> float:
    """Mean squared error of the layer's outputs."""
    difference = exact_OI - other_OI
    return float(((difference @ moment()) * difference).sum())


def test_pruners_keep_the_density_and_zero_the_rest() -> None:
    for method in (magnitude, lambda w, density: wanda(w, moment(), density=density),
                   lambda w, density: sparsegpt(w, moment(), density=density)):  # fmt: skip
        pruned, mask = method(weight(), density=0.5)
        assert int(mask.sum()) == OUT * IN // 2
        assert (pruned[~mask] == 0).all()


def test_each_pruner_beats_the_plainer_one_on_the_outputs() -> None:
    scaled = weight() * torch.logspace(0, 1, IN)
    by_size = error(scaled, magnitude(scaled, density=0.4)[0])
    by_inputs = error(scaled, wanda(scaled, moment(), density=0.4)[0])
    by_surgeon = error(scaled, sparsegpt(scaled, moment(), density=0.4)[0])
    assert by_surgeon < 0.8 * min(by_size, by_inputs)


def test_wanda_keeps_the_same_number_in_every_row_by_weight_times_input() -> None:
    _, mask = wanda(weight(), torch.diag(torch.tensor([100.0] * 6 + [1e-4] * 54)), density=0.1)
    assert torch.equal(mask, torch.arange(IN).expand(OUT, IN) < 6)


def test_gptq_beats_rounding_to_the_nearest_on_the_outputs() -> None:
    integers, steps, _ = gptq(weight(), moment(), values=values_named("int3"), dtype=torch.float32)
    assert integers.dtype == torch.int8
    assert integers.abs().max() <= 3
    rounded = integers * steps.unsqueeze(1)
    nearest = (weight() / steps.unsqueeze(1)).round().clamp(-3, 3) * steps.unsqueeze(1)
    assert error(weight(), rounded) < 0.8 * error(weight(), nearest)


def test_low_rank_is_best_in_its_own_metric() -> None:
    plain_basis, plain = truncated_svd(weight(), rank=8)
    basis, factor = whitened_svd(weight(), moment(), reads_stream=False, rank=8)
    assert basis.shape == (OUT, 8)
    assert factor.shape == (8, IN)
    assert error(weight(), basis @ factor) < error(weight(), plain_basis @ plain)
    assert (weight() - plain_basis @ plain).norm() < (weight() - basis @ factor).norm()


def test_a_shared_basis_serves_matrices_that_lie_in_one_space() -> None:
    space = torch.randn(IN, 6, generator=torch.Generator().manual_seed(1))
    matrices = [space @ torch.randn(6, 30, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    basis, factors = shared_whitened_svd(matrices, moment(), rank=6)
    for matrix, factor in zip(matrices, factors, strict=True):
        torch.testing.assert_close(basis @ factor, matrix, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("magnitude", {}), ("wanda", {"values": "int8"}), ("sparsegpt", {"values": "int4"}), ("gptq", {}), ("svd", {}),
        ("svd-llm", {}), ("basis-sharing", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["vit", "phi3", "gpt2"])
def test_every_method_keeps_the_bytes_and_loads_exactly(
    family: str, method: Any, changes: dict[str, Any], tmp_path: Any
) -> None:
    model = tiny_model(family)
    batches = batches_for(model)
    config = fips.CompressionConfig(bits=8.0, method=method, **changes)
    report = fips.compress(model, batches, config)
    dense, factored = (report.plan["layers"][key] for key in ("dense", "factored"))
    assert factored["bytes"] <= 0.5 * 2 * dense["parameters"] + len(factored_layers(model))
    assert fips.save(model, tmp_path / "out") == report.plan["compressed_model"]["bytes"]
    with torch.no_grad():
        assert torch.equal(fips.load(tmp_path / "out")(**batches[0]).logits, model(**batches[0]).logits)
