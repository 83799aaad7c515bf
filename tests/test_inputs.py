"""What ``fips.compress`` is given: batches, masks, models in wrappers, and a state that comes back as it was."""

from __future__ import annotations

import copy
import random
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from conftest import DECODER, SMALL, batches_for, quick_settings, tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import AutoConfig, BatchEncoding, PreTrainedModel

import fips
from fips.calibration.inputs import CalibrationData
from fips.calibration.moments import LayerMoments, collect_moments
from fips.calibration.tokens import TokenTracker
from fips.errors import ConfigError, DataError, FipsError, ModelError
from fips.layers.linear import BASES, FactoredLinear, basis_owner, factored_layers
from fips.methods.workbench import MomentCache, Needs, Workbench
from fips.models import Site, locate_layers

TEXT = {**SMALL, "vocab_size": 64, "pad_token_id": 0}
SEQ2SEQ = {
    "d_model": 32, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2, "d_ff": 80,
    "d_kv": 8, "num_layers": 2, "num_heads": 4,
}  # fmt: skip


def made(family: str, architecture: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, architecture)(AutoConfig.for_model(family, **fields)).eval()


def gptq(**changes: Any) -> fips.CompressionConfig:
    """The quickest method that measures moments."""
    return fips.CompressionConfig(**{"method": "gptq", "bits": 5.6, **changes})


# Batches


