"""Passes over the data run in the type that the processor multiplies natively, and leave no trace in the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model

import fips
from fips.calibration.precision import has_bfloat16, in_native_types, resolve_precision
from fips.layers.linear import factored_layers
from fips.methods.fips import stages
from fips.methods.workbench import Workbench
from fips.training.factors import TrainableGroup

CPU = torch.device("cpu")


def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_a_processor_is_asked_for_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bfloat16(monkeypatch)
    assert not has_bfloat16(CPU)
    assert has_bfloat16(torch.device("cuda"))
    wide, half = tiny_model("llama"), tiny_model("llama").half()
    assert resolve_precision("auto", wide, CPU) == "float32"
    for instructions in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, instructions, lambda: True)
            assert has_bfloat16(CPU)
            assert resolve_precision("auto", wide, CPU) == "bfloat16"
            assert resolve_precision("auto", half, CPU) == "float32"


def test_bfloat16_beside_float16_is_refused_before_any_work() -> None:
    model = tiny_model("llama").half()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(fips.FipsError, match="does not go with a model in float16 on a CPU"):
        fips.compress(model, batches_for(model), fips.CompressionConfig(bits=6.4, precision="bfloat16"))


def test_outputs_are_those_of_the_model_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bfloat16(monkeypatch)
    model = tiny_model("llama").to(torch.bfloat16)
    before = {name: (value.dtype, value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()}
    wide = copy.deepcopy(model).float()
    (batch,) = batches_for(model, count=1)
    with torch.no_grad(), in_native_types(model):
        found = model(**batch).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, wide(**batch).logits)
    assert {name: (value.dtype, value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()} == before


def test_nothing_changes_where_the_processor_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fips.calibration.precision.has_bfloat16", lambda device: True)
    model = tiny_model("llama").to(torch.bfloat16)
    with in_native_types(model):
        assert all(value.dtype == torch.bfloat16 for value in model.parameters())


def test_an_error_puts_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bfloat16(monkeypatch)
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(KeyError), in_native_types(model):
        raise KeyError
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.slow
def test_a_compressed_model_keeps_its_type(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same integers as those of the float32 model; biases, which are moved by the solver, are bfloat16 again."""
    without_bfloat16(monkeypatch)
    model = tiny_model(family).to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    settings = fips.CompressionConfig(bits=6.4)
    for one in (model, wide):
        fips.compress(one, batches_for(one), settings)
    assert {value.dtype for value in model.parameters() if value.is_floating_point()} == {torch.bfloat16}
    for name, layer in factored_layers(model).items():
        other = factored_layers(wide)[name]
        assert torch.equal(layer.values, other.values)
        assert torch.equal(layer.scales, other.scales)
    fips.save(model, tmp_path / "model")
    again = fips.load(tmp_path / "model")
    assert {value.dtype for value in again.parameters() if value.is_floating_point()} == {torch.bfloat16}


def test_weights_that_lie_elsewhere_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bfloat16(monkeypatch)
    model = tiny_model("llama").to(torch.bfloat16)
    model.lm_head = torch.nn.Linear(32, 64, device="meta", dtype=torch.bfloat16)
    with in_native_types(model):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.norm.weight.dtype == torch.float32
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())


def test_blocks_are_widened_only_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model computes is that of float32, and no bit of a weight changes."""
    without_bfloat16(monkeypatch)
    model = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    batch = batches_for(model, count=1)[0]
    expected = tiny_model("llama")
    expected.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    blocks = [f"model.layers.{index}" for index in range(3)]
    seen = []
    model.model.layers[1].mlp.act_fn.register_forward_hook(
        lambda *_: seen.append([model.model.layers[index].mlp.up_proj.weight.dtype for index in (0, 1)])
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_native_types(model, blocks), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits)
        assert model.lm_head.weight.dtype == torch.float32
    assert seen == [[torch.bfloat16, torch.float32]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_of_16_bits_train_in_32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the learning rate round away in 16 bits, and the squares that Adam divides by are zero in float16."""
    monkeypatch.setattr("fips.calibration.precision.has_bfloat16", lambda device: True)  # or all is held in 32 bits
    groups: list[TrainableGroup] = []
    monkeypatch.setattr(TrainableGroup, "restore", lambda group, _: None)  # keep what the steps made, better or not
    pack = TrainableGroup.stored_biases
    monkeypatch.setattr(TrainableGroup, "stored_biases", lambda group: groups.append(group) or pack(group))
    model = tiny_model("opt", num_hidden_layers=1).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("fc1.bias", "fc2.bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    config = fips.CompressionConfig(
        bits=6.0, layers="mlp", precision="float32", reconstruction={"steps": 4, "learning_rate": 3e-5}
    )
    report = fips.compress(model, batches_for(model), config)
    (group,) = groups
    assert all(bias is not None and bias.isfinite().all() for bias in group.biases)
    for trained, given, stored in zip(group.biases, group._given, pack(group), strict=True):
        assert trained is not None
        assert given is not None
        assert stored is not None
        assert trained.dtype == torch.float32
        assert stored.dtype == given.dtype == dtype
        moved = trained.detach() - given.detach().float()
        assert moved.abs().max() > 1e-6
        assert moved.abs().max() < 2e-4
    assert report.groups[0]["relative_error_final"] < 1
    assert {layer.bias.dtype for layer in factored_layers(model).values()} == {dtype}


def test_products_of_the_solver_are_not_rounded_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    move, half, seen = stages._moved_bias, Workbench.moments_of_part, []

    def moved(*args: Any) -> Any:
        seen.append(("bias", torch.is_autocast_enabled("cpu")))
        return move(*args)

    def measured(*args: Any, **options: Any) -> Any:
        seen.append(("passes", torch.is_autocast_enabled("cpu")))
        return half(*args, **options)

    monkeypatch.setattr(stages, "_moved_bias", moved)
    monkeypatch.setattr(Workbench, "moments_of_part", measured)
    monkeypatch.setattr(stages.GroupSearch, "sharing_ratio", lambda *_: 0.5)  # ask data held out
    model = tiny_model("opt", num_hidden_layers=2)
    config = fips.CompressionConfig(effort="max", bits=5.0, layers="mlp", share_blocks=2, precision="bfloat16")
    fips.compress(model, batches_for(model), config)
    assert sorted(set(seen)) == [("bias", False), ("passes", True)]
    assert len([name for name, _ in seen if name == "passes"]) == 3  # all batches, then the two halves
