"""Models that predict other things than the next token or the class of an image: each scored by its own metric, against
loops written by hand, or refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL, tiny_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import fips
from fips.cli import main
from fips.data import Batches
from fips.errors import DataError, ModelError
from fips.evaluation import EmbeddingResult, LabelResult, MaskedResult, TargetResult
from fips.models.tasks import task_of

WORDS = [f"{first}{second}" for first in "abcdefgh" for second in "klmnop"]
CLS, SEP, MASK = 1, 2, 3
SENTENCES = [" ".join(np.random.default_rng(seed).choice(WORDS, 3 + seed % 9)) for seed in range(24)]
SIZES = {**SMALL, "vocab_size": 64, "num_hidden_layers": 2}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """One token per word, in ``[CLS] ... [SEP]``, as BERT's."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    special = {
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]",
    }  # fmt: skip
    names_of_inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names_of_inputs, **{**special, **changes}
    )


TOKENIZER = make_tokenizer()


def make_bert(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Weights large enough that predictions differ."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**SIZES, "max_position_embeddings": 40, **changes})
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4)
    return model


def noisy(model: PreTrainedModel, size: float = 0.02) -> PreTrainedModel:
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in copy.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=size)
    return copy


def saved(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(SENTENCES))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    def write(**columns: list[Any]) -> Path:
        path = tmp_path / "table.jsonl"
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def load(source: Path, model: PreTrainedModel, tokenizer: Any = TOKENIZER, **options: Any) -> Batches:
    return fips.load_data(str(source), model, **{"processor": tokenizer, "purpose": "evaluation", **options})


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def bits_of(batch: dict[str, Tensor], row: int) -> list[int]:
    """The tokens of a row without padding."""
    size = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else batch["input_ids"].shape[1]
    return batch["input_ids"][row, :size].tolist()


def test_tasks_are_told_from_classes() -> None:
    kinds = {
        "BertForMaskedLM": "masked-lm", "BertForSequenceClassification": "text-classification",
        "BertForTokenClassification": "token-classification", "BertModel": "embedding",
        "BertLMHeadModel": "causal-lm", "BertForQuestionAnswering": "other", "BertForMultipleChoice": "other",
    }  # fmt: skip
    for kind, task in kinds.items():
        assert task_of(make_bert(kind)).name == task, kind
    for family, task in {"llama": "causal-lm", "gpt2": "causal-lm", "vit": "image-classification"}.items():
        assert task_of(tiny_model(family)).name == task, family

    class Renamed(transformers.BertForMaskedLM):
        pass

    assert task_of(Renamed(make_bert("BertForMaskedLM").config)).name == "masked-lm"
    torch.manual_seed(0)
    assert task_of(make_t5()).name == "seq2seq-lm"
    assert task_of(transformers.T5Model(make_t5().config)).name == "other"
    assert task_of(transformers.Dinov2Model(tiny_model("dinov2").config)).name == "embedding"


