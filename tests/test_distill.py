"""Distillation: towards the original, and kept only where it helps on data that it was not trained on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import fips
from fips.record import CompressionReport
from fips.training.distill import held_out_batches


@pytest.mark.slow
@pytest.mark.parametrize(("values", "size", "rate"), [("float", 4.8, 1e-3), ("auto", 3.2, 3e-4), ("int4", 3.2, 3e-4)])
@pytest.mark.parametrize("family", ["vit", "llama"])
def test_distillation_moves_the_logits_towards_the_teacher(family: str, values: Any, size: float, rate: float) -> None:
    def divergence(steps: int) -> float:
        model, teacher = tiny_model(family), tiny_model(family)
        batches = batches_for(model)
        distill = {"steps": steps, "learning_rate": rate, "held_out": 0}
        config = fips.CompressionConfig(bits=size, values=values, distill=distill)
        report = fips.compress(model, batches, config)
        assert len(report.groups) == 1
        before = teacher.state_dict()
        assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model(family).state_dict().items())
        with torch.no_grad():
            pairs = [(model(**b).logits.log_softmax(-1), teacher(**b).logits.log_softmax(-1)) for b in batches]
        return sum(float((t.exp() * (t - s)).sum()) for s, t in pairs)

    assert divergence(60) < 0.8 * divergence(0)


@pytest.mark.parametrize(
    ("count", "share", "numbers"),
    [
        (16, 0.125, {4, 12}), (4, 0.125, {2}), (2, 0.125, {1}), (1, 0.125, set()), (4, 0.0, set()),
        (3, 0.5, {0, 2}), (8, 0.5, {1, 3, 5, 7}),
    ],
)  # fmt: skip
def test_batches_held_out_are_spread_over_all(count: int, share: float, numbers: set[int]) -> None:
    assert held_out_batches(count, share) == numbers


def _distilled(held_out: float = 0.125, **settings: Any) -> tuple[PreTrainedModel, CompressionReport]:
    model = tiny_model("llama")
    config = fips.CompressionConfig(
        bits=3.2, effort="fast", precision="float32", distill={"held_out": held_out, **settings}
    )
    return model, fips.compress(model, batches_for(model, batch=16), config)


@pytest.mark.slow
def test_distillation_keeps_what_was_best_on_batches_that_it_did_not_train_on() -> None:
    model, report = _distilled(steps=30, check_every=4, learning_rate=1e-3)
    losses = dict(report.distilled["held_out"])
    kept = report.distilled["kept"]
    assert set(losses) <= {0, *range(4, 30, 4), 30}
    assert losses[kept] == min(losses.values()) < losses[0]
    (held,) = held_out_batches(4, 0.125)
    batch, teacher = batches_for(model, batch=16)[held], tiny_model("llama")
    with torch.no_grad():
        ours, theirs = (one(**batch).logits.float().log_softmax(-1).flatten(0, 1) for one in (model, teacher))
    divergence = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert divergence.item() == pytest.approx(losses[kept], rel=0.02)  # one more token counts in the batch's last place
    assert f"after {kept} of {report.distilled['steps']} steps" in report.summary()
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))).distillation() == report.distillation()


@pytest.mark.slow
def test_distillation_that_helps_nowhere_ends_early_and_is_taken_back() -> None:
    model, report = _distilled(steps=60, check_every=2, patience=2, learning_rate=1.0)
    solved, _ = _distilled(steps=0)
    assert report.distilled["kept"] == 0
    assert report.distilled["steps"] == 4
    assert any("4 steps of distillation made the loss on data held out no smaller" in note for note in report.notes)
    state = solved.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_without_batches_held_out_the_last_state_is_kept() -> None:
    model, report = _distilled(held_out=0.0, steps=4, learning_rate=1.0)
    assert report.distilled == {"steps": 4, "kept": 4, "held_out": []}
    assert "distilled" not in report.summary()
    solved, _ = _distilled(steps=0)
    state = solved.state_dict()
    assert any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_what_is_computed_anew_in_the_backward_pass_is_the_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that compute their activations once more for the gradients give those of the layers that are trained."""

    def trained() -> dict[str, torch.Tensor]:
        model = tiny_model("llama")
        distill = {"steps": 3, "learning_rate": 1e-2, "held_out": 0}
        fips.compress(model, batches_for(model), fips.CompressionConfig(bits=6.4, values="float", distill=distill))
        return model.state_dict()

    once = trained()
    kind = type(tiny_model("llama").model.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: checkpoint(forward, self, x, use_reentrant=False))
    assert all(torch.equal(once[name], tensor) for name, tensor in trained().items())
