"""`layers: all`: the embedding and the output head are packed, one matrix where they are tied."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import batches_for, tiny_model
from safetensors.torch import load_file
from test_cli import llama_directory, text  # noqa: F401 - fixtures
from test_families import MORE
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import fips
from fips.cli import main
from fips.config import size_bytes
from fips.errors import BackendError, CheckpointError, ConfigError, FipsError, ModelError
from fips.formats.packed import Packed, rows_of, to_dense
from fips.formats.rotation import widest_rotation
from fips.formats.values import values_named
from fips.layers.embedding import PackedEmbedding, TiedLayer, tied_layers
from fips.layers.linear import FactoredLinear, factored_layers
from fips.methods import workbench
from fips.methods.workbench import ProgressEvent
from fips.plan.footprint import state_bytes
from fips.plan.plan import plan_compression
from fips.solve.allocate import tempered
from fips.solve.structures import Choice, Point

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
COMPRESS = importlib.import_module("fips.compression")
UNTIED = {"tie_word_embeddings": False}


def made(family: str, **changes: Any) -> PreTrainedModel:
    fields = {"qwen2": QWEN2, **MORE}.get(family)
    if fields is None:
        return tiny_model(family, **changes)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**fields, **changes})
    return getattr(transformers, fields["architectures"][0])(config).eval()


def batches(model: PreTrainedModel, *, count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    found = batches_for(model, count=count, seed=seed)
    if model.config.is_encoder_decoder:
        return [{**one, "decoder_input_ids": one["input_ids"][:, :6]} for one in found]
    return found


def compressed(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    fips.compress(model, batches(model), fips.CompressionConfig(**{"bits": 5.0, "layers": "all", **settings}))
    return model


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
        return found


@pytest.fixture(scope="module")
def tied() -> PreTrainedModel:
    return compressed(made("llama"))


@pytest.fixture(scope="module")
def directory(tied: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "tied"
    fips.save(tied, path)
    return path


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("columns", [64, 20, 7, 33])
@pytest.mark.parametrize("values", ["int3", "int4g32", "int5", "int6g64", "int7", "int8", "nl3g64", "nl4", "nl5g16"])
def test_rows_are_those_of_the_whole_matrix(values: str, columns: int) -> None:
    """Also where rows begin within bytes."""
    generator = torch.Generator().manual_seed(columns)
    numbers, matrix = values_named(values), torch.randn(11, columns, generator=generator)
    scales, groups = numbers.fitted_scales(matrix, torch.ones_like(matrix, dtype=torch.bool), torch.bfloat16)
    stored = numbers.pack(numbers.quantize(matrix, scales, groups).flatten())
    packed = Packed(
        stored, torch.empty(0, dtype=torch.uint8), scales, (11, columns), "full", 0, values, 11 * columns, groups,
        widest_rotation(columns),
    )  # fmt: skip
    ids = torch.tensor([[3, 0, 10], [10, 5, 3]])
    torch.testing.assert_close(rows_of(packed, ids), to_dense(packed)[ids], atol=1e-6, rtol=1e-5)
    for outside in (11, -1):
        with pytest.raises(IndexError):
            rows_of(packed, torch.tensor([outside]))


def test_rows_of_floats_are_not_there() -> None:
    packed = Packed(torch.ones(6), torch.empty(0, dtype=torch.uint8), None, (2, 3), "full")
    with pytest.raises(BackendError, match="whole matrices on a grid"):
        rows_of(packed, torch.tensor([0]))


# ------------------------------------------------------------------------------------------------------------ families


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fips", "gptq"])
@pytest.mark.parametrize(
    ("family", "changes", "embedding", "others"),
    [
        ("llama", {}, "model.embed_tokens", ["lm_head"]),
        ("llama", UNTIED, "model.embed_tokens", []),
        ("gemma2", {}, "model.embed_tokens", ["lm_head"]),
        ("gemma3_text", {}, "model.embed_tokens", ["lm_head"]),
        ("gpt2", {}, "transformer.wte", ["lm_head"]),
        ("qwen2", UNTIED, "model.embed_tokens", []),
        ("bert", {}, "bert.embeddings.word_embeddings", ["cls.predictions.decoder"]),
        ("t5", {}, "shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    ],
)
def test_packed_saved_loaded_and_merged(
    family: str, changes: dict[str, Any], embedding: str, others: list[str], method: str, tmp_path: Path
) -> None:
    model = made(family, **changes)
    names, batch = set(model.state_dict()), batches(model, count=1, seed=5)[0]
    before = outputs(model, batch)
    report = fips.compress(model, batches(model), fips.CompressionConfig(bits=6.5, layers="all", method=method))
    layers = factored_layers(model)
    assert isinstance(layers[embedding], PackedEmbedding)
    assert list(tied_layers(model)) == others
    assert ("lm_head" in layers) is (changes == UNTIED)
    expected = outputs(model, batch)
    assert 0 < (expected - before).norm() / before.norm() < 0.2

    assert fips.save(model, tmp_path / "packed") == report.plan["compressed_model"]["bytes"] == state_bytes(model)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == state_bytes(model)
    assert not [
        name for name in stored if name in names and stored[name].shape[:1] == (64,) and stored[name].numel() > 64
    ]
    loaded, info = type(model).from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    for one in (fips.load(tmp_path / "packed"), loaded):
        assert torch.equal(outputs(one, batch), expected)
        assert state_bytes(one) == state_bytes(model)  # one copy of what is tied

    loaded.save_pretrained(tmp_path / "again")
    for one in (fips.load(tmp_path / "again"), type(model).from_pretrained(tmp_path / "again")):
        assert torch.equal(outputs(one, batch), expected)

    fips.merge(loaded)
    assert set(loaded.state_dict()) == names
    assert (outputs(loaded, batch) - expected).norm() / expected.norm() < 1e-5
    weight = loaded.get_submodule(embedding).weight
    assert type(loaded.get_submodule(embedding)) is type(made(family, **changes).get_submodule(embedding))
    assert all(loaded.get_submodule(name).weight is weight for name in others)
    loaded.save_pretrained(tmp_path / "dense")
    dense, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs(dense, batch), outputs(loaded, batch))


def test_a_tied_matrix_is_held_once_and_no_dense_one_is_made(directory: Path) -> None:
    model = fips.load(directory)
    head = model.get_output_embeddings()
    assert isinstance(head, TiedLayer)
    assert head.embedding is model.get_input_embeddings()
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.numel() >= 64 * 32 and tensor.is_floating_point() for tensor in tensors)
    assert not [name for name in load_file(directory / "model.safetensors") if name.startswith("lm_head")]


def test_only_rows_that_are_asked_for_are_decoded(tied: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the whole matrix was decoded")

    monkeypatch.setattr("fips.layers.linear.to_dense", refuse)
    monkeypatch.setattr("fips.kernels.reference.to_dense", refuse)
    rows = tied.get_input_embeddings()(torch.tensor([[3, 5, 3]]))
    assert rows.shape == (1, 3, 32)
    assert torch.equal(rows[0, 0], rows[0, 2])


def test_logits_of_a_tied_head_are_products_with_the_rows(tied: PreTrainedModel) -> None:
    embedding = tied.get_input_embeddings()
    rows, hidden = embedding(torch.arange(64)), torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tied.lm_head(hidden), hidden @ rows.T, atol=1e-4, rtol=1e-4)


def test_a_scale_of_the_embedding_is_kept() -> None:
    model = made("gemma3_text")
    scale, rows = 32**0.5, model.get_input_embeddings()(torch.tensor([5, 7])).detach()
    compressed(model, bits=7.5)
    found = model.get_input_embeddings()
    assert found.lookup.scale == pytest.approx(scale)
    torch.testing.assert_close(found(torch.tensor([5, 7])), rows, atol=0.1 * float(rows.std()), rtol=0)
    torch.testing.assert_close(found(torch.tensor([5])), scale * found.dense_weight()[[5]], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_padding_stays_what_it_was() -> None:
    model = made("llama")
    assert model.get_input_embeddings().padding_idx == 0
    compressed(model)
    assert model.get_input_embeddings().padding_idx == 0
    assert fips.merge(model).get_input_embeddings().padding_idx == 0


class Doubled(nn.Embedding):
    """Something that is not known."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.slow