class TestMasked:
    def test_windows_are_framed_and_partly_hidden(self, lines: Path) -> None:
        model = make_bert("BertForMaskedLM")
        batches = load(lines, model, document_separator="\n", batch_size=5)
        found = []
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                ids = bits_of(batch, row)
                labels = batch["labels"][row, : len(ids)]
                hidden = [index for index, label in enumerate(labels.tolist()) if label != -100]
                assert (ids[0], ids[-1]) == (CLS, SEP)
                assert len(hidden) == max(1, round(0.15 * (len(ids) - 2)))
                assert [ids[index] for index in hidden] == [MASK] * len(hidden)
                assert ids.count(MASK) == len(hidden)
                assert (batch["labels"][row, len(ids) :] == -100).all()
                found.append([int(labels[index]) if index in hidden else one for index, one in enumerate(ids)])
        assert sorted(found) == sorted(map(ids_of, SENTENCES))

    def test_hidden_tokens_follow_the_seed(self, lines: Path) -> None:
        model = make_bert("BertForMaskedLM")
        first, again, other = (list(load(lines, model, sequence_length=20, seed=seed)) for seed in (0, 0, 1))
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))

    def test_equals_a_loop_by_hand(self, lines: Path) -> None:
        original = make_bert("BertForMaskedLM")
        model = noisy(original)
        batches = load(lines, model, document_separator="\n", batch_size=5)
        losses, hits, kls = [], [], []
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                ids = torch.tensor([bits_of(batch, row)])
                with torch.no_grad():
                    log_q, log_p = (
                        tiny(ids).logits[0].double().log_softmax(-1) for tiny in (model.double(), original.double())
                    )
                for place, label in enumerate(batch["labels"][row].tolist()):
                    if label != -100:
                        losses.append(-log_q[place, label].item())
                        hits.append(log_q[place].argmax().item() == label)
                        kls.append(float((log_p[place].exp() * (log_p[place] - log_q[place])).sum()))
        result = fips.evaluate(model.float(), batches, against=original.float())
        assert isinstance(result, MaskedResult)
        assert result.num_tokens == len(losses)
        assert result.pseudo_perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert result.accuracy_percent == pytest.approx(100 * sum(hits) / len(hits))
        assert result.against is not None
        assert result.against.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3)
        assert result.against.kl_standard_error
        assert result.against.kl > 1e-3
        assert result.headline.name == "pseudo_perplexity"

    def test_calibration_is_shown_hidden_tokens_too(self, lines: Path) -> None:
        batches = load(lines, make_bert("BertForMaskedLM"), purpose="calibration", sequence_length=20, num_samples=4)
        for batch in batches:
            assert set(batch) == {"input_ids"}
            assert batch["input_ids"].shape[1] == 20
            assert ((batch["input_ids"] == MASK).sum(1) == round(0.15 * 18)).all()
            assert (batch["input_ids"][:, 0] == CLS).all()
        with pytest.raises(DataError, match="hold no scored text"):
            fips.evaluate(make_bert("BertForMaskedLM"), batches)

    def test_a_tokenizer_without_a_mask_token(self, lines: Path) -> None:
        with pytest.raises(DataError, match="has no mask token, which `BertForMaskedLM` is asked about"):
            load(lines, make_bert("BertForMaskedLM"), make_tokenizer(mask_token=None))

    def test_too_short_windows(self, lines: Path) -> None:
        with pytest.raises(DataError, match="leaves no room beside the special tokens; use at least 3"):
            load(lines, make_bert("BertForMaskedLM"), sequence_length=2)


class TestTextClasses:
    @pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
    def test_equals_a_count_by_hand(self, table: Callable[..., Path], pairs: bool) -> None:
        original = make_bert("BertForSequenceClassification", num_labels=3)
        model, labels = noisy(original, 0.1), [index % 3 for index in range(24)]
        source = table(one=SENTENCES, two=SENTENCES[::-1], label=labels)
        batches = load(source, model, column="one,two" if pairs else "one", batch_size=5)
        hits, kls = [], []
        for first, second, label in zip(SENTENCES, SENTENCES[::-1], labels, strict=True):
            inputs = TOKENIZER(first, second if pairs else None, return_tensors="pt")
            assert "token_type_ids" in inputs
            with torch.no_grad():
                log_q, log_p = (each(**inputs).logits[0].double().log_softmax(-1) for each in (model, original))
            hits.append(int(log_q.argmax()) == label)
            kls.append(float((log_p.exp() * (log_p - log_q)).sum()))
        result = fips.evaluate(model, batches, against=original)
        assert isinstance(result, LabelResult)
        assert result.accuracy_percent == pytest.approx(100 * sum(hits) / 24)
        assert 0 < sum(hits) < 24
        assert result.against is not None
        assert result.against.kl == pytest.approx(sum(kls) / 24, rel=1e-3)
        assert result.scored_on == "24 texts"

    def test_labels_by_name(self, table: Callable[..., Path]) -> None:
        model = make_bert("BertForSequenceClassification", id2label={0: "bad", 1: "good"})
        numbers = [index % 2 for index in range(24)]
        expected = fips.evaluate(model, load(table(text=SENTENCES, label=numbers), model)).headline
        named = table(text=SENTENCES, label=["good" if number else "bad" for number in numbers])
        assert fips.evaluate(model, load(named, model)).headline == expected
        with pytest.raises(DataError, match=r"the label `awful`, which .* does not know; it knows `bad`, `good`"):
            load(table(text=SENTENCES, label=["awful"] * 24), model)

    def test_refused(self, table: Callable[..., Path], lines: Path) -> None:
        model = make_bert("BertForSequenceClassification")
        with pytest.raises(DataError, match=r"is plain text, and .* needs texts with a `label` column; give a table"):
            load(lines, model)
        with pytest.raises(DataError, match="has no column of labels"):
            load(table(text=SENTENCES), model)
        with pytest.raises(DataError, match="rows without a label"):
            load(table(text=SENTENCES, label=[0] * 23 + [-1]), model)
        many = load(table(text=SENTENCES, label=list(range(24))), model)
        with pytest.raises(DataError, match=r"got 24 classes .* the model has 2"):
            fips.evaluate(model, many)
        regression = make_bert("BertForSequenceClassification", num_labels=1, problem_type="regression")
        with pytest.raises(ModelError, match="`problem_type: regression`; accuracy is for one class per example"):
            fips.evaluate(regression, load(table(text=SENTENCES, label=[0] * 24), regression))
        single = make_bert("BertForSequenceClassification", num_labels=1)
        with pytest.raises(ModelError, match="a single output, a number and no class"):
            fips.evaluate(single, load(table(text=SENTENCES, label=[0] * 24), single))

    def test_texts_alone_calibrate(self, lines: Path) -> None:
        batches = load(
            lines, make_bert("BertForSequenceClassification"), purpose="calibration", document_separator="\n"
        )
        assert sorted(bits_of(b, row) for b in batches for row in range(len(b["input_ids"]))) == sorted(
            map(ids_of, SENTENCES)
        )


