"""Experts that a router chooses among: taken apart, measured from the tokens that reach them, packed, fused again."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import DECODER, quick_settings
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

import fips
from fips.app.outline import outline_of_plan
from fips.app.sources import empty_model
from fips.calibration.inputs import place
from fips.calibration.moments import LayerMoments
from fips.calibration.record import ActivationSpool
from fips.calibration.sweep import Sweep
from fips.layers.linear import FactoredLinear, factored_layers
from fips.models import Site, locate_layers
from fips.models.experts import ExpertList, expert_lists, experts_apart, fuse_experts, split_experts
from fips.plan.kinds import layer_bytes, sizes_by_kind
from fips.training.factors import TrainableGroup

EXPERTS, WIDTH, HIDDEN = 4, 32, 24
FIELDS = {**DECODER, "num_hidden_layers": 2, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gated": ("mixtral", "model.layers.0.mlp.experts", {}),
    "transposed, interleaved, with biases": (
        "gpt_oss", "model.layers.0.mlp.experts", {"head_dim": 8, "num_experts_per_tok": 2},
    ),
    "not gated": ("nemotron_h", "model.layers.0.mixer.experts", {
        "layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "moe_intermediate_size": HIDDEN, "moe_shared_expert_intermediate_size": 16, "head_dim": 8, "topk_group": 1,
    }),
}  # fmt: skip


def mixtral(**changes: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    model: MixtralForCausalLM = MixtralForCausalLM(AutoConfig.for_model("mixtral", **{**FIELDS, **changes})).eval()
    return model


def texts(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": texts(4, 12, seed=seed)} for seed in range(count)]


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(texts(2, 10, seed=9) if ids is None else ids).logits
    return found


def settings(**changes: Any) -> fips.CompressionConfig:
    return fips.CompressionConfig(**{"method": "gptq", "bits": 5.5, **changes})


# ------------------------------------------------------------------------------------------------- apart and together


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, str]:
    kind, place, changes = FORMS[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**FIELDS, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(place):
                parameter.normal_(std=0.3)
    return model, place


def test_apart_they_compute_what_they_computed(form: tuple[PreTrainedModel, str]) -> None:
    """A token may name an expert twice, which counts twice, or one that is not there, which adds nothing."""
    model, place = form
    fused = model.get_submodule(place)
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    chosen, weights = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 1], [0, 3], [3, 1], [1, 0]]), torch.rand(7, 2)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = fused.double()(x.double(), chosen, weights.double())
        assert float(expected.norm()) > 1
        with experts_apart(model):
            apart = model.get_submodule(place)
            assert isinstance(apart, ExpertList)
            found = apart(x.double(), chosen, weights.double())
            weights[0, 1] = 0
            without = apart(x.double(), chosen, weights.double())[0]
            chosen[0, 1] = EXPERTS
            missing = apart(x.double(), chosen, torch.ones_like(weights).double() * weights[0, 0])[0]
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(missing, without, rtol=1e-12, atol=1e-12)


def test_the_very_parameters_come_back_and_stacked_ones_are_equal(form: tuple[PreTrainedModel, str]) -> None:
    model, _ = form
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    with experts_apart(model):
        assert len(dict(model.named_parameters())) > len(before)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    split_experts(model)
    fuse_experts(model)
    again = dict(model.named_parameters())
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_a_copy_and_a_pickle_are_models_of_their_own() -> None:
    model = mixtral()
    fips.compress(model, batches(1), settings())
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        fips.merge(other)
        assert not expert_lists(other)
    assert torch.equal(logits(model), expected)
    assert len(expert_lists(model)) == 2


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral()
    before = dict(model.named_parameters())

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fips.compression._install", fail)
    with pytest.raises(KeyboardInterrupt):
        fips.compress(model, batches(1), settings())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


# ---------------------------------------------------------------------------------------------------------- measuring


def moments_of(model: nn.Module, data: list[dict[str, Tensor]], sites: list[Site]) -> dict[str, LayerMoments]:
    blocks = [f"model.layers.{index}" for index in range(2)]
    device = torch.device("cpu")

    def run(model: nn.Module, batch: Any) -> Any:
        return model(**place(batch, device, torch.float32))

    def wanted(keep: Callable[[int], bool]) -> Any:
        return ((number, batch) for number, batch in enumerate(data) if keep(number))

    with (
        ActivationSpool(1 << 24) as spool,
        Sweep(model, blocks, wanted, len(data), run, spool, device) as sweep,
    ):  # fmt: skip
        return sweep.step(2, sites).moments


def routed_tokens(model: MixtralForCausalLM, batch: dict[str, Tensor], layer: int) -> list[Tensor]:
    """By expert what it reads, told by hooks on the fused module: all tokens, and who was chosen for each."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, chosen, _weights = args
        keep = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else torch.ones(len(x)).bool()
        found.extend(x[(chosen == expert).any(1) & keep].double() for expert in range(EXPERTS))

    handle = model.model.layers[layer].mlp.experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_the_moment_of_an_expert_is_that_of_the_tokens_sent_to_it(padded: bool) -> None:
    model = mixtral()
    batch: dict[str, Tensor] = {"input_ids": texts(16, 20)}
    if padded:
        mask = torch.ones(16, 20, dtype=torch.long)
        mask[::2, 14:] = 0
        batch["attention_mask"] = mask
    expected = routed_tokens(model, batch, 1)
    assert min(map(len, expected)) > WIDTH  # nothing has to be taken from the others
    with experts_apart(model):
        located = locate_layers(model)
        sites = [site for sublayer in located.sublayers for site in sublayer.sites]
        moments = moments_of(model, [batch], sites)
    for expert, x in enumerate(expected):
        found = moments[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"]
        assert found.weight == len(x)
        wanted = x.T @ x / len(x)
        assert (found.inputs_II - wanted).norm() / wanted.norm() < 1e-5
        assert moments[f"model.layers.1.mlp.experts.down_proj.{expert}"].weight == len(x)


def test_experts_that_few_tokens_reach_are_told_the_rest_by_the_others() -> None:
    model, batch = mixtral(num_experts_per_tok=1), {"input_ids": texts(1, 3)}
    expected = routed_tokens(model, batch, 0)
    counts = [len(x) for x in expected]
    assert 0 in counts
    assert max(counts) < WIDTH
    with experts_apart(model):
        sites = [site for sublayer in locate_layers(model).sublayers for site in sublayer.sites]
        moments = moments_of(model, [batch], sites)
    prior = sum(x.T @ x for x in expected) / sum(counts)
    name = "model.layers.0.mlp.experts"
    for expert, x in enumerate(expected):
        share = len(x) / WIDTH
        wanted = (1 - share) * prior + (share * x.T @ x / len(x) if len(x) else 0)
        found = moments[f"{name}.gate_up_proj.{expert}"]
        assert (found.inputs_II - wanted).norm() / wanted.norm() < 1e-5
        assert found.weight == len(x)
    hidden = moments[f"{name}.down_proj.{counts.index(0)}"].inputs_II
    assert torch.equal(hidden, hidden[0, 0] * torch.eye(HIDDEN))
    assert hidden[0, 0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fips-paper", "fips"])
def test_supports_regrow_where_a_batch_reaches_an_expert(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it does not reach have no gradients, and keep their supports."""
    regrow, reached = TrainableGroup.regrow, []

    def spied(group: TrainableGroup, *args: Any) -> None:
        before = [(layer.dense_gradient_RF is not None, layer.mask_RF) for layer in group.layers]
        regrow(group, *args)
        for layer, (has_gradient, mask_RF) in zip(group.layers, before, strict=True):
            assert has_gradient or torch.equal(layer.mask_RF, mask_RF)
            assert layer.dense_gradient_RF is None
        assert sum(int(layer.mask_RF.sum()) for layer in group.layers) == sum(int(mask.sum()) for _, mask in before)
        reached.extend(has_gradient for has_gradient, _ in before)

    monkeypatch.setattr(TrainableGroup, "regrow", spied)
    model, data = mixtral(num_experts_per_tok=1), [{"input_ids": texts(1, 3, seed=seed)} for seed in range(4)]
    config = fips.CompressionConfig(
        method=method, schedule="rigl", bits=6.0, layers="mlp", precision="float32",
        reconstruction={"steps": 12, "update_every": 2},
    )  # fmt: skip
    fips.compress(model, data, config)
    assert set(reached) == {True, False}
    with torch.no_grad():
        assert bool(model(**data[0]).logits.isfinite().all())


@pytest.mark.parametrize(
    "config",
    [
        settings(), settings(method="fips", effort="fast"),
        fips.CompressionConfig(bits=9.0, sharing="auto", values="int8", pattern="unstructured"),
    ],
    ids=["inputs", "influence", "gradients"],
)  # fmt: skip
def test_an_expert_that_no_token_reaches_is_packed_and_the_report_says_so(config: fips.CompressionConfig) -> None:
    model, data = mixtral(num_experts_per_tok=1), [{"input_ids": texts(1, 3)}]
    report = fips.compress(model, data, config)
    assert len(factored_layers(model)) >= 2 * 2 * EXPERTS
    assert report.plan["left_dense"]["layers"] == []
    (note,) = [note for note in report.notes if "experts" in note]
    assert note.startswith("16 of 16 matrices of experts were reached by fewer tokens")
    assert " 0 of them by none" not in note
    for expert, original in enumerate(mixtral().model.layers[0].mlp.experts.gate_up_proj.detach()):
        weight = model.model.layers[0].mlp.experts.gate_up_proj[expert].dense_weight()
        assert (weight - original).norm() / original.norm() < 0.5


def test_enough_tokens_are_no_reason_for_a_note() -> None:
    report = fips.compress(mixtral(), [{"input_ids": texts(8, 32)}], settings())
    assert not [note for note in report.notes if "experts" in note]


# ------------------------------------------------------------------------------------------------------- packed models


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtralForCausalLM, Path]:
    """One expert is left out: it stays dense among packed ones."""
    model, path = mixtral(), tmp_path_factory.mktemp("mixtral") / "packed"
    report = fips.compress(model, batches(), settings(layers="all", ignore=["layers.1.mlp.experts.2"]))
    assert fips.save(model, path) == report.plan["compressed_model"]["bytes"]
    return model, path


def test_files_name_the_matrices_of_experts_one_by_one(packed: tuple[MixtralForCausalLM, Path]) -> None:
    written = load_file(packed[1] / "model.safetensors")
    assert written["model.layers.1.mlp.experts.down_proj.1.values"].dtype == torch.uint8
    assert written["model.layers.1.mlp.experts.down_proj.2.weight"].shape == (WIDTH, HIDDEN)
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in written)


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_loaded_they_compute_the_same_whatever_way_to_multiply_is_set(
    packed: tuple[MixtralForCausalLM, Path], way: str
) -> None:
    model, path = packed
    loaded = AutoModelForCausalLM.from_pretrained(path, experts_implementation=way)
    assert torch.equal(logits(loaded), logits(model))
    ids = texts(2, 5)
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_the_base_model_alone_is_loaded_from_the_whole(packed: tuple[MixtralForCausalLM, Path]) -> None:
    model, path = packed
    base = AutoModel.from_pretrained(path)
    assert len(expert_lists(base)) == 2
    with torch.no_grad():
        found, expected = (one(texts(2, 10)).last_hidden_state for one in (base, model.model))
    assert torch.equal(found, expected)


def test_merged_they_are_the_tensors_of_before_in_their_places(
    packed: tuple[MixtralForCausalLM, Path], tmp_path: Path
) -> None:
    model, path = packed
    wanted = {
        name: module.dense_weight() if isinstance(module, FactoredLinear) else module.weight.detach()
        for name, module in model.named_modules() if "experts." in name and hasattr(module, "weight")
    }  # fmt: skip
    merged = fips.merge(fips.load(path))
    assert not expert_lists(merged)
    for layer in range(2):
        for key in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{key}"
            found = dict(merged.named_parameters())[name]
            assert isinstance(found, nn.Parameter)
            assert torch.equal(found, torch.stack([wanted[f"{name}.{expert}"] for expert in range(EXPERTS)]))
    merged.save_pretrained(tmp_path / "dense")
    mixtral().save_pretrained(tmp_path / "original")
    dense, original = (set(load_file(tmp_path / name / "model.safetensors")) for name in ("dense", "original"))
    assert dense == original
    assert any(name.endswith("experts.1.w2.weight") for name in dense)  # the names of older checkpoints


def test_a_layer_of_another_shape_is_refused_by_name(packed: tuple[MixtralForCausalLM, Path], tmp_path: Path) -> None:
    shutil.copytree(packed[1], tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "num_local_experts": EXPERTS - 1}))
    for load in (lambda where: fips.load(where, verify=False), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(fips.FipsError, match=r"`model\.layers\.0\.mlp\.experts\.\w+\.3` .* is not in"):
            load(tmp_path / "other")


@pytest.mark.parametrize(
    "config", [quick_settings(share_blocks=2), settings(method="svd", bits=8.0), settings(method="wanda", bits=8.0)]
)
def test_every_method_takes_experts(config: fips.CompressionConfig, tmp_path: Path) -> None:
    model = mixtral()
    report = fips.compress(model, batches(2), config)
    assert len(factored_layers(model)) >= 2 * 2 * EXPERTS
    assert fips.save(model, tmp_path / "packed") == report.plan["compressed_model"]["bytes"]
    assert torch.equal(logits(fips.load(tmp_path / "packed")), logits(model))


def test_patterns_that_move_neurons_move_those_of_an_expert_together() -> None:
    model, original = mixtral(intermediate_size=32), mixtral(intermediate_size=32)
    pattern = {"pattern": "block8", "values": "float", "sharing": "never", "layers": "mlp"}
    fips.compress(model, batches(2), fips.CompressionConfig(budget=0.95, **pattern))
    assert (logits(model) - logits(original)).norm() / logits(original).norm() < 0.2
    kind, _, changes = FORMS["transposed, interleaved, with biases"]
    fields = {**FIELDS, **changes, "intermediate_size": 32}
    mixed = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    with pytest.raises(fips.FipsError, match="reorders hidden neurons"):
        fips.compress(mixed.eval(), batches(2), fips.CompressionConfig(budget=0.95, **pattern))


def test_the_plan_counts_experts_as_a_kind_of_their_own() -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(AutoConfig.for_model("mixtral", **FIELDS))
    plan = fips.plan_compression(model, settings(layers="all"))
    kinds = {kind.kind: kind for kind in sizes_by_kind(model, layer_bytes(plan))}
    assert kinds["experts up"].weights == 2 * EXPERTS * 2 * HIDDEN * WIDTH
    assert kinds["experts down"].weights == 2 * EXPERTS * HIDDEN * WIDTH
    assert "MLP up" not in kinds
    assert sum(kind.bytes_before for kind in kinds.values()) == plan.model_bytes
    assert kinds["all else"].weights == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "norm" in name or "mlp.gate" in name
    )  # routers are not compressed


def test_the_plan_of_mlps_alone_tells_the_smallest_size(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "model")
    config = settings(layers="mlp")
    empty = empty_model(str(tmp_path / "model"), compressed=False)
    outline = outline_of_plan(empty, fips.plan_compression(empty, config), config)
    assert outline.smallest is not None
    experts = 2 * EXPERTS * 3 * HIDDEN * WIDTH
    rest = sum(parameter.numel() for parameter in mixtral().parameters()) - experts
    assert 4 * rest + experts / 4 < outline.smallest["bytes"] < 4 * rest + experts


def test_an_export_to_onnx_has_no_shapes_that_depend_on_who_was_chosen(packed: tuple[MixtralForCausalLM, Path]) -> None:
    _, path = packed
    experts = fips.load(path).model.layers[0].mlp.experts
    x, chosen, weights = torch.randn(5, WIDTH), torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 1]]), torch.rand(5, 2)
    with torch.no_grad():
        expected, found = experts(x, chosen, weights), experts._by_all(x, chosen, weights)
    assert (found - expected).norm() / expected.norm() < 1e-6


def test_a_linear_layer_that_is_said_to_be_an_embedding_is_refused(
    packed: tuple[MixtralForCausalLM, Path], tmp_path: Path
) -> None:
    shutil.copytree(packed[1], tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    fields = json.loads(path.read_text())
    name = next(name for name in fields["quantization_config"]["layers"] if name.endswith("0.self_attn.q_proj"))
    fields["quantization_config"]["layers"][name]["embedding"] = True
    fields["quantization_config"]["format_version"] = 4
    path.write_text(json.dumps(fields))
    for load in (lambda where: fips.load(where, verify=False), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(fips.FipsError, match=f"`{name}` of the checkpoint is an embedding, in the model it is a"):
            load(tmp_path / "other")


def test_a_run_that_was_ended_goes_on_with_experts(tmp_path: Path) -> None:
    whole, again = mixtral(num_experts_per_tok=1), mixtral(num_experts_per_tok=1)
    data = [{"input_ids": texts(1, 3)}]
    first = fips.compress(whole, data, settings(), work=tmp_path / "work")
    second = fips.compress(again, data, settings(), work=tmp_path / "work")  # all of it is there
    assert second.notes == first.notes
    assert len([note for note in first.notes if "experts" in note]) == 1
    assert torch.equal(logits(again), logits(whole))


@pytest.mark.slow
def test_experts_that_a_model_calls_itself_are_compressed_too(tmp_path: Path) -> None:
    """Switch transformers have a module for every expert; most see few tokens, and some none."""
    fields = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    more = {"num_experts": 6, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("switch_transformers", **fields, **more, expert_capacity=64, decoder_start_token_id=0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    ids = texts(1, 4)
    report = fips.compress(model, [{"input_ids": ids, "decoder_input_ids": ids}], settings(layers="mlp"))
    experts = [name for name in factored_layers(model) if ".experts.expert_" in name]
    assert len(experts) == 2 * 6 * 2
    assert report.plan["left_dense"]["layers"] == []
    assert report.notes[0].startswith("24 of 24 matrices of experts")
    fips.save(model, tmp_path / "packed")
    with torch.no_grad():
        found, expected = (
            one(input_ids=ids, decoder_input_ids=ids).logits for one in (fips.load(tmp_path / "packed"), model)
        )
    assert torch.equal(found, expected)


def test_adapters_on_experts_train_and_merge() -> None:
    peft = pytest.importorskip("peft")
    model = mixtral()
    fips.compress(model, batches(1), settings())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=[f"down_proj.{expert}" for expert in range(EXPERTS)], r=2)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert (logits(merged) - expected).norm() / expected.norm() < 1e-4
    merged = fips.merge(merged)
    assert not expert_lists(merged)
    assert (logits(merged) - expected).norm() / expected.norm() < 1e-4
