"""The HTML report and the model card: one file that says what is known, escaped, without paths of the machine."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import batches_for, save_tiny_vit, tiny_model
from PIL import Image

import fips
from fips.app import compressing
from fips.app.compressing import compress_to_directory
from fips.app.evaluating import evaluable_source
from fips.app.outline import PackedLayer, PackedOutline, outline_of_directory
from fips.app.page import PAGE, Example, report_page, sides_of
from fips.cli import main
from fips.config import CompressionConfig, DataConfig, Recipe
from fips.demo.run import MODEL_DIRECTORY
from fips.errors import CheckpointError, ModelError
from fips.evaluation import Divergence, EvaluationResult, TextResult
from fips.files.names import base_name, without_directories
from fips.models.transformers import load_processor
from fips.plan.kinds import KindSize
from fips.record import CompressionReport, scores
from fips.storage.companions import license_of

FIXTURES = Path(__file__).parent / "fixtures"
Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
DATA = ["--num-samples", "16", "--sequence-length", "16"]


class Tags(HTMLParser):
    """The elements of a page, its text, and what it would fetch; raises where they do not nest."""

    EMPTY = ("meta", "img", "wbr", "br", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a person, with a space, in which everything lies."""
    return tmp_path_factory.mktemp("home") / "Jane Doe"


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    path = home / "models" / "little-llama"
    tiny_model("llama", vocab_size=260).save_pretrained(path)
    load_processor(str(MODEL_DIRECTORY), "text").save_pretrained(path)
    (path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Little\n")
    return path


@pytest.fixture(scope="module")
def text(home: Path) -> Path:
    path = home / "data" / "functions.txt"
    path.parent.mkdir(parents=True)
    path.write_text("def f(x):\n    return x + 1\n" * 200)
    return path


@pytest.fixture(scope="module")
def packed(model: Path, text: Path, home: Path) -> Path:
    path = home / "small"
    command = ["compress", str(model), "--data", str(text), "--bits", "6", "--layers", "blocks", "--output", str(path)]
    assert main([*command, *DATA]) == 0
    return path


@pytest.fixture(scope="module")
def images(home: Path) -> Path:
    root, generator = home / "pets", np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(4):
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def vit(home: Path, images: Path) -> tuple[Path, Path]:
    """A model and what it was compressed to."""
    path, out = home / "vit", home / "small-vit"
    save_tiny_vit(path)
    assert main(["compress", str(path), "--data", str(images), "--size", "60%", "--output", str(out)]) == 0
    return path, out


def page_of(directory: Path) -> str:
    return (directory / PAGE).read_text(encoding="utf-8")


def test_a_compression_writes_a_page_that_loads_nothing(packed: Path) -> None:
    found = Tags(page_of(packed))
    assert found.addresses == []
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(found.tags)
    assert "url(" not in page_of(packed)
    assert "@import" not in page_of(packed)
    assert "default-src 'none'" in page_of(packed)
    assert "prefers-color-scheme: dark" in page_of(packed)


def test_the_page_says_what_is_known(packed: Path) -> None:
    found = Tags(page_of(packed)).text
    outline = outline_of_directory(str(packed))
    report = outline.report
    assert report is not None
    assert report.created is not None
    words = [
        "little-llama",
        report.created[:10],
        "6 bits per weight",
        "MLP",
        "attention",
        "embeddings, heads",
        "all else",
    ]
    words += [f"{layer.bits:.2f} bits" for layer in outline.layers]
    words += [layer.values for layer in outline.layers]
    words += [f"held out {layer.held_out:.3f}" for layer in outline.layers]
    words += [f"{error:.3g}" for error in outline.block_errors.values()]
    words += [value for name, value in report.rows() if name != "note"]
    words += ["functions.txt", "num_samples 16", "seed 0", report.environment["device"], report.environment["torch"]]
    words += ["fips report DIR --data DATA --against MODEL", *report.phases]
    assert [word for word in words if word not in found] == []


def test_the_bars_of_sizes_add_up(packed: Path) -> None:
    """Before is the whole width; what the pale bars take from it leaves what is after."""
    rows = re.findall(r"<tr><td>(.*?)</td>\s*<td><div class=\"track\">(.*?)</div>", page_of(packed), re.DOTALL)
    widths = {
        re.sub(r"<.*?>", "", name): {
            kind: (float(left), float(width))
            for kind, left, width in re.findall(r'class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', parts)
        }
        for name, parts in rows
    }
    before, after = (sum(width for _, width in widths[name].values()) for name in ("before", "after"))
    kinds = outline_of_directory(str(packed)).kinds
    share = sum(kind.bytes_after for kind in kinds) / sum(kind.bytes_before for kind in kinds)
    saved = sum(width for name in widths for kind, (_, width) in widths[name].items() if kind == "saved")
    assert before == pytest.approx(100, abs=0.05)
    assert after == pytest.approx(100 * share, abs=0.05)
    assert saved == pytest.approx(before - after, abs=0.05)
    assert widths["attention"]["saved"][0] == pytest.approx(after, abs=0.05)


def test_the_page_is_in_the_manifest_and_the_directory_loads(packed: Path, tmp_path: Path) -> None:
    assert PAGE in json.loads((packed / "fips_manifest.json").read_text())["files"]
    fips.load(packed)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in packed.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / PAGE).write_text("something else")
    with pytest.raises(CheckpointError, match=PAGE):
        fips.load(copy)