class TestWordClasses:
    def test_equals_a_count_by_hand(self, table: Callable[..., Path]) -> None:
        model = make_bert("BertForTokenClassification", num_labels=4)
        words = [sentence.split() for sentence in SENTENCES]
        tags = [[(index + len(one)) % 4 for index, _ in enumerate(one)] for one in words]
        hits = []
        for one, labels in zip(words, tags, strict=True):
            with torch.no_grad():
                best = model(torch.tensor([ids_of(" ".join(one))])).logits[0, 1:-1].argmax(-1)
            hits += (best == torch.tensor(labels)).tolist()
        batches = load(table(tokens=words, ner_tags=tags), model, batch_size=5)
        result = fips.evaluate(model, batches, against=model)
        assert isinstance(result, LabelResult)
        assert (result.num_labels, result.num_texts, result.task) == (len(hits), 24, "token-classification")
        assert result.accuracy_percent == pytest.approx(100 * sum(hits) / len(hits))
        assert result.accuracy_standard_error
        assert result.against is not None
        assert result.against.kl == 0

    def test_words_of_several_tokens_are_read_at_the_first(self, table: Callable[..., Path]) -> None:
        model = make_bert("BertForTokenClassification", num_labels=4)
        batches = load(table(tokens=[["ak bl", "cm"]], tags=[[2, 3]]), model)
        (batch,) = batches
        assert batch["labels"].tolist() == [[-100, 2, -100, 3, -100]]

    def test_refused(self, table: Callable[..., Path], lines: Path) -> None:
        model = make_bert("BertForTokenClassification")
        with pytest.raises(DataError, match=r"is plain text, and .* needs lists of words with a label for each"):
            load(lines, model)
        with pytest.raises(DataError, match=r"has no lists of words .* its columns: `text`"):
            load(table(text=SENTENCES), model)


class TestEmbeddings:
    def test_texts_by_hand(self, table: Callable[..., Path]) -> None:
        original = make_bert("BertModel")
        model = noisy(original)
        cosines, errors = [], []
        for sentence in SENTENCES:
            with torch.no_grad():
                x, y = (
                    each(torch.tensor([ids_of(sentence)])).last_hidden_state[0].mean(0) for each in (model, original)
                )
            cosines.append(float(x @ y / x.norm() / y.norm()))
            errors.append(float((x - y).norm() / y.norm()))
        result = fips.evaluate(model, load(table(text=SENTENCES), model, batch_size=5), against=original)
        assert isinstance(result, EmbeddingResult)
        assert result.against is not None
        assert result.against.cosine == pytest.approx(np.mean(cosines), rel=1e-5)
        assert result.against.relative_error == pytest.approx(np.mean(errors), rel=1e-4)
        spread = np.std(errors, ddof=1) / math.sqrt(24)
        assert result.against.relative_error_standard_error == pytest.approx(spread, rel=1e-3)
        assert 0.5 < result.against.cosine < 0.9999
        assert result.headline.name == "cosine"
        assert result.num_examples == 24

    def test_pairs_with_scores(self, table: Callable[..., Path]) -> None:
        model = make_bert("BertModel")
        scores = [float(index % 5) for index in range(24)]
        source = table(sentence1=SENTENCES, sentence2=SENTENCES[5:] + SENTENCES[:5], score=scores)
        values = []
        for pair in zip(SENTENCES, SENTENCES[5:] + SENTENCES[:5], strict=True):
            with torch.no_grad():
                x, y = (model(torch.tensor([ids_of(one)])).last_hidden_state[0].mean(0) for one in pair)
            values.append(float(x @ y / x.norm() / y.norm()))
        ranks = [[np.mean([sorted(each).index(one), len(each) - 1 - sorted(each, reverse=True).index(one)])
                  for one in each] for each in ([round(value, 6) for value in values], scores)]  # fmt: skip
        result = fips.evaluate(model, load(source, model, batch_size=5), against=model)
        assert isinstance(result, EmbeddingResult)
        assert result.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
        assert result.spearman_original == result.spearman
        assert result.num_pairs == 24
        assert result.headline.name == "spearman"
        assert fips.evaluate(model, load(source, model)).headline.value == pytest.approx(result.spearman)

    @pytest.mark.parametrize("folders", [(".",), ("cat", "dog")], ids=["plain", "with classes"])
    def test_images(self, tmp_path: Path, folders: tuple[str, ...]) -> None:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        generator = np.random.default_rng(0)
        for index in range(6):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            place = tmp_path / "photos" / folders[index % len(folders)]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{index}.png")
        torch.manual_seed(0)
        original = transformers.Dinov2Model(tiny_model("dinov2").config).eval()
        model = noisy(original)
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        batches = load(tmp_path / "photos", model, processor, batch_size=4)
        result = fips.evaluate(model, batches, against=original)
        assert isinstance(result, EmbeddingResult)
        pixels = torch.cat([batch["pixel_values"] for batch in batches])
        with torch.no_grad():
            x, y = model(pixels).pooler_output, original(pixels).pooler_output
        assert result.against is not None
        assert result.against.cosine == pytest.approx(torch.cosine_similarity(x, y).mean().item(), rel=1e-5)
        assert (result.num_examples, result.width) == (6, 32)

    def test_alone_without_scores(self, lines: Path) -> None:
        model = make_bert("BertModel")
        with pytest.raises(DataError, match=r"`BertModel` gives embeddings, which have no score of their own; name"):
            fips.evaluate(model, load(lines, model))


