"""Chats, joined columns, mixtures and streams as calibration data, by Python and on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import DECODER, save_tiny_vit, tiny_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import fips
from fips.cli import main
from fips.config import DataConfig
from fips.data import Batches, load_batches
from fips.data import rows as rows_module
from fips.data.mixture import counts_of, mixture_of
from fips.errors import ConfigError, DataError
from fips.layers.linear import factored_layers

TEMPLATE = "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}\n{% endfor %}"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token per letter, ``<s>`` before every text, as Llama's."""
    letters = "abcdefghijklmnopqrstuvwxyz <>\n0123456789"
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>", chat_template=template
    )


TOKENIZER = make_tokenizer()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(source: Any, tokenizer: Any = TOKENIZER, *, purpose: str = "calibration", **fields: Any) -> Batches:
    config = DataConfig(source=str(source), **{"sequence_length": 16, "batch_size": 4, **fields})
    return load_batches(config, processor=tokenizer, kind="text", purpose=purpose)  # type: ignore[arg-type]


def tokens_of(batches: Batches) -> Iterator[list[int]]:
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for ids, keep in zip(batch["input_ids"], mask, strict=True):
            yield ids[keep.bool()].tolist()


class TestChats:
    @pytest.mark.parametrize("kind", ["messages", "conversations", "other"])
    def test_are_read_in_the_template(self, tmp_path: Path, kind: str) -> None:
        chats = [[("user", f"what is {one}"), ("assistant", f"it is {one}")] for one in "abcdefgh"]
        names = ("from", "value") if kind == "conversations" else ("role", "content")
        speakers = {"user": "human", "assistant": "gpt"} if kind == "conversations" else {}
        rows = [{kind: [{names[0]: speakers.get(role, role), names[1]: text} for role, text in chat]} for chat in chats]
        more = {"column": "other"} if kind == "other" else {}
        batches = load(
            write(tmp_path / "chats.jsonl", rows), purpose="evaluation", chat=True, sequence_length=64, **more
        )
        expected = [f"<u>what is {one}\n<a>it is {one}\n" for one in "abcdefgh"]
        assert sorted(map(TOKENIZER.decode, tokens_of(batches))) == expected, "each by itself, without a further <s>"
        assert batches.num_samples == 8
        assert batches.description["chat"]

    def test_windows_for_calibration_are_full(self, tmp_path: Path) -> None:
        rows = [{"messages": [{"role": "user", "content": "abc"}]}] * 9
        batches = load(write(tmp_path / "chats.jsonl", rows), chat=True)
        found = list(tokens_of(batches))
        assert len(found) == 9 * len("<u>abc\n") // 16
        assert all(len(ids) == 16 for ids in found)

    def test_refused(self, tmp_path: Path) -> None:
        rows = [{"messages": [{"role": "user", "content": "abc"}]}] * 9
        source = write(tmp_path / "chats.jsonl", rows)
        with pytest.raises(DataError, match="are read with `--chat`"):
            load(source)
        with pytest.raises(DataError, match=r"needs a chat template, and the tokenizer of this model has none; take"):
            load(source, make_tokenizer(None), chat=True)
        with pytest.raises(DataError, match="has no column of chats"):
            load(write(tmp_path / "texts.jsonl", [{"text": "abc"}]), chat=True)
        with pytest.raises(DataError, match="a message needs `role` and `content`"):
            load(write(tmp_path / "odd.jsonl", [{"messages": [{"who": "a", "said": "b"}]}]), chat=True)
        with pytest.raises(DataError, match="every chat is a document of its own"):
            load(source, chat=True, document_separator="|")
        strict = make_tokenizer("{{ raise_exception('user first') }}")
        with pytest.raises(DataError, match="does not fit the template: user first; remove such rows"):
            load(source, strict, chat=True)


class TestColumns:
    def test_are_joined(self, tmp_path: Path) -> None:
        rows = [{"instruction": f"say {one}", "input": "", "output": one * 3} for one in "abc"]
        batches = load(write(tmp_path / "a.jsonl", rows), column="instruction,input,output", purpose="evaluation",
                       sequence_length=99)  # fmt: skip
        assert [TOKENIZER.decode(ids[1:]) for ids in tokens_of(batches)] == ["say a\naaa\n\nsay b\nbbb\n\nsay c\nccc"]
        assert batches.description["column"] == "instruction,input,output"

    def test_a_name_with_a_comma(self, tmp_path: Path) -> None:
        batches = load(write(tmp_path / "a.jsonl", [{"a,b": "abc", "c": "x"}]), column="a,b", purpose="evaluation")
        assert [TOKENIZER.decode(ids[1:]) for ids in tokens_of(batches)] == ["abc"]

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"`column=none` is no text column .* its columns: `a`"):
            load(write(tmp_path / "a.jsonl", [{"a": "abc"}]), column="a,none")