def test_an_unknown_embedding_is_left_dense_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = made("llama")
    model.config.tie_word_embeddings = False
    model.model.embed_tokens = Doubled(64, 32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    kind = transformers.LlamaForCausalLM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(COMPRESS, "check_reloadable", lambda *_: None)  # of a class of nobody's
        report = fips.compress(model, batches(model), fips.CompressionConfig(bits=5.0, layers="all"))
    assert isinstance(model, kind)
    assert "`model.embed_tokens` is left dense: `model.embed_tokens` is a `Doubled`" in " ".join(report.notes)
    assert "left dense" in caplog.text
    assert isinstance(model.lm_head, FactoredLinear)


@pytest.mark.slow
def test_a_model_without_tokens_is_compressed_in_its_blocks() -> None:
    one, other = tiny_model("vit"), tiny_model("vit")
    report = fips.compress(one, batches_for(one), fips.CompressionConfig(bits=5.0, layers="all"))
    fips.compress(other, batches_for(other), fips.CompressionConfig(bits=5.0, layers="blocks"))
    assert set(factored_layers(one)) == set(factored_layers(other))
    assert "the model has none of tokens; `layers: all` takes its blocks alone" in " ".join(report.notes)


# ------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.slow
def test_the_head_is_fitted_to_what_it_reads() -> None:
    """With error feedback in the metric of its inputs the logits are nearer than with plain rounding."""
    errors = {}
    for method in ("fips", "plain"):
        model = made("qwen2", **UNTIED, hidden_size=64)
        with torch.no_grad():
            model.model.norm.weight.copy_(torch.logspace(-2, 0, 64))  # columns that hardly count, and some that do
        batch = batches(model, seed=9)[0]
        with torch.no_grad():
            hidden = model.model(**batch)[0]
        weight = model.lm_head.weight.detach().clone()
        settings = {"values": "int4", "rotate": False, "bits": 5.5}
        if method == "fips":
            compressed(model, **settings)
            found = model.lm_head.dense_weight()
        else:
            numbers = values_named("int4")
            scales, groups = numbers.fitted_scales(weight, torch.ones_like(weight, dtype=torch.bool), torch.bfloat16)
            found = numbers.dequantize(numbers.quantize(weight, scales, groups), scales, groups)
        errors[method] = float((hidden @ (found - weight).T).norm())
    assert errors["fips"] < 0.7 * errors["plain"]


def test_levels_that_are_believed_keep_their_distance() -> None:
    curves = [[Point(Choice(False, "unstructured", "int4"), 10.0, loss)] for loss in (1.0, 4.0, 100.0)]
    plain, believed = ([points[0].loss for points in tempered(curves, ends)] for ends in ((), (2,)))
    assert plain == pytest.approx([1.0, 2.0, 10.0])
    assert believed == pytest.approx([1.0, 2.0, 100 / 2**0.5])  # the mean level of the others is 2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, UNTIED])
def test_often_seen_tokens_are_stored_better(changes: dict[str, Any]) -> None:
    """The influence of an embedding is how often each token occurs."""
    model = made("llama", **changes)
    seen: dict[str, Any] = {}
    collect = workbench.collect_influence

    def kept(*args: Any, **options: Any) -> Any:
        seen.update(collect(*args, **options))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "collect_influence", kept)
        compressed(model)
    ids = torch.cat([one["input_ids"] for one in batches(model)])
    counts = torch.bincount(ids.flatten(), minlength=64) / ids.numel()
    torch.testing.assert_close(seen["model.embed_tokens"].inputs_I, counts)
    assert seen["model.embed_tokens"].outputs_O.shape == (32,)
    assert seen["lm_head"].outputs_O.shape == (64,)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, UNTIED])
