"""Random damage to directories of packed models: one function per kind, each deterministic in its generator."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fips.formats.patterns import pattern_in_file
from fips.formats.values import packed_length, values_named

WEIGHTS, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "fips_manifest.json"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 63, 64, 65, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    1.5, -0.0, 1e308, math.nan, math.inf, "", "x", "../../etc/passwd", "/etc/passwd", "\0", "é" * 50, "A" * 100_000,
    None, True, False, [], {}, [[]], [1, 2, 3], {"a": 1}, "dense", "bitmask", "2:4", "4:16", "31:32", "block4", "int2",
    "int8", "float", "up", "down", "0:4", "16:16", "٣:٤",
)  # fmt: skip
ADDED = ("pytorch_model.bin", "model-00001-of-00002.safetensors", "tokenizer.json", "x.py", "notes.md",
         "preprocessor_config.json", "chat_template.jinja", "model.bak", "adapter_model.safetensors")  # fmt: skip
FORMATS = ("dense", "bitmask", "2:4", "4:16", "1:2", "8:16", "3:7", "1:16", "31:32", "block4", "block8")
KINDS = (
    "float",
    "int8",
    "int7",
    "int6",
    "int5",
    "int4",
    "int3",
    "int2",
    "int4g32",
    "int8g16",
    "nl4",
    "nl3g32",
    "tc2",
    "tc3g32",
    "tc4",
)


@dataclass
class Tensors:
    """A safetensors file taken apart: ``(type, shape, bytes)`` by name."""

    path: Path
    entries: dict[str, tuple[str, list[int], bytes]]

    @classmethod
    def read(cls, path: Path) -> Tensors:
        header, body = split(path.read_bytes())
        parts = {
            name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        return cls(path, parts)

    def write(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        body = b""
        for name, (dtype, shape, content) in self.entries.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
            body += content
        self.path.write_bytes(join(header, body))

    def pick(self, rng: Random, *endings: str) -> str:
        """Mostly a tensor with such a name, or of a packed layer."""
        endings = endings or (".values", ".pattern", ".scales", ".group_scales", ".bias")
        packed = [name for name in self.entries if name.endswith(endings) or "fips_bases" in name]
        return rng.choice(packed if packed and rng.random() < 0.7 else list(self.entries))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def join(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def weights_of(directory: Path, rng: Random) -> Path:
    return rng.choice(sorted(directory.glob("*.safetensors")))


def edit_file(path: Path, change: Callable[[Any], str]) -> str:
    """Change a JSON file in place; returns what ``change`` says."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    words = change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return words


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(content[key], (*at, key))


def edit_json(rng: Random, content: Any, within: tuple[str, ...] = ()) -> str:
    """One random edit: a field deleted, renamed, copied from elsewhere, shifted, or set to an odd value."""
    every = list(places(content))
    inner = [place for place in every if any(name in place for name in within)]
    if not every:
        content["x"] = 1
        return "added x"
    place = rng.choice(inner if inner and rng.random() < 0.5 else every)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    key, act = place[-1], rng.random()
    if act < 0.12:
        del parent[key]
        return f"deleted {place}"
    if act < 0.2 and isinstance(parent, dict):
        name = rng.choice(["x", "", "é", f"{key}x", "../x", "weight", "a.b"])
        parent[name] = parent.pop(key)
        return f"renamed {place} to {name!r}"
    if act < 0.35 and type(parent[key]) is int:
        step = rng.choice([1, -1, 2, -2, 8, -8, 64, 100])
        parent[key] += step
        return f"{place} changed by {step}"
    if act < 0.42:
        other = content
        source = rng.choice(every)
        for part in source:
            other = other[part]
        parent[key] = json.loads(json.dumps(other))
        return f"{place} copied from {source}"
    parent[key] = rng.choice(VALUES)
    return f"{place} set to {str(parent[key])[:40]!r}"


def flip(rng: Random, content: bytearray, start: int, end: int, times: int) -> None:
    for _ in range(times):
        content[rng.randrange(start, end)] ^= 1 << rng.randrange(8)


def flip_data(rng: Random, directory: Path) -> str:
    path = weights_of(directory, rng)
    content = bytearray(path.read_bytes())
    flip(rng, content, len(content) - len(split(bytes(content))[1]), len(content), rng.choice([1, 1, 4, 50]))
    path.write_bytes(content)
    return path.name