def same_layers(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def padded_batches(count: int = 2, *, left: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 64, (3, 12), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate((12, 5, 3)):
            padding = slice(0, 12 - length) if left else slice(length, 12)
            mask[row, padding] = ids[row, padding] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.mark.parametrize("kind", [BatchEncoding, UserDict, lambda batch: UserDict({**batch, "labels": "none"})])
def test_any_mapping_is_a_batch(kind: Any) -> None:
    reference, model = tiny_model("llama"), tiny_model("llama")
    fips.compress(reference, padded_batches(), gptq())
    fips.compress(model, [kind(batch) for batch in padded_batches()], gptq())
    assert same_layers(model, reference)


@pytest.mark.parametrize("settings", [gptq(), fips.CompressionConfig(bits=6, distill={"steps": 1})])
def test_none_counts_as_absent(settings: fips.CompressionConfig) -> None:
    """Texts without padding, whose mask a tokenizer or a collator leaves None."""
    reference, model = tiny_model("llama"), tiny_model("llama")
    batches = [{"input_ids": torch.randint(3, 64, (4, 160))} for _ in range(2)]
    fips.compress(reference, batches, settings)
    unmasked = [{**batch, "attention_mask": None, "position_ids": None, "labels": None} for batch in batches]
    fips.compress(model, unmasked, settings)
    assert same_layers(model, reference)


class NeedsMask(nn.Module):
    """A model whose mask has no default."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = tiny_model("llama")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def test_none_is_given_where_the_model_wants_to_be_told() -> None:
    model = NeedsMask()
    fips.compress(model, [{"input_ids": torch.randint(3, 64, (4, 160)), "attention_mask": None}], gptq())
    assert factored_layers(model)


def test_labels_on_the_meta_device_are_refused_where_decoder_inputs_are_made_of_them() -> None:
    model = made("t5", "T5ForConditionalGeneration", **SEQ2SEQ)
    with pytest.raises(DataError, match="`decoder_input_ids` of batch 0 lies on the meta device"):
        fips.compress(model, [{"input_ids": ids, "labels": ids.to("meta")}], gptq())


ids = torch.full((2, 8), 5)
REFUSED: dict[str, tuple[Any, str]] = {
    "generator": ((batch for batch in [{"input_ids": ids}]), "used up after one pass"),
    "map": (map(dict, [{"input_ids": ids}]), "used up after one pass"),
    "zip": (zip([ids], [ids], strict=True), "used up after one pass"),
    "iterator": (iter([{"input_ids": ids}]), "used up after one pass"),
    "empty": ([], "has no batch"),
    "empty loader": (DataLoader([]), "has no batch"),
    "text": ("wikitext", "got the str 'wikitext'"),
    "path": (Path("data.txt"), "data.txt"),
    "one dict": ({"input_ids": ids}, "got one dict; put it into a list"),
    "one encoding": (BatchEncoding({"input_ids": ids}), "got one BatchEncoding; put it into a list"),
    "one tensor": (ids, "got one Tensor; put it into a list"),
    "none": (None, "got `NoneType`"),
    "tuples": ([(ids, torch.zeros(2))], "got tuple of 2 .batch 0.; give the inputs alone"),
    "strings": (["once", "upon"], "tokenize first"),
    "lists of strings": ([["once", "upon"]], "tokenize first"),
    "a column of text": ([{"input_ids": ids, "text": ["a", "b"]}], "`text` of batch 0 is text"),
    "lists of ids": ([{"input_ids": ids.tolist()}], "`input_ids` of batch 0 is a list, not a tensor"),
    "an array": ([{"input_ids": ids.numpy()}], "is a ndarray, not a tensor"),
    "nothing": ([{}], "holds no tensor"),
    "None alone": ([{"input_ids": None}], "holds no tensor"),
    "a row": ([{"input_ids": ids[0]}], "no batch axis"),
    "floats": ([{"input_ids": ids.float()}], "token ids are integers"),
    "unknown tokens": ([{"input_ids": ids}, {"input_ids": ids + 60}], "batch 1 hold token 65, and the model knows 64"),
    "negative tokens": ([{"input_ids": ids - 10}], "hold token -5"),
    "no examples": ([{"input_ids": ids[:0]}], "is empty"),
    "on the meta device": ([{"input_ids": ids.to("meta")}], "`input_ids` of batch 0 lies on the meta device"),
    "a mask on the meta device": (
        [{"input_ids": ids, "attention_mask": [ids.to("meta")]}], "`attention_mask` of batch 0 lies on the meta device"
    ),
    "another mask": ([{"input_ids": ids, "attention_mask": torch.ones(2, 7)}], "must be alike"),
    "nothing but padding": (
        [{"input_ids": ids, "attention_mask": torch.tensor([[1] * 8, [0] * 8])}], "hides every token of example 1"
    ),
    "a cache": ([{"input_ids": ids, "past_key_values": transformers.DynamicCache()}], "which every pass would change"),
    "numbers": ([1, 2], "got int"),
    "not what the model reads": ([{"pixel_values": torch.randn(2, 3, 8, 8)}], "cannot read the first batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_batches_is_refused_before_work_in_one_line(name: str) -> None:
    batches, message = REFUSED[name]
    model = tiny_model("llama")
    events: list[Any] = []
    with pytest.raises(DataError, match=message) as caught:
        fips.compress(model, batches, gptq(), progress=events.append)
    assert "\n" not in str(caught.value)
    assert events == []
    assert not factored_layers(model)


def test_arguments_that_forward_does_not_take_and_infinite_pixels_are_refused() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    with pytest.raises(DataError, match=r"holds `index`, and `Strict.forward` has no such argument; leave it out"):
        fips.compress(Strict(), [{"x": torch.randn(4, 16), "index": torch.arange(4)}], gptq())
    vit = tiny_model("vit")
    batches = batches_for(vit)
    batches[2]["pixel_values"][0, 0, 0, 0] = torch.inf
    with pytest.raises(DataError, match="`pixel_values` of batch 2 holds NaN or Inf"):
        fips.compress(vit, batches, gptq())


@pytest.mark.parametrize("config", [{"bits": 5.6}, None, "fips"])
def test_settings_of_another_type_are_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="must be a `CompressionConfig`, got"):
        fips.compress(tiny_model("vit"), batches_for(tiny_model("vit")), config)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


def plain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def test_loaders_of_tuples_and_tensor_data_sets_give_the_inputs_alone() -> None:
    x, y = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)), torch.arange(32)
    reference = plain_model()
    fips.compress(reference, list(x.split(16)), gptq())
    one_hot = torch.eye(32)
    for data in (
        DataLoader(TensorDataset(x), batch_size=16),
        DataLoader(TensorDataset(x, y), batch_size=16),
        DataLoader(TensorDataset(x, one_hot), batch_size=16),
        DataLoader([(row, int(label)) for row, label in zip(x, y, strict=True)], batch_size=16),
        TensorDataset(x, y),
    ):
        model = plain_model()
        fips.compress(model, data, gptq())
        assert same_layers(model, reference)


def test_a_loader_that_gives_masks_without_names_is_refused() -> None:
    tokens = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(tokens, torch.ones_like(tokens)), batch_size=4)
    with pytest.raises(DataError, match=r"2 values per batch .*give dicts that name them"):
        fips.compress(tiny_model("llama"), loader, gptq())
    labelled = tiny_model("llama")
    fips.compress(labelled, DataLoader(TensorDataset(tokens, torch.arange(8)), batch_size=4), gptq())
    assert factored_layers(labelled)


class Noisy(Dataset[Tensor]):
    """Random augmentation by the three global generators."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(16) + random.random() + float(np.random.rand())


def test_shuffled_and_augmented_loaders_give_the_same_batches_on_every_pass() -> None:
    model, own = plain_model(), torch.Generator().manual_seed(5)
    for loader in (
        DataLoader(Noisy(), batch_size=2, shuffle=True),
        DataLoader(Noisy(), batch_size=2, shuffle=True, generator=own),
    ):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        expected = torch.rand(1), float(np.random.rand()), random.random()
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        data = CalibrationData(model, loader, seed=0)
        data.check()
        first, second = list(data), list(data)
        assert len(data) == len(first) == 4
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[0], first[1])
        assert (torch.rand(1), float(np.random.rand()), random.random()) == expected
    assert torch.equal(own.get_state(), torch.Generator().manual_seed(5).get_state())


def test_data_that_changes_or_ends_after_the_first_pass_is_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self.rest = iter(batches_for(tiny_model("llama")))

        def __iter__(self) -> Iterator[Any]:
            yield from self.rest

    class Counting:
        number = 3

        def __iter__(self) -> Iterator[Any]:
            self.number += 1
            yield {"input_ids": torch.full((2, 8), self.number)}

    for data, message in ((Once(), "used up by the first pass"), (Counting(), "other ones on every pass")):
        with pytest.raises(DataError, match=message):
            fips.compress(tiny_model("llama"), data, gptq())


def test_moments_of_other_batches_are_not_taken_from_the_cache() -> None:
    cache: MomentCache = {}
    models = [tiny_model("llama") for _ in range(3)]
    for model, seed in zip(models, (0, 1, 1), strict=True):
        fips.compress(model, batches_for(model, seed=seed), gptq(), moments=cache)
    fresh = tiny_model("llama")
    fips.compress(fresh, batches_for(fresh, seed=1), gptq())
    assert len(cache) == 2
    assert same_layers(models[1], fresh)
    assert same_layers(models[2], fresh)
    assert not same_layers(models[0], fresh)


def test_moments_of_another_precision_are_not_taken_from_the_cache() -> None:
    cache: MomentCache = {}
    first, second, alone = (tiny_model("llama") for _ in range(3))
    fips.compress(first, batches_for(first), gptq(precision="bfloat16"), moments=cache)
    fips.compress(second, batches_for(second), gptq(precision="float32"), moments=cache)
    fips.compress(alone, batches_for(alone), gptq(precision="float32"))
    assert same_layers(second, alone)
    assert not same_layers(first, alone)


def test_a_cache_of_moments_keeps_to_the_bound() -> None:
    cache: MomentCache = {}
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), gptq(), moments=cache)
    (key,) = cache
    size = sum(moment.nbytes for moment in cache[key].values())
    for seed, memory in enumerate((2 * size, size, 1), start=1):
        model = tiny_model("llama")
        fips.compress(model, batches_for(model, seed=seed), gptq(metric={"memory": memory}), moments=cache)
        held = sum(moment.nbytes for one in cache.values() for moment in one.values())
        assert memory // 2 <= held <= memory


