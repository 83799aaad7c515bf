"""Batches of images and text: exact contents, exact byte counts, and every refusal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fips.config import DataConfig
from fips.data import Batches, Source, describe_source, load_batches
from fips.data import images as images_module
from fips.data import rows as rows_module
from fips.data import source as source_module
from fips.data import text as text_module
from fips.data.mixture import mixture_of
from fips.errors import DataError

TEXT = "\r\n A café — 日本 😀 and\n\nmore.\tTabs,  spaces\r\n" * 12 + "end\n\n"
SENTENCES = [f"Story number {index} is about a fox and {index * 7} hens." for index in range(20)]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that characters are cut into several tokens; `model_max_length` is tiny on purpose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        model_max_length=8,
        clean_up_tokenization_spaces=False,
    )


BOS = make_tokenizer(bos=True)
PLAIN = make_tokenizer(bos=False)
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


def text_batches(source: Path | str, tokenizer: Any = BOS, *, purpose: str = "evaluation", **fields: Any) -> Batches:
    config = DataConfig(source=str(source), **{"sequence_length": 16, "batch_size": 4, **fields})
    return load_batches(config, processor=tokenizer, kind="text", purpose=purpose)  # type: ignore[arg-type]


def image_batches(source: Path | str, *, purpose: str = "evaluation", **fields: Any) -> Batches:
    config = DataConfig(source=str(source), **{"batch_size": 2, **fields})
    return load_batches(config, processor=PROCESSOR, kind="image", purpose=purpose)  # type: ignore[arg-type]


def encode(text: str) -> list[int]:
    return BOS(text, add_special_tokens=False, verbose=False)["input_ids"]


def rows_of(batches: Batches) -> list[dict[str, list[int]]]:
    """Windows without padding: inputs, and labels shifted to the token they ask for."""
    rows = []
    for batch in batches:
        lengths = batch["attention_mask"].sum(1) if "attention_mask" in batch else [batch["input_ids"].shape[1]] * 999
        for index, ids in enumerate(batch["input_ids"]):
            size = int(lengths[index])
            rows.append({"ids": ids[:size].tolist(), "labels": batch["labels"][index].tolist(), "size": size})
    return rows


def save_images(folder: Path, count: int, *, mode: str = "RGB", seed: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        pixels = Image.fromarray(generator.integers(0, 256, (16, 12, 3), dtype=np.uint8)).convert(mode)
        paths.append(folder / f"{index}.png")
        pixels.save(paths[-1])
    return paths


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index, name in enumerate(["dog", "ant", "train"]):  # a class may be called like a split
        save_images(tmp_path / "photos" / name, 3, seed=index)
    (tmp_path / "photos" / "README.md").write_text("not an image")
    return tmp_path / "photos"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_bytes(TEXT.encode())
    return tmp_path / "book.txt"


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    (tmp_path / "stories.txt").write_text("\n\n<end>".join(SENTENCES) + "<end>\n <end>")
    return tmp_path / "stories.txt"


def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the data was read")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    monkeypatch.setattr(rows_module, "_read_texts", refuse)


class TestDescribeSource:
    @pytest.mark.parametrize(
        ("source", "builder", "configuration", "kind"),
        [
            ("wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
            ("c4", "allenai/c4", None, "text"),
            ("imagenet-1k", "ILSVRC/imagenet-1k", None, "image"),
            ("owner/name", "owner/name", None, None),
            ("owner/name-2.0:part.one", "owner/name-2.0", "part.one", None),
        ],
    )
    def test_hub(self, source: str, builder: str, configuration: str | None, kind: str | None) -> None:
        found = describe_source(source)
        assert (found.builder, found.configuration, found.kind) == (builder, configuration, kind)

    @pytest.mark.parametrize("source", ["./none", "/no/such", "~/none", "none.txt", "photos.parquet", "a/b/c"])
    def test_missing_path_is_no_hub_id(self, source: str) -> None:
        with pytest.raises(DataError, match="looks like a path, but there is no such file"):
            describe_source(source)

    @pytest.mark.parametrize("name", ["pipe", "pipe.txt", "pipe.csv"])
    def test_what_can_be_read_once_is_no_source(self, name: str, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}` is neither a regular file nor a directory"):
            describe_source(str(tmp_path / name))

    @pytest.mark.parametrize("source", ["~nobody/data.txt", "x" * 300 + ".txt"])
    def test_names_that_no_file_can_have(self, source: str) -> None:
        with pytest.raises(DataError, match="looks like a path"):
            describe_source(source)
        assert mixture_of(f"{source}:0.5,b.txt:0.5") == {source: 0.5, "b.txt": 0.5}

    @pytest.mark.parametrize(
        ("name", "builder", "kind"),
        [("a.txt", "text", "text"), ("a.unknown", "text", "text"), ("a.csv", "csv", None), ("a.jsonl", "json", None)],
    )
    def test_file(self, tmp_path: Path, name: str, builder: str, kind: str | None) -> None:
        (tmp_path / name).write_text("text\nb")
        found = describe_source(str(tmp_path / name))
        assert (found.builder, found.kind, set(found.files)) == (builder, kind, {"whole"})

    def test_character_cut_at_the_end_of_the_examined_part_is_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"a" * ((1 << 16) - 1) + "é".encode() + b"b" * 100)
        assert describe_source(str(tmp_path / "a.txt")).kind == "text"

    def test_directory_follows_the_most_frequent_type(self, photos: Path) -> None:
        assert describe_source(str(photos)).kind == "image"
        for index in range(10):
            (photos / f"{index}.txt").write_text("a")
        assert describe_source(str(photos)).kind == "text"

    def test_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "x.png").write_bytes(b"")
        (tmp_path / "empty").mkdir()
        for source, message in {
            " ": "`source` is empty",
            str(tmp_path / "x.bin"): "is not UTF-8 text",
            str(tmp_path / "x.png"): "is a single image",
            str(tmp_path / "empty"): "directory without images, texts or tables",
        }.items():
            with pytest.raises(DataError, match=message):
                describe_source(source)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "header.csv", "a.parquet"])
def test_tables_without_rows_are_refused_as_such(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        datasets.Dataset.from_dict({"text": []}).to_parquet(path)
    else:
        path.write_text("text\n" if name.startswith("header") else "")
    with pytest.raises(DataError, match=f"has no rows: `{path}` is empty"):
        rows_module.load_rows(
            describe_source(str(path)), DataConfig(source=str(path)), kind="text", purpose="calibration"
        )


class TestChecksBeforeReading:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"source": "wikitext"}, "holds text, but the model reads images"),
            ({"source": "imagenet-1k", "sequence_length": 8}, "`sequence_length` only applies to text"),
            ({"source": "imagenet-1k", "document_separator": "x"}, "`document_separator` only applies to text"),
        ],
    )
    def test_images(self, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str) -> None:
        no_loading(monkeypatch)
        with pytest.raises(DataError, match=message):
            load_batches(DataConfig(**fields), processor=PROCESSOR, kind="image", purpose="evaluation")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"source": "imagenet-1k"}, "holds images, but the model reads text"),
            ({"source": "c4"}, "too large to evaluate whole; set `num_samples`"),
            ({"source": "wikitext", "document_separator": ""}, "`document_separator` is empty"),
            ({"source": "wikitext", "sequence_length": 33}, "more than the 32 tokens the model accepts"),
        ],
    )
    def test_text(self, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str) -> None:
        no_loading(monkeypatch)
        with pytest.raises(DataError, match=message):
            load_batches(DataConfig(**fields), processor=BOS, kind="text", purpose="evaluation", context_length=32)

    @pytest.mark.parametrize(("kind", "message"), [("image", "an image processor"), ("text", "a tokenizer")])
    def test_no_processor(self, photos: Path, book: Path, kind: Any, message: str) -> None:
        config = DataConfig(source=str(photos if kind == "image" else book))
        with pytest.raises(DataError, match=f"needs {message}.*got none"):
            load_batches(config, processor=None, kind=kind, purpose="calibration")


class TestImages:
    def test_pixels_and_labels(self, photos: Path) -> None:
        batches = image_batches(photos)
        files = [path for name in ["ant", "dog", "train"] for path in sorted((photos / name).iterdir())]
        expected = (
            torch.stack(
                [torch.from_numpy(np.asarray(Image.open(path).resize((8, 8), 2), dtype=np.float32)) for path in files]
            ).permute(0, 3, 1, 2)
            / 127.5
            - 1
        )
        assert torch.equal(torch.cat([batch["labels"] for batch in batches]), torch.tensor([0] * 3 + [1] * 3 + [2] * 3))
        torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in batches]), expected)
        assert [len(batch["labels"]) for batch in batches] == [2, 2, 2, 2, 1]
        assert (len(batches), batches.num_samples, batches.max_label) == (5, 9, 2)
        assert batches.class_names == ("ant", "dog", "train")
        assert json.loads(json.dumps(batches.description)) == {
            "source": str(photos), "split": None, "purpose": "evaluation", "seed": 0, "batch_size": 2,
            "num_samples": 9, "size": [3, 8, 8], "processor": "ViTImageProcessorPil", "num_classes": 3,
        }  # fmt: skip

    def test_linked_folders_are_named(self, photos: Path, tmp_path: Path) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        for name in ("dog", "ant"):
            (linked / name).symlink_to(photos / name)
        with pytest.raises(DataError, match="copies in place of links such as `ant`, which are not followed"):
            image_batches(linked)

    def test_same_batches_every_time(self, photos: Path) -> None:
        batches = image_batches(photos, purpose="calibration")
        again = image_batches(photos, purpose="calibration")
        assert len(list(batches)) == 5
        for first, second, third in zip(batches, batches, again, strict=True):
            assert torch.equal(first["pixel_values"], second["pixel_values"])
            assert torch.equal(first["pixel_values"], third["pixel_values"])

    def test_samples_are_a_seeded_choice(self, photos: Path) -> None:
        def pixels(**fields: Any) -> list[bytes]:
            batches = image_batches(photos, purpose="calibration", **fields)
            return [image.numpy().tobytes() for batch in batches for image in batch["pixel_values"]]

        everything = pixels()
        assert pixels(num_samples=4) == everything[:4]
        assert pixels(seed=1) != everything
        assert sorted(pixels(seed=1)) == sorted(everything)
        in_order = [image.numpy().tobytes() for batch in image_batches(photos) for image in batch["pixel_values"]]
        assert everything != in_order, "calibration mixes the classes"

    def test_decoded_one_batch_at_a_time(self, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[int] = []
        decode = images_module.decode
        monkeypatch.setattr(images_module, "decode", lambda *args: decoded.append(args[2]) or decode(*args))
        iterator = iter(image_batches(photos))
        assert decoded == [0], "one image is decoded to learn the size"
        next(iterator)
        assert decoded == [0, 0, 1]

    def test_index_holds_no_pixels(self, photos: Path) -> None:
        image_batches(photos)
        cached = sum(file.stat().st_size for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))
        save_images(photos / "dog", 400)
        image_batches(photos)
        grown = sum(file.stat().st_size for file in Path(datasets.config.HF_DATASETS_CACHE).rglob("*")) - cached
        assert 0 < grown < sum(file.stat().st_size for file in photos.rglob("*.png")) / 2

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
    def test_converted_to_rgb(self, tmp_path: Path, mode: str) -> None:
        for name in "ab":
            save_images(tmp_path / "images" / name, 1, mode=mode)
        (batch,) = image_batches(tmp_path / "images")
        assert batch["pixel_values"].shape == (2, 3, 8, 8)

    def test_folder_without_classes_has_no_labels(self, tmp_path: Path) -> None:
        save_images(tmp_path / "images", 3)
        batches = image_batches(tmp_path / "images", purpose="calibration")
        assert [set(batch) for batch in batches] == [{"pixel_values"}, {"pixel_values"}]
        assert (batches.class_names, batches.max_label) == (None, None)

    def test_odd_names(self, tmp_path: Path) -> None:
        root = tmp_path / "[a] *.x" / ".hidden"
        for name in "ab":
            (save_images(root / name, 1)[0]).rename(root / name / "test_1.PNG")
        assert image_batches(root).num_samples == 2

    def test_splits(self, tmp_path: Path) -> None:
        for split, count in {"train": 4, "val": 2, "test": 1}.items():
            for name in "ab":
                save_images(tmp_path / split / name, count)
        assert image_batches(tmp_path, purpose="calibration").num_samples == 8
        assert image_batches(tmp_path).num_samples == 4
        assert image_batches(tmp_path, split="test").num_samples == 2
        assert image_batches(tmp_path).description["split"] == "val"
        with pytest.raises(DataError, match="has no split `validation`; it has `test`, `train`, `val`"):
            image_batches(tmp_path, split="validation")

    def test_training_images_are_not_evaluated_unasked(self, tmp_path: Path) -> None:
        save_images(tmp_path / "train" / "a", 2)
        with pytest.raises(DataError, match="no usual split for evaluation; set `split` to one of `train`"):
            image_batches(tmp_path)
        assert image_batches(tmp_path, split="train").num_samples == 2

    def test_split_of_a_folder_without_splits(self, photos: Path) -> None:
        with pytest.raises(DataError, match="not divided into splits, got `split=train`"):
            image_batches(photos, split="train")

    def test_too_many_samples(self, photos: Path) -> None:
        with pytest.raises(DataError, match="`num_samples=10` is more than the 9 samples"):
            image_batches(photos, num_samples=10)

    def test_broken_image_is_named(self, photos: Path) -> None:
        (photos / "dog" / "1.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"dog/1\.png` cannot be decoded"):
            list(image_batches(photos))

    def test_images_in_a_table(self, tmp_path: Path) -> None:
        paths = save_images(tmp_path / "raw", 3)
        columns = {"picture": [str(path) for path in paths], "label": [7, 0, 5], "caption": ["a", "b", "c"]}
        table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
        table.to_parquet(tmp_path / "table.parquet")
        batches = image_batches(tmp_path / "table.parquet")
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [7, 0, 5]
        assert (batches.class_names, batches.max_label) == (None, 7)
        with pytest.raises(DataError, match="holds images, but the model reads text"):
            text_batches(tmp_path / "table.parquet")
        with pytest.raises(DataError, match="`column=caption` is no image column"):
            image_batches(tmp_path / "table.parquet", column="caption")

    def test_missing_labels_matter_only_for_evaluation(self, tmp_path: Path) -> None:
        paths = save_images(tmp_path / "raw", 2)
        table = datasets.Dataset.from_dict({"image": [str(path) for path in paths], "label": [-1, -1]})
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "table.parquet")
        assert set(next(iter(image_batches(tmp_path / "table.parquet", purpose="calibration")))) == {"pixel_values"}
        with pytest.raises(DataError, match="without a label"):
            image_batches(tmp_path / "table.parquet")


class TestScoredText:
    @pytest.mark.parametrize("length", [2, 7, 16, 4096])
    def test_every_token_once_and_every_byte(self, book: Path, length: int) -> None:
        batches = text_batches(book, sequence_length=length)
        scored = [token for row in self.in_order(batches, book) for token in row["ids"][1:]]
        assert scored == encode(TEXT)
        assert BOS.decode(scored).encode() == book.read_bytes()
        assert batches.num_bytes == len(book.read_bytes())
        assert all(row["ids"][0] == BOS.bos_token_id for row in rows_of(batches))
        assert max(row["size"] for row in rows_of(batches)) == min(length, 1 + len(scored))

    @staticmethod
    def in_order(batches: Batches, book: Path) -> list[dict[str, Any]]:
        """The windows in the order of the text, found by reloading them in one batch each with the known choice."""
        order = np.random.default_rng(0).permutation(batches.num_samples)
        length = batches.description["sequence_length"]
        tokens = encode(book.read_bytes().decode())
        windows = [tokens[start : start + length - 1] for start in range(0, len(tokens), length - 1)]
        by_length = sorted(order, key=lambda index: -len(windows[index]))
        return [row for _, row in sorted(zip(by_length, rows_of(batches), strict=True), key=lambda pair: pair[0])]

    def test_labels_are_the_inputs_without_context_and_padding(self, stories: Path) -> None:
        batches = text_batches(stories, document_separator="<end>")
        assert any("attention_mask" in batch for batch in batches)
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            expected = torch.where(mask.bool(), batch["input_ids"], -100)
            expected[:, 0] = -100
            assert torch.equal(batch["labels"], expected)
            assert batch["input_ids"][~mask.bool()].eq(BOS.pad_token_id).all()
            assert torch.equal(mask, mask.sort(1, descending=True).values), "padding is on the right"

    def test_without_bos_the_token_before_is_context(self, book: Path) -> None:
        batches = text_batches(book, PLAIN, sequence_length=10, batch_size=1)
        tokens = encode(TEXT)
        windows = [tokens[start - 1 : start + 9] for start in range(1, len(tokens), 9)]
        assert sorted(row["ids"] for row in rows_of(batches)) == sorted(windows)
        assert batches.num_bytes == len(TEXT.encode()) - len(PLAIN.decode(tokens[:1]).encode())
        assert batches.description["num_scored_tokens"] == len(tokens) - 1

    def test_documents_are_scored_apart(self, stories: Path) -> None:
        batches = text_batches(stories, document_separator="<end>", sequence_length=4096)
        assert sorted(row["ids"] for row in rows_of(batches)) == sorted([0, *encode(story)] for story in SENTENCES)
        assert batches.num_bytes == sum(len(story) for story in SENTENCES)
        assert batches.description["num_documents"] == len(SENTENCES)

    @pytest.mark.parametrize("tokenizer", [BOS, PLAIN], ids=["bos", "plain"])
    def test_bytes_of_a_subset(self, tmp_path: Path, tokenizer: Any) -> None:
        # characters of one byte only: then the bytes of a window are those of its decoded tokens
        (tmp_path / "a.txt").write_text(" ".join(SENTENCES))
        seen = []
        for count in (1, 5, 9):
            batches = text_batches(tmp_path / "a.txt", tokenizer, num_samples=count)
            rows = [row["ids"] for row in rows_of(batches)]
            assert len(rows) == batches.num_samples == count
            assert batches.num_bytes == sum(len(tokenizer.decode(ids[1:]).encode()) for ids in rows)
            assert {str(ids) for ids in seen} <= {str(ids) for ids in rows}
            seen = rows

    def test_bytes_of_a_character_cut_into_tokens_count_for_the_first(self) -> None:
        encoded = PLAIN(TEXT, return_offsets_mapping=True, verbose=False)
        pieces = PLAIN.convert_ids_to_tokens(encoded["input_ids"])
        ends = np.cumsum([len(piece) for piece in pieces])  # one character of a byte-level token is one byte
        boundaries = np.cumsum([0, *(len(character.encode()) for character in TEXT)])
        expected = [int(boundaries[boundaries >= end].min()) for end in ends]
        found = text_module._bytes_per_token(TEXT, len(pieces), encoded["offset_mapping"])
        assert expected != ends.tolist(), "some characters are cut"
        assert np.cumsum(found).tolist() == expected

    def test_text_the_tokenizer_strips_still_counts(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(bos=True)
        tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
        (tmp_path / "a.txt").write_text("  a fox  \n")
        assert text_batches(tmp_path / "a.txt", tokenizer).num_bytes == 10

    def test_no_warning_about_the_length_of_the_text(self, book: Path) -> None:
        tokenizer = make_tokenizer(bos=True)
        text_batches(book, tokenizer)
        text_batches(book, tokenizer, purpose="calibration")
        assert not tokenizer.deprecation_warnings

    def test_tokenizer_without_offsets(self, book: Path, caplog: pytest.LogCaptureFixture) -> None:
        class Slow:
            bos_token_id, pad_token_id, unk_token_id, eos_token_id, is_fast = 0, None, None, None, False

            def __call__(self, text: str, **options: Any) -> Any:
                assert not options.get("return_offsets_mapping")
                return BOS(text, **options)

        batches = text_batches(book, Slow())
        assert batches.num_bytes == len(TEXT.encode())
        assert "bytes are spread evenly" in caplog.text

    def test_unknown_tokens_are_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        words = Tokenizer(models.WordLevel({"<unk>": 0, "fox": 1}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        (tmp_path / "a.txt").write_text("fox hen fox hen hen")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
        batches = text_batches(tmp_path / "a.txt", tokenizer)
        assert batches.description["num_unknown_tokens"] == 3
        assert "3 scored tokens are unknown" in caplog.text

    def test_description(self, stories: Path) -> None:
        description = text_batches(stories, document_separator="<end>", num_samples=3, seed=4).description
        assert json.loads(json.dumps(description)) == description
        wanted = {"source": str(stories), "split": None, "seed": 4, "num_samples": 3, "sequence_length": 16,
                  "document_separator": "<end>", "row_separator": None, "num_documents": 20}  # fmt: skip
        assert wanted.items() <= description.items()

    def test_default_window(self, book: Path) -> None:
        def length(context: int | None, purpose: Any) -> Any:
            config = DataConfig(source=str(book), num_samples=1)
            batches = load_batches(config, processor=BOS, kind="text", purpose=purpose, context_length=context)
            return batches.description["sequence_length"]

        assert [length(context, "evaluation") for context in (None, 64, 9999)] == [2048, 64, 2048]
        assert [length(context, "calibration") for context in (None, 64, 9999)] == [512, 64, 512]

    @pytest.mark.parametrize("content", ["", " \n<end> "])
    def test_nothing_to_score(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(DataError, match="has 0 tokens of text, a window needs 2"):
            text_batches(tmp_path / "a.txt", document_separator="<end>")

    def test_bad_byte_late_in_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"a" * 70000 + b"\xff")
        with pytest.raises(DataError, match=r"a\.txt` is not UTF-8 text \(byte 70000\)"):
            text_batches(tmp_path / "a.txt")


class TestCalibrationText:
    def test_stream_with_bos(self, book: Path) -> None:
        tokens = encode(TEXT)
        expected = [[0, *tokens[start : start + 15]] for start in range(0, len(tokens) - 14, 15)]
        batches = text_batches(book, purpose="calibration")
        assert [set(batch) for batch in batches] == [{"input_ids"}] * len(batches)
        found = torch.cat([batch["input_ids"] for batch in batches]).tolist()
        assert len(expected) > 5
        assert sorted(found) == sorted(expected)
        assert found != expected, "random order"
        assert batches.num_bytes is None

    def test_stream_without_bos(self, book: Path) -> None:
        tokens = encode(TEXT)
        expected = [tokens[start : start + 16] for start in range(0, len(tokens) - 15, 16)]
        found = torch.cat([batch["input_ids"] for batch in text_batches(book, PLAIN, purpose="calibration")]).tolist()
        assert sorted(found) == sorted(expected)

    @pytest.mark.parametrize("length", [2, 3, 16, 50, 101])
    def test_documents_are_packed(self, stories: Path, length: int) -> None:
        windows: list[list[int]] = [[]]
        for story in SENTENCES:
            for position, token in enumerate(encode(story)):
                if position == 0 or not windows[-1]:
                    windows[-1].append(0)
                    if len(windows[-1]) == length:
                        windows.append([0])
                windows[-1].append(token)
                if len(windows[-1]) == length:
                    windows.append([])
        expected = [window for window in windows if len(window) == length]
        batches = text_batches(
            stories,
            purpose="calibration",
            document_separator="<end>",
            sequence_length=length,
            num_samples=len(expected),
        )
        assert sorted(torch.cat([batch["input_ids"] for batch in batches]).tolist()) == sorted(expected)

    def test_number_of_samples(self, book: Path) -> None:
        assert text_batches(book, purpose="calibration", sequence_length=3).num_samples == 128
        assert text_batches(book, purpose="calibration", sequence_length=3, num_samples=130).num_samples == 130
        with pytest.raises(DataError, match="`num_samples=99999` is more than the"):
            text_batches(book, purpose="calibration", sequence_length=3, num_samples=99999)

    def test_text_shorter_than_a_window(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a fox")
        with pytest.raises(DataError, match=r"has \d tokens of text, a window needs 16; .* lower `sequence_length`"):
            text_batches(tmp_path / "a.txt", purpose="calibration")


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    table = datasets.Dataset.from_dict(columns)
    writers: dict[str, Callable[[Path], Any]] = {
        ".csv": table.to_csv, ".json": table.to_json, ".jsonl": table.to_json, ".parquet": table.to_parquet
    }  # fmt: skip
    writers[path.suffix](path)


class TestTables:
    @pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
    def test_rows_are_joined_with_an_empty_line(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"odd [name]{suffix}"
        write_table(path, {"text": SENTENCES, "title": ["t"] * 20})
        batches = text_batches(path, sequence_length=4096)
        assert [row["ids"][1:] for row in rows_of(batches)] == [encode("\n\n".join(SENTENCES))]
        assert batches.description["row_separator"] == "\n\n"

    def test_column(self, tmp_path: Path) -> None:
        write_table(tmp_path / "a.jsonl", {"body": SENTENCES, "title": ["fox"] * 20, "year": [1] * 20})
        with pytest.raises(DataError, match=r"several text columns, set `column`; .*`body` \(string\)"):
            text_batches(tmp_path / "a.jsonl")
        assert text_batches(tmp_path / "a.jsonl", column="title").num_bytes == 20 * 3 + 19 * 2
        with pytest.raises(DataError, match="`column=year` is no text column"):
            text_batches(tmp_path / "a.jsonl", column="year")
        with pytest.raises(DataError, match="holds text, but the model reads images"):
            image_batches(tmp_path / "a.jsonl")

    def test_no_text_at_all(self, tmp_path: Path) -> None:
        write_table(tmp_path / "a.parquet", {"year": [1, 2]})
        with pytest.raises(DataError, match="has no text column"):
            text_batches(tmp_path / "a.parquet")

    def test_broken_table(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"no table")
        with pytest.raises(DataError, match=r"cannot be loaded: .*check that the files are complete"):
            text_batches(tmp_path / "a.parquet")

    def test_directory_split_by_file_names(self, tmp_path: Path) -> None:
        write_table(tmp_path / "train-00000.parquet", {"text": ["one fox"] * 99})
        write_table(tmp_path / "test-00000.parquet", {"text": ["two foxes"]})
        assert text_batches(tmp_path).num_bytes == len("two foxes")
        assert text_batches(tmp_path, purpose="calibration").description["split"] == "train"

    def test_directory_of_texts(self, tmp_path: Path) -> None:
        for name, content in {"b.md": "second\n", "a.txt": "first", "sub/train.py": "third", "x.png": ""}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        batches = text_batches(tmp_path, sequence_length=4096)
        assert [row["ids"][1:] for row in rows_of(batches)] == [encode("first\n\nsecond\n\n\nthird")]


class TestHub:
    """A directory in the layout of a hub repository stands in for one."""

    @pytest.fixture
    def repository(self, tmp_path: Path) -> Path:
        write_table(tmp_path / "train-00000-of-00001.parquet", {"text": SENTENCES * 5})
        write_table(tmp_path / "test-00000-of-00001.parquet", {"text": SENTENCES[:2]})
        return tmp_path

    @pytest.mark.slow
    def test_splits_are_found(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shortcut = Source(name="tales", kind="text", builder=str(repository))
        monkeypatch.setattr(source_module, "HUB_SHORTCUTS", {"tales": shortcut})
        assert text_batches("tales").num_bytes == len("\n\n".join(SENTENCES[:2]))
        assert text_batches("tales", purpose="calibration").description["split"] == "train"
        with pytest.raises(DataError, match="has no split `dev`; it has `train`, `test`"):
            text_batches("tales", split="dev")

    def test_wrong_kind_is_refused_before_the_download(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Builder:
            class info:
                features = datasets.Features({"text": datasets.Value("string")})
                splits = ("train", "test")

        no_loading(monkeypatch)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder)
        with pytest.raises(DataError, match="holds text, but the model reads images"):
            image_batches("owner/tales")

    def test_stream_reads_no_more_than_needed(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [f"{index} foxes and hens in a field" for index in range(1000, 3000)]
        write_table(repository / "stream.jsonl", {"text": rows, "url": ["u"] * 2000})
        files = {"train": (str(repository / "stream.jsonl"),), "test": (str(repository / "stream.jsonl"),)}
        shortcut = Source(name="tales", kind="text", builder="json", files=files, streaming=True)
        monkeypatch.setattr(source_module, "HUB_SHORTCUTS", {"tales": shortcut})
        monkeypatch.setattr(text_module, "TEXTS_PER_CALL", 10)
        batches = text_batches("tales", num_samples=20)
        assert batches.num_samples == 20
        assert batches.description["num_documents"] < 100
        found = [row["ids"] for row in rows_of(batches)]
        assert all(row[0] == 0 for row in found)
        assert max(int(re.findall(r"\d+", BOS.decode(row) + " 0")[0]) for row in found) > 1200, "shuffled"
        assert found == [row["ids"] for row in rows_of(text_batches("tales", num_samples=20))]
        assert found != [row["ids"] for row in rows_of(text_batches("tales", num_samples=20, seed=1))]
        assert text_batches("tales", purpose="calibration").num_samples == 128

    @pytest.mark.parametrize("source", ["wikitext", "owner/none:part"])
    def test_unreachable(self, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
        def fail(*_: Any) -> None:
            raise ConnectionError("Couldn't reach the Hub.\nlong trace") from OSError("no route")

        monkeypatch.setattr(datasets, "load_dataset_builder", fail)
        with pytest.raises(DataError) as caught:
            text_batches(source)
        assert str(caught.value).startswith(
            f"`{source}` cannot be loaded: Couldn't reach the Hub (no route); no file or directory has"
        )
        assert "\n" not in str(caught.value)


def test_calibration_takes_so_many_images_unless_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fips.data.images.DEFAULT_CALIBRATION_IMAGES", 2)
    everything = image_batches(photos).description["num_samples"]
    assert image_batches(photos, purpose="calibration").description["num_samples"] == 2 < everything
    assert image_batches(photos, purpose="calibration", num_samples=3).description["num_samples"] == 3