def change_pattern(rng: Random, directory: Path) -> str:
    tensors = Tensors.read(weights_of(directory, rng))
    name = tensors.pick(rng, ".pattern")
    dtype, shape, content = tensors.entries[name]
    changed, way = bytearray(content), rng.choice(["flip", "ones", "zeros", "random", "shuffle"])
    if way == "flip" and changed:
        flip(rng, changed, 0, len(changed), rng.choice([1, 2, 8]))
    elif way == "shuffle":
        changed = bytearray(rng.sample(changed, len(changed)))
    else:
        changed = bytearray(
            {"ones": b"\xff", "zeros": b"\0"}.get(way, b"") * len(content) or rng.randbytes(len(content))
        )
    tensors.entries[name] = (dtype, shape, bytes(changed))
    tensors.write()
    return f"{name} {way}"


def not_finite(rng: Random, directory: Path) -> str:
    tensors = Tensors.read(weights_of(directory, rng))
    name = tensors.pick(rng, ".scales", ".values")
    dtype, shape, content = tensors.entries[name]
    odd = {"F32": struct.pack("<I", 0x7FC00000), "BF16": b"\xc0\x7f", "F16": b"\x00\x7e"}.get(dtype)
    if odd is not None and rng.random() < 0.5:
        odd = {"F32": struct.pack("<f", -math.inf), "BF16": b"\x80\xff", "F16": b"\x00\xfc"}[dtype]
    if odd is None or len(content) < len(odd):
        return f"{name} has no floats"
    at = rng.randrange(len(content) // len(odd)) * len(odd)
    tensors.entries[name] = (dtype, shape, content[:at] + odd + content[at + len(odd) :])
    tensors.write()
    return name


def flip_header(rng: Random, directory: Path) -> str:
    path = weights_of(directory, rng)
    content = bytearray(path.read_bytes())
    flip(rng, content, 0, len(content) - len(split(bytes(content))[1]), rng.choice([1, 1, 3]))
    path.write_bytes(content)
    return path.name


def cut(rng: Random, directory: Path) -> str:
    path = weights_of(directory, rng)
    content, way = path.read_bytes(), rng.choice(["cut", "head", "empty", "longer", "zeros"])
    path.write_bytes(
        {
            "cut": content[: rng.randrange(len(content))],
            "head": content[: rng.randrange(16)],
            "empty": b"",
            "longer": content + rng.randbytes(rng.randrange(1, 100)),
            "zeros": b"\0" * len(content),
        }[way]
    )
    return f"{path.name} {way}"


def edit_header(rng: Random, directory: Path) -> str:
    path = weights_of(directory, rng)
    header, body = split(path.read_bytes())
    words = edit_json(rng, header)
    path.write_bytes(join(header, body))
    return words


def repeat_header_key(rng: Random, directory: Path) -> str:
    path = weights_of(directory, rng)
    header, body = split(path.read_bytes())
    one, other = rng.choice(list(header)), rng.choice(list(header))
    text = json.dumps(header)[:-1] + f", {json.dumps(one)}: {json.dumps(header[other])}}}"
    text += " " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)
    return f"{one} again, as {other}"