class TestMixtures:
    @pytest.fixture
    def sources(self, tmp_path: Path) -> tuple[Path, Path]:
        for name, letter in (("a.txt", "a"), ("b.txt", "b")):
            (tmp_path / name).write_text(letter * 1000)
        return tmp_path / "a.txt", tmp_path / "b.txt"

    def test_shares(self, sources: tuple[Path, Path]) -> None:
        batches = load(f"{sources[0]}:3,{sources[1]}:1", num_samples=16)
        rows = list(tokens_of(batches))
        kinds = [TOKENIZER.decode(row[1:2]) for row in rows]
        assert (kinds.count("a"), kinds.count("b")) == (12, 4)
        assert kinds != sorted(kinds), "in one random order"
        assert rows == list(tokens_of(batches))
        assert rows == list(tokens_of(load(f"{sources[0]}:0.75,{sources[1]}:0.25", num_samples=16)))
        assert [part["num_samples"] for part in batches.description["mixture"]] == [12, 4]
        assert json.dumps(batches.description)

    def test_counts(self) -> None:
        assert counts_of({"a": 0.5, "b": 0.25, "c": 0.25}, 7) == {"a": 3, "b": 2, "c": 2}
        assert counts_of({"a": 0.999, "b": 0.001}, 100) == {"a": 99, "b": 1}
        assert mixture_of("owner/name:part") is None
        assert mixture_of("owner/a:part:0.5,b.txt:1.5") == {"owner/a:part": 0.25, "b.txt": 0.75}

    def test_texts_of_different_lengths(self, tmp_path: Path) -> None:
        from test_tasks import SENTENCES, make_bert
        from test_tasks import TOKENIZER as FRAMING

        paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for path, part in zip(paths, (SENTENCES[:9], SENTENCES[9:]), strict=True):
            path.write_text("\n".join(part))
        model = make_bert("BertForMaskedLM")
        mixture = fips.load_data(f"{paths[0]}:1,{paths[1]}:1", model, processor=FRAMING, document_separator="\n",
                                 num_samples=18, batch_size=6)  # fmt: skip
        lengths = [len(ids) for ids in tokens_of(mixture)]
        assert len(lengths) == 18
        assert len(set(lengths)) > 1
        fips.compress(model, mixture, fips.CompressionConfig(bits=6.0))

    def test_images(self, tmp_path: Path) -> None:
        for name, color in (("red", 250), ("black", 0)):
            (tmp_path / name).mkdir()
            for index in range(4):
                Image.new("RGB", (8, 8), (color, 0, 0)).save(tmp_path / name / f"{index}.png")
        config = DataConfig(source=f"{tmp_path / 'red'}:1,{tmp_path / 'black'}:3", num_samples=4, batch_size=3)
        processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
        batches = load_batches(config, processor=processor, kind="image", purpose="calibration")
        reds = [float(pixels[0].mean()) > 0 for batch in batches for pixels in batch["pixel_values"]]
        assert sorted(reds) == [False, False, False, True]

    def test_refused(self, sources: tuple[Path, Path], tmp_path: Path) -> None:
        first, second = sources
        for source, words in {
            f"{first},{second}": "has no share; write `a.txt:0.7,b.txt:0.3`",
            f"{first}:0.5,{second}:-1": "has no share",
            f"{first}:0.5,{first}:0.5": "names .* twice; add up its shares",
            f"{first}:0.5,{tmp_path}/none.txt:0.5": "no such file",
        }.items():
            with pytest.raises(DataError, match=words):
                load(source)
        with pytest.raises(DataError, match="a mixture, which is for calibration; evaluate on each by itself"):
            load(f"{first}:1,{second}:1", purpose="evaluation")
        with pytest.raises(DataError, match="less than the 2 sources that are mixed"):
            load(f"{first}:1,{second}:1", num_samples=1)

    def test_a_file_whose_name_has_a_comma(self, tmp_path: Path) -> None:
        (tmp_path / "a,b:1.txt").write_text("abc" * 20)
        assert load(tmp_path / "a,b:1.txt").num_samples == 4