@pytest.mark.slow
def test_no_page_costs_nothing_but_itself(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Log
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(compressing, "report_page", fail)
    recipe = Recipe(
        compression=CompressionConfig(bits=6.0), data=DataConfig(source=str(text), num_samples=8, sequence_length=16)
    )
    done = compress_to_directory(str(model), recipe, tmp_path / "out", quality=fail)  # type: ignore[arg-type]
    assert done is not None
    assert done.report.quality is None
    assert "lacks its report for people" in caplog.text
    assert "quality could not be measured" in caplog.text
    assert not (tmp_path / "out" / PAGE).exists()
    assert fips.load(tmp_path / "out").fips_report.to_dict() == done.report.to_dict()


def test_nothing_says_where_it_was_made(packed: Path, home: Path, text: Path) -> None:
    for words in (page_of(packed), (packed / "README.md").read_text()):
        assert "Jane Doe" not in words
        assert str(home.parent) not in words
        assert "little-llama" in words
        assert text.name in words


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/models/vit", "vit"), ("./vit", "vit"), ("../a/vit/", "vit"), ("~/vit", "vit"), ("/", "/"),
        (r"C:\Users\me\vit", "vit"), ("file:///home/me/vit", "vit"), ("owner/name", "owner/name"),
        ("timm/deit_base", "timm/deit_base"), ("wikitext:wikitext-2-raw-v1", "wikitext:wikitext-2-raw-v1"),
    ],
)  # fmt: skip
def test_the_base_name_of_a_source(source: str, shown: str) -> None:
    assert base_name(source) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("left out `/home/me/a.txt`, 3 lines", "left out `a.txt`, 3 lines"),
        ("path=/tmp/x/y:3 or source:/home/me/z", "path=y:3 or source:z"),
        ("~/data/x.txt, ~me/y and D:/data/z", "x.txt, y and z"),
        ("3 / 4 of and/or, 10 MB/s, owner/name", "3 / 4 of and/or, 10 MB/s, owner/name"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        (r"re:.*\.mlp\.(fc1|fc2)", r"re:.*\.mlp\.(fc1|fc2)"),
    ],
)
def test_paths_in_a_text_become_their_last_parts(text: str, shown: str) -> None:
    assert without_directories({"notes": [text]}) == {"notes": [shown]}


def test_a_source_with_spaces_is_found_in_texts() -> None:
    record = {"source": "/home/Jane Doe/m", "data": {"source": "./d"}, "notes": ["of /home/Jane Doe/m/x and ./d."]}
    assert without_directories(record) == {"source": "m", "data": {"source": "d"}, "notes": ["of m/x and d."]}


def made_up(blocks: int, layers: int, report: CompressionReport | None) -> PackedOutline:
    names = [f"model.layers.{block}.mlp.p{layer}" for block in range(blocks) for layer in range(layers)]
    found = tuple(
        PackedLayer(
            name=name, inputs=64, outputs=128, rank=0, pattern="full", values="nl4", bits=4 + index / 100, held_out=1.01
        )
        for index, name in enumerate(names)
    )
    kinds = (KindSize("MLP up", 3, 1000, 4000, 500.0), KindSize("all else", 2, 10, 40, 44.0))
    return PackedOutline(
        found, kinds, {f"model.layers.{block}": 0.00123 + 0.001 * block for block in range(blocks)}, report
    )


