"""What is saved can be loaded, by fips and transformers, or is refused before any work; and nothing runs untrusted."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import pickle
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL, batches_for, quick_settings, tiny_model
from fresh import python
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

import fips
from fips.cli import main
from fips.files.manifest import write_manifest
from fips.layers.linear import factored_layers
from fips.models.transformers import config_from_fields, load_dense, load_processor, resolve_dtype

Capture = pytest.CaptureFixture[str]
IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(5))


class NoBatches:
    """Batches that must not be asked for: a refusal comes before any work."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("work has begun")


def first_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = model(**batch)
    return result[0] if not hasattr(result, "logits_per_image") else result.logits_per_image


def compressed(model: PreTrainedModel, batches: list[dict[str, Tensor]], path: Path) -> Path:
    fips.compress(model, batches, quick_settings(budget=0.6))
    fips.save(model, path)
    return path


def edit_config(directory: Path, **changes: Any) -> Path:
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**fields, **changes}))
    return directory


def test_infinity_in_a_configuration_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    """``save_pretrained`` writes it as an object."""
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 64, "num_heads": 8,
              "head_dim": 8, "n_groups": 1}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(AutoConfig.for_model("mamba2", **fields)).eval()
    fips.compress(model, [{"input_ids": IDS}], fips.CompressionConfig(bits=6, targets=["in_proj", "out_proj"]))
    model.save_pretrained(tmp_path / "small")
    fips.save(model, tmp_path / "saved")
    for place, read in itertools.product(("small", "saved"), (fips.load, AutoModelForCausalLM.from_pretrained)):
        written = json.loads((tmp_path / place / "config.json").read_text())
        assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
        again = read(tmp_path / place)
        assert again.config.time_step_limit[1] == float("inf")
        assert torch.equal(first_output(again, {"input_ids": IDS}), first_output(model, {"input_ids": IDS}))
    assert config_from_fields(written).time_step_limit[1] == float("inf")


def test_a_card_in_another_encoding_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    card = "Ein Modell f\u00fcr alle".encode("latin-1")
    (tmp_path / "README.md").write_bytes(card)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == card
    assert "is not UTF-8 text: left as it is" in caplog.text
    assert fips.load(tmp_path).fips_report.config.method == "fips-paper"


# Every family, both ways


def albert() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """One block, run four times."""
    fields = {**SMALL, "num_hidden_layers": 4, "embedding_size": 16, "vocab_size": 64}
    model = transformers.AlbertForMaskedLM(AutoConfig.for_model("albert", **fields)).eval()
    return model, [{"input_ids": IDS}]