@pytest.mark.parametrize("effort", ["default", "fast"])
def test_the_size_of_the_whole_file_is_met(changes: dict[str, Any], effort: str) -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=384, vocab_size=512, **changes)
    wanted = size_bytes("15%", state_bytes(model))
    config = fips.CompressionConfig(size="15%", layers="all", effort=effort)
    report = fips.compress(model, batches(model), config)
    assert 0.99 * wanted <= state_bytes(model) <= wanted
    ends = [group for group in report.plan["groups"] if group["name"] in ("tied", "embedding", "head")]
    assert sum(group["dense"]["parameters"] for group in ends) == 512 * 128 * (2 if changes else 1)
    bits = 8 * report.plan["layers"]["factored"]["bytes"] / report.plan["layers"]["dense"]["parameters"]
    assert report.config.bits is not None
    assert 0.98 * report.config.bits <= bits <= report.config.bits


@pytest.mark.slow
def test_the_smallest_size_is_one_that_works() -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=384)
    with pytest.raises(
        FipsError, match="the smallest size with the blocks, embedding and head compressed is"
    ) as refused:
        plan_compression(model, fips.CompressionConfig(size="5%", layers="all"))
    least = int(str(refused.value).split("compressed is ")[1].split(" bytes")[0].replace(",", ""))
    fips.compress(model, batches(model), fips.CompressionConfig(size=str(least + 1), layers="all"))
    assert state_bytes(model) <= least + 1


def test_blocks_alone_say_that_there_is_more(tied: PreTrainedModel) -> None:
    model = made("llama", vocab_size=4096)
    with pytest.raises(FipsError, match=r"with `--layers all` it is [\d,]+$"):
        plan_compression(model, fips.CompressionConfig(size="40%", layers="blocks"))
    with pytest.raises(FipsError, match=r"even with `--layers all --rest-dtype bfloat16` it is [\d,]+$"):
        plan_compression(model, fips.CompressionConfig(size="3%", layers="blocks"))