def test_inputs_keep_no_history_of_gradients() -> None:
    model = tiny_model("llama")
    embedding = model.get_input_embeddings()
    batches = [{"inputs_embeds": embedding(batch["input_ids"])} for batch in batches_for(model, count=2)]
    fips.compress(model, batches, gptq())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_become_decoder_inputs_and_their_padding_does_not_count() -> None:
    model = made("t5", "T5ForConditionalGeneration", **SEQ2SEQ)
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    data = CalibrationData(model, [{"input_ids": ids, "labels": labels}], seed=0)
    (batch,) = data
    assert batch["decoder_input_ids"].tolist() == [[2, 5, 6, 7], [2, 8, 1, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert "labels" not in batch


# Masks


def moments_of(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], sites: list[Site], *, floor: float = 0.4
) -> dict[str, LayerMoments]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return collect_moments(model, sites, batches, lambda net, batch: net(**batch), temperature=2.0, floor=floor, seed=0)


def sites_of(model: PreTrainedModel, *targets: str) -> list[Site]:
    found = locate_layers(model, targets=targets or None)
    return [site for sublayer in found.sublayers for site in sublayer.sites]


def example(lengths: dict[str, int], row: int) -> dict[str, Tensor]:
    """One example without padding: ids under every name, of these lengths."""
    generator = torch.Generator().manual_seed(row)
    return {name: torch.randint(3, 60, (1, length), generator=generator) for name, length in lengths.items()}


def joined(examples: list[dict[str, Tensor]], *, left: bool = False) -> dict[str, Tensor]:
    """Examples padded to the longest, with their masks."""
    batch: dict[str, Tensor] = {}
    for name in examples[0]:
        rows = [one[name][0] for one in examples]
        longest = max(len(row) for row in rows)
        padding = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
        batch[name] = torch.stack([nn.functional.pad(row, pad) for row, pad in zip(rows, padding, strict=True)])
        mask = name.replace("input_ids", "attention_mask")
        batch[mask] = torch.stack(
            [nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, padding, strict=True)]
        )
    return batch


