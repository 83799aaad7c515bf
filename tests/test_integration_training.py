"""Fine-tuning a packed model: the Trainer on values, bases and biases; LoRA adapters through peft."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from conftest import batches_for, quick_settings, tiny_model
from fresh import python
from test_nn import mixed_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import fips
from fips.layers.linear import BASES, factored_layers

IDS = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(5))


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A few sequences to learn by heart."""

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "labels": IDS[index]}


def packed(family: str, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family)
    fips.compress(model, batches_for(model), quick_settings(**{"share_blocks": 2, **changes}))
    return model


def train(model: Any, directory: Path, *, steps: int = 20) -> tuple[float, float]:
    """Loss on the sequences before and after."""
    arguments = TrainingArguments(
        str(directory), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="steps", save_steps=steps, logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Sentences())
    losses = [loss_of(model)]
    trainer.train()
    return losses[0], loss_of(model)


def loss_of(model: Any) -> float:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).loss.item()


def logits_of(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS[:2]).logits


@pytest.mark.slow
def test_the_trainer_trains_everything_and_keeps_the_support(tmp_path: Path) -> None:
    fips.save(packed("gpt2"), tmp_path / "start")  # gpt2 has biases
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    before = copy.deepcopy(model)
    start, end = train(model, tmp_path / "run")
    assert end < 0.7 * start
    for name, layer in factored_layers(model).items():
        old = before.get_submodule(name)
        assert torch.equal(layer.pattern, old.pattern)
        assert torch.equal(layer.mask(), old.mask())
        assert not (layer.factor() != 0)[~old.mask()].any()
        assert not torch.equal(layer.values, old.values)
        assert not torch.equal(layer.bias, old.bias)
    for group in ("g0", "g1"):
        assert not torch.equal(model.transformer.fips_bases[group].weight, before.transformer.fips_bases[group].weight)
    for again in (
        fips.load(tmp_path / "run" / "checkpoint-20"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-20"),
    ):
        assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.slow
def test_int8_values_stay_while_bases_train(tmp_path: Path) -> None:
    model, _ = mixed_llama()
    before = copy.deepcopy(model)
    start, end = train(model, tmp_path, steps=10)
    assert end < start
    kinds = set()
    for name, layer in factored_layers(model).items():
        kinds.add(layer.kind)
        assert torch.equal(layer.values, before.get_submodule(name).values) == (layer.kind != "float"), name
    assert kinds == {"int8", "int6", "int4", "int3", "nl4g16", "nl3", "float"}
    assert not torch.equal(model.model.fips_bases["g0"].weight, before.model.fips_bases["g0"].weight)


@pytest.mark.parametrize("values", ["float", "int4g16", "tc3"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool, values: str, caplog: Any) -> None:
    """Without reentry it ends what it computes anew by an error, from inside the call of a layer."""
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), fips.CompressionConfig(bits=8 if values == "float" else 4, values=values))
    model.train()
    model.enable_input_require_grads()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for _ in range(2):
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for gradients in found[1:]:
        assert gradients.keys() == found[0].keys()
        assert all(torch.allclose(gradients[name], found[0][name], atol=1e-6) for name in gradients)
    assert "kernel failed" not in caplog.text


