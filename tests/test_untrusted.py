"""Directories from strangers: everything malformed is a ``CheckpointError`` that names file and field, before work."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_model
from directory_mutations import SIZES, Tensors, join, renew_manifest, split
from fuzz_directories import RECIPES, packed_model
from torch import nn

import fips
from fips.files.manifest import MANIFEST
from fips.layers.linear import factored_layers
from fips.models import building
from fips.models.transformers import build_empty, config_from_fields
from fips.storage.layout import Layout, check_layers, install_layout

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj"
Edit = Callable[[Any], Any]
LOADERS: dict[str, Callable[[Path], Any]] = {
    "load": fips.load,
    "unverified": lambda path: fips.load(path, verify=False),
    "from_pretrained": transformers.AutoModelForCausalLM.from_pretrained,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model"
    fips.save(packed_model(RECIPES["basis"]), path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    fips.save(fips.load(whole), tmp_path / "sharded", max_shard_size=15_000)
    return tmp_path / "sharded"


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


def edit_layer(path: Path, **fields: Any) -> None:
    edit(path / "config.json", lambda c: c["quantization_config"]["layers"][DOWN].update(fields))


def move(path: Path, place: str) -> None:
    """The layer of ``DOWN`` at another place, in the layout and in the file."""

    def change(content: Any) -> None:
        layers = content["quantization_config"]["layers"]
        layers[place] = layers.pop(DOWN)

    edit(path / "config.json", change)
    tensors = Tensors.read(path / WEIGHTS)
    tensors.entries = {name.replace(f"{DOWN}.", f"{place}."): entry for name, entry in tensors.entries.items()}
    tensors.write()


def header_of(path: Path, change: Edit) -> None:
    header, body = split((path / WEIGHTS).read_bytes())
    change(header)
    (path / WEIGHTS).write_bytes(join(header, body))


def refused(path: Path, match: str, *, by: str = "unverified") -> None:
    with pytest.raises(fips.errors.CheckpointError, match=match):
        LOADERS[by](path)


# ------------------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "64 levels"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "64 levels"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "'model_type' is there twice"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"", "not valid JSON"),
        (b" " * (33 << 20), "more than"),
    ],
    ids=["deep list", "deep object", "twice", "encoding", "digits", "list", "empty", "long"],
)
@pytest.mark.parametrize("name", ["config.json", MANIFEST, INDEX])
def test_json_is_read_strictly(sharded: Path, name: str, content: bytes, message: str) -> None:
    (sharded / name).write_bytes(content)
    for loader in {MANIFEST: ["load"], INDEX: ["unverified", "from_pretrained"]}.get(name, ["unverified"]):
        refused(sharded, rf"{name}`.*{message}", by=loader)


@pytest.mark.parametrize("nan", [float("nan"), {"__float__": "NaN"}], ids=["number", "object"])
def test_nan_in_a_setting_is_named(nan: Any, copy: Path) -> None:
    edit(copy / "config.json", lambda c: c.update(rope_parameters={"rope_theta": nan}))
    refused(copy, r"config\.json`: `rope_parameters\.rope_theta` is NaN")


@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "loop"])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, MANIFEST])
def test_what_is_no_file_is_not_read(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else name)
    refused(copy, rf"{name}", by="load")


# ------------------------------------------------------------------------------------------------- sizes and places


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nonzeros": 10**15}, rf"config\.json`: `quantization_config`.*{DOWN}.*`nonzeros` {10**15}"),
        ({"nonzeros": 2**64}, r"layers.*nonzeros.*less than"),
        ({"nonzeros": True}, r"layers.*nonzeros.*valid integer"),
        ({"columns": 2**44}, r"layers.*columns.*less than"),
        ({"columns": "80"}, r"layers.*columns.*valid integer"),
        ({"columns": 160}, "nonzeros|has shape"),
        ({"basis": None}, "wants either `basis` or `width`"),
        ({"format": "٣:٤"}, "unknown packed format"),
        ({"format": "31:032"}, "unknown packed format"),
        ({"bias": True}, rf"lacks tensor `{DOWN}\.bias`"),
        ({"conv1d": True}, rf"layer `{DOWN}` of the checkpoint has conv1d True, the model wants False"),
        ({"activation_bits": 8, "values": "float"}, "`activation_bits` is for integer `values`"),
    ],
)
@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
def test_wrong_fields_of_a_layer_are_named(copy: Path, loader: str, fields: dict[str, Any], message: str) -> None:
    edit_layer(copy, **fields)
    refused(copy, message, by=loader)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(layers={}), "`layers` is empty"),
        (lambda q: q["bases"].update({"a.b": q["bases"]["g0"]}), r"'a\.b' cannot be the name"),
        (lambda q: q["bases"].update({"": q["bases"]["g0"]}), "'' cannot be the name"),
        (lambda q: q["bases"].update(g9=q["bases"]["g0"]), "no layer uses basis `g9`"),
        (lambda q: q["bases"]["g0"].update(rank=2**40), r"bases\.g0\.rank"),
        (lambda q: q["bases"]["g0"].update(width=2**31 - 1), r"fips_bases\.g0\.weight` has shape \(32, 16\)"),
        (lambda q: q["layers"].update({"": q["layers"][DOWN]}), "'' cannot be the name"),
        (lambda q: q["layers"].update({"a..b": q["layers"][DOWN]}), r"'a\.\.b' cannot be the name"),
    ],
)
@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
def test_a_malformed_layout_is_refused(copy: Path, loader: str, change: Edit, message: str) -> None:
    edit(copy / "config.json", lambda c: change(c["quantization_config"]))
    refused(copy, message, by=loader)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model.norm", "is a `LlamaRMSNorm` in the model; only linear layers"),
        ("model.layers", "is a `ModuleList` in the model; only linear layers"),
        ("model.embed_tokens", "is a `Embedding` in the model; only linear layers"),
        ("model.layers.0.self_attn.q_proj", "has in_features 80, the model wants 32"),
        ("model.layers.7.mlp.down_proj", "is not in `LlamaForCausalLM`"),
        (f"{DOWN}.x", "is not in `LlamaForCausalLM`"),
    ],
)
@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
def test_a_layer_at_the_wrong_place_is_refused(copy: Path, loader: str, place: str, message: str) -> None:
    move(copy, place)
    refused(copy, message, by=loader)


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)
        self.second.weight = self.first.weight


def layout_of(width: int = 8, columns: int = 16, **layers: dict[str, Any]) -> Layout:
    entry = {"role": "up", "format": "dense", "bias": True, "conv1d": False, "width": width, "columns": columns}
    entry["nonzeros"] = width * columns
    named = {name: {**entry, **changes} for name, changes in layers.items()}
    return Layout.parse({"quant_method": "fips", "format_version": 1, "bases": {}, "layers": named}, where="here")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of(9, first={}), "layer `first` of the checkpoint has in_features 9, the model wants 8"),
        (layout_of(8, 32, first={}), "layer `first` of the checkpoint has out_features 32, the model wants 16"),
        (layout_of(first={"bias": False}), "layer `first` of the checkpoint has bias False, the model wants True"),
        (layout_of(first={"conv1d": True}), "layer `first` of the checkpoint has conv1d True, the model wants False"),
        (layout_of(first={}), "layer `first` of the checkpoint shares its weight with another"),
    ],
)
def test_a_packed_layer_is_compared_with_the_dense_one(layout: Layout, message: str) -> None:
    model = Tied()
    before = dict(model.named_modules())
    with pytest.raises(fips.errors.CheckpointError, match=message):
        install_layout(model, layout)
    assert dict(model.named_modules()) == before


def test_two_names_of_one_place_are_refused(whole: Path) -> None:
    fields = json.loads((whole / "config.json").read_text())["quantization_config"]
    fields["layers"]["layers.0.mlp.down_proj"] = fields["layers"][DOWN]
    with pytest.raises(fips.errors.CheckpointError, match="two layers of the checkpoint have one place"):
        install_layout(tiny_model("llama", num_hidden_layers=1), Layout.parse(fields, where="here"))


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**7}, r"`num_hidden_layers` is 1e\+07, but the weights are \d+ tensors"),
        ({"num_labels": 10**9}, "`num_labels`"),
        ({"num_hidden_layers": 250}, "has a tensor|lacks tensor|describes a model of more than"),
        ({"hidden_size": 2**40}, r"config.json` describes a model of [\d,]+ weights"),
        ({"hidden_act": "nothing"}, "config.json`.* describes no .*KeyError"),
        ({"output_hidden_states": "yes"}, "config.json`: `output_hidden_states` wants true or false, got 'yes'"),
        ({"architecture": "hf-hub:me/mine", "pretrained_cfg": {}}, "`architecture` wants the name of a model of timm"),
        ({"model_args": {"checkpoint_path": "/x.pth"}}, r"`model_args\.checkpoint_path` is no setting of a model"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_named(copy: Path, fields: dict[str, Any], message: str) -> None:
    edit(copy / "config.json", lambda c: c.update(fields))
    refused(copy, message)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 10**7}, {"hidden_act": "nothing"}])
def test_transformers_is_not_asked_to_build_what_cannot_be_built(copy: Path, fields: dict[str, Any]) -> None:
    edit(copy / "config.json", lambda c: c.update(fields))
    refused(copy, "config.json` describes", by="from_pretrained")


def test_more_weights_than_any_file_holds_are_refused_before_they_are_allocated(copy: Path) -> None:
    edit(copy / "config.json", lambda c: c.update(intermediate_size=2**32))
    size = sum(file.stat().st_size for file in copy.glob("*.safetensors"))
    with pytest.raises(
        fips.errors.CheckpointError, match=r"a model of [\d,]+ weights; its files have ([\d,]+) bytes"
    ) as caught:
        fips.load(copy, verify=False)
    assert int(re.search(r"have ([\d,]+) bytes", str(caught.value))[1].replace(",", "")) <= size  # type: ignore[index]


def test_buffers_of_no_file_are_bounded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "BUFFER_BYTES", 0)
    monkeypatch.setattr(building, "WEIGHTS_PER_BYTE", 10**6)
    fields = json.loads((copy / "config.json").read_text())
    built = build_empty(config_from_fields({**fields, "head_dim": 2**12, "quantization_config": None}))
    needed = sum(buffer.numel() * buffer.element_size() for buffer in built.buffers())
    with pytest.raises(fips.errors.CheckpointError, match=rf"a model with {needed:,} bytes of buffers"):
        building.build_within(lambda: built, tensors=100, nbytes=needed // 4 - 1, path=copy / "config.json")
    assert building.build_within(lambda: built, tensors=100, nbytes=needed, path=copy / "config.json") is built


def test_nothing_is_counted_after_a_build() -> None:
    with pytest.raises(fips.errors.CheckpointError, match="more than"):
        building.build_within(
            lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(10_000)), tensors=1, nbytes=1, path=Path("config.json")
        )
    assert len(nn.ModuleList(nn.Linear(1, 1) for _ in range(1000))) == 1000


# ---------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (f"{DOWN}.values", "I32", "has type torch.int32"),
        (f"{DOWN}.pattern", "I8", "has type torch.int8, wanted a type like torch.uint8"),
        ("model.fips_bases.g0.weight", "I32", "has type torch.int32"),
        ("model.norm.weight", "I32", "has type torch.int32"),
        ("model.norm.weight", "F8_E4M3", "has type F8_E4M3"),
    ],
)
def test_types_are_compared_before_tensors_are_read(
    copy: Path, loader: str, name: str, dtype: str, message: str
) -> None:
    tensors = Tensors.read(copy / WEIGHTS)
    _, shape, _ = tensors.entries[name]
    tensors.entries[name] = (dtype, shape, bytes(SIZES[dtype] * torch.Size(shape).numel()))
    tensors.write()
    refused(copy, message, by=loader)


@pytest.mark.parametrize("dtype", ["F64", "BF16"])
def test_one_dense_tensor_of_another_type_is_refused(copy: Path, dtype: str) -> None:
    tensors = Tensors.read(copy / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    _, shape, _ = tensors.entries[name]
    tensors.entries[name] = (dtype, shape, bytes(SIZES[dtype] * torch.Size(shape).numel()))
    tensors.write()
    refused(copy, rf"tensor `{name}` has type .*, wanted a type like torch\.float32, in which the model runs")


def test_norms_may_all_have_another_type(tmp_path: Path) -> None:
    model = packed_model(RECIPES["shared-16-bit"])
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    fips.save(model, tmp_path / "mixed")
    loaded = fips.load(tmp_path / "mixed")
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("loader", list(LOADERS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ending", [".values", ".scales", "g0.weight"])
def test_values_that_are_no_numbers_are_refused(copy: Path, loader: str, ending: str, value: float) -> None:
    tensors = Tensors.read(copy / WEIGHTS)
    name = next(n for n, (dtype, _, _) in tensors.entries.items() if n.endswith(ending) and dtype == "F32")
    dtype, shape, content = tensors.entries[name]
    tensors.entries[name] = (dtype, shape, content[:-4] + struct.pack("<f", value))
    tensors.write()
    renew_manifest(copy)
    refused(copy, rf"tensor `{name}` holds NaN or Inf", by=loader)


def test_bits_behind_the_end_of_a_pattern_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 3, generator=generator) < 0.5  # 9 bits of 16
    model = nn.Sequential(fips.FactoredLinear.from_factor(None, torch.ones(3, 3), mask, role="down", fmt="bitmask"))
    check_layers(model)
    model[0].pattern[-1] |= 0b10
    with pytest.raises(fips.errors.CheckpointError, match="layer `0`: its pattern has bits behind its end"):
        check_layers(model)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    one, other = Tensors.read(first), Tensors.read(second)
    name = next(iter(one.entries))
    other.entries[name] = one.entries[name]
    other.write()
    refused(sharded, rf"tensor `{name}` is both in `.*{first.name}` and in `.*{second.name}`")
    refused(sharded, rf"tensor `{name}` is both in", by="from_pretrained")


def test_header_keys_that_are_there_twice_are_refused(copy: Path) -> None:
    header, body = split((copy / WEIGHTS).read_bytes())
    name = "model.norm.weight"
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    text += " " * (-len(text) % 8)
    (copy / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)
    refused(copy, rf"the header of `.*{WEIGHTS}`.*'{name}' is there twice|not a safetensors file")


@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
def test_overlapping_tensors_are_refused(copy: Path, loader: str) -> None:
    def overlap(header: Any) -> None:
        names = [n for n in header if n.endswith("proj.weight") and ".self_attn." in n]
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]

    header_of(copy, overlap)
    refused(copy, f"`.*{WEIGHTS}` is cut short or not a safetensors file", by=loader)


@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
@pytest.mark.parametrize("content", [b"", bytes(7), b"\xff" * 64, struct.pack("<Q", 2) + b"[]"], ids=str)
def test_weights_that_are_no_safetensors_are_refused(copy: Path, content: bytes, loader: str) -> None:
    (copy / WEIGHTS).write_bytes(content)
    refused(copy, WEIGHTS, by=loader)


@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
def test_weights_that_are_cut_short_are_refused(copy: Path, loader: str) -> None:
    os.truncate(copy / WEIGHTS, (copy / WEIGHTS).stat().st_size // 2)
    refused(copy, f"`.*{WEIGHTS}` is cut short", by=loader)


# ------------------------------------------------------------------------------------------------ names of files


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], "`weight_map` wants an object"),
        (None, "`weight_map` wants an object"),
        ({}, "`weight_map` wants an object"),
        ({"a": 1}, "names the file 1"),
        ({"a": None}, "names the file None"),
        ({"a": ["x"]}, "names the file"),
        ({"a": "../whole/model.safetensors"}, "names the file '../whole"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a": "./config.json"}, "names the file './config.json'"),
        ({"a": "config.json"}, "is no safetensors file"),
        ({"a": "nothing.safetensors"}, "nothing.safetensors` is missing"),
        ({"a": "x\0.safetensors"}, "names the file"),
        ({"a": "x" * 3000}, "names the file"),
    ],
)
@pytest.mark.parametrize("loader", list(LOADERS))
def test_an_index_names_files_of_its_directory(sharded: Path, places: Any, message: str, loader: str) -> None:
    edit(sharded / INDEX, lambda content: content.update(weight_map=places))
    renew_manifest(sharded)
    refused(sharded, message, by=loader)


@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
@pytest.mark.parametrize("change", [{"metadata": [1]}, {"metadata": None}, {}], ids=str)
def test_an_index_has_what_transformers_reads(sharded: Path, change: dict[str, Any], loader: str) -> None:
    edit(sharded / INDEX, lambda content: (content.pop("metadata"), content.update(change)))
    refused(sharded, rf"{INDEX}`: `metadata` wants an object", by=loader)


@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
def test_an_index_tells_the_truth(sharded: Path, loader: str) -> None:
    def turn(content: Any) -> None:
        places = content["weight_map"]
        names = sorted(places, key=places.get)
        places[names[0]], places[names[-1]] = places[names[-1]], places[names[0]]

    edit(sharded / INDEX, turn)
    refused(sharded, rf"{INDEX}`: `weight_map` has tensor `.*` in '.*', `.*` holds it", by=loader)


@pytest.mark.parametrize("loader", list(LOADERS))
def test_links_out_of_the_directory_are_refused(copy: Path, whole: Path, loader: str) -> None:
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to(whole / WEIGHTS)
    refused(copy, f"`.*{WEIGHTS}` is a link to `.*`, outside the directory", by=loader)


@pytest.mark.parametrize("loader", list(LOADERS))
def test_links_of_the_hub_cache_are_followed(whole: Path, tmp_path: Path, loader: str) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in whole.iterdir():
        shutil.copy(path, blobs / f"{path.name}-digest")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-digest")
    assert len(factored_layers(LOADERS[loader](snapshot))) == 3


@pytest.mark.parametrize("loader", list(LOADERS))
def test_weights_that_are_there_twice_are_refused(sharded: Path, whole: Path, loader: str) -> None:
    shutil.copy(whole / WEIGHTS, sharded / WEIGHTS)
    refused(sharded, f"has both `{WEIGHTS}` and `{INDEX}`", by=loader)


# ------------------------------------------------------------------------------------------------------- manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(files=[1]), "`files` wants an object of file names, got list"),
        (lambda m: m.update(files={}), "does not list `config.json`"),
        (lambda m: m.pop("files"), "`files` wants an object of file names, got NoneType"),
        (lambda m: m.update(format_version=True), "has format_version True"),
        (lambda m: m["files"].update({"config.json": {}}), r"`files\.config\.json` wants a number `bytes`"),
        (lambda m: m["files"].update({"config.json": 3}), r"`files\.config\.json` wants a number `bytes`"),
        (lambda m: m["files"][WEIGHTS].update(sha256=None), rf"`files\.{WEIGHTS}` wants a number `bytes`"),
        (lambda m: m["files"].pop(WEIGHTS), f"does not list `{WEIGHTS}`"),
        (lambda m: m["files"].update({"a\0": m["files"][WEIGHTS]}), "names the file"),
        (lambda m: m["files"].update({"../x": m["files"][WEIGHTS]}), "names the file '../x'"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"][WEIGHTS]}), "names the file '/etc/passwd'"),
    ],
)
def test_a_malformed_manifest_is_refused(copy: Path, change: Edit, message: str) -> None:
    edit(copy / MANIFEST, change)
    refused(copy, message, by="load")
    fips.load(copy, verify=False)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "pytorch_model.bin", "x.py", "chat_template.jinja", "more/model.safetensors", "notes"]
)
def test_files_that_were_not_written_are_refused(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    refused(copy, f"`.*{name}` is not among the files written", by="load")
    fips.load(copy, verify=False)


def test_files_for_people_may_be_added(copy: Path) -> None:
    for name in ("LICENSE", "plot.png", "CHANGES.md", ".gitattributes", ".cache/huggingface/x.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    fips.load(copy)


def test_shards_and_index_must_be_listed(sharded: Path) -> None:
    for name in (INDEX, sorted(path.name for path in sharded.glob("model-*"))[0]):
        content = (sharded / MANIFEST).read_text()
        edit(sharded / MANIFEST, lambda manifest, name=name: manifest["files"].pop(name))  # type: ignore[misc]
        refused(sharded, f"does not list `{name}`", by="load")
        (sharded / MANIFEST).write_text(content)


# ------------------------------------------------------------------------------------------- report, files afterwards


@pytest.mark.parametrize("content", [b"{}", b"[", b'{"config": 3}', b"\xff", b'{"a":' + b"[" * 10**5])
@pytest.mark.parametrize("loader", ["unverified", "from_pretrained"])
def test_a_damaged_report_costs_the_report_alone(
    copy: Path, loader: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "fips_report.json").write_bytes(content)
    with caplog.at_level("WARNING", logger="fips"):
        model = LOADERS[loader](copy)
    assert not hasattr(model, "fips_report")
    assert [r.getMessage().partition(": ")[0] for r in caplog.records if r.name == "fips"] == ["the report is left out"]


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("loader", list(LOADERS))
def test_a_loaded_model_does_not_depend_on_its_file(copy: Path, loader: str) -> None:
    model = LOADERS[loader](copy)
    before = values(model)
    size = (copy / WEIGHTS).stat().st_size
    with (copy / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * size)
        file.truncate(100)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("loader", list(LOADERS))
def test_a_model_is_saved_over_itself(copy: Path, loader: str) -> None:
    model = LOADERS[loader](copy)
    before = values(model)
    for size in ("10KB", "5GB", "15KB"):
        model.save_pretrained(copy, max_shard_size=size)
        for again in (fips.load(copy), LOADERS["from_pretrained"](copy)):
            found = again.state_dict()
            assert found.keys() == before.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_dense_tensor_is_no_random_one(copy: Path, name: str) -> None:
    tensors = Tensors.read(copy / WEIGHTS)
    del tensors.entries[name]
    tensors.write()
    for loader in ("unverified", "from_pretrained"):
        refused(copy, f"lacks tensor `{name}`", by=loader)


def test_weights_of_another_kind_are_no_packed_model(copy: Path) -> None:
    torch.save({"x": torch.zeros(1)}, copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    refused(copy, r"pytorch_model\.bin` is no safetensors file", by="from_pretrained")


@pytest.mark.parametrize("names", [5, {"a": 1}, "LlamaForCausalLM", [None]], ids=str)
def test_architectures_that_are_no_list_of_names_are_refused_by_from_pretrained(names: object, tmp_path: Path) -> None:
    place = shutil.copytree(Path(__file__).parent / "fixtures" / "format-1-bitmask", tmp_path / "model")
    config = place / "config.json"
    config.chmod(0o644)
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": names}))
    with pytest.raises(fips.FipsError, match=r"`architectures` in config\.json must be a list of class names"):
        transformers.AutoModelForCausalLM.from_pretrained(place)