@pytest.mark.parametrize(("blocks", "layers"), [(1, 3), (30, 3), (2, 9)])
def test_every_layer_is_on_the_page_once(blocks: int, layers: int) -> None:
    """Beside the others of its block; where those are many, in a row of its own."""
    page = report_page(made_up(blocks, layers, None), name="small")
    text = Tags(page).text
    for index in range(blocks * layers):
        assert page.count(f"<b>{4 + index / 100:.2f}</b> bits") == 1
    rows = re.findall(r'<th scope="row">(model[\w.]+)</th>', page)
    assert len(rows) == (blocks * layers if layers == 9 else blocks)
    assert rows == sorted(rows, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    for block in range(blocks):
        assert text.count(f" {0.00123 + 0.001 * block:.3g}") == 1
    assert "No record lies beside the weights" in text


def test_what_files_say_is_escaped(packed: Path) -> None:
    outline = outline_of_directory(str(packed))
    report = outline.report
    assert report is not None
    bad = "<script>alert(1)</script>"
    report.source = f"owner/{bad}"
    report.notes = [bad]
    report.data = {"source": bad, bad: bad}
    report.environment = {**report.environment, "device": bad, "fips": bad}
    report.quality = {
        "data": {"source": bad}, "scored_on": bad, "scores": [{"name": bad, "before": bad, "after": bad}],
    }  # fmt: skip
    example = Example(caption=bad, prompt=bad, sides=sides_of({bad: f"a{bad}", "original": "ab"}))
    page = report_page(outline, name=bad, examples=[example])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 9
    Tags(page)


def test_a_note_is_told_once_and_its_code_is_marked(packed: Path) -> None:
    outline = outline_of_directory(str(packed))
    report = outline.report
    assert report is not None
    report.notes = ["`wte` is left dense: no tokens"]
    report.plan["skipped"] = [
        {"name": "wte", "reason": "no tokens"},
        {"name": "lm_head", "reason": "matched by `ignore`"},
    ]
    page = report_page(outline, name="small")
    assert "<li><code>wte</code> is left dense: no tokens</li>" in page
    assert "<li>skipped <code>lm_head</code>: matched by <code>ignore</code></li>" in page
    assert page.count("no tokens") == 1


def test_texts_are_marked_from_where_they_part() -> None:
    first, second = sides_of({"original": "x + 1\n", "compressed": "x + 2\n"})
    assert (first.same, first.other) == ("x + ", "1\n")
    assert (second.same, second.other) == ("x + ", "2\n")
    (alone,) = sides_of({"compressed": "x"})
    assert (alone.same, alone.other) == ("x", "")
    longer, shorter = sides_of({"original": "xyz", "compressed": "x"})
    assert (longer.other, shorter.other) == ("yz", "")


def test_report_writes_the_page_of_a_directory(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in packed.iterdir()}
    assert main(["report", str(packed)]) == 0
    assert "written to report.html" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == page_of(packed)
    assert main(["report", str(packed), "--output", str(tmp_path / "new" / "x.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == len((tmp_path / "new" / "x.html").read_bytes())
    assert main(["report", str(packed)]) == 0, "a report may be written over"
    assert {path: path.read_bytes() for path in packed.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "report.html"]


def test_report_refuses_what_would_do_harm(packed: Path, model: Path, tmp_path: Path, capsys: Capture) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    pipe, endless = tmp_path / "pipe", tmp_path / "endless"
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    cases = [
        ([str(packed), "--output", str(packed / "again.html")], 1, "whose manifest lists all that it holds"),
        ([str(packed), "--output", str(packed / PAGE)], 1, "whose manifest lists all that it holds"),
        ([str(packed), "--output", str(mine)], 1, "is no report of fips"),
        ([str(packed), "--output", str(pipe)], 1, "is no report of fips"),  # reading it would wait for ever
        ([str(packed), "--output", str(endless)], 1, "is no report of fips"),
        ([str(packed), "--output", str(tmp_path)], 1, "is a directory"),
        ([str(model), "--output", str(tmp_path / "x.html")], 1, "is not a compressed model"),
        ([str(packed), "--output", str(tmp_path / "x.html"), "--against", str(model)], 2, "give --data"),
        ([str(packed), "--output", str(tmp_path / "x.html"), "--num-samples", "3"], 2, "give --data"),
    ]
    for arguments, code, words in cases:
        assert main(["report", *arguments]) == code, words
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
    assert mine.read_text() == "<p>mine</p>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["endless", "mine.html", "pipe"]
    fips.load(packed)


@pytest.mark.slow
def test_report_evaluates_texts_beside_the_original(
    packed: Path, model: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, data = tmp_path / "x.html", ["--data", str(text), *DATA]
    assert main(["report", str(packed), "--output", str(out), *data, "--against", str(model), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["examples"] == 3
    found = Tags(out.read_text()).text
    scored = DataConfig(source=str(text), num_samples=16, sequence_length=16)
    original = evaluable_source(str(model), scored).evaluate().to_dict()
    for name in ("perplexity", "bits_per_byte"):
        digits = ".4g" if name == "perplexity" else ".4f"
        assert f"{original[name]:{digits}} {done['quality'][name]:{digits}}" in found
    assert re.search(rf"{done['quality']['against']['agreement_percent']:.2f}( ± [\d.e-]+)? % of tokens", found)
    assert "Not evaluated" not in found
    assert found.count("example ") == 3
    assert "Jane Doe" not in out.read_text()
    assert main(["report", str(packed), "--output", str(out), *data, "--examples", "0"]) == 0
    found = Tags(out.read_text()).text
    assert "KL to the original" not in found
    assert "example " not in found


def test_report_shows_images_with_their_classes(
    vit: tuple[Path, Path], images: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, small = vit
    out = tmp_path / "x.html"
    options = ["--data", str(images), "--against", str(model), "--examples", "2", "--batch-size", "3", "--json"]
    assert main(["report", str(small), "--output", str(out), *options]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    original = evaluable_source(str(model), DataConfig(source=str(images))).evaluate().to_dict()
    found = Tags(out.read_text())
    assert f"{original['top1_percent']:.2f} % {quality['top1_percent']:.2f} %" in found.text
    assert [address.partition(",")[0] for address in found.addresses] == ["data:image/jpeg;base64"] * 2
    assert len(re.findall(r"\d+\.\d % +(cat|dog)", out.read_text())) == 2 * 2 * 2
    assert "example 1, cat" in found.text
    assert "example 5, dog" in found.text


def test_the_size_of_the_whole_file_is_said_as_it_was_asked_for(vit: tuple[Path, Path]) -> None:
    report = fips.load(vit[1]).fips_report
    assert report.asked == {"size": "60%"}
    assert report.config.bits is not None
    assert "asked for: 60% for the whole file" in page_of(vit[1])
    assert "60% for the whole file asked for" in (vit[1] / "README.md").read_text()
    assert 0 < sum(report.phases.values()) <= report.seconds
    assert CompressionReport.from_dict(report.to_dict()).to_dict() == report.to_dict()


@pytest.mark.parametrize("name", [path.name for path in FIXTURES.iterdir() if path.is_dir()])
def test_directories_of_earlier_versions_have_a_report(name: str, tmp_path: Path) -> None:
    assert main(["report", str(FIXTURES / name), "--output", str(tmp_path / "x.html")]) == 0
    assert "whole file" in Tags((tmp_path / "x.html").read_text()).text


@pytest.mark.parametrize("field", ["data", "environment", "overfit", "phases", "notes", "asked", "created", "plan"])
def test_a_damaged_record_is_an_error_of_one_line_or_left_out(
    field: str, packed: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in packed.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    record = json.loads((copy / "fips_report.json").read_text())
    record["layers" if field == "plan" else field] = 7
    (copy / "fips_report.json").write_text(json.dumps(record))
    code = main(["report", str(copy), "--output", str(tmp_path / "x.html")])
    assert code in (0, 1)
    assert code == 0 or "no compression that can be reported on" in capsys.readouterr().err
    assert (tmp_path / "x.html").exists() == (code == 0)


def test_scores_of_the_original_follow_from_the_difference() -> None:
    against = Divergence(
        change=math.log(1.25), change_standard_error=None, kl=0.01, kl_standard_error=None, agreement_percent=99.0,
        agreement_standard_error=None,
    )  # fmt: skip
    result = TextResult(
        perplexity=5.0, perplexity_standard_error=None, bits_per_byte=2.0, num_tokens=10, num_bytes=20,
        sequence_length=8, stride=7, data={}, against=against,
    )  # fmt: skip
    first, second, *others = scores(result.to_dict())
    assert (first.before, first.after) == ("4", "5")
    assert second.before == f"{2 - math.log2(1.25) / 2:.4f}"
    assert [score.line() for score in others] == ["0.01 nats per token", "99.00 % of tokens", "+0.223 nats per token"]
    paired = replace(result, against=replace(against, change_standard_error=0.0123))
    assert paired.rows()[-2] == ("change of the loss", "+0.223 ± 0.01 nats per token")
    assert [score.before for score in scores(replace(result, against=None).to_dict())] == [None, None]
    earlier = {name: value for name, value in result.to_dict().items() if name not in ("scores", "scored_on", "task")}
    assert [(score.name, score.line()) for score in scores(earlier)] == [("perplexity", "5")]
    assert result.to_dict()["scored_on"] == "10 tokens in windows of 8, stride 7"


@pytest.mark.slow
def test_the_card_says_size_data_license_and_quality(packed: Path, model: Path, text: Path, tmp_path: Path) -> None:
    card = (packed / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"library_name": "transformers", "tags": ["fips"], "license": "apache-2.0"}
    report = json.loads((packed / "fips_report.json").read_text())
    sizes = f"| bytes of the model | {report['model']['bytes']:,} | {report['compressed_model']['bytes']:,} |"
    for words in (sizes, "6 bits per weight asked for", "16 examples of `functions.txt`", "Not evaluated"):
        assert words in card
    recipe = Recipe(
        compression=CompressionConfig(bits=6.0), data=DataConfig(source=str(text), num_samples=8, sequence_length=16)
    )
    scored: list[EvaluationResult] = []

    def quality(compressed: Any) -> EvaluationResult:
        data = DataConfig(source=str(text), num_samples=8, sequence_length=16)
        found = evaluable_source(str(model), data)
        scored.append(fips.evaluate(compressed, found.batches, against=found.model))
        return scored[0]

    out = tmp_path / "out"
    compress_to_directory(str(model), recipe, out, quality=quality)
    assert json.loads((out / "fips_report.json").read_text())["quality"] == scored[0].to_dict()
    card, page = (out / "README.md").read_text(), Tags(page_of(out)).text
    assert f"| {scored[0].to_dict()['perplexity']:.4g} |" in card
    assert "Not evaluated" not in card + page
    assert f"{scored[0].to_dict()['bits_per_byte']:.4f}" in page
    assert f"-> {scored[0].to_dict()['perplexity']:.4g}" in fips.load(out).fips_report.summary()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: 'mit'\n---\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: llama 3\nlicense_link: https://a.org/L\n---\n",
            {"license": "other", "license_name": "llama 3", "license_link": "https://a.org/L"},
        ),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("---\nlicense: <b>x\n---\n", {}),
        ("license: mit\n", {}),
        (None, {}),
    ],
)
def test_the_license_is_that_of_the_source(card: str | None, expected: dict[str, str], tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config._name_or_path = str(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(model) == expected


def test_no_license_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    assert license_of(tiny_model("llama")) == {}
    model = tiny_model("llama")
    model.config.license = "gpl-3.0"
    assert license_of(model) == {"license": "gpl-3.0"}
    of_timm = torch.nn.Linear(2, 2)
    of_timm.pretrained_cfg = {"license": "apache-2.0"}  # type: ignore[assignment]
    assert license_of(of_timm) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    "place", ["file/r.html", "file/sub/r.html", "n" * 300 + ".html", "/proc/no/r.html", "new/r.html"]
)
def test_where_no_report_can_be_is_told_before_the_evaluation(
    place: str, packed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from fips.app import reporting

    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    evaluated: list[str] = []

    def evaluable(source: str, *_: Any, **__: Any) -> Any:
        evaluated.append(source)
        assert sorted(tmp_path.rglob("*")) == before, "what the place was tried with is gone"
        raise ModelError("far enough")

    monkeypatch.setattr(reporting, "evaluable_source", evaluable)
    assert main(["report", str(packed), "--data", str(text), "--output", str(tmp_path / place)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("far enough" in error) == (place == "new/r.html")
    assert bool(evaluated) == (place == "new/r.html")
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "fips-paper", "budget": 0.5, "reconstruction": {"steps": 2}}, "2 steps of every group"),
        ({"bits": 6.0, "effort": "fast", "distill": {"steps": 3}}, "3 steps of the whole model"),
        ({"bits": 6.0, "effort": "fast"}, None),
    ],
)
def test_a_report_says_what_was_trained(settings: dict[str, Any], said: str | None) -> None:
    model = tiny_model("llama")
    report = fips.compress(model, batches_for(model), fips.CompressionConfig(**settings))
    assert dict(report.rows()).get("trained") == said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a program alone is told on Linux only")
def test_the_peak_memory_of_a_run_is_its_own_and_not_that_of_the_program_that_started_it() -> None:
    peak = "import torch; from fips.record import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
    parent = f"""
import subprocess, sys
large = bytearray(3_000_000_000)
large[:] = bytes(1) * len(large)
print(subprocess.run([sys.executable, "-c", {peak!r}], capture_output=True, text=True, check=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 10**8 < int(done.stdout) < 2 * 10**9