def assert_padding_changes_nothing(
    model: PreTrainedModel, examples: list[dict[str, Tensor]], padded: dict[str, Tensor], sites: list[Site]
) -> None:
    """Moments of the padded batch against those of the examples alone, where tokens are weighted over a batch alike.

    The direction is the same for every row: random draws depend on what is drawn before.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fips.calibration.heads._noise",
            lambda head, _: torch.arange(head.scores.shape[-1]).cos().expand(head.scores.shape),
        )
        expected = moments_of(model, examples, sites, floor=1.0)
        found = moments_of(model, [padded], sites, floor=1.0)
    assert expected.keys() == found.keys()
    for name in expected:
        assert found[name].weight == expected[name].weight, name
        for part in ("inputs_II", "mean_I", "gradients_OO"):
            ours, theirs = getattr(found[name], part), getattr(expected[name], part)
            assert theirs.norm() > 0, (name, part)
            assert (ours - theirs).norm() <= 2e-5 * theirs.norm(), (name, part)


HEADS = {
    "causal": ("llama", "LlamaForCausalLM", DECODER),
    "eager": ("llama", "LlamaForCausalLM", {**DECODER, "attn_implementation": "eager"}),
    "sliding": ("gemma2", "Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": 4}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
    "masked": ("bert", "BertForMaskedLM", TEXT),
    "tokens": ("bert", "BertForTokenClassification", {**TEXT, "num_labels": 5}),
    "question": ("bert", "BertForQuestionAnswering", TEXT),
    "question, distilbert": (
        "distilbert", "DistilBertForQuestionAnswering",
        {"dim": 32, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
    ),
    "sequence": ("bert", "BertForSequenceClassification", {**TEXT, "num_labels": 8}),
    "sequence, decoder": ("llama", "LlamaForSequenceClassification", {**DECODER, "num_labels": 5}),
    "base": ("bert", "BertModel", TEXT),
}  # fmt: skip
LENGTHS = (8, 5, 3, 8, 2, 7, 4, 6)
"""As many examples as tokens of the longest (and as labels of `sequence`): no mask is told from its shape."""


@pytest.mark.parametrize("head", HEADS)
def test_padding_counts_nowhere_whatever_the_head(head: str) -> None:
    family, architecture, fields = HEADS[head]
    model = made(family, architecture, **fields)
    examples = [example({"input_ids": length}, row) for row, length in enumerate(LENGTHS)]
    assert_padding_changes_nothing(model, examples, joined(examples), sites_of(model))


@pytest.mark.parametrize("kind", ["long", "bool", "float", "4-D bool", "4-D float"])
@pytest.mark.parametrize("left", [False, True])
def test_masks_of_every_type_and_side_say_the_same(kind: str, left: bool) -> None:
    model = made("llama", "LlamaForCausalLM", **DECODER)
    examples = [example({"input_ids": length}, row) for row, length in enumerate(LENGTHS)]
    padded = joined(examples, left=left)
    mask = padded["attention_mask"].bool()
    padded["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    square = mask[:, None, None, :] & mask[:, None, :, None] & torch.ones(8, 8).tril().bool()
    padded["attention_mask"] = {
        "long": mask.long(), "bool": mask, "float": mask.float(), "4-D bool": square,
        "4-D float": torch.zeros(square.shape).masked_fill(~square, -1e9),
    }[kind]  # fmt: skip
    assert_padding_changes_nothing(model, examples, padded, sites_of(model))


def test_padding_takes_no_random_numbers_from_the_examples() -> None:
    model = made("llama", "LlamaForCausalLM", **DECODER)
    sites, examples = sites_of(model), [example({"input_ids": length}, row) for row, length in enumerate(LENGTHS)]
    expected, found = (
        moments_of(model, examples, sites, floor=1.0),
        moments_of(model, [joined(examples)], sites, floor=1.0),
    )
    for name, one in expected.items():
        assert (found[name].gradients_OO - one.gradients_OO).norm() <= 2e-5 * one.gradients_OO.norm()


def test_packed_sequences_have_no_padding() -> None:
    model = made("llama", "LlamaForCausalLM", **DECODER)
    examples = [example({"input_ids": length}, row) for row, length in enumerate((5, 3))]
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in examples], dim=1),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]),
    }
    sites = sites_of(model)
    assert {one.weight for one in moments_of(model, [packed], sites, floor=1.0).values()} == {8.0}


def test_encoder_and_decoder_tokens_count_by_their_own_masks() -> None:
    """Cross attention too: its keys and values read the encoder's tokens. All lengths and the batch are equal."""
    model = made("t5", "T5ForConditionalGeneration", **SEQ2SEQ)
    examples = [
        example({"input_ids": length, "decoder_input_ids": 9 - length}, row) for row, length in enumerate(LENGTHS)
    ]
    examples[0]["decoder_input_ids"] = example({"decoder_input_ids": 8}, 9)["decoder_input_ids"]
    sites = sites_of(model, "wi", "wo", "EncDecAttention.k", "EncDecAttention.q", "SelfAttention.v")
    padded = joined(examples)
    assert padded["attention_mask"].shape == padded["decoder_attention_mask"].shape == (8, 8)
    assert_padding_changes_nothing(model, examples, padded, sites)