class TestStreams:
    """Rows that are counted as they are read stand in for those of a large data set."""

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Numbers of the rows that were read of a stream of a million."""
        found: list[int] = []

        def rows() -> Iterator[dict[str, Any]]:
            for index in range(1_000_000):
                found.append(index)
                pixels = np.full((8, 8, 3), index % 256, dtype=np.uint8)
                yield {"text": f"row {index} ", "label": index % 2, "image": Image.fromarray(pixels)}

        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.Value("int64"), "image": datasets.Image()}
        )

        def load_dataset(*_: Any, streaming: bool = False, **__: Any) -> Any:
            assert streaming, "it would be downloaded whole"
            return datasets.IterableDataset.from_generator(rows, features=features)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(rows_module, "_inspect_hub", lambda *_: ["train", "test"])
        return found

    @pytest.mark.slow
    def test_calibration_on_a_hub_id(self, read: list[int]) -> None:
        batches = load("owner/large", num_samples=20)
        assert batches.num_samples == 20
        assert 0 < len(read) < 20_000
        assert list(tokens_of(batches)) == list(tokens_of(load("owner/large", num_samples=20)))

    def test_images(self, read: list[int]) -> None:
        config = DataConfig(source="owner/large", num_samples=5, batch_size=3)
        processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
        batches = load_batches(config, processor=processor, kind="image", purpose="calibration")
        assert sum(len(batch["pixel_values"]) for batch in batches) == 5
        assert len({float(pixels.mean()) for batch in batches for pixels in batch["pixel_values"]}) == 5
        assert len(read) < 5000

    @pytest.mark.slow
    def test_texts_with_labels(self, read: list[int]) -> None:
        from test_tasks import TOKENIZER as FRAMING
        from test_tasks import make_bert

        model = make_bert("BertForSequenceClassification")
        options = {"processor": FRAMING, "purpose": "evaluation", "stream": True}
        batches = fips.load_data("owner/large", model, num_samples=7, **options)
        assert fips.evaluate(model, batches).num_texts == 7  # type: ignore[union-attr]
        assert len(read) < 20_000
        with pytest.raises(DataError, match="too large to evaluate whole; set `num_samples`"):
            fips.load_data("owner/large", model, **options)

    def test_a_local_table(self, tmp_path: Path) -> None:
        source = write(tmp_path / "a.jsonl", [{"text": f"{index} abc"} for index in range(300)])
        streamed = load(source, stream=True, num_samples=5)
        assert streamed.num_samples == 5
        assert streamed.description["num_documents"] <= 300
        (tmp_path / "a.txt").write_text("abc" * 99)
        with pytest.raises(DataError, match="is read where it lies; `stream` is for tables"):
            load(tmp_path / "a.txt", stream=True)


@pytest.mark.slow
def test_the_command_takes_chats_columns_mixtures_and_streams(tmp_path: Path, capsys: Capture) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": f"{index} is a number"}], "a": "abc " * 9, "b": "def"}
            for index in range(60)]  # fmt: skip
    table = str(write(tmp_path / "table.jsonl", rows))
    (tmp_path / "a.txt").write_text("the fox " * 99)
    options = ["--bits", "6", "--method", "gptq", "--num-samples", "8", "--sequence-length", "16"]
    for number, data in enumerate(
        (
            ["--data", table, "--chat"],
            ["--data", table, "--column", "a,b"],
            ["--data", table, "--column", "a", "--stream"],
            ["--data", f"{tmp_path / 'a.txt'}:1,{table}:1", "--document-separator", "|"],
        )
    ):
        out = tmp_path / f"out{number}"
        command = ["compress", str(tmp_path / "model"), *data, *options, "--output", str(out)]
        if number == 3:
            assert main(command) == 1
            assert "several text columns, set `column`" in capsys.readouterr().err
            continue
        assert main(command) == 0, capsys.readouterr().err
        record = json.loads((out / "fips_report.json").read_text())
        assert record["data"]["num_samples"] == 8
        fips.load(out)


@pytest.mark.slow
def test_images_take_no_template(tmp_path: Path, capsys: Capture) -> None:
    save_tiny_vit(tmp_path / "vit")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "0.png")
    capsys.readouterr()
    command = ["compress", str(tmp_path / "vit"), "--data", str(tmp_path / "photos"), "--bits", "6", "--chat"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 1
    assert "`chat` only applies to text" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="chat"):
        DataConfig(source="a.txt", chat="perhaps")  # type: ignore[arg-type]


@pytest.mark.slow
def test_images_with_texts_calibrate_a_model_that_sees(tmp_path: Path, capsys: Capture) -> None:
    """A tiny LLaVA, through the processor that lies beside it, on a folder of images with a table of texts."""
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    words = transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": 2})
    config = transformers.LlavaConfig(vision_config=vision, text_config=words, image_token_index=image_token)
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).eval().save_pretrained(tmp_path / "model")
    transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for index in range(12):
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": "what is this " * (1 + index % 3)})
    write(tmp_path / "photos" / "metadata.jsonl", rows)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    batches = fips.load_data(str(tmp_path / "photos"), model, batch_size=4)
    assert batches.num_samples == 12
    for batch in batches:
        assert set(batch) >= {"input_ids", "pixel_values", "attention_mask"}
        assert ((batch["input_ids"] == image_token).sum(1) == 4).all(), "a token per patch"
    with pytest.raises(DataError, match="is calibrated on but not scored; evaluate on texts alone"):
        fips.load_data(str(tmp_path / "photos"), model, purpose="evaluation")
    command = ["compress", str(tmp_path / "model"), "--data", str(tmp_path / "photos"), "--bits", "6"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert any("vision" in name for name in factored_layers(fips.load(tmp_path / "out")))
    (tmp_path / "a.txt").write_text("the fox " * 99)
    assert fips.load_data(str(tmp_path / "a.txt"), model, sequence_length=16).num_samples > 9