def change_offsets(rng: Random, directory: Path) -> str:
    path = weights_of(directory, rng)
    header, body = split(path.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    name, other, way = (
        rng.choice(names),
        rng.choice(names),
        rng.choice(["shift", "below", "far", "turned", "none", "other"]),
    )
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = {
        "shift": [start + rng.choice([1, -1, 8, 64]), end],
        "below": [-1, end],
        "far": [start, rng.choice([2**63 - 1, 2**64 - 1, 2**40, len(body) + 1])],
        "turned": [end, start],
        "none": [start, start],
        "other": header[other]["data_offsets"],
    }[way]
    path.write_bytes(join(header, body))
    return f"{name} {way}"


def change_length(rng: Random, directory: Path) -> str:
    path = weights_of(directory, rng)
    content = path.read_bytes()
    size = len(content)
    length = rng.choice([0, 1, 2**63, 2**64 - 1, 2**32, size, size - 8, 100_000_001, rng.randrange(size)])
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return str(length)


def change_tensors(rng: Random, directory: Path) -> str:
    """Tensors dropped, renamed, doubled, swapped, emptied or added, in a file that is well-formed."""
    tensors = Tensors.read(weights_of(directory, rng))
    entries, name = tensors.entries, tensors.pick(rng)
    alike = [other for other in entries if other != name and entries[other][:2] == entries[name][:2]]
    way = rng.choice(["drop", "rename", "double", "swap", "swap alike", "empty", "add"])
    if way == "drop":
        del entries[name]
    elif way == "rename":
        entries[name + rng.choice(["x", "_", " "])] = entries.pop(name)
    elif way == "double":
        entries[name.replace("0", "1", 1) if "0" in name else f"{name}2"] = entries[name]
    elif way in ("swap", "swap alike"):
        other = rng.choice(alike if alike and way == "swap alike" else list(entries))
        entries[name], entries[other] = entries[other], entries[name]
    elif way == "empty":
        entries[name] = (entries[name][0], [0], b"")
    else:
        entries[rng.choice(["extra", "model.extra.weight", f"{name.rpartition('.')[0]}.extra"])] = (
            "F32",
            [2],
            bytes(8),
        )
    tensors.write()
    return f"{name} {way}"


def retype(rng: Random, directory: Path) -> str:
    tensors = Tensors.read(weights_of(directory, rng))
    name, dtype = tensors.pick(rng), rng.choice(list(SIZES))
    shape = tensors.entries[name][1]
    size = math.prod(shape) * SIZES[dtype]
    content = rng.choice([b"\0", b"\1", b"\x3c"]) * size if rng.random() < 0.7 else rng.randbytes(size)
    tensors.entries[name] = (dtype, shape, content)
    tensors.write()
    return f"{name} {dtype}"


def reshape(rng: Random, directory: Path) -> str:
    tensors = Tensors.read(weights_of(directory, rng))
    name = tensors.pick(rng)
    dtype, old, content = tensors.entries[name]
    shape, way = list(old), rng.choice(["turned", "flat", "longer", "shorter", "scalar", "deeper", "none"])
    if way in ("longer", "shorter") and shape:
        axis = rng.randrange(len(shape))
        shape[axis] = max(0, shape[axis] + (1 if way == "longer" else -1))
    else:
        shape = {"turned": shape[::-1], "flat": [math.prod(shape)], "scalar": [], "deeper": [1, *shape], "none": [0, *shape]}.get(way, shape)  # fmt: skip # noqa: E501
    size = math.prod(shape) * SIZES[dtype]
    tensors.entries[name] = (dtype, shape, (content + bytes(size))[:size])
    tensors.write()
    return f"{name} {way}"


def edit_config(rng: Random, directory: Path) -> str:
    def change(content: Any) -> str:
        return "; ".join(edit_json(rng, content, ("quantization_config",)) for _ in range(rng.choice([1, 1, 1, 2, 3])))

    return edit_file(directory / "config.json", change)


def edit_layout(rng: Random, directory: Path) -> str:
    """One or two sensible-looking changes of the entry of a layer."""
    return edit_file(directory / "config.json", lambda content: _edit_entry(rng, content["quantization_config"]))


def _edit_entry(rng: Random, layout: Any) -> str:
    name = rng.choice(list(layout["layers"]))
    entry = layout["layers"][name]
    words = []
    for _ in range(rng.choice([1, 1, 2])):
        field = rng.choice([*entry, "width", "activation_bits", "basis", "place", "name of basis", "embedding", "tied"])
        if field == "place":
            place = rng.choice(["lm_head", "model.norm", "model", "", ".", "fips_bases", "model.layers",
                                "model.layers.0.self_attn.q_proj", "model.layers.0.mlp", f"{name}.x", f"model.{name}",
                                "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj.9",
                                "model.layers.0.mlp.experts.down_proj.1", "model.embed_tokens"])  # fmt: skip
            layout["layers"][place] = layout["layers"].pop(name, entry)
            words.append(f"at {place!r}")
        elif field == "name of basis":
            for basis in list(layout["bases"])[:1]:
                layout["bases"][rng.choice(["a.b", "", "weight", "g9"])] = layout["bases"].pop(basis)
        else:
            entry[field] = _entry_value(rng, field, entry, list(layout["bases"]))
            words.append(f"{field} {entry[field]}")
    return f"{name} {', '.join(words)}"


def _entry_value(rng: Random, field: str, entry: dict[str, Any], bases: list[str]) -> Any:
    if field == "columns":
        return entry["columns"] * rng.choice([1, 2]) + rng.choice([0, 1, -1, 8, -8, 64])
    if field == "nonzeros":
        return entry["nonzeros"] + rng.choice([1, -1, 2**31, 2**33, -5, 10**15])
    choices: dict[str, Any] = {
        "format": FORMATS, "values": KINDS, "role": ("up", "down"), "basis": (None, "x", *bases), "bias": (True, False),
        "width": (None, 1, 32, 63, 64, 65, 128, 2**40), "conv1d": (True, False), "activation_bits": (8, None, 16),
        "embedding": (True, False, 1, None), "rotation": (1, 4, 16, 64, 3, 0),
        "tied": ([], ["lm_head"], ["lm_head", "lm_head"], ["model.norm"], [""], "lm_head", None),
    }  # fmt: skip
    return rng.choice(choices[field])


def rebuild_layer(rng: Random, directory: Path) -> str:
    """A stranger's layer: another format, kind and size, of which header and layout speak alike."""
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layout = content["quantization_config"]
    name = rng.choice(list(layout["layers"]))
    entry = layout["layers"][name]
    path = next(p for p in sorted(directory.glob("*.safetensors")) if f"{name}.values" in Tensors.read(p).entries)
    tensors, basis = Tensors.read(path), layout["bases"].get(entry.get("basis"))
    if basis is None and rng.random() < 0.3:
        entry["width"] = rng.choice([8, 16, 32, 64, 128])
    rank = entry["width"] if basis is None else basis["rank"]
    if rng.random() < 0.5:
        entry["columns"] = max(8, int(entry["columns"] * rng.choice([0.5, 2, 4])) // 8 * 8)
    entry["format"], entry["values"] = rng.choice(FORMATS), rng.choice(KINDS)
    rows, cols = (entry["columns"], rank) if entry["role"] == "up" else (rank, entry["columns"])
    pattern, kept = random_pattern(rng, rows * cols, entry["format"])
    entry["nonzeros"] = max(0, kept + rng.choice([0, 0, 0, 0, 0, 0, 1, -1, 8, -8, 1000]))
    for key in ("values", "pattern", "scales", "group_scales"):
        tensors.entries.pop(f"{name}.{key}", None)
    bits, groups = values_named(entry["values"]).bits, values_named(entry["values"]).num_scales_of(rows, cols)[1]
    if bits is None:
        dtype = rng.choice(["F32", "BF16", "F16", "F64"])
        tensors.entries[f"{name}.values"] = (dtype, [entry["nonzeros"]], b"\x3c" * entry["nonzeros"] * SIZES[dtype])
    else:
        length = packed_length(entry["nonzeros"], bits)
        tensors.entries[f"{name}.values"] = ("I8" if bits == 8 else "U8", [length], rng.randbytes(length))
        tensors.entries[f"{name}.scales"] = ("F32", [rows], struct.pack("<f", rng.choice([0.01, -0.01, 0.0])) * rows)
    if groups:
        content["quantization_config"]["format_version"] = rng.choice([2, 2, 2, 4, 1])
        tensors.entries[f"{name}.group_scales"] = ("U8", [groups], rng.randbytes(groups))
    if entry["format"] != "dense":
        tensors.entries[f"{name}.pattern"] = ("U8", [len(pattern)], pattern)
    tensors.write()
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return f"{name} {entry['role']} {entry['format']} {entry['values']} {rows} x {cols}, {entry['nonzeros']} kept"


def random_pattern(rng: Random, size: int, fmt: str) -> tuple[bytes, int]:
    """A pattern of a format and the entries it keeps; now and then N:M codes that stand for nothing."""
    pattern = pattern_in_file(fmt)
    length = pattern.nbytes(size)
    if fmt == "dense":
        return b"", size
    if pattern.group_kept is not None:
        groups, bits = size // pattern.group, pattern.group_bits
        codes = [rng.randrange(math.comb(pattern.group, pattern.group_kept)) for _ in range(groups)]
        stream = sum(code << (at * bits) for at, code in enumerate(codes))
        random = rng.random() < 0.2
        return rng.randbytes(length) if random else stream.to_bytes(length, "little"), groups * pattern.group_kept
    block = int(fmt.removeprefix("block")) if fmt.startswith("block") else 1
    count = -(-size // block)
    bits_ = rng.getrandbits(count) if rng.random() < 0.8 else rng.getrandbits(8 * length)
    return bits_.to_bytes(length, "little"), block * (bits_ & ((1 << count) - 1)).bit_count()


def edit_manifest(rng: Random, directory: Path) -> str:
    return edit_file(
        directory / MANIFEST,
        lambda content: "; ".join(edit_json(rng, content, ("files",)) for _ in range(rng.choice([1, 2]))),
    )


def change_index(rng: Random, directory: Path) -> str:
    """The index edited, or one made for a directory that had none."""
    path = directory / INDEX
    if path.is_file() and rng.random() < 0.6:
        return edit_file(path, lambda content: edit_json(rng, content, ("weight_map",)))
    names = [name for file in directory.glob("*.safetensors") for name in Tensors.read(file).entries]
    files: list[Any] = [WEIGHTS, "../x.safetensors", "/etc/passwd", "model-2.safetensors", 1, None, ["a"], "", "."]
    places_ = {name: rng.choice(files) for name in names}
    same = dict.fromkeys(names, rng.choice(files))
    content = rng.choice([{"weight_map": places_}, {"metadata": {}, "weight_map": same}, {}, {"weight_map": []}, {"weight_map": None}])  # fmt: skip # noqa: E501
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"new index {str(content)[:60]}"


def edit_companion(rng: Random, directory: Path) -> str:
    """An edit of the report or of the settings for generation."""
    name = rng.choice(["fips_report.json", "generation_config.json"])
    return f"{name} {edit_file(directory / name, lambda content: edit_json(rng, content))}"


def change_text(rng: Random, directory: Path) -> str:
    """JSON that is none, not only, or not strictly."""
    path = rng.choice(sorted(directory.glob("*.json")))
    content, way = bytearray(path.read_bytes()), rng.choice(["flip", "cut", "empty", "mark", "list", "number", "twice", "noise"])  # fmt: skip # noqa: E501
    if way == "flip":
        flip(rng, content, 0, len(content), rng.choice([1, 3]))
    elif way == "cut":
        content = content[: rng.randrange(len(content))]
    elif way == "twice":
        content = content.rstrip()[:-1] + b',"format_version":1,"format_version":1,"quantization_config":{}}'
    else:
        other = {"empty": b"", "mark": b"\xef\xbb\xbf" + content, "list": b"[1]", "number": b"1e999"}
        content = bytearray(other.get(way, rng.randbytes(100)))
    path.write_bytes(content)
    return f"{path.name} {way}"


def nest(rng: Random, directory: Path) -> str:
    path, depth = rng.choice(sorted(directory.glob("*.json"))), rng.choice([50, 100, 990, 5000, 100_000])
    content = path.read_text(encoding="utf-8").rstrip()[:-1]
    deep = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
    path.write_text(f'{content}, "deep": {deep}}}', encoding="utf-8")
    return f"{path.name} {depth} levels"


def change_files(rng: Random, directory: Path) -> str:
    """Files removed, added, or replaced by directories, links and pipes."""
    path, way = rng.choice(sorted(directory.iterdir())), rng.choice(["remove", "add", "directory", "link", "pipe"])
    if way == "add":
        path = directory / rng.choice(ADDED)
        path.write_bytes(rng.randbytes(50))
        return f"added {path.name}"
    path.unlink()
    if way == "directory":
        path.mkdir()
    elif way == "link":
        path.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", "loop", path.name, "/"]))
    elif way == "pipe":
        os.mkfifo(path)
    return f"{path.name}: {way}"


MUTATIONS: tuple[Callable[[Random, Path], str], ...] = (
    flip_data, flip_data, change_pattern, change_pattern, not_finite, flip_header, cut, edit_header, edit_header,
    repeat_header_key, change_offsets, change_length, change_tensors, change_tensors, retype, reshape, edit_config,
    edit_config, edit_config, edit_config, edit_layout, edit_layout, rebuild_layer, rebuild_layer, rebuild_layer,
    edit_manifest, change_index, edit_companion, change_text, nest, change_files,
)  # fmt: skip


def mutate(rng: Random, directory: Path) -> tuple[str, str, bool]:
    """Damage a directory; returns the kind, some words, and whether its manifest was made to agree or removed."""
    change = rng.choice(MUTATIONS)
    words = change(rng, directory)
    kept = change is edit_manifest or rng.random() < 0.4
    if not kept:
        renew_manifest(directory) if rng.random() < 0.7 else remove(directory / MANIFEST)
    return change.__name__, words, not kept


def renew_manifest(directory: Path) -> None:
    """As someone writes it who wants the directory to pass for whole."""
    remove(directory / MANIFEST)
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.stat().st_size < 1 << 30]
    files = [path for path in files if not path.is_symlink() and path.name != "README.md"]
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    }
    text = json.dumps({"format_version": 1, "files": entries})
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
