"""The main job on tiny models of every family: exact counts, exact load, a model that is left alone on failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, batches_for, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import fips
from fips.compression import ProgressEvent
from fips.formats.patterns import pattern_named
from fips.layers.linear import factored_layers
from fips.methods.workbench import dense_matrix
from fips.models import group_layers, locate_layers
from fips.plan.footprint import state_bytes
from fips.training.factors import TrainableGroup
from fips.training.reconstruct import reconstruct_


def settings(**changes: Any) -> fips.CompressionConfig:
    reconstruction = {"steps": 12, "update_every": 3, "learning_rate": 3e-3}
    return fips.CompressionConfig(
        **{"method": "fips-paper", "budget": 0.6, "reconstruction": reconstruction, "precision": "float32", **changes}
    )


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_compress_save_load_merge(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    batches = batches_for(model)
    report = fips.compress(model, batches, settings())
    expected = logits_of(model, batches[0])

    written = fips.save(model, tmp_path / "out")
    assert written == report.plan["compressed_model"]["bytes"] == state_bytes(model)
    loaded = fips.load(tmp_path / "out")
    assert torch.equal(logits_of(loaded, batches[0]), expected)
    assert not [name for name, p in loaded.named_parameters() if p.is_meta]
    assert loaded.fips_report.to_dict() == report.to_dict()

    merged = fips.merge(loaded)
    assert factored_layers(merged) == {}
    assert {name: tuple(t.shape) for name, t in merged.state_dict().items()} == {
        name: tuple(t.shape) for name, t in tiny_model(family).state_dict().items()
    }
    torch.testing.assert_close(logits_of(merged, batches[0]), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "4:16"},
        {"pattern": "2:4", "schedule": "static"},
        {"schedule": "rigl"},
        {"threshold_scope": "layer"},
        {"sparsity": 0.0},
        {"factor_dtype": "bfloat16"},
        {"share_blocks": 1},
        {"groups": [[0, 2]]},
        {"targets": ["self_attn.o_proj", "down_proj"]},
        {"reconstruction": {"steps": 0}},
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_setting_has_the_predicted_size_and_loads_exactly(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    batches = batches_for(model)
    report = fips.compress(model, batches, settings(**changes))
    for group in report.plan["groups"]:
        assert group["factored"]["parameters"] <= 0.6 * group["dense"]["parameters"]
    layers = factored_layers(model)
    kept = sum(layer.values.numel() for layer in layers.values())
    assert kept == sum(group["kept"] for group in report.plan["groups"])
    assert fips.save(model, tmp_path / "out") == report.plan["compressed_model"]["bytes"]
    loaded = fips.load(tmp_path / "out")
    assert torch.equal(logits_of(loaded, batches[1]), logits_of(model, batches[1]))


@pytest.mark.parametrize("schedule", ["static", "gmp", "rigl"])
def test_every_schedule_ends_exactly_at_its_sparsity(schedule: str) -> None:
    model = tiny_model("vit")
    fips.compress(model, batches_for(model), settings(schedule=schedule, sparsity=0.8, threshold_scope="layer"))
    for layer in factored_layers(model).values():
        size = layer.factor_shape[0] * layer.factor_shape[1]
        assert layer.values.numel() == int(0.2 * size + 1e-6)
        assert (
            int(pattern_named(layer.fmt).unpack_mask(layer.pattern, layer.factor_shape).sum()) == layer.values.numel()
        )


def test_nm_holds_along_the_reduction_of_both_roles() -> None:
    model = tiny_model("vit")
    fips.compress(model, batches_for(model), settings(pattern="4:16"))
    roles = set()
    for layer in factored_layers(model).values():
        mask = layer.factor() != 0
        assert (mask.reshape(-1, 16).sum(1) <= 4).all()
        roles.add((layer.role, layer.factor_shape[1] == (layer.basis.weight.shape[1] if layer.role == "up" else 80)))
    assert roles == {("up", True), ("down", True)}


def test_matrices_that_share_a_subspace_are_reproduced() -> None:
    model = tiny_model("vit")
    batches = batches_for(model)
    subspace = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(3))).Q
    for site in (site for sublayer in locate_layers(model).sublayers for site in sublayer.sites):
        weight = model.get_submodule(site.name).weight
        projected = subspace @ (subspace.T @ dense_matrix(model, site))
        weight.data = projected.T.contiguous() if site.role == "up" else projected
    expected = logits_of(model, batches[0])
    config = settings(budget=1.0, sparsity=0.0, reconstruction={"steps": 0}, precision="float32")
    report = fips.compress(model, batches, config)
    assert report.plan["groups"][0]["rank"] == 30
    torch.testing.assert_close(logits_of(model, batches[0]), expected, atol=1e-6, rtol=1e-4)


def test_calibration_lowers_the_block_error() -> None:
    model = tiny_model("vit")
    reconstruction = {"steps": 60, "update_every": 10, "learning_rate": 5e-3}
    report = fips.compress(
        model, batches_for(model), settings(reconstruction=reconstruction, precision="float32", schedule="rigl")
    )
    result = report.groups[0]
    assert result["relative_error_final"] < 0.5 * result["relative_error_start"]
    assert result["loss_last_step"] < result["loss_first_step"]


def test_the_loss_is_the_sum_of_block_errors_on_original_activations() -> None:
    """First step against an independent computation: dense blocks with W replaced by B (F * mask)."""
    model = tiny_model("vit")
    batch = batches_for(model, count=1)
    config = settings(schedule="static", reconstruction={"steps": 1}, precision="float32")
    reference = tiny_model("vit")
    states: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: states.append(args[0])) for b in reference.vit.layers]
    hooks.append(reference.vit.layers[2].register_forward_hook(lambda _, __, out: states.append(out)))
    logits_of(reference, batch[0])
    for hook in hooks:
        hook.remove()
    sites = [site for sublayer in locate_layers(reference).sublayers for site in sublayer.sites]
    weights = [dense_matrix(reference, site).double() for site in sites]
    u, s, vh = torch.linalg.svd(torch.cat(weights, dim=1), full_matrices=False)
    rank = int(0.6 * 32 * 480 / (32 + 0.25 * 480))
    extra = rank - 32
    factor = torch.cat([s[:, None] * vh, (s[:, None] * vh)[:extra] / 32.0])
    kept = int(0.25 * factor.numel())
    factor = factor * (factor.abs() >= factor.abs().flatten().sort(descending=True).values[kept - 1])
    basis = torch.cat([u, torch.zeros(32, extra, dtype=torch.float64)], dim=1)
    for site, part in zip(sites, factor.split([site.hidden for site in sites], dim=1), strict=True):
        product = (basis @ part).float()
        layer = reference.get_submodule(site.name)
        layer.weight.data = product.T.contiguous() if site.role == "up" else product
    with torch.no_grad():
        loss = sum((reference.vit.layers[i](states[i]) - states[i + 1]).square().mean().item() for i in range(3))
    report = fips.compress(model, batch, config)
    assert report.groups[0]["loss_first_step"] == pytest.approx(loss, rel=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    def values(seed: int) -> list[Tensor]:
        model = tiny_model("vit")
        fips.compress(model, batches_for(model), settings(seed=seed))
        return [layer.values.detach() for layer in factored_layers(model).values()]

    first, again, other = values(0), values(0), values(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_memory_bound_does_not_change_the_result() -> None:
    def values(limit: int) -> tuple[list[Tensor], int]:
        model = tiny_model("llama")
        config = settings(reconstruction={"steps": 6}, activation_memory=limit, precision="float32")
        report = fips.compress(model, batches_for(model), config)
        return [layer.values.detach() for layer in factored_layers(model).values()], report.activation_file_bytes

    in_ram, none_in_file = values(1 << 30)
    in_file, file_bytes = values(0)
    assert none_in_file == 0
    assert file_bytes > 4 * 4 * 16 * 32 * 4
    assert all(torch.equal(a, b) for a, b in zip(in_ram, in_file, strict=True))


def test_biases_norms_and_attention_are_untouched() -> None:
    model, original = tiny_model("vit"), tiny_model("vit")
    fips.compress(model, batches_for(model), settings())
    before, after = original.state_dict(), model.state_dict()
    kept = [name for name in before if not name.endswith(("fc1.weight", "fc2.weight"))]
    assert len(kept) == len(before) - 6
    for name in kept:
        assert torch.equal(after[name], before[name]), name
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_training_mode_and_cache_setting_come_back() -> None:
    model = tiny_model("llama").train()
    model.config.use_cache = True
    fips.compress(model, batches_for(model), settings())
    assert model.training
    assert model.config.use_cache
    assert all(layer.training for layer in factored_layers(model).values())


@pytest.mark.parametrize("stage", ["record", "reconstruct"])
def test_an_interrupt_leaves_the_model_as_it_was(stage: str) -> None:
    model, original = tiny_model("vit"), tiny_model("vit")
    batches = batches_for(model)

    def interrupt(event: ProgressEvent) -> None:
        if event.stage == stage and event.group == "g1" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fips.compress(model, batches, settings(share_blocks=1), progress=interrupt)
    assert factored_layers(model) == {}
    assert model.state_dict().keys() == original.state_dict().keys()
    assert torch.equal(logits_of(model, batches[0]), logits_of(original, batches[0]))
    assert all(p.requires_grad for p in model.parameters())


def test_progress_reports_every_step() -> None:
    model = tiny_model("vit")
    events: list[ProgressEvent] = []
    fips.compress(model, batches_for(model), settings(), progress=events.append)
    steps = [event for event in events if event.stage == "reconstruct"]
    assert [event.done for event in steps] == list(range(1, 13))
    assert all(event.total == 12 and event.loss is not None for event in steps)
    assert [event.done for event in events if event.stage == "record"][-1] == 4


def test_a_group_is_announced_before_the_minutes_that_it_takes() -> None:
    model = tiny_model("llama")
    events: list[ProgressEvent] = []
    config = fips.CompressionConfig(method="fips-shared", bits=8.0, share_blocks=2)
    fips.compress(model, batches_for(model), config, progress=events.append)
    for stage in ("try", "solve"):
        steps = [(event.group, event.done, event.total) for event in events if event.stage == stage]
        assert steps == [("g0", 0, 2), ("g0", 1, 2), ("g1", 1, 2), ("g1", 2, 2)]


def test_wrong_batches_and_double_compression_are_refused() -> None:
    model = tiny_model("vit")
    with pytest.raises(fips.FipsError, match="must be a dict of tensors or a tensor, got list"):
        fips.compress(model, [[1, 2]], settings())
    fips.compress(model, batches_for(model), settings())
    with pytest.raises(fips.FipsError, match="already compressed"):
        fips.compress(model, batches_for(model), settings())


def test_an_nm_pattern_that_does_not_divide_the_width_is_refused_before_any_work() -> None:
    model = tiny_model("llama", intermediate_size=72)
    with pytest.raises(fips.FipsError, match=r"multiple of 16, but `model\.layers\.0\.mlp\.down_proj` has 72"):
        fips.compress(model, [], settings(pattern="4:16"))


def test_tensor_batches_work_for_plain_modules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(torch.relu(self.fc1(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    report = fips.compress(model, [torch.randn(8, 16) for _ in range(3)], settings())
    assert set(factored_layers(model)) == {"0.fc1", "0.fc2", "1.fc1", "1.fc2"}
    assert report.groups[0]["relative_error_final"] < 1
    x = torch.randn(8, 16)
    y = model(x)  # its bases stand in the sequence too
    assert torch.equal(y, model[1](model[0](x)))
    assert torch.allclose(fips.merge(model)(x), y, atol=1e-5)


def test_calibrating_a_group_moves_the_basis_jointly() -> None:
    """One basis, all factors: every parameter of the group gets a gradient step, the dense weights none."""
    model = tiny_model("vit")
    groups = group_layers(locate_layers(model).sublayers)
    weights = [dense_matrix(model, site) for site in groups[0].sites]
    from fips.calibration.record import ActivationSpool, record_blocks
    from fips.solve.svd import shared_svd
    from fips.training.factors import swapped

    config = settings(schedule="static", sparsity=0.5, reconstruction={"steps": 1}, precision="float32")
    basis, factors = shared_svd(weights, rank=20)
    group = TrainableGroup(basis, factors, groups[0].sites, [None] * len(weights), config, 0.5)
    blocks = {name: model.get_submodule(name) for name in groups[0].blocks}
    model.requires_grad_(False)
    with ActivationSpool(1 << 30) as spool:
        records = record_blocks(model, blocks, batches_for(model, count=1), spool, lambda m, b: m(**b))
        with swapped(model, group.modules):
            losses = reconstruct_(group, blocks, records, spool, torch.device("cpu"))
    assert len(losses) == 1
    assert not torch.equal(group.basis_DR.detach(), basis)
    for layer, factor in zip(group.layers, factors, strict=True):
        assert not torch.equal(layer.entries_RF.detach()[layer.mask_RF], factor[layer.mask_RF])