# --------------------------------------------------------------------------------------------------------- work around


def test_it_generates(tied: PreTrainedModel, directory: Path) -> None:
    ids = batches(tied)[0]["input_ids"]
    found = [one.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for one in (tied, fips.load(directory))]
    assert torch.equal(*found)
    assert found[0].shape[1] > ids.shape[1]


def test_the_base_model_loads_from_it(tied: PreTrainedModel, directory: Path) -> None:
    base = transformers.AutoModel.from_pretrained(directory)
    batch = batches(tied)[0]
    with torch.no_grad():
        assert torch.equal(base(**batch)[0], tied.model(**batch)[0])


def test_copies_and_casts_stay_tied(tied: PreTrainedModel) -> None:
    batch = batches(tied, seed=5)[0]
    expected = outputs(tied, batch)
    for twin in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied))):
        assert twin.lm_head.embedding is twin.model.embed_tokens
        assert twin.lm_head.embedding is not tied.model.embed_tokens
        assert torch.equal(outputs(twin, batch), expected)
    narrow = outputs(twin.to(torch.bfloat16), batch)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - expected).norm() / expected.norm() < 0.02
    assert state_bytes(twin) <= state_bytes(tied)


@pytest.mark.slow
def test_it_is_traced_and_offloaded(tied: PreTrainedModel) -> None:
    from accelerate import cpu_offload

    batch = batches(tied, seed=5)[0]
    expected = outputs(tied, batch)
    traced = torch.compile(copy.deepcopy(tied), fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(traced, batch), expected, atol=1e-5, rtol=1e-4)
    away = cpu_offload(copy.deepcopy(tied), execution_device=torch.device("cpu"))
    torch.testing.assert_close(outputs(away, batch), expected, atol=1e-5, rtol=1e-4)


def test_more_tokens_are_refused_until_it_is_dense(directory: Path) -> None:
    for model in (fips.load(directory), transformers.LlamaForCausalLM.from_pretrained(directory)):
        with pytest.raises(ModelError, match=r"packed with 64 rows, which cannot become 70.*call `fips.merge"):
            model.resize_token_embeddings(70)
        assert model.resize_token_embeddings() is model.get_input_embeddings()
        assert model.resize_token_embeddings(64) is model.get_input_embeddings()
        fips.merge(model).resize_token_embeddings(70)
        assert model.get_input_embeddings().num_embeddings == 70
        assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the extra peft is not installed")