def t5() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    fields = {"d_model": 32, "vocab_size": 64, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 4,
              "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
    model = transformers.T5ForConditionalGeneration(AutoConfig.for_model("t5", **fields)).eval()
    return model, [{"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}]


def clip() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    text = {**SMALL, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = AutoConfig.for_model("clip", text_config=text, vision_config=vision, projection_dim=16)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return transformers.CLIPModel(config).eval(), [{"input_ids": IDS, "pixel_values": pixels}]


def sentence_encoder() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    return transformers.BertModel(AutoConfig.for_model("bert", **SMALL, vocab_size=64)).eval(), [{"input_ids": IDS}]


MORE = {"albert": albert, "t5": t5, "clip": clip, "sentence encoder": sentence_encoder}


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
@pytest.mark.slow
def test_a_saved_model_loads_both_ways(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name in MORE:
        model, batches = MORE[name]()
    else:
        model = tiny_model(name)
        batches = batches_for(model, count=1, batch=2)
    path = compressed(model, batches, tmp_path / "out")
    expected = first_output(model, batches[0])
    loaded = fips.load(path)
    assert type(loaded) is type(model)
    assert torch.equal(first_output(loaded, batches[0]), expected)
    again, info = type(model).from_pretrained(path, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert torch.equal(first_output(again, batches[0]), expected)
    auto = next(
        kind
        for kind in (AutoModelForCausalLM, transformers.AutoModelForMaskedLM, transformers.AutoModelForSeq2SeqLM,
                     transformers.AutoModelForImageClassification, AutoModel)
        if type(model.config) in kind._model_mapping and kind._model_mapping[type(model.config)] is type(model)
    )  # fmt: skip
    assert torch.equal(first_output(auto.from_pretrained(path), batches[0]), expected)


# Changed models


class MyLlama(LlamaForCausalLM):
    """As people write it to add a helper."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.note = "mine"

    def parameters_in_millions(self) -> float:
        return sum(p.numel() for p in self.parameters()) / 1e6


class Louder(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Doubler(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class MyConfig(transformers.LlamaConfig):
    model_type = "my-llama"


@pytest.mark.parametrize("way", ["fips.save", "save_pretrained"])
def test_a_subclass_that_changes_nothing_is_saved_as_its_base(way: str, tmp_path: Path) -> None:
    base = tiny_model("llama")
    model = MyLlama(base.config)
    model.load_state_dict(base.state_dict())
    fips.compress(model.eval(), batches_for(model), quick_settings())
    path = tmp_path / "out"
    fips.save(model, path) if way == "fips.save" else model.save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    expected = model(IDS).logits
    for loaded in (fips.load(path), AutoModelForCausalLM.from_pretrained(path), MyLlama.from_pretrained(path)):
        assert torch.equal(loaded(IDS).logits, expected)


@pytest.mark.parametrize("way", ["fips.save", "save_pretrained"])
def test_a_configuration_of_ones_own_type_is_saved_as_its_base(way: str, tmp_path: Path) -> None:
    model = MyLlama(MyConfig(**{**FAMILIES["llama"], "flavour": "sweet"})).eval()
    fips.compress(model, batches_for(model), quick_settings())
    fips.save(model, tmp_path / "o") if way == "fips.save" else model.save_pretrained(tmp_path / "o")
    fields = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (fields["model_type"], fields["flavour"]) == ("llama", "sweet")
    for loaded in (fips.load(tmp_path / "o"), AutoModelForCausalLM.from_pretrained(tmp_path / "o")):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def up_proj(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.up_proj


def doubler(model: Any) -> None:
    new = Doubler(32, 80, bias=False)
    new.weight = up_proj(model).weight
    model.model.layers[0].mlp.up_proj = new


def share_mlp(model: Any) -> None:
    model.model.layers[2].mlp = model.model.layers[0].mlp


def share_layer(model: Any) -> None:
    model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj


def share_weight(model: Any) -> None:
    model.model.layers[2].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def drop_block(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def patch(module: Any) -> None:
    original = type(module).forward
    module.forward = types.MethodType(lambda self, *a, **k: original(self, *a, **k), module)


def adapter(model: Any, target: str) -> None:
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False), model)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight norm": (lambda m: parametrizations.weight_norm(up_proj(m)), "remove_parametrizations"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(up_proj(m)), "remove_parametrizations"),
    "weight norm on attention": (
        lambda m: parametrizations.weight_norm(m.model.layers[0].self_attn.q_proj), "remove_parametrizations"
    ),
    "old weight norm": (lambda m: nn.utils.weight_norm(up_proj(m)), r"weight_g"),
    "pruned": (lambda m: prune.l1_unstructured(up_proj(m), "weight", amount=0.5), "prune.remove"),
    "pruned head": (lambda m: prune.l1_unstructured(m.lm_head, "weight", amount=0.5), "prune.remove"),
    "layer of another class": (doubler, "`Doubler` instead of a `Linear`"),
    "layer with another forward": (lambda m: patch(up_proj(m)), r"up_proj` has a `forward`"),
    "block with another forward": (lambda m: patch(m.model.layers[1]), r"layers\.1` has a `forward`"),
    "model with another forward": (patch, "the model has a `forward`"),
    "shared MLP": (share_mlp, r"`model\.layers\.0\.mlp` and `model\.layers\.2\.mlp` are one"),
    "shared layer": (share_layer, r"`model\.layers\.0\.mlp\.up_proj` and `model\.layers\.2\.mlp\.up_proj` are one"),
    "shared weight": (share_weight, r"layers\.0\.self_attn\.q_proj\.weight` and .* are one"),
    "untied head": (untie, r"`model\.embed_tokens\.weight` and `lm_head\.weight` are two"),
    "block dropped": (drop_block, r"`model\.layers\.2` is missing"),
    "adapter on the MLP": (lambda m: adapter(m, "up_proj"), "merge_and_unload"),
    "adapter on attention": (lambda m: adapter(m, "q_proj"), "merge_and_unload"),
    "one module more": (lambda m: m.add_module("probe", nn.Linear(4, 4)), "`probe`, a `Linear`, is not part of it"),
    "one parameter more": (lambda m: m.model.register_parameter("soft", nn.Parameter(torch.ones(3))), "model.soft"),
    "another activation": (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()), "`ReLU` instead of a"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_model_is_refused_before_work(case: str) -> None:
    change, words = CHANGES[case]
    model = tiny_model("llama")
    change(model)
    with pytest.raises(fips.FipsError, match=words) as caught:
        fips.compress(model, NoBatches(), quick_settings())
    assert "\n" not in str(caught.value)
    assert factored_layers(model) == {}


def test_layers_that_the_configuration_parametrises_come_back(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "wav2vec2", **SMALL, vocab_size=32, conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3],
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    batches = [{"input_values": torch.randn(2, 400)} for _ in range(2)]
    path = compressed(model, batches, tmp_path / "out")
    assert torch.equal(fips.load(path)(**batches[0]).logits, model(**batches[0]).logits)
    changed = transformers.Wav2Vec2ForCTC(config).eval()
    nn.utils.parametrize.remove_parametrizations(changed.wav2vec2.encoder.pos_conv_embed.conv, "weight")
    with pytest.raises(fips.FipsError, match="`Conv1d` instead of a `ParametrizedConv1d`"):
        fips.compress(changed, NoBatches(), quick_settings())


def test_changes_that_do_nothing_are_accepted(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.bert.encoder.layer[0].output.dropout = nn.Identity()
    model.gradient_checkpointing_enable()
    model.register_forward_hook(lambda *_: None)
    path = compressed(model, batches_for(model), tmp_path / "out")
    assert torch.equal(fips.load(path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("case", ["weight norm on attention", "adapter on attention", "untied head"])
def test_a_model_changed_after_compression_is_refused_by_save(case: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    change, words = CHANGES[case]
    change(model)
    with pytest.raises(fips.FipsError, match=words):
        fips.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_subclasses_that_change_something_are_refused_before_work() -> None:
    model = Louder(tiny_model("llama").config).eval()
    with pytest.raises(fips.FipsError, match=r"`test_saved_loads\.Louder` overrides `forward`") as caught:
        fips.compress(model, NoBatches(), quick_settings())
    assert "register_for_auto_class" in str(caught.value)


def test_a_class_of_ones_own_under_a_known_name_is_refused() -> None:
    model = type("LlamaForCausalLM", (Louder,), {"__module__": __name__})(tiny_model("llama").config).eval()
    with pytest.raises(fips.FipsError, match="overrides `forward`"):
        fips.compress(model, NoBatches(), quick_settings())


# Modules outside transformers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.ModuleDict({"up": nn.Linear(16, 48), "down": nn.Linear(48, 16)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["down"](torch.nn.functional.gelu(self.mlp["up"](self.norm(x))))


class Tiny(nn.Module):
    """Three residual MLPs; ``share`` lets the last be the first."""

    def __init__(self, *, share: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        if share:
            self.layers[2].mlp = self.layers[0].mlp

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def inputs() -> list[Tensor]:
    return [torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def plain_settings(**changes: Any) -> fips.CompressionConfig:
    return fips.CompressionConfig(**{"bits": 9.6, "method": "gptq", **changes})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (parametrizations.weight_norm, "ParametrizedLinear"),
        (nn.utils.weight_norm, "made anew"),
        (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5), "made anew"),
        (patch, "given another `forward`"),
    ],
    ids=["parametrized", "old weight norm", "pruned", "patched"],
)
def test_layers_that_are_more_than_weight_and_bias_stay_dense(change: Callable[[Any], Any], reason: str) -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    change(model.layers[1].mlp["up"])
    report = fips.compress(model, inputs(), plain_settings())
    assert sorted(factored_layers(model)) == [f"layers.{n}.mlp.{side}" for n in (0, 2) for side in ("down", "up")]
    skipped = {item["name"]: item["reason"] for item in report.plan["skipped"]}
    assert reason in skipped["layers.1.mlp"]
    with pytest.raises(fips.FipsError, match=r"`layers\.1\.mlp\.up`.*not a plain linear layer"):
        fips.plan_compression(tiny_with(change), plain_settings(targets=("*up",)))


def tiny_with(change: Callable[[Any], Any]) -> nn.Module:
    model = Tiny().eval()
    change(model.layers[1].mlp["up"])
    return model


def test_a_module_registered_twice_is_compressed_once_and_stays_one() -> None:
    torch.manual_seed(0)
    model = Tiny(share=True).eval()
    dense = copy.deepcopy(model)
    report = fips.compress(model, inputs(), plain_settings(bits=8.8))
    assert model.layers[2].mlp is model.layers[0].mlp
    assert sorted(factored_layers(model)) == [f"layers.{n}.mlp.{side}" for n in (0, 1) for side in ("down", "up")]
    assert "compressed there" in {item["name"]: item["reason"] for item in report.plan["skipped"]}["layers.2.mlp"]
    assert report.plan["compressed_model"]["bytes"] < report.plan["model"]["bytes"]
    x = inputs()[0]
    assert (model(x) - dense(x)).norm() / dense(x).norm() < 0.05
    fips.merge(model)
    assert model.layers[2].mlp is model.layers[0].mlp
    assert type(model.layers[2].mlp["up"]) is nn.Linear


def test_a_layer_registered_in_two_mlps_is_replaced_in_both() -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    model.layers[2].mlp["up"] = model.layers[0].mlp["up"]
    fips.compress(model, inputs(), plain_settings())
    assert isinstance(model.layers[2].mlp["up"], fips.FactoredLinear)
    assert model.layers[2].mlp["up"] is model.layers[0].mlp["up"]
    fips.merge(model)
    assert type(model.layers[2].mlp["up"]) is nn.Linear


# Code that lies in the repository

CODE = """
import pathlib
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from .my_parts import Louder

pathlib.Path(MARKER).write_text("")


class MyConfig(LlamaConfig):
    model_type = "my-llama"


class MyLlamaForCausalLM(LlamaForCausalLM):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.louder = Louder()
        if LOOPED:
            self.model.layers[2].mlp = self.model.layers[0].mlp

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.louder(output.logits)
        return output
"""
PARTS = """
from torch import nn


class Louder(nn.Module):
    def forward(self, x):
        return x * 2
"""
WORDS = "the cat sat on the mat and the dog ran to the cat . "


def tokenizer(path: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: n + 3 for n, word in enumerate(sorted(set(WORDS.split())))}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    FastTokenizer(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(path)


def write_repository(path: Path, *, looped: bool = False) -> Path:
    model = tiny_model("llama")
    if looped:
        model.model.layers[2].mlp = model.model.layers[0].mlp
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    auto_map = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyLlamaForCausalLM"}
    edit_config(path, model_type="my-llama", architectures=["MyLlamaForCausalLM"], auto_map=auto_map)
    (path / "modeling_my.py").write_text(
        CODE.replace("LOOPED", str(looped)).replace("MARKER", repr(str(path.parent / "code.ran")))
    )
    (path / "my_parts.py").write_text(PARTS)
    tokenizer(path)
    return path


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("asked a question")

    monkeypatch.setattr("builtins.input", ask)


@pytest.fixture(autouse=True, scope="module")
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of repository code do not go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def forget(path: Path) -> None:
    """As if no code of a repository had run in this process."""
    (path / "code.ran").unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]


def ran(path: Path) -> bool:
    return (path / "code.ran").exists()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text(WORDS * 100)
    return tmp_path / "words.txt"


def packed_repository(repository: Path, path: Path, *, way: str = "fips.save") -> tuple[PreTrainedModel, Path]:
    model = load_dense(str(repository), trust_remote_code=True)
    fips.compress(model, batches_for(model), quick_settings())
    fips.save(model, path) if way == "fips.save" else model.save_pretrained(path)
    return model, path


@pytest.mark.parametrize("way", ["fips.save", "save_pretrained"])
@pytest.mark.parametrize("looped", [False, True], ids=["", "looped"])
@pytest.mark.slow
def test_code_travels_with_packed_weights(looped: bool, way: str, tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", looped=looped)
    model, path = packed_repository(repository, tmp_path / "packed", way=way)
    assert type(model).__name__ == "MyLlamaForCausalLM"
    assert len(factored_layers(model)) == (6 if looped else 9)
    shutil.rmtree(repository)
    expected = first_output(model, {"input_ids": IDS})
    loaded = fips.load(path, trust_remote_code=True)
    assert (loaded.model.layers[2].mlp is loaded.model.layers[0].mlp) == looped
    assert torch.equal(first_output(loaded, {"input_ids": IDS}), expected)
    again, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(first_output(again, {"input_ids": IDS}), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(
        first_output(fips.load(tmp_path / "again", trust_remote_code=True), {"input_ids": IDS}), expected
    )
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; assert 'fips' not in sys.modules;"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "torch.save(m(torch.tensor(eval(sys.argv[2]))).logits.detach(), sys.argv[3])"
    )
    done = python(code, tmp_path / "again", IDS.tolist(), tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_a_merged_model_of_repository_code_needs_nothing_of_fips(repository: Path, tmp_path: Path) -> None:
    _, path = packed_repository(repository, tmp_path / "packed")
    merged = fips.merge(fips.load(path, trust_remote_code=True))
    merged.save_pretrained(tmp_path / "dense")
    written = {file.name for file in (tmp_path / "dense").iterdir()}
    assert {"modeling_my.py", "my_parts.py"} <= written
    assert "fips_remote.py" not in written
    again = load_dense(str(tmp_path / "dense"), trust_remote_code=True)
    assert torch.equal(first_output(again, {"input_ids": IDS}), first_output(merged, {"input_ids": IDS}))


COMMANDS = {
    "inspect": ["inspect", "DENSE"],
    "plan": ["compress", "DENSE", "--dry-run", "--bits", "9.6"],
    "compress": ["compress", "DENSE", "--data", "TEXT", "--output", "OUT", "--bits", "9.6", "--method", "gptq",
                 "--sequence-length", "16", "--num-samples", "4"],
    "evaluate": ["evaluate", "DENSE", "--data", "TEXT", "--sequence-length", "16", "--num-samples", "4"],
    "evaluate packed": ["evaluate", "PACKED", "--data", "TEXT", "--sequence-length", "16", "--num-samples", "4"],
    "compare": ["compare", "DENSE", "--data", "TEXT", "--output", "OUT", "--methods", "gptq", "--bits", "9.6",
                "--sequence-length", "16", "--num-samples", "4"],
    "export": ["export", "PACKED", "--output", "OUT"],
    "bench": ["bench", "PACKED", "--against", "DENSE", "--batch", "1", "--prompt", "4", "--repeats", "2"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "bench" else ()) for name in COMMANDS]
)
def test_commands_run_repository_code_only_when_told(
    name: str, repository: Path, text: Path, tmp_path: Path, capsys: Capture, no_questions: None
) -> None:
    packed = packed_repository(repository, tmp_path / "packed")[1] if "PACKED" in COMMANDS[name] else tmp_path
    tokenizer(packed)
    if packed != tmp_path:
        write_manifest(packed)  # as if the tokenizer had been given to `fips.save`
    forget(tmp_path)
    places = {"DENSE": repository, "PACKED": packed, "TEXT": text, "OUT": tmp_path / "out"}
    command = [str(places.get(word, word)) for word in COMMANDS[name]]
    capsys.readouterr()
    assert main(command) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "modeling_my.py" in captured.err
    assert "--trust-remote-code" in captured.err
    assert not ran(tmp_path)
    assert not (tmp_path / "out").exists()
    assert main([*command, "--trust-remote-code"]) == 0, capsys.readouterr().err
    assert ran(tmp_path)
    if name in ("compress", "export"):
        again = fips.load if name == "compress" else load_dense
        model = again(str(tmp_path / "out"), trust_remote_code=True)
        assert type(model).__name__ == "MyLlamaForCausalLM"


def test_python_functions_refuse_repository_code_by_default(
    repository: Path, tmp_path: Path, no_questions: None
) -> None:
    path = packed_repository(repository, tmp_path / "packed")[1]
    forget(tmp_path)
    for call in (lambda: fips.load(path), lambda: load_dense(str(repository))):
        with pytest.raises(fips.FipsError, match="trust_remote_code=True"):
            call()
    assert not ran(tmp_path)


def test_the_module_of_fips_is_never_run_by_fips(tmp_path: Path, text: Path, capsys: Capture) -> None:
    model = tiny_model("llama")
    path = compressed(model, batches_for(model), tmp_path / "out")
    tokenizer(path)
    (path / "fips_remote.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'code.ran')!r}).write_text('')")
    fips.load(path, verify=False)
    fips.load(path, verify=False, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "fips_remote.py").write_text((path / "fips_remote.py").read_text())
    tokenizer(tmp_path / "again")
    options = ["--data", str(text), "--sequence-length", "16", "--num-samples", "4"]
    assert main(["evaluate", str(tmp_path / "again"), *options]) == 0, capsys.readouterr().err
    assert main(["export", str(tmp_path / "again"), "--output", str(tmp_path / "dense")]) == 0
    assert not ran(tmp_path)


def test_code_that_transformers_has_itself_is_left_alone(tmp_path: Path) -> None:
    """Repositories of models that transformers took over still carry their old code."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", auto_map={"AutoModelForCausalLM": "modeling_old.LlamaForCausalLM"})
    dense = load_dense(str(tmp_path / "dense"))
    path = compressed(dense, batches_for(dense), tmp_path / "out")
    assert json.loads((path / "config.json").read_text())["auto_map"] == {"AutoConfig": "fips_remote.LlamaConfig"}
    for loaded in (fips.load(path), AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)):
        assert torch.equal(loaded(IDS).logits, dense(IDS).logits)


def test_code_without_a_file_is_refused_before_work() -> None:
    kind = type("Mine", (Louder,), {"__module__": "__main__", "_auto_class": "AutoModelForCausalLM"})
    with pytest.raises(fips.FipsError, match="no module of its own"):
        fips.compress(kind(tiny_model("llama").config).eval(), NoBatches(), quick_settings())


@pytest.mark.parametrize("broken", ["raise RuntimeError('no')", "import no_such_package_at_all", "def (", "x = 1"])
def test_code_that_fails_is_one_line(broken: str, repository: Path, no_questions: None) -> None:
    (repository / "modeling_my.py").write_text(broken)
    with pytest.raises(fips.FipsError) as caught:
        load_dense(str(repository), trust_remote_code=True)
    assert "\n" not in str(caught.value)


# What config.json says is no program


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a function": ({"architectures": ["pipeline"]}, "architectures"),
    "a function of one argument": ({"architectures": ["set_seed"]}, "architectures"),
    "an auto class": ({"architectures": ["AutoModelForCausalLM"]}, "architectures"),
    "a module": ({"architectures": ["utils"]}, "architectures"),
    "the base of all models": ({"architectures": ["PreTrainedModel"]}, "architectures"),
    "the base of one family": ({"architectures": ["LlamaPreTrainedModel"]}, "architectures"),
    "a number": ({"architectures": 3}, "architectures"),
    "numbers": ({"architectures": [3]}, "architectures"),
    "a string": ({"architectures": "LlamaForCausalLM"}, "architectures"),
    "an object": ({"architectures": {"LlamaForCausalLM": 1}}, "architectures"),
    "another family": ({"architectures": ["SwinForImageClassification"]}, "SwinForImageClassification"),
    "no such type": ({"model_type": "no-such-type"}, "model_type"),
    "a type that is a number": ({"model_type": 3}, "model_type"),
    "no type": ({"model_type": None}, "model_type"),
    "an unknown activation": ({"hidden_act": "explode"}, "hidden_act"),
    "a size of the wrong type": ({"hidden_size": "wide"}, "hidden_size"),
    "a size below zero": ({"hidden_size": -32}, "LlamaForCausalLM"),
    "no heads": ({"num_attention_heads": 0}, "config.json"),
    "endless layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "an unknown type of numbers": ({"dtype": "load"}, "config.json"),
    "auto_map of the wrong type": ({"auto_map": ["x"]}, "auto_map"),
    "auto_map that leads out": ({"auto_map": {"AutoModel": "../evil.Evil"}}, "auto_map"),
    "attention to download": ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
}


@pytest.fixture(scope="module")
def packed_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    return compressed(model, batches_for(model), tmp_path_factory.mktemp("hostile") / "packed")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_fields_are_refused_with_their_name(case: str, packed_llama: Path, tmp_path: Path) -> None:
    changes, word = HOSTILE[case]
    packed = edit_config(Path(shutil.copytree(packed_llama, tmp_path / "packed")), **changes)
    with pytest.raises(fips.FipsError, match=word) as caught:
        fips.load(packed, verify=False)
    assert "\n" not in str(caught.value)
    if case == "endless layers":
        return  # a dense model's own files are the user's choice
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(fips.FipsError, match=word) as caught:
        load_dense(str(edit_config(tmp_path / "dense", **changes)))
    assert "\n" not in str(caught.value)


# Weights that are not in the file


def test_a_missing_head_is_said_and_the_base_model_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = transformers.BertModel(AutoConfig.for_model("bert", **SMALL, vocab_size=64)).eval()
    base.save_pretrained(tmp_path / "encoder")
    edit_config(tmp_path / "encoder", architectures=["BertForMaskedLM"])
    with caplog.at_level(logging.WARNING, "fips"):
        model = load_dense(str(tmp_path / "encoder"))
    assert type(model) is transformers.BertModel
    assert torch.equal(first_output(model, {"input_ids": IDS}), first_output(base, {"input_ids": IDS}))
    (line,) = [record.getMessage() for record in caplog.records]
    for word in ("`cls.predictions.bias`", "BertForMaskedLM", "loaded as `BertModel`"):
        assert word in line
    path = compressed(model, [{"input_ids": IDS}], tmp_path / "out")
    expected = first_output(model, {"input_ids": IDS})
    for loaded in (fips.load(path), AutoModel.from_pretrained(path)):
        assert torch.equal(first_output(loaded, {"input_ids": IDS}), expected)


def test_a_language_model_without_its_head_is_loaded_without(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "dense")
    drop_tensors(tmp_path / "dense", "lm_head.weight")
    assert type(load_dense(str(tmp_path / "dense"))) is transformers.LlamaModel


def drop_tensors(directory: Path, *names: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_other_missing_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    drop_tensors(tmp_path / "dense", name)
    with pytest.raises(fips.FipsError, match=rf"lacks .*`{name}`.*random"):
        load_dense(str(tmp_path / "dense"))


def test_a_missing_pooler_is_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", architectures=["BertModel"])
    with pytest.raises(fips.FipsError, match=r"pooler\.dense\.bias"):
        load_dense(str(tmp_path / "dense"))


def test_weights_without_a_place_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", num_hidden_layers=2)
    with caplog.at_level(logging.WARNING, "fips"):
        load_dense(str(tmp_path / "dense"))
    assert "model.layers.2" in caplog.records[0].getMessage()


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", intermediate_size=96)
    with pytest.raises(fips.FipsError, match="cannot load model") as caught:
        load_dense(str(tmp_path / "dense"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel], ids=lambda kind: kind.__name__)
def test_from_pretrained_of_a_packed_directory_makes_up_nothing_the_model_had(
    auto: Any, packed_llama: Path, tmp_path: Path
) -> None:
    packed = Path(shutil.copytree(packed_llama, tmp_path / "packed"))
    drop_tensors(packed, "model.norm.weight")
    for load in (auto.from_pretrained, functools.partial(fips.load, verify=False)):
        with pytest.raises(fips.FipsError, match=r"lacks tensor `model\.norm\.weight`"):
            load(packed)


def test_a_new_head_on_a_packed_model_is_still_possible(packed_llama: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(packed_llama, num_labels=2)
    assert len(factored_layers(model)) == 9


def test_labels_of_another_number_are_asked_for_as_ever_and_a_wrong_shape_on_file_is_named(tmp_path: Path) -> None:
    """The first is a caller's wish, which transformers answers; the second is a directory that contradicts itself."""
    packed, load = tmp_path / "packed", transformers.AutoModelForImageClassification.from_pretrained
    model = tiny_model("vit", num_labels=4)
    compressed(model, batches_for(model), packed)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(packed, num_labels=7)
    assert load(packed, num_labels=7, ignore_mismatched_sizes=True).classifier.out_features == 7

    tensors = load_file(packed / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"][:3].clone()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fips.FipsError, match=r"`classifier\.weight` has shape \(3, .*\), wanted \(4, "):
        load(packed)


# Weights that cannot be read


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("bomb.ran"), ""))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shards(directory: Path) -> None:
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink()


def lose_a_shard(directory: Path) -> None:
    shards(directory)
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def scramble_the_index(directory: Path) -> None:
    shards(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": [1, 2]}')


def pickled(content: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        content(directory / "pytorch_model.bin")

    return change


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "safetensors cut short": (lambda d: cut(d / "model.safetensors"), "cannot load"),
    "safetensors empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "cannot load"),
    "safetensors of noise": (lambda d: (d / "model.safetensors").write_bytes(b"noise" * 99), "cannot load"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot load"),
    "shard missing": (lose_a_shard, "cannot load"),
    "index scrambled": (scramble_the_index, "cannot load"),
    "pickle of noise": (pickled(lambda p: p.write_bytes(b"noise" * 99)), "safetensors"),
    "pickle empty": (pickled(lambda p: p.write_bytes(b"")), "safetensors"),
    "pickle of a program": (pickled(lambda p: p.write_bytes(pickle.dumps({"w": Bomb()}))), "safetensors"),
    "torch file with a program": (pickled(lambda p: torch.save({"w": Bomb()}, p)), "safetensors"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_weights_that_cannot_be_read_are_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer(tmp_path / "dense")
    change, word = UNREADABLE[case]
    change(tmp_path / "dense")
    options = ["--data", str(text), "--sequence-length", "16", "--num-samples", "4"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "dense"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error
    assert not (tmp_path / "bomb.ran").exists()


# Types, tokenizers and models that a command cannot feed


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("torch.float32", "float32"), ("auto", "auto")],
)
def test_types_have_the_names_people_use(name: str, wanted: str) -> None:
    assert resolve_dtype(name) == wanted


def test_fp16_works_and_int8_is_refused_before_work(tmp_path: Path, text: Path, capsys: Capture) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer(tmp_path / "dense")
    assert load_dense(str(tmp_path / "dense"), dtype="bf16").dtype == torch.bfloat16
    command = [str(tmp_path / "dense"), "--data", str(text), "--sequence-length", "16", "--num-samples", "4"]
    assert main(["evaluate", *command, "--dtype", "fp16"]) == 0
    capsys.readouterr()
    for dtype in ("int8", "nonsense", "load"):
        assert main(["evaluate", *command, "--dtype", dtype]) == 2
        error = capsys.readouterr().err
        assert "`--dtype` must be one of auto, float32, fp32, bfloat16" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{broken"), ("tokenizer_config.json", "[]"), ("tokenizer.json", '{"x": 1}')],
)
def test_a_broken_tokenizer_is_said(name: str, content: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer(tmp_path / "dense")
    assert load_processor(str(tmp_path / "dense"), "text") is not None
    (tmp_path / "dense" / name).write_text(content)
    with pytest.raises(fips.FipsError, match=r"tokenizer of .* cannot be used") as caught:
        load_processor(str(tmp_path / "dense"), "text")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_vocabulary_is_none(tmp_path: Path) -> None:
    """transformers makes up one of five words for a BERT without any."""
    tiny_model("bert").save_pretrained(tmp_path / "dense")
    assert load_processor(str(tmp_path / "dense"), "text") is None
    (tmp_path / "dense" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(fips.FipsError, match="no vocabulary"):
        load_processor(str(tmp_path / "dense"), "text")


def test_a_broken_image_processor_is_said(tmp_path: Path) -> None:
    tiny_model("vit").save_pretrained(tmp_path / "dense")
    assert load_processor(str(tmp_path / "dense"), "image") is None
    (tmp_path / "dense" / "preprocessor_config.json").write_text("{broken")
    with pytest.raises(fips.FipsError, match="image processor of"):
        load_processor(str(tmp_path / "dense"), "image")


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_models_that_need_two_inputs_are_refused_by_commands(
    name: str, tmp_path: Path, text: Path, capsys: Capture
) -> None:
    model, _ = MORE[name]()
    model.save_pretrained(tmp_path / "dense")
    tokenizer(tmp_path / "dense")
    options = ["--data", str(text), "--sequence-length", "16", "--num-samples", "4"]
    for command in (
        ["evaluate", str(tmp_path / "dense"), *options],
        ["compress", str(tmp_path / "dense"), *options, "--bits", "9.6", "--output", str(tmp_path / "out")],
    ):
        capsys.readouterr()
        assert main(command) == 1
        error = capsys.readouterr().err
        assert f"`{type(model).__name__}` needs" in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
