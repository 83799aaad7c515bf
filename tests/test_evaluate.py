"""Accuracy and perplexity against loops written by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fips.app import compare as compare_module
from fips.config import DataConfig
from fips.data import Batches, load_batches
from fips.errors import ConfigError, DataError, ModelError
from fips.evaluation import ImageResult, TextResult, evaluate
from fips.evaluation import tokens as module
from fips.evaluation.divergence import differences

LETTERS = "abcdefghijklmnopqrstuvwxyz .é"
LOOKS = 2
"""Passes at the start that find out whether a model sees the tokens that follow."""
CLASSES = [f"class {index}" for index in range(10)]


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """One token per letter, ids from 3."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {letter: index for index, letter in enumerate(LETTERS, start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


def random_documents() -> list[str]:
    generator = np.random.default_rng(3)
    sizes = [1, 2, 5, 12, 23, 24, 25, 40, 61]
    return ["".join(generator.choice(list(LETTERS.replace(" ", "")), size)) for size in sizes]


DOCUMENTS = random_documents()


def text_batches(path: Path, *, bos: bool = True, purpose: Any = "evaluation", **fields: Any) -> Batches:
    (path / "a.txt").write_text("|".join(DOCUMENTS), encoding="utf-8")
    settings = {"document_separator": "|", "sequence_length": 12, "batch_size": 4, **fields}
    config = DataConfig(source=str(path / "a.txt"), **settings)
    return load_batches(config, processor=make_tokenizer(bos=bos), kind="text", purpose=purpose)


def nll_by_hand(model: PreTrainedModel, *, bos: bool, length: int) -> tuple[float, int, int]:
    """Total -ln p, scored tokens and their bytes, token by token in float64, without padding or batches."""
    exact = tiny_like(model).double()
    total, count, num_bytes = 0.0, 0, 0
    for document in DOCUMENTS:
        tokens = [LETTERS.index(letter) + 3 for letter in document]
        for start in range(0 if bos else 1, len(tokens), length - 1):
            window = ([1] if bos else [tokens[start - 1]]) + tokens[start : start + length - 1]
            with torch.no_grad():
                log_p = exact(torch.tensor([window])).logits[0].log_softmax(-1)
            total -= sum(log_p[position, token].item() for position, token in enumerate(window[1:]))
            count += len(window) - 1
            num_bytes += len(document[start : start + length - 1].encode())
    return total, count, num_bytes


def tiny_like(model: PreTrainedModel) -> PreTrainedModel:
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.fixture
def sharp_llama() -> PreTrainedModel:
    """Weights large enough that predictions differ between positions."""
    model = tiny_model("llama")
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(8)
    return model