def test_a_decoder_without_a_mask_does_not_take_the_encoders() -> None:
    model = made("t5", "T5ForConditionalGeneration", **SEQ2SEQ)
    examples = [example({"input_ids": length}, row) for row, length in enumerate(LENGTHS)]
    batch = {**joined(examples), "decoder_input_ids": torch.randint(3, 60, (8, 8))}
    found = moments_of(model, [batch], sites_of(model), floor=1.0)
    for name, one in found.items():
        assert one.weight == (sum(LENGTHS) if name.startswith("encoder") else 64), name


def test_patches_of_images_are_not_masked_by_the_text() -> None:
    """17 patches of 17 images beside 17 tokens of 17 texts."""
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    model = made("clip", "CLIPModel", text_config={**TEXT, "eos_token_id": 1}, vision_config=vision, projection_dim=16)
    text = joined([example({"input_ids": 17 if row == 0 else 6}, row) for row in range(17)])
    batch = {**text, "pixel_values": torch.randn(17, 3, 32, 32)}
    found = moments_of(model, [batch], sites_of(model), floor=1.0)
    weights = {name.partition("_")[0]: one.weight for name, one in found.items()}
    assert weights == {"text": 17 + 16 * 6, "vision": 17 * 17}


def test_frames_of_speech_count_by_the_mask_made_of_their_samples() -> None:
    fields = {
        **SMALL, "num_hidden_layers": 2, "vocab_size": 12, "conv_dim": (8, 8), "conv_stride": (4, 4),
        "conv_kernel": (4, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    }  # fmt: skip
    model = made("wav2vec2", "Wav2Vec2ForCTC", **fields)
    lengths = (320, 160)
    mask = torch.stack([(torch.arange(320) < length).long() for length in lengths])
    batch = {"input_values": torch.randn(2, 320) * mask, "attention_mask": mask}
    found = moments_of(model, [batch], sites_of(model), floor=1.0)
    assert {one.weight for one in found.values()} == {20 + 10}
    names = [site.name for site in sites_of(model)]
    with TokenTracker(model, names) as tokens, torch.no_grad():
        (head,) = tokens.heads(model(**batch))
    assert head.counted is not None
    assert head.counted.sum(1).tolist() == [20, 10]


class Flattening(nn.Module):
    """A block whose MLP sees tokens as rows (B * T, D), as shared experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.reshape(-1, x.shape[-1])).view(x.shape)


class Patches(nn.Module):
    """Cuts what it is given (B, D, T) into T patches of its own, for layers that take no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block())

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.transpose(1, 2))