def make_t5(**changes: Any) -> PreTrainedModel:
    fields = {"d_model": 32, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
              "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": SEP}  # fmt: skip
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**fields, **changes})).eval()


class TestTargets:
    @pytest.mark.parametrize("kind", ["columns", "translation"])
    def test_equals_a_loop_by_hand(self, table: Callable[..., Path], kind: str) -> None:
        original = make_t5()
        model = noisy(original, 0.05)
        pairs = list(zip(SENTENCES, SENTENCES[::-1], strict=True))
        if kind == "columns":
            batches = load(table(source=SENTENCES, target=SENTENCES[::-1]), model, batch_size=5)
        else:
            rows = [{"en": first, "de": second} for first, second in pairs]
            batches = load(table(translation=rows), model, column="en,de", batch_size=5)
        losses, kls = [], []
        for first, second in pairs:
            labels = torch.tensor([ids_of(second)])
            with torch.no_grad():
                log_q, log_p = (
                    each(input_ids=torch.tensor([ids_of(first)]), labels=labels).logits[0].double().log_softmax(-1)
                    for each in (model, original)
                )
            losses += [-log_q[place, label].item() for place, label in enumerate(labels[0].tolist())]
            kls += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        result = fips.evaluate(model, batches, against=original)
        assert isinstance(result, TargetResult)
        assert (result.num_tokens, result.num_pairs) == (len(losses), 24)
        assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
        assert result.against is not None
        assert result.against.kl == pytest.approx(np.mean(kls), rel=1e-3)

    def test_refused(self, table: Callable[..., Path], lines: Path) -> None:
        model = make_t5()
        for purpose in ("evaluation", "calibration"):
            with pytest.raises(
                DataError, match=r"is plain text, and .* needs two columns of text, `--column SOURCE,TA"
            ):
                load(lines, model, purpose=purpose)
            with pytest.raises(DataError, match="needs two columns of text, named by `--column SOURCE,TARGET`; its"):
                load(table(one=SENTENCES, two=SENTENCES), model, purpose=purpose)

    @pytest.mark.slow
    def test_pairs_calibrate(self, table: Callable[..., Path]) -> None:
        model = make_t5()
        batches = load(table(source=SENTENCES, target=SENTENCES[::-1]), model, purpose="calibration")
        report = fips.compress(model, batches, fips.CompressionConfig(bits=6.0))
        assert report.plan["layers"]["factored"]["bytes"] > 0