class TestText:
    @pytest.mark.parametrize("bos", [True, False], ids=["bos", "plain"])
    @pytest.mark.parametrize("length", [4, 12, 200])
    def test_equals_a_loop_by_hand(self, sharp_llama: PreTrainedModel, tmp_path: Path, bos: bool, length: int) -> None:
        total, count, num_bytes = nll_by_hand(sharp_llama, bos=bos, length=length)
        result = evaluate(sharp_llama, text_batches(tmp_path, bos=bos, sequence_length=length))
        assert isinstance(result, TextResult)
        assert (result.num_tokens, result.num_bytes, result.sequence_length) == (count, num_bytes, length)
        assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
        assert result.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
        assert abs(total / count - math.log(len(LETTERS))) > 0.1, "a constant prediction would not be noticed"

    def test_one_window_at_a_time_or_many(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        single = evaluate(sharp_llama, text_batches(tmp_path, batch_size=1))
        many = evaluate(sharp_llama, text_batches(tmp_path, batch_size=64))
        assert many.headline.value == pytest.approx(single.headline.value, rel=1e-5)

    def test_padding_is_masked(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        masks: list[Tensor | None] = []
        sharp_llama.register_forward_pre_hook(
            lambda _, __, inputs: masks.append(inputs.get("attention_mask")), with_kwargs=True
        )
        batches = text_batches(tmp_path)
        evaluate(sharp_llama, batches)
        masks = masks[LOOKS:]
        expected = [batch.get("attention_mask") for batch in batches]
        assert [mask is None for mask in masks] == [mask is None for mask in expected]
        assert sum(mask is None for mask in masks) not in (0, len(masks)), "some batches have padding, some have none"
        assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True) if a is not None and b is not None)

    def test_memory_limits_change_nothing(
        self, sharp_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = text_batches(tmp_path, batch_size=8)
        expected = evaluate(sharp_llama, batches).headline.value
        sizes: list[tuple[int, ...]] = []
        sharp_llama.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.logits.shape)))
        monkeypatch.setattr(module, "MAX_LOGITS", 2 * 12 * 64)
        monkeypatch.setattr(module, "MAX_LOSS_LOGITS", 5 * 64)
        assert evaluate(sharp_llama, batches).headline.value == pytest.approx(expected, rel=1e-6)
        assert max(math.prod(size) for size in sizes) == 2 * 12 * 64
        assert sum(size[0] for size in sizes[LOOKS:]) == batches.num_samples

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("BertForMaskedLM", "sees the tokens that follow"),
            ("BertForTokenClassification", "not one prediction"),
            ("BertForSequenceClassification", "not one prediction"),
        ],
    )
    def test_models_that_do_not_predict_the_next_token_are_refused(self, kind: str, words: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        with pytest.raises(ModelError, match=words):
            evaluate(getattr(transformers, kind)(config), text_batches(tmp_path))

    def test_bfloat16(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        batches = text_batches(tmp_path)
        exact = evaluate(sharp_llama, batches).headline.value
        assert evaluate(sharp_llama.to(torch.bfloat16), batches).headline.value == pytest.approx(exact, rel=0.05)

    def test_headline_and_dict(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        batches = text_batches(tmp_path)
        result = evaluate(sharp_llama, batches)
        found = json.loads(json.dumps(result.to_dict()))
        assert found["task"] == "causal-lm"
        assert found["data"] == batches.description
        assert found["headline"] == {"name": "perplexity", "value": found["perplexity"], "higher_is_better": False}

    def test_batches_for_calibration(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no scored text"):
            evaluate(sharp_llama, text_batches(tmp_path, purpose="calibration"))

    def test_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        small = tiny_model("llama", vocab_size=20)
        with pytest.raises(DataError, match=r"got token 3\d, the model knows 20 tokens"):
            evaluate(small, text_batches(tmp_path))

    def test_not_a_number(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        with torch.no_grad():
            sharp_llama.model.norm.weight.fill_(math.nan)
        with pytest.raises(ModelError, match="not finite"):
            evaluate(sharp_llama, text_batches(tmp_path))

    def test_no_logits(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="returned `BaseModelOutputWithPast` without logits"):
            evaluate(sharp_llama.model, text_batches(tmp_path))


class Colors(nn.Module):
    """A plain module as of an image library: positional input, logits are the mean colors times weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(3, num_classes, bias=False)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.head(images.mean((2, 3)))


@pytest.fixture
def colors() -> Colors:
    torch.manual_seed(1)
    return Colors(10)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            color = generator.integers(0, 256, 3, dtype=np.uint8)
            Image.fromarray(np.broadcast_to(color, (8, 8, 3))).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def image_batches(path: Path, **fields: Any) -> Batches:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    config = DataConfig(source=str(path), **{"batch_size": 4, **fields})
    return load_batches(config, processor=processor, kind="image", purpose="evaluation")


class TestImages:
    @pytest.mark.parametrize("name", ["colors", "vit"])
    def test_equals_a_count_by_hand(self, photos: Path, request: pytest.FixtureRequest, name: str) -> None:
        model = request.getfixturevalue(name)
        batches = image_batches(photos)
        ranks = []
        for batch in batches:
            with torch.no_grad():
                output = model(batch["pixel_values"])
            for row, label in zip(getattr(output, "logits", output), batch["labels"].tolist(), strict=True):
                ranks.append(int((row > row[label]).sum()))
        top1 = sum(rank < 1 for rank in ranks) / 30
        result = evaluate(model, batches)
        assert isinstance(result, ImageResult)
        assert result.num_images == 30
        assert result.top1_percent == pytest.approx(100 * top1)
        assert result.top5_percent == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 30)
        assert result.top1_standard_error == pytest.approx(100 * math.sqrt(top1 * (1 - top1) / 30))
        assert 0 < result.top1_percent < result.top5_percent < 100, "neither all nor none"

    def test_fewer_than_five_classes(self, photos: Path) -> None:
        for name in CLASSES[3:]:
            for path in (photos / name).iterdir():
                path.unlink()
            (photos / name).rmdir()
        assert evaluate(Colors(3), image_batches(photos)).to_dict()["top5_percent"] == 100

    def test_headline_and_dict(self, colors: Colors, photos: Path) -> None:
        batches = image_batches(photos)
        found = json.loads(json.dumps(evaluate(colors, batches).to_dict()))
        assert found["task"] == "image-classification"
        assert found["data"] == batches.description
        assert found["headline"] == {"name": "top1_percent", "value": found["top1_percent"], "higher_is_better": True}

    def test_bars_and_tables_for_a_notebook(
        self, colors: Colors, photos: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        result = evaluate(colors, image_batches(photos), progress=False)
        assert capfd.readouterr() == ("", "")
        assert evaluate(colors, image_batches(photos), progress=True) == result
        out, err = capfd.readouterr()
        assert out == ""
        assert "evaluate 1/" in err
        lines = result.summary().splitlines()
        assert f"{result.headline.value:.2f} %" in lines[0]
        assert lines[-1].endswith("30 images")
        html = result._repr_html_()
        assert html.startswith("<table")
        assert html.count("<tr>") == len(lines)

    def test_pixels_follow_the_type_of_the_model(self, colors: Colors, photos: Path) -> None:
        batches = image_batches(photos)
        exact = evaluate(colors, batches).headline.value
        assert evaluate(colors.double(), batches).headline.value == exact

    @pytest.mark.parametrize("num_classes", [7, 12])
    def test_other_classes_than_the_data(self, photos: Path, num_classes: int) -> None:
        model = Colors(num_classes)
        with pytest.raises(DataError, match=f"got 10 classes in .*, the model has {num_classes}"):
            evaluate(model, image_batches(photos))
        assert model.calls == 0

    def test_other_classes_than_the_data_transformers(self, photos: Path) -> None:
        model = tiny_model("vit", num_labels=4)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        with pytest.raises(DataError, match=r"got 10 classes in .*, the model has 4"):
            evaluate(model, image_batches(photos))

    def test_a_plain_list_of_batches(self) -> None:
        with pytest.raises(DataError, match=r"got `list`; make them by `fips.load_data\(source, model, purpose="):
            evaluate(nn.Linear(2, 2), [torch.zeros(1, 2)])  # type: ignore[arg-type]

    def test_module_that_does_not_tell_its_classes(self, photos: Path) -> None:
        with pytest.raises(DataError, match=r"got 10 classes in .*, the model has 6"):
            evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6)), image_batches(photos))

    def test_integer_labels_may_be_fewer_but_not_more(self, colors: Colors, photos: Path) -> None:
        unnamed = replace(image_batches(photos), class_names=None)
        assert evaluate(colors, replace(unnamed, max_label=8)).num_images == 30  # type: ignore[union-attr]
        with pytest.raises(DataError, match="got 11 classes"):
            evaluate(colors, replace(unnamed, max_label=10))

    def test_same_classes_in_another_order(self, photos: Path) -> None:
        model = tiny_model("vit")
        batches = image_batches(photos)
        model.config.id2label = dict(enumerate(CLASSES))
        evaluate(model, batches)
        model.config.id2label = dict(enumerate([*CLASSES[:8], CLASSES[9], CLASSES[8]]))
        with pytest.raises(DataError, match="class 8 is `class 8` in the data and `class 9` in the model"):
            evaluate(model, batches)

    def test_no_labels(self, colors: Colors, photos: Path) -> None:
        with pytest.raises(DataError, match="has no labels"):
            evaluate(colors, image_batches(photos / CLASSES[0]))

    def test_not_a_number(self, colors: Colors, photos: Path) -> None:
        nn.init.constant_(colors.head.weight, math.inf)
        with pytest.raises(ModelError, match="not finite"):
            evaluate(colors, image_batches(photos))


class TestModel:
    def test_modes_are_restored(self, photos: Path) -> None:
        model = tiny_model("vit", hidden_dropout_prob=0.9).train()
        model.classifier.eval()
        before = {name: part.training for name, part in model.named_modules()}
        batches = image_batches(photos)
        first, second = evaluate(model, batches), evaluate(model, batches)
        assert first == second, "dropout is off"
        assert {name: part.training for name, part in model.named_modules()} == before
        model.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, batches)
        assert {name: part.training for name, part in model.named_modules()} == before

    def test_no_gradients(self, colors: Colors, photos: Path) -> None:
        seen: list[bool] = []
        colors.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
        evaluate(colors, image_batches(photos))
        assert seen == [False] * 8

    def test_progress(self, colors: Colors, photos: Path) -> None:
        calls: list[tuple[int, int]] = []
        evaluate(colors, image_batches(photos), device="cpu", progress=lambda done, total: calls.append((done, total)))
        assert calls == [(done, 8) for done in range(1, 9)]

    def test_devices_that_are_not_there(self, colors: Colors, photos: Path) -> None:
        for device in ("xyz", "meta"):
            with pytest.raises(ConfigError, match=f"device `{device}`"):
                evaluate(colors, image_batches(photos), device=device)

    def test_none_counts_as_absent(self, tmp_path: Path) -> None:
        model, batches = tiny_model("llama", vocab_size=64), text_batches(tmp_path)
        unmasked = replace(batches, collate=lambda rows: {"position_ids": None, **batches.collate(rows)})
        assert evaluate(model, unmasked) == evaluate(model, batches)


def kl_by_hand(model: nn.Module, original: nn.Module, window: Tensor) -> tuple[list[float], list[bool]]:
    """KL and agreement of every prediction but the last of one window, in float64."""
    with torch.no_grad():
        log_q, log_p = (each(window[None]).logits[0, :-1].double().log_softmax(-1) for each in (model, original))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl.tolist(), (log_p.argmax(-1) == log_q.argmax(-1)).tolist()


def ratio_by_hand(draws: list[list[float]]) -> tuple[float, float]:
    """Mean of all entries, and its standard error with a list as one draw."""
    count = sum(map(len, draws))
    mean = sum(map(sum, draws)) / count
    squares = sum((sum(draw) - mean * len(draw)) ** 2 for draw in draws)
    return mean, math.sqrt(len(draws) / (len(draws) - 1) * squares) / count


class TestAgainst:
    """How far predictions are from the original's."""

    @pytest.fixture
    def noisy_llama(self, sharp_llama: PreTrainedModel) -> PreTrainedModel:
        noisy = tiny_like(sharp_llama)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in noisy.parameters():
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.003)
        return noisy

    @pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
    def test_text_by_hand(
        self,
        sharp_llama: PreTrainedModel,
        noisy_llama: PreTrainedModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        pieces: bool,
    ) -> None:
        batches = text_batches(tmp_path)
        if pieces:
            monkeypatch.setattr(module, "MAX_LOGITS", 2 * 12 * 64)
            monkeypatch.setattr(module, "MAX_LOSS_LOGITS", 5 * 64)
        kls, same, changes = [], [], []
        for batch in batches:
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                scored = (labels[1:] != -100).nonzero()[:, 0].tolist()
                kl, equal = kl_by_hand(noisy_llama, sharp_llama, ids[: scored[-1] + 2])
                kls.append([kl[position] for position in scored])
                same.append([float(equal[position]) for position in scored])
                with torch.no_grad():
                    losses = [
                        -each(ids[None]).logits[0].double().log_softmax(-1)[scored, ids[1:][scored]]
                        for each in (noisy_llama, sharp_llama)
                    ]
                changes.append((losses[0] - losses[1]).tolist())
        result = evaluate(noisy_llama, batches, against=sharp_llama)
        assert result.against is not None
        found = result.against
        for value, error, draws, unit in (
            (found.kl, found.kl_standard_error, kls, 1),
            (found.agreement_percent, found.agreement_standard_error, same, 100),
            (found.change, found.change_standard_error, changes, 1),
        ):
            mean, spread = ratio_by_hand(draws)
            assert value == pytest.approx(unit * mean, rel=1e-3)
            assert error == pytest.approx(unit * spread, rel=1e-3)
        assert found.kl > 0.001
        assert 10 < found.agreement_percent < 99, "neither equal nor unrelated"
        alone, original = evaluate(noisy_llama, batches), evaluate(sharp_llama, batches)
        assert result.headline.value == pytest.approx(alone.headline.value, rel=1e-6)
        assert math.log(alone.headline.value / original.headline.value) == pytest.approx(found.change, rel=1e-3)

    def test_images_by_hand(self, colors: Colors, photos: Path) -> None:
        batches = image_batches(photos)
        original = tiny_model("vit")
        pairs = []
        for batch in batches:
            with torch.no_grad():
                logits = [colors(batch["pixel_values"]), original(batch["pixel_values"]).logits]
            pairs += list(zip(logits[0].double(), logits[1].double(), batch["labels"].tolist(), strict=True))
        kls = [[float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())] for q, p, _ in pairs]
        same = [[float(q.argmax() == p.argmax())] for q, p, _ in pairs]
        changes = [[float(q.argmax() == label) - float(p.argmax() == label)] for q, p, label in pairs]
        result = evaluate(colors, batches, against=original)
        assert result.against is not None
        found = result.against
        assert found.kl == pytest.approx(ratio_by_hand(kls)[0], rel=1e-4)
        assert found.kl_standard_error == pytest.approx(ratio_by_hand(kls)[1], rel=1e-4)
        assert found.agreement_percent == pytest.approx(100 * ratio_by_hand(same)[0])
        assert found.change == pytest.approx(100 * ratio_by_hand(changes)[0])
        assert found.change_standard_error == pytest.approx(100 * ratio_by_hand(changes)[1])
        assert result.scores()[-1].line().startswith(f"{found.change:+.2f} ± ")

    def test_itself(self, colors: Colors, photos: Path) -> None:
        found = evaluate(colors, image_batches(photos), against=colors).against
        assert found is not None
        assert (found.kl, found.agreement_percent, found.change) == (pytest.approx(0, abs=1e-7), 100, 0)

    def test_other_outcomes(self, colors: Colors, photos: Path) -> None:
        batches = replace(image_batches(photos), class_names=None)
        with pytest.raises(ModelError, match="got predictions of 10 outcomes, the original has 12"):
            evaluate(colors, batches, against=Colors(12))

    @pytest.mark.parametrize("size", [32, 80])
    def test_another_vocabulary(self, size: int, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        with pytest.raises(
            ModelError, match=f"LlamaForCausalLM` of {size} tokens, the model a `LlamaForCausalLM` of 64 t"
        ):
            evaluate(sharp_llama, text_batches(tmp_path), against=tiny_model("llama", vocab_size=size))

    def test_a_model_of_another_kind(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        vit = tiny_model("vit")
        vit.config.num_labels = sharp_llama.config.num_labels
        with pytest.raises(
            ModelError, match=r"`against` is a `ViT.*`, the model a `LlamaForCausalLM`: give the original"
        ):
            evaluate(sharp_llama, text_batches(tmp_path), against=vit)

    def test_one_window_has_no_standard_error(self, sharp_llama: PreTrainedModel, tmp_path: Path) -> None:
        batches = text_batches(tmp_path, num_samples=1)
        found = json.loads(json.dumps(evaluate(sharp_llama, batches, against=sharp_llama).to_dict(), allow_nan=False))
        assert found["perplexity_standard_error"] is None
        assert found["against"]["kl_standard_error"] is None


@pytest.mark.parametrize("room", [1 << 28, 1000], ids=["kept", "too large"])
def test_the_original_of_a_comparison_is_asked_once(
    colors: Colors, photos: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(compare_module, "MOST_REMEMBERED", room)
    batches, other = image_batches(photos), Colors(10)
    nn.init.normal_(other.head.weight, generator=torch.Generator().manual_seed(5))
    expected = evaluate(other, batches, against=colors).against
    reference = compare_module._Remembering(colors)
    colors.calls = 0
    for _ in range(3):
        reference.begin()
        assert evaluate(other, batches, against=reference).against == expected
    assert colors.calls == (len(batches) if room > 1000 else 3 * len(batches))


def test_outcomes_that_are_ruled_out_add_nothing_to_the_divergence() -> None:
    logits, reference = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind()
    ruled_out = torch.cat([reference, torch.full((6, 2), -torch.inf)], dim=1)
    also = torch.cat([logits, torch.full((6, 2), -torch.inf)], dim=1)
    assert torch.equal(differences(also, ruled_out), differences(logits, reference))
    partly = differences(torch.cat([logits, torch.zeros(6, 2)], dim=1), ruled_out)[:, 0]
    assert bool(partly.isfinite().all())
    assert bool((partly > differences(logits, reference)[:, 0]).all())  # what is given to them is missing elsewhere
    assert bool((differences(ruled_out[:, [0, 1, 2, 3, 6]], reference)[:, 0] == torch.inf).all())
