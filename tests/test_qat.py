"""Packed numbers and scales in training, and packed again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

import fips
from fips.errors import ModelError
from fips.layers.linear import FactoredLinear, factored_layers
from fips.training.qat import TrainedLinear
from fips.training.rounded import INTEGER_RATE

SHARED: dict[str, Any] = {"sharing": "always", "bits": 8.0, "values": "int8", "layers": "mlp"}
SETTINGS: list[dict[str, Any]] = [
    {"bits": 4.6, "values": "int4"},
    {"bits": 5.0, "values": "int4g32"},
    {"bits": 3.6, "values": "nl3g64"},
    {"bits": 3.6, "values": "tc3"},
    {"bits": 5.0, "values": "int8", "pattern": "unstructured"},
    {"bits": 6.0, "values": "int8", "pattern": "2:4"},
    SHARED,
    {"bits": 6.0, "method": "gptq", "layers": "all"},
]


def packed(settings: dict[str, Any], family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family)
    fips.compress(model, batches_for(model), fips.CompressionConfig(**settings))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batches_for(model, count=1)[0]).logits
    return found


def train(model: PreTrainedModel, steps: int, rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    losses, (batch,) = [], batches_for(model, count=1, seed=1)
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_packed_again_computes_what_was_trained(settings: dict[str, Any], tmp_path: Path) -> None:
    model = packed(settings)
    before, kinds = logits(model), {name: (one.kind, one.fmt) for name, one in factored_layers(model).items()}
    bytes_before = fips.save(model, tmp_path / "before")
    assert fips.prepare_qat(model) is model
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)
    codes = {name: one.values.clone() for name, one in factored_layers(model).items()}
    masks = {name: one.mask() for name, one in factored_layers(model).items()}
    losses = train(model, 12)
    assert losses[-1] < losses[0]
    trained = logits(model)
    model.save_pretrained(tmp_path / "during")  # as a trainer does between epochs
    assert fips.save(model, tmp_path / "saved") == bytes_before
    for name in ("during", "saved"):
        torch.testing.assert_close(logits(fips.load(tmp_path / name)), trained, atol=2e-4, rtol=1e-4)
    assert fips.finish_qat(model) is model
    layers = factored_layers(model)
    assert {name: (one.kind, one.fmt) for name, one in layers.items()} == kinds
    assert not any(isinstance(one, TrainedLinear) for one in layers.values())
    torch.testing.assert_close(logits(model), trained, atol=2e-4, rtol=1e-4)
    assert all(torch.equal(one.mask(), masks[name]) for name, one in layers.items())
    opened = [name for name in layers if not name.endswith(("embed_tokens", "lm_head"))]
    moved = [not torch.equal(layers[name].values, codes[name]) for name in opened]
    assert all(moved) == any(moved) == (settings.get("values") != "tc3")
    assert fips.save(model, tmp_path / "after") == bytes_before
    assert torch.equal(logits(fips.load(tmp_path / "after")), logits(model))


def test_a_number_moves_by_the_rate_and_stays_in_its_grid() -> None:
    model = fips.prepare_qat(packed({"bits": 4.6, "values": "int4"}))
    layer = next(iter(factored_layers(model).values()))
    assert isinstance(layer, TrainedLinear)
    assert layer.change is not None
    before = layer.numbers().detach()
    with torch.no_grad():
        layer.change += 1 / INTEGER_RATE
    assert torch.equal(layer.numbers(), (before + 1).clamp(-7, 7))
    with torch.no_grad():
        layer.change += 100
    assert float(layer.numbers().detach().amax()) == 7


@pytest.mark.slow
def test_everything_trains_that_is_said_to() -> None:
    model = fips.prepare_qat(packed(SHARED))
    (batch,) = batches_for(model, count=1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    missing = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
    assert not missing
    names = [name for name, _ in model.named_parameters()]
    for part in ("change", "growth", "fips_bases"):
        assert any(part in name for name in names), part


class Texts(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 64, (12,), generator=torch.Generator().manual_seed(index % 4))
        return {"input_ids": ids, "labels": ids}


def test_a_packed_embedding_is_no_news_to_who_lets_the_rest_train(caplog: pytest.LogCaptureFixture) -> None:
    model = fips.prepare_qat(packed({"bits": 6.0, "layers": "all", "effort": "fast"})).train()
    ids = torch.arange(3, 15)[None]
    model(ids, labels=ids).loss.backward()
    assert "training leaves" not in caplog.text
    assert fips.finish_qat(model) is model


@pytest.mark.slow
def test_the_trainer_trains_saves_and_loads_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = fips.prepare_qat(packed({"bits": 3.6, "values": "nl3g64"}))
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, learning_rate=2e-3, report_to=[],
        save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts())
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last < 0.95 * first
    assert "training leaves" not in caplog.text
    fips.finish_qat(model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-3)
    best = Path(str(trainer.state.best_model_checkpoint))
    torch.testing.assert_close(logits(fips.load(best)), logits(model.to("cpu")), atol=1e-4, rtol=1e-4)


def test_a_packed_state_is_loaded_into_layers_in_training() -> None:
    model = packed({"bits": 4.6, "values": "int4"})
    start = copy.deepcopy(model.state_dict())
    expected = logits(model)
    fips.prepare_qat(model)
    parameters = [one for _, one in model.named_parameters()]
    train(model, 3)
    assert model.state_dict().keys() == start.keys()
    model.load_state_dict(start)
    assert all(a is b for a, b in zip(parameters, (one for _, one in model.named_parameters()), strict=True))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_wrong_use_is_told() -> None:
    with pytest.raises(ModelError, match="no packed layer whose numbers could train"):
        fips.prepare_qat(tiny_model("llama"))
    model = packed({"bits": 4.6, "values": "int4"})
    with pytest.raises(ModelError, match="prepare_qat"):
        fips.finish_qat(model)
    fips.prepare_qat(model)
    with pytest.raises(ModelError, match="finish_qat"):
        fips.prepare_qat(model)


def test_layers_of_floating_values_stay_what_they_are() -> None:
    model = packed({"method": "fips-paper", "budget": 0.5, "reconstruction": {"steps": 1}, "precision": "float32"})
    with pytest.raises(ModelError, match="no packed layer whose numbers"):
        fips.prepare_qat(model)
    assert all(type(layer) is FactoredLinear for layer in factored_layers(model).values())
