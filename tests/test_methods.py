"""A method is one class in one place; what it does not need is not measured; a name that nothing answers to raises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from conftest import batches_for, tiny_model
from pydantic import Field, create_model
from torch import Tensor, nn

import fips
from fips.app import compare as comparing
from fips.app.compare import compare
from fips.config import NAMED, SETTINGS, CompressionConfig, known_methods
from fips.data import Batches
from fips.errors import ConfigError
from fips.layers.linear import factored_layers
from fips.methods.layerwise import MatrixMethod, StoredMatrix
from fips.methods.registry import Method, method_of, register
from fips.methods.sweep import _Pass
from fips.methods.workbench import MomentCache, Needs, Workbench
from fips.plan.groups import GroupPlan
from fips.plan.planner import PLANNERS
from fips.storage.quantizer import read_report

FIELDS: dict[str, dict[str, Any]] = {
    "fips-paper": {"reconstruction": {"steps": 0}},
    "toy": {"keep": 0.25},
}


class Rows(MatrixMethod[Any]):
    """Keeps the first rows of every matrix and zeros the others."""

    class Settings(CompressionConfig):
        method: Literal["toy"] = "toy"
        keep: float = Field(gt=0, le=1)
        """Share of the rows."""

    settings = Settings
    aliases: ClassVar = {"toy-half": {"keep": 0.5}}

    def store(self, weight_OI: Tensor, moment_II: Tensor | None, plan: GroupPlan) -> StoredMatrix:
        mask_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
        mask_OI[: int(self.config.keep * len(mask_OI))] = True
        return StoredMatrix(weight_OI * mask_OI, mask_OI)


@pytest.fixture
def toy() -> Iterator[type[Rows]]:
    yield register(Rows)
    SETTINGS.pop("toy", None)
    NAMED.pop("toy-half", None)
    PLANNERS.pop("toy", None)


def toy_settings(**changes: Any) -> CompressionConfig:
    return CompressionConfig(**{"method": "toy", "bits": 8.0, "keep": 0.25, **changes})


def test_a_toy_method_is_one_class(toy: type[Rows], tmp_path: Path) -> None:
    model = tiny_model("vit")
    batches = batches_for(model)
    config = toy_settings()
    assert type(config) is Rows.Settings
    assert type(method_of(config)) is Rows
    original = model.vit.layers[0].mlp.fc1.weight.detach().clone()
    report = fips.compress(model, batches, config)
    weight = model.vit.layers[0].mlp.fc1.dense_weight()
    assert torch.equal(weight[:20].bfloat16(), original[:20].bfloat16())
    assert not weight[20:].any()
    fips.save(model, tmp_path / "out", recipe=fips.Recipe(compression=config).to_yaml())
    loaded = fips.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)
    assert loaded.fips_report.config == config
    assert loaded.fips_report.to_dict() == report.to_dict()
    assert fips.Recipe.load(tmp_path / "out" / "fips_recipe.yaml").compression == config


def test_a_toy_method_is_compared_under_its_names(toy: type[Rows]) -> None:
    model = tiny_model("llama")
    examples = batches_for(model)
    scored = Batches(
        kind="text", description={"sequence_length": 16}, num_samples=16, num_bytes=100, chunks=[[0], [1]],
        collate=lambda places: {**examples[places[0]], "labels": examples[places[0]]["input_ids"]},
    )  # fmt: skip
    found = compare(model, lambda seed: examples, scored, methods=["toy+keep=0.25", "toy-half"], sizes=[8.0])
    quarter, half = found.runs
    assert quarter.relative_error is not None
    assert half.relative_error is not None
    assert half.relative_error < quarter.relative_error
    assert {"toy", "toy-half", "fips", "fips-shared", "no-sharing"} <= set(known_methods())
    assert toy_settings(method="toy-half", keep=0.75).keep == 0.75


def test_moments_of_a_seed_go_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = tiny_model("llama"), []
    examples = [batches_for(model, seed=seed) for seed in range(3)]
    scored = Batches(
        kind="text", description={"sequence_length": 16}, num_samples=4, num_bytes=100, chunks=[[0]],
        collate=lambda places: {**examples[0][0], "labels": examples[0][0]["input_ids"]},
    )  # fmt: skip
    work = comparing.compress

    def spied(*args: Any, moments: MomentCache, **options: Any) -> Any:
        report = work(*args, moments=moments, **options)
        held.append(len(moments))
        return report

    monkeypatch.setattr(comparing, "compress", spied)
    compare(model, lambda seed: examples[seed], scored, methods=["gptq", "sparsegpt"], sizes=[8.0], seeds=[0, 1, 2])
    assert held == [1] * 6


def test_settings_of_a_toy_method_are_checked_like_all_others(toy: type[Rows]) -> None:
    with pytest.raises(ConfigError, match=r"unknown field `kept` of `method: toy`; did you mean `keep`\?"):
        toy_settings(kept=1)
    with pytest.raises(ConfigError, match="`keep` belongs to `method: toy`, not to `method: gptq`"):
        CompressionConfig(method="gptq", bits=8.0, keep=1)
    with pytest.raises(ConfigError, match="there is a `method: toy` already, Rows"):
        register(Rows)
    taken = type("Taken", (Rows,), {"settings": create_model("Fresh", __base__=Rows.Settings, method=(str, "fresh"))})
    with pytest.raises(ConfigError, match="there is a `method: toy-half` already, Rows"):
        register(taken)


def test_a_name_that_nothing_answers_to_raises(toy: type[Rows], tmp_path: Path) -> None:
    model = tiny_model("vit")
    config = toy_settings()
    fips.compress(model, batches_for(model), config)
    fips.save(model, tmp_path / "out")
    del PLANNERS["toy"]
    with pytest.raises(ConfigError, match=r"`method: toy` has settings and nothing that uses them.*fips-paper"):
        fips.compress(tiny_model("vit"), batches_for(model), config)
    del SETTINGS["toy"]
    with pytest.raises(ConfigError, match=r"`method`: there is no `toy`; .*known methods: fips"):
        toy_settings()
    assert read_report(tmp_path / "out") is None  # what it says of the method cannot be read; the model can
    assert factored_layers(fips.load(tmp_path / "out"))


class Passes:
    """Counts forward and backward passes through a model."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        model.register_forward_pre_hook(self._run)
        original = Tensor.backward

        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.backward += 1
            original(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, "backward", backward)

    def _run(self, *_: Any) -> None:
        self.forward += 1