def test_gradients_of_values_and_basis_are_those_of_the_dense_product() -> None:
    model = packed("llama").double()
    layer = factored_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(5, 32, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight = layer.dense_weight().detach().double().requires_grad_(True)
    (x @ weight.T).square().sum().backward()
    factor_gradient = (weight.grad @ layer.basis.weight)[layer.mask()]
    torch.testing.assert_close(layer.values.grad, factor_gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.basis.weight.grad, weight.grad.T @ layer.factor(), rtol=1e-4, atol=1e-4)


class TestLora:
    """peft on packed layers."""

    pytestmark: ClassVar = [
        pytest.mark.slow,
        pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra peft is not installed"),
    ]

    @pytest.fixture(autouse=True)
    def _import(self) -> None:
        self.peft = importlib.import_module("peft")

    def adapted(self, model: PreTrainedModel, targets: list[str], **options: Any) -> Any:
        torch.manual_seed(0)
        config = self.peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, **options)
        return self.peft.get_peft_model(model, config)

    @pytest.mark.slow
    @pytest.mark.parametrize(("family", "targets"), [("llama", ["up_proj", "down_proj", "q_proj"]), ("gpt2", ["c_fc"])])
    def test_training_an_adapter_saving_it_and_loading_it(
        self, family: str, targets: list[str], tmp_path: Path
    ) -> None:
        base = packed(family)
        fips.save(base, tmp_path / "base")
        frozen = copy.deepcopy(base.state_dict())
        model = self.adapted(base, targets)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable
        assert all("lora_" in name for name in trainable)
        start, end = train(model, tmp_path / "run")
        assert end < 0.98 * start
        for name, tensor in frozen.items():
            place = (
                name if name in base.state_dict() else name.rpartition(".")[0] + ".base_layer." + name.split(".")[-1]
            )
            assert torch.equal(base.state_dict()[place], tensor), name
        model.save_pretrained(tmp_path / "adapter")
        files = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert "adapter_model.safetensors" in files
        assert "model.safetensors" not in files
        again = self.peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
        )
        assert torch.equal(logits_of(again), logits_of(model))

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merging_gives_dense_layers_and_unmerging_the_packed_ones(self, family: str, safe_merge: bool) -> None:
        targets = {"llama": ["up_proj", "down_proj"], "gpt2": ["c_fc", "mlp.c_proj"]}[family]
        model = self.adapted(packed(family), targets, lora_bias=family == "gpt2", init_lora_weights=False)
        expected = logits_of(model)
        with model.disable_adapter():
            without = logits_of(model)
        assert not torch.allclose(expected, without, rtol=1e-3)
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), expected)
        count = len(factored_layers(model))
        merged = model.merge_and_unload(safe_merge=safe_merge)
        torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)
        assert len(factored_layers(merged)) == count - 6
        if family == "gpt2":
            assert isinstance(merged.transformer.h[0].mlp.c_fc, Conv1D)

    def test_a_partly_merged_model_is_saved_packed_and_a_wholly_merged_one_plain(self, tmp_path: Path) -> None:
        partly = self.adapted(packed("llama"), ["up_proj"], init_lora_weights=False).merge_and_unload()
        assert len(factored_layers(partly)) == 6
        partly.save_pretrained(tmp_path / "partly")
        assert torch.equal(logits_of(fips.load(tmp_path / "partly")), logits_of(partly))

        targets = ["up_proj", "gate_proj", "down_proj"]
        wholly = self.adapted(packed("llama"), targets, init_lora_weights=False).merge_and_unload()
        wholly.save_pretrained(tmp_path / "wholly")
        assert not hasattr(wholly.model, BASES)
        assert "fips" not in (tmp_path / "wholly" / "config.json").read_text()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "wholly")
        assert torch.equal(logits_of(plain), logits_of(wholly))

    @pytest.mark.slow
    def test_importing_peft_first_is_enough(self, tmp_path: Path) -> None:
        fips.save(packed("llama"), tmp_path / "base")
        code = (
            "import sys, peft, fips; from transformers import AutoModelForCausalLM as A;"
            "m = peft.get_peft_model(A.from_pretrained(sys.argv[1]), peft.LoraConfig(target_modules=['up_proj']));"
            "print(sum('lora_A' in n for n, _ in m.named_parameters()))"
        )
        done = python(code, tmp_path / "base", imported="torch")
        assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr[-2000:]

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}])
    def test_adapters_that_read_the_weights_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(fips.FipsError, match="reads the weights of its layer, which is packed"):
            self.adapted(packed("llama"), ["up_proj"], **options)

    def test_transformers_own_adapter_calls_work(self, tmp_path: Path) -> None:
        try:
            transformers.utils.peft_utils.check_peft_version(transformers.integrations.peft.MIN_PEFT_VERSION)
        except ValueError as error:
            pytest.skip(f"transformers {transformers.__version__} refuses PEFT {self.peft.__version__}: {error}")
        fips.save(packed("llama"), tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        model.add_adapter(self.peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
        expected = logits_of(model)
        model.save_pretrained(tmp_path / "adapter")
        assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}
        assert not (tmp_path / "adapter" / "model.safetensors").exists()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits_of(again), expected)