class Reader(nn.Module):
    """Reads tokens with a mask and, beside them, rows and patches of something else that are just as many."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.text, self.rows, self.tower = nn.ModuleList([Flattening()]), nn.Sequential(Block()), Patches()

    def forward(self, input_ids: Tensor, rows: Tensor, image: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.text:
            x = block(x)
        return x + self.rows(rows).mean(0) + self.tower(image)


def test_flattened_tokens_keep_their_mask_and_other_rows_get_none() -> None:
    torch.manual_seed(0)
    model = Reader().requires_grad_(False)
    mask = torch.ones(4, 6)
    mask[1:, 2:] = 0
    batch = {"input_ids": torch.randint(64, (4, 6)), "rows": torch.randn(24, 16), "image": torch.randn(4, 16, 6)}
    found = moments_of(model, [{**batch, "attention_mask": mask}], sites_of(model), floor=1.0)
    weights = {name.partition(".")[0]: one.weight for name, one in found.items()}
    assert weights == {"text": 12, "rows": 24, "tower": 24}


@pytest.mark.parametrize("changes", [{}, {"distill": {"steps": 2, "hidden_weight": 1.0}}], ids=["solve", "distill"])
@pytest.mark.parametrize("architecture", ["BertForQuestionAnswering", "BertForTokenClassification"])
@pytest.mark.slow
def test_what_padding_holds_changes_no_error_and_no_step(architecture: str, changes: dict[str, Any]) -> None:
    """Token ids at padded places are arbitrary: block errors, reconstruction and distillation must not see them."""
    reports = []
    for filler in (0, 7):
        model = made("bert", architecture, **TEXT)
        batches = padded_batches()
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = filler
        reconstruction = {"steps": 3}
        settings = quick_settings(reconstruction=reconstruction, precision="float32")
        if changes:
            settings = fips.CompressionConfig(bits=4.8, precision="float32", **changes)
        reports.append(fips.compress(model, batches, settings).groups)
    assert reports[0][0]["loss_last_step"] is not None
    for first, second in zip(*reports, strict=True):
        for name in ("relative_error_start", "relative_error_final", "loss_first_step", "loss_last_step"):
            assert first[name] == pytest.approx(second[name], rel=1e-4), name


# Models


def compiled(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compile", "data parallel"])
@pytest.mark.slow
def test_wrappers_are_taken_off_and_the_model_inside_is_saved(wrap: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    wrapper, batches = wrap(model), batches_for(model)
    plan = fips.plan_compression(wrapper, gptq())
    assert plan.groups[0].group.sites[0].name == "model.layers.0.self_attn.q_proj"
    fips.compress(wrapper, batches, gptq())
    assert len(factored_layers(model)) == 21
    fips.save(wrapper, tmp_path / "out")
    with torch.no_grad():
        expected = model(**batches[0]).logits
        assert torch.equal(fips.load(tmp_path / "out")(**batches[0]).logits, expected)
        found = wrapper(**batches[0]).logits
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_one_data_parallel_process_is_unwrapped_and_one_of_several_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        wrapper = nn.parallel.DistributedDataParallel(model)
        fips.compress(wrapper, batches_for(model), gptq())
        fips.save(wrapper, tmp_path / "out")
        batch = batches_for(model)[0]
        with torch.no_grad():
            assert torch.equal(fips.load(tmp_path / "out")(**batch).logits, model(**batch).logits)
    finally:
        torch.distributed.destroy_process_group()

    class DistributedDataParallel(nn.Module):
        process_group = type("Group", (), {"size": lambda _: 2})()

    with pytest.raises(ModelError, match="one of several copies"):
        fips.compress(DistributedDataParallel(), [{"input_ids": ids}], gptq())


@pytest.mark.slow
def test_a_model_compiled_in_place_runs_its_new_layers_afterwards() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    batches = batches_for(model)
    model.compile(backend="eager")
    with torch.no_grad():
        before = model(**batches[0]).logits
        fips.compress(model, batches, gptq(bits=3.2))
        fips.compress(plain, batches, gptq(bits=3.2))
        after, expected = model(**batches[0]).logits, plain(**batches[0]).logits
    change = (before - expected).norm()
    assert (after - expected).norm() < 0.1 * change


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    accelerate.state.AcceleratorState._reset_state()  # one for the process, made by whoever came first
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def with_compiled_forward(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = torch.compile(model.forward, backend="eager")
    model(**batches_for(model)[0])
    return model


@pytest.mark.parametrize("wrap", [prepared, with_compiled_forward])
@pytest.mark.slow
def test_a_forward_put_over_the_models_own_is_passed_by_and_stays(wrap: Any) -> None:
    """``Accelerator.prepare`` adds autocast, in which moments would be products of bfloat16."""
    model, expected = wrap(tiny_model("llama")), tiny_model("llama")
    forward = vars(model)["forward"]
    fips.compress(expected, batches_for(expected), gptq())
    fips.compress(model, batches_for(model), gptq())
    assert vars(model)["forward"] is forward
    assert same_layers(model, expected)


def test_blocks_in_wrappers_are_refused_by_their_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny_model("llama")
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    with pytest.raises(ModelError, match=r"`model.layers.1` is wrapped in a `CheckpointWrapper`.*wrap it afterwards"):
        fips.compress(model, batches_for(model), fips.CompressionConfig(bits=6.0, method="gptq"))


def test_peft_models_are_refused_before_work_and_by_save() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"])
    wrapper = peft.get_peft_model(tiny_model("llama"), config)
    adapted = tiny_model("llama")
    peft.inject_adapter_in_model(config, adapted)
    for model in (wrapper, adapted):
        with pytest.raises(ModelError, match="merge_and_unload"):
            fips.compress(model, batches_for(adapted), gptq())
    with pytest.raises(ModelError, match="merge_and_unload"):
        fips.save(wrapper, "never-written")
    merged = wrapper.merge_and_unload()
    fips.compress(merged, batches_for(merged), gptq())
    assert factored_layers(merged)


def fully_sharded() -> nn.Module:
    class FullyShardedDataParallel(nn.Module):
        pass

    return FullyShardedDataParallel()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_model("llama")


def quantized() -> nn.Module:
    model = tiny_model("llama")
    model.is_quantized = True
    return model


def in_parts() -> nn.Module:
    model = tiny_model("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return tiny_model("llama")


def with_int_weight() -> nn.Module:
    model = plain_model()
    for block in model:
        block.fc1.weight = nn.Parameter(torch.zeros(64, 16, dtype=torch.int8), requires_grad=False)
    return model


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


REFUSED_MODELS = {
    "a name": (lambda: "gpt2", r"must be an `nn.Module`, got `str`; load it first"),
    "a pipeline": (lambda: type("Pipeline", (), {"model": tiny_model("llama")})(), "give its `.model`"),
    "script": (lambda: torch.jit.script(plain_model()), "whose layers cannot be replaced"),
    "fsdp": (fully_sharded, "wrapped in `FullyShardedDataParallel`"),
    "no parameters": (nn.Identity, "no floating-point parameter"),
    "meta": (on_meta, "on the meta device"),
    "quantized": (quantized, "already quantized by another method"),
    "compiled parts": (in_parts, r"`model.layers.1` is wrapped by `torch.compile`"),
    "inference mode": (in_inference_mode, "made under `torch.inference_mode"),
    "integers": (with_int_weight, "`Parameter` of torch.int8; wanted a plain parameter of a floating type"),
    "torch's encoder": (torch_encoder, "reads its weight past the layer"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_that_cannot_be_changed_are_refused_before_work_in_one_line(name: str) -> None:
    make, message = REFUSED_MODELS[name]
    model = make()
    with pytest.raises(FipsError, match=message) as caught:
        fips.compress(model, [{"input_ids": ids}], gptq())
    assert "\n" not in str(caught.value)


def test_offloaded_models_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ModelError, match="is offloaded by accelerate; load the model on one device"):
        fips.compress(model, batches_for(model), gptq())


# State


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that compressing touches for its own use, except the layers it replaces.

    Hooks of the model itself are left out: a compressed model has one that warns of layers that do not train.
    """
    packed = ("mlp", "self_attn", BASES)
    rest = [(name, p) for name, p in model.named_parameters() if not any(part in name for part in packed)]
    kept = {name: module for name, module in model.named_modules() if name and BASES not in name}
    return {
        "training": {name: module.training for name, module in model.named_modules() if BASES not in name},
        "trained": {name: p.requires_grad for name, p in rest},
        "grad": {name: p.grad for name, p in rest},
        "cache": model.config.use_cache,
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in kept.items()},
        "torch": (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(), torch.random.get_rng_state().sum().item(),
        ),
        "random": (np.random.get_state()[1].sum(), hash(random.getstate())),
    }  # fmt: skip