def compressed(method: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Method[Any], Passes]:
    """A method, and the passes it made besides those that measure the errors in the report."""
    model = tiny_model("opt")
    passes = Passes(model, monkeypatch)
    monkeypatch.setattr(Workbench, "final_errors", lambda *_: ())
    monkeypatch.setattr(_Pass, "_measure", lambda *_: None)
    config = CompressionConfig(**{"bits": 8.0, **FIELDS.get(method, {}), "method": method})
    fips.compress(model, batches_for(model, count=3), config)
    return method_of(config), passes


@pytest.mark.parametrize("method", [*PLANNERS, "toy"])
def test_only_what_a_method_needs_is_measured(method: str, toy: type[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass tries an example and one surveys a few; then every batch is measured or recorded, or none is.

    The influence of layers is told by the gradients of a few examples, here those of all three batches. Before inputs
    are measured an example shows how the blocks run.
    """
    found, passes = compressed(method, monkeypatch)
    wanted = {
        "fips": Needs.INPUTS | Needs.INFLUENCE,
        "fips-paper": Needs.ACTIVATIONS,
        **dict.fromkeys(("magnitude", "svd", "toy"), Needs.NOTHING),
    }
    assert found.needs == wanted.get(method, Needs.INPUTS)
    influence = Needs.INFLUENCE in found.needs
    probes = int(Needs.INPUTS in found.needs)
    assert passes.forward == (4 if influence else 2) + probes + (3 if found.needs else 0)
    assert passes.backward == (3 if influence else 0)


def test_a_method_that_did_not_declare_its_needs_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLANNERS["gptq"], "needs", Needs.NOTHING)
    monkeypatch.setattr(MatrixMethod, "compress", lambda self, bench, plan: bench.moments("all", ()))
    with pytest.raises(AssertionError, match="must declare that it needs them"):
        compressed("gptq", monkeypatch)