def test_adapters_of_head_and_blocks(tied: PreTrainedModel) -> None:
    import peft

    import fips.layers.lora  # noqa: F401

    batch = batches(tied, seed=5)[0]
    expected = outputs(tied, batch)
    with pytest.raises(ModelError, match="on a packed embedding of 64 rows"):
        peft.get_peft_model(copy.deepcopy(tied), peft.LoraConfig(target_modules=["embed_tokens"]))
    model = peft.get_peft_model(copy.deepcopy(tied), peft.LoraConfig(target_modules=["up_proj", "lm_head"]))
    torch.testing.assert_close(outputs(model, batch), expected)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    adapters = [one for name, one in model.named_parameters() if "lm_head.lora_B" in name]
    assert adapters
    assert all(one.grad is not None and bool(one.grad.any()) for one in adapters)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="the extra onnx is not installed")
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gemma3_text", UNTIED)])
def test_onnx_agrees(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    from fips.integrations.onnx import export_onnx

    model = compressed(made(family, **changes))
    assert export_onnx(model, tmp_path / "m.onnx", batches(model)[0]).relative_error < 1e-5


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on(tmp_path: Path) -> None:
    done = compressed(made("qwen2", **UNTIED))
    model, config = made("qwen2", **UNTIED), fips.CompressionConfig(bits=5.0, layers="all")

    def end(event: ProgressEvent) -> None:
        if event.stage == "solve" and event.group == "lm_head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fips.compress(model, batches(model), config, progress=end, work=tmp_path / "work")
    assert not factored_layers(model)
    fips.compress(model, batches(model), config, work=tmp_path / "work")
    found, expected = model.state_dict(), done.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    keys, head = dict(model.all_tied_weights_keys), model.lm_head

    def fail(_: nn.Module) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMPRESS, "attach", fail)
    with pytest.raises(KeyboardInterrupt):
        compressed(model)
    assert model.all_tied_weights_keys == keys
    assert model.lm_head is head
    assert head.weight is model.get_input_embeddings().weight


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sparsegpt"}, "`layers: all` is for `method: fips` and `method: gptq`, got `method: sparsegpt`"),
        ({"method": "fips-paper", "bits": None, "budget": 0.5}, "got `method: fips-paper`"),
        ({"bits": None, "budget": 0.5}, "give `bits` or `size`, not `budget`"),
        ({"effort": "max"}, "goes with `effort: default` or `fast`"),
        ({"distill": {"steps": 2}}, "without sharing, `propagate_errors` and training"),
        ({"values": "float"}, "got `values: float`"),
        ({"pattern": "4:16"}, "keeps all entries of embedding and head, got `pattern: 4:16`"),
        ({"targets": ("q_proj",)}, "`layers: all` says nothing"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        fips.CompressionConfig(**{"bits": 5.0, "layers": "all", **settings})


def test_a_matrix_that_is_read_past_its_module_is_refused_before_the_work() -> None:
    config = AutoConfig.for_model(
        "deberta-v2", hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        legacy=False,
    )  # fmt: skip
    model = transformers.DebertaV2ForMaskedLM(config).eval()
    with pytest.raises(ModelError, match=r"reads its weight.*--ignore deberta.embeddings.word_embeddings"):
        compressed(model)
    compressed(model, ignore=("word_embeddings",))
    assert isinstance(model.get_input_embeddings(), nn.Embedding)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_what_is_ignored_is_left_dense(name: str) -> None:
    model = compressed(made("llama"), ignore=(name,))
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def edited(directory: Path, place: Path, **fields: Any) -> Path:
    shutil.copytree(directory, place)
    (place / "fips_manifest.json").unlink()
    config = json.loads((place / "config.json").read_text())
    entry = config["quantization_config"]["layers"]["model.embed_tokens"]
    entry.update(fields.pop("entry", {}))
    config["quantization_config"].update(fields.pop("quantization", {}))
    config.update(fields)
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization": {"format_version": 3}}, "has `embedding`, which format_version 3 does not know"),
        ({"quantization": {"format_version": 5}}, "this fips reads 1 to 4"),
        ({"entry": {"tied": ["lm_head", "model.layers.0"]}}, "is a `LlamaDecoderLayer`|`model.layers.0`"),
        ({"entry": {"tied": []}}, "`lm_head` shares the weight of the embedding"),
        ({"entry": {"tied": ["lm_head", "lm_head"]}}, "is named twice"),
        ({"entry": {"bias": True}}, "an `embedding` is an up layer"),
        ({"tie_word_embeddings": False}, "`lm_head` does not share the weight of the embedding"),
        ({"vocab_size": 80}, "has 64 rows of 32, the model wants"),
    ],
)
def test_a_directory_that_contradicts_itself_is_refused(
    fields: dict[str, Any], message: str, directory: Path, tmp_path: Path
) -> None:
    place = edited(directory, tmp_path / "edited", **fields)
    with pytest.raises(CheckpointError, match=message):
        fips.load(place)
    with pytest.raises(CheckpointError, match=message):
        transformers.LlamaForCausalLM.from_pretrained(place)


def test_the_version_is_raised_only_where_embeddings_are_packed(directory: Path, tmp_path: Path) -> None:
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["format_version"] == 4
    model = compressed(made("llama"), layers="blocks", values="nl4")
    model.save_pretrained(tmp_path / "blocks")
    fields = json.loads((tmp_path / "blocks" / "config.json").read_text())["quantization_config"]
    assert fields["format_version"] == 3
    assert not any({"embedding", "tied"} & set(layer) for layer in fields["layers"].values())


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_the_command_plans_compresses_exports_and_evaluates(
    llama_directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    assert main(["inspect", str(llama_directory), "--layers", "all", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [group["name"] for group in plan["groups"]][-1] == "tied"
    assert main(["inspect", str(llama_directory), "--layers", "all"]) == 0
    assert "model.embed_tokens" in capsys.readouterr().out
    options = ["--layers", "all", "--size", "20%", "--sequence-length", "32", "--num-samples", "8"]
    command = ["compress", str(llama_directory), "--data", str(text), "--output", str(tmp_path / "out"), *options]
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    before = sum(tensor.nbytes for tensor in load_file(llama_directory / "model.safetensors").values())
    assert 0.9 * 0.2 * before <= state_bytes(fips.load(tmp_path / "out")) <= 0.2 * before
    assert "so that all tensors take 20%" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "dense")]) == 0
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.lm_head.weight is dense.get_input_embeddings().weight