def test_the_command_names_what_each_kind_needs(
    table: Callable[..., Path], lines: Path, tmp_path: Path, capsys: Capture
) -> None:
    cases = {
        "BertForQuestionAnswering": "`BertForQuestionAnswering` has no metric here",
        "BertForSequenceClassification": "needs texts with a `label` column",
        "BertForTokenClassification": "needs lists of words",
        "BertModel": "--against MODEL",
    }
    for kind, words in cases.items():
        source = saved(make_bert(kind), tmp_path / kind)
        capsys.readouterr()
        assert main(["evaluate", str(source), "--data", str(lines)]) == 1
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_compress_evaluates_on_other_data_at_the_end(
    kind: str, table: Callable[..., Path], lines: Path, tmp_path: Path, capsys: Capture
) -> None:
    source, out = saved(make_bert(kind), tmp_path / "model"), tmp_path / "small"
    other = tmp_path / "other.txt"
    other.write_text("\n".join(sentence[::-1] + " " + sentence for sentence in SENTENCES[:9]))
    command = [
        "compress", str(source), "--data", str(lines), "--bits", "6", "--document-separator", "\\n",
        "--num-samples", "20",
    ]  # fmt: skip
    assert main([*command, "--output", str(out), "--eval-data", str(other), "--eval-samples", "7"]) == 0
    shown = capsys.readouterr().out
    assert main(["evaluate", str(out), "--data", str(other), "--num-samples", "7", "--document-separator", "\\n",
                 "--against", str(source), "--json"]) == 0  # fmt: skip
    again = json.loads(capsys.readouterr().out)
    quality = json.loads((out / "fips_report.json").read_text())["quality"]
    assert quality["data"]["num_samples"] == 7
    assert quality["data"]["source"] == str(other)
    assert quality["headline"]["value"] == pytest.approx(again["headline"]["value"], rel=1e-3)
    first = quality["scores"][0]
    words = first["after"] if first["before"] is None else f"{first['before']} -> {first['after']}"
    assert f"{first['name']}: {words}" in shown
    for place in ("README.md", "fips_report.html"):
        text = (out / place).read_text()
        assert "ot evaluated" not in text
        assert first["after"] in text
    fips.load(out)


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused_before_the_work(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from fips.app.sources import Source

    source, out = saved(make_bert("BertForSequenceClassification"), tmp_path / "model"), tmp_path / "small"
    monkeypatch.setattr(Source, "dense", lambda *_, **__: pytest.fail("the weights were read"))
    capsys.readouterr()
    command = ["compress", str(source), "--data", str(lines), "--bits", "6", "--output", str(out)]
    for options, code, words in [
        (["--eval-data", str(lines)], 1, "needs texts with a `label` column"),
        (["--eval-data", str(tmp_path / "none.txt")], 1, "there is no such file"),
        (["--eval-samples", "4"], 2, "give --eval-data"),
    ]:
        assert main([*command, "--document-separator", "\\n", "--num-samples", "20", *options]) == code
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "BertModel"])
def test_a_compressed_encoder_is_evaluated_beside_its_original(
    kind: str, table: Callable[..., Path], lines: Path, tmp_path: Path, capsys: Capture
) -> None:
    source, out = saved(make_bert(kind), tmp_path / "model"), tmp_path / "small"
    labelled = table(text=SENTENCES, label=[index % 2 for index in range(24)])
    data = ["--data", str(labelled if kind.endswith("Classification") else lines)]
    calibration = ["--document-separator", "\\n", "--num-samples", "20", "--data", str(lines)]
    assert main(["compress", str(source), *calibration, "--bits", "6", "--output", str(out)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), *data, "--against", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"].get("kl", 1) > 0
    assert found["against"].get("cosine", 1) > 0.99
    assert main(["evaluate", str(out), *data, "--against", str(source)]) == 0
    assert found["headline"]["name"] in capsys.readouterr().out or kind == "BertModel"
    page = tmp_path / "report.html"
    assert main(["report", str(out), *data, "--against", str(source), "--output", str(page)]) == 0
    assert found["scores"][0]["name"] in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "T5ForConditionalGeneration"])
def test_methods_are_compared_on_every_kind(kind: str, table: Callable[..., Path], lines: Path, tmp_path: Path) -> None:
    model = make_t5() if kind.startswith("T5") else make_bert(kind)
    source, out = saved(model, tmp_path / "model"), tmp_path / "compared"
    pairs = table(source=SENTENCES, target=SENTENCES[::-1])
    data = ["--data", str(pairs if kind.startswith("T5") else lines), "--num-samples", "8", "--sequence-length", "16"]
    command = ["compare", str(source), *data, "--methods", "gptq", "--bits", "6", "--output", str(out)]
    assert main(command) == 0
    found = json.loads((out / "compare.json").read_text())
    (run,) = found["runs"]
    assert run["against"].get("kl", 1) > 0
    assert 0.9 < run["against"].get("cosine", 0.95) < 1
    alone = fips.evaluate(model, load(pairs if kind.startswith("T5") else lines, model, sequence_length=16),
                          against=model)  # fmt: skip
    assert found["original"] == pytest.approx(alone.headline.value, rel=1e-4)