def unusual() -> PreTrainedModel:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.up_proj.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    model.config.use_cache = True
    model.model.layers[0].register_forward_hook(lambda *_: random.seed(torch.rand(1).item() + np.random.rand()))
    return model


@pytest.mark.parametrize("ending", ["success", "measure", KeyboardInterrupt])
def test_everything_is_as_before_after_success_and_after_failure(ending: Any) -> None:
    model = unusual()
    gradient = model.model.norm.weight.grad
    before = state_of(model)

    def progress(event: Any) -> None:
        if event.stage == ending or (ending is KeyboardInterrupt and event.stage == "solve"):
            raise KeyboardInterrupt if ending is KeyboardInterrupt else RuntimeError("stopped")

    if ending == "success":
        fips.compress(model, batches_for(model), gptq(), progress=progress)
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            fips.compress(model, batches_for(model), gptq(), progress=progress)
        assert not factored_layers(model)
        assert not model._forward_pre_hooks
    after = state_of(model)
    assert after == before
    assert model.model.norm.weight.grad is gradient


def test_new_parameters_are_trained_where_those_they_stand_for_were() -> None:
    model = tiny_model("vit")
    model.requires_grad_(False)
    model.vit.layers[1].requires_grad_(True)
    fips.compress(model, batches_for(model), quick_settings(share_blocks=1))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("layers.1." in name or name.endswith(f"{BASES}.g1.weight") for name in trained), trained
    assert f"vit.{BASES}.g1.weight" in trained


def test_hooks_on_replaced_layers_go_on_and_their_handles_remove_them() -> None:
    model = tiny_model("llama")
    seen: list[str] = []
    layer = model.model.layers[0].mlp.up_proj
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("after")),
        layer.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    batches = batches_for(model)
    fips.compress(model, batches, gptq())
    assert isinstance(model.model.layers[0].mlp.up_proj, FactoredLinear)
    seen.clear()
    model(**batches[0]).logits.sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(**batches[0])
    assert len(seen) == 3


def test_an_interrupt_while_layers_are_put_in_place_puts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = tiny_model("llama"), tiny_model("llama")
    module = sys.modules["fips.compression"]
    calls: list[str] = []
    replace = module.replace_linear

    def interrupted(net: nn.Module, name: str, layer: FactoredLinear, *homes: Any) -> None:
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        replace(net, name, layer, *homes)

    monkeypatch.setattr(module, "replace_linear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fips.compress(model, batches_for(model), gptq())
    assert not factored_layers(model)
    assert not hasattr(basis_owner(model), BASES)
    assert same_layers(model, original)


CALLERS: dict[str, Any] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize("settings", [gptq(), quick_settings(reconstruction={"steps": 3}, precision="float32")])
def test_the_callers_torch_changes_nothing(name: str, settings: fips.CompressionConfig) -> None:
    expected, model = tiny_model("llama"), tiny_model("llama")
    batches = batches_for(model)
    fips.compress(expected, batches, settings)
    with CALLERS[name]():
        if name == "inference mode":
            batches = batches_for(model)
        fips.compress(model, batches, settings)
    assert same_layers(model, expected)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_type_changes_nothing_and_stays(dtype: torch.dtype) -> None:
    expected, model = tiny_model("llama"), tiny_model("llama")
    batches = batches_for(model)
    fips.compress(expected, batches, gptq())
    torch.set_default_dtype(dtype)
    try:
        fips.compress(model, batches, gptq())
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_layers(model, expected)


def test_lower_precision_of_products_is_not_used_and_stays() -> None:
    model = tiny_model("llama")
    seen: list[str] = []
    torch.set_float32_matmul_precision("medium")
    try:
        fips.compress(
            model, batches_for(model), gptq(), progress=lambda _: seen.append(torch.get_float32_matmul_precision())
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_caches_in_nested_configurations_are_off_for_the_time_of_the_work() -> None:
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    text = {**DECODER, "head_dim": 8, "model_type": "gemma3_text"}
    fields = {"text_config": text, "vision_config": {**vision, "model_type": "siglip_vision_model"}}
    model = made("gemma3", "Gemma3ForConditionalGeneration", **fields, mm_tokens_per_image=4, image_token_id=63)
    model.config.text_config.use_cache = True
    top = "use_cache" in vars(model.config)
    seen: list[bool] = []
    config = quick_settings(ignore=["*vision_tower*"], reconstruction={"steps": 2}, precision="float32")
    fips.compress(
        model, [{"input_ids": torch.randint(3, 60, (2, 8))} for _ in range(2)], config,
        progress=lambda _: seen.append(model.config.text_config.use_cache),
    )  # fmt: skip
    assert set(seen) == {False}
    assert model.config.text_config.use_cache is True
    assert ("use_cache" in vars(model.config)) == top


def test_a_model_that_draws_random_numbers_draws_the_same_on_every_pass() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x + torch.randn_like(x))

    model, x = Sampling(), torch.randn(4, 16)
    data = CalibrationData(model, [x], seed=0)
    bench = Workbench(model, gptq(), data, torch.device("cpu"), Needs.INPUTS)
    state = torch.get_rng_state()
    assert torch.equal(bench.run(model, x), bench.run(model, x))
    assert torch.equal(torch.get_rng_state(), state)


def test_deepcopies_of_a_compressed_model_have_its_hooks_too() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    fips.compress(model, batches_for(model), gptq())
    seen.clear()
    copy.deepcopy(model)(**batches_for(model)[0])
    assert seen == [1]
