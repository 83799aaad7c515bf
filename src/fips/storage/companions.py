"""What travels beside packed weights: configuration, code for loading without importing fips, and the model card."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from fips.errors import ModelError
from fips.files.names import without_directories
from fips.models.architectures import (
    REMOTE_MODULE,
    code_of,
    foreign_code,
    lies_in_repository,
    saved_class,
    saved_config_class,
)
from fips.record import REPORT_FILE, CompressionReport, scores, size_asked_for

__all__ = [
    "CARD",
    "REMOTE_CODE",
    "architecture_of",
    "auto_map",
    "license_of",
    "model_card",
    "saved_classes",
    "saved_fields",
    "write_card",
    "write_remote_code",
]

log = logging.getLogger("fips.storage")

REMOTE_CODE = f"{REMOTE_MODULE}.py"
CARD = "README.md"
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/.+\.gguf)?")
_WORD = r"[\w.+-]{1,100}"
_LICENSE = {
    "license": rf"^license:\s*[\"']?({_WORD})[\"']?\s*$",
    "license_name": r"^license_name:\s*[\"']?([\w.+ -]{1,100}?)[\"']?\s*$",
    "license_link": r"^license_link:\s*[\"']?(https://[\w./%~-]{1,300})[\"']?\s*$",
}
"""Single words and links; a list of licenses, or a link that is relative to the source, is not copied."""
_LONGEST_CARD = 1 << 20
_TEMPLATE_MARK = "has been automatically generated"

_REMOTE_TEXT = '''"""Runs under `trust_remote_code=True`: fips teaches transformers the layers of this model."""

{imports}

try:
    import fips  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the MLPs of this model are packed by fips, which is not installed; the model card says where to get it"
    ) from error


class {name}({base}):
    """The configuration class of the original model."""
'''

_NOTICE = """\
> **Layers of this model are packed by fips**, as numbers of few bits. Load it with fips installed and
> `import fips` before `from_pretrained`, or with `trust_remote_code=True`. Without either, loading stops with a size
> mismatch and the warning `Unknown quantization type, got fips`: never pass `ignore_mismatched_sizes=True`.
"""

_NOTICE_TIMM = """\
> **Layers of this timm model are packed by fips**, as numbers of few bits. Load it with `import fips` and `fips.load`;
> timm alone refuses its weights.
"""

_USAGE_TIMM = """
```python
import fips

model = fips.load("{name}")
fips.merge(model)  # optional: plain dense layers again, for tools that want them
```
"""

_USAGE = """
```python
import fips
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}")
model.dequantize()  # optional: plain dense layers, faster where memory does not matter
```
"""


def saved_fields(model: PreTrainedModel) -> dict[str, Any]:
    """``config.json`` of a model, without the layout of its packed layers: classes that whoever loads it can build.

    Raises ``ModelError`` if there are none.
    """
    fields: dict[str, Any] = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):  # the second is where the model lay on this machine
        fields.pop(name, None)
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    return fields | saved_classes(model)


def saved_classes(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of ``config.json`` that say which classes to build."""
    return {
        "architectures": [saved_class(type(model)).__name__],
        "model_type": saved_config_class(type(model.config)).model_type,
        "auto_map": auto_map(model),
    }


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """``auto_map`` for ``config.json``: the module that fips writes, and the code of the model's own classes."""
    modules = {path.stem for path in _code_files(model)}
    own = {
        key: reference.rpartition("--")[2]
        for key, reference in foreign_code(vars(model.config)).items()
        if reference.rpartition("--")[2].partition(".")[0] in modules
    }
    kind = type(model)
    if lies_in_repository(kind):
        reference = f"{code_of(kind).stem}.{kind.__name__}"
        if reference not in own.values():
            own[getattr(kind, "_auto_class", None) or "AutoModel"] = reference
    return {**own, "AutoConfig": f"{REMOTE_MODULE}.{saved_config_class(type(model.config)).__name__}"}


def write_remote_code(directory: Path, model: PreTrainedModel) -> None:
    """The modules that ``auto_map`` names."""
    config = saved_config_class(type(model.config))
    name = config.__name__
    imports, base = "import transformers", f"transformers.{name}"
    if lies_in_repository(config):
        imports, base = f"from .{code_of(config).stem} import {name} as _Original", "_Original"
    text = _REMOTE_TEXT.format(name=name, imports=imports, base=base)
    (directory / REMOTE_CODE).write_text(text, encoding="utf-8")
    for path in _code_files(model):
        if path.resolve() != (directory / path.name).resolve():
            shutil.copyfile(path, directory / path.name)


def _code_files(model: PreTrainedModel) -> list[Path]:
    """The files that define the model's classes where those are not of transformers, with what they import."""
    files: dict[str, Path] = {}
    for kind in (saved_class(type(model)), saved_config_class(type(model.config))):
        if not lies_in_repository(kind):
            continue
        for path in (code_of(kind), *map(Path, get_relative_import_files(code_of(kind)))):
            other = files.setdefault(path.name, path)
            if path.name == REMOTE_CODE or other.read_bytes() != path.read_bytes():
                raise ModelError(f"`{path}` cannot be saved beside another file of its name; rename one of them")
    return list(files.values())


def write_card(
    directory: Path,
    *,
    name: str,
    architecture: str | None,
    report: Mapping[str, Any] | None,
    license_fields: Mapping[str, str] | None = None,
) -> None:
    """Write the card of model ``name``; one that a person wrote is kept below the notice on how to load the model, and
    one that is no UTF-8 text as it is."""
    path = directory / CARD
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        log.warning("`%s` is not UTF-8 text: left as it is, without a word on how to load the model", path)
        return
    if not text or _TEMPLATE_MARK in text:
        card = model_card(name, architecture=architecture, report=report, license_fields=license_fields)
        path.write_text(card, encoding="utf-8")
    elif "import fips" not in text:
        header, body = _split_header(text)
        path.write_text(f"{header}{_NOTICE}\n{body}", encoding="utf-8")


def model_card(
    name: str,
    *,
    architecture: str | None,
    report: Mapping[str, Any] | None,
    license_fields: Mapping[str, str] | None = None,
) -> str:
    """Model card with the loading notice first, then what was done and measured.

    Paths of the machine it was made on are not in it, only their last parts.
    """
    source = (report or {}).get("source")
    header: dict[str, Any] = {"library_name": "transformers" if architecture else "timm", "tags": ["fips"]}
    if isinstance(source, str) and (found := _HUB_ID.fullmatch(source)) and not Path(source).exists():
        header["base_model"] = found[1]
    text = f"---\n{yaml.safe_dump({**header, **(license_fields or {})}, sort_keys=False)}---\n\n"
    results = _results(CompressionReport.from_dict(without_directories(report)), license_fields) if report else ""
    if architecture is None:
        return f"{text}{_NOTICE_TIMM}{_USAGE_TIMM.format(name=name)}{results}"
    return f"{text}{_NOTICE}{_USAGE.format(name=name, auto_class=_auto_class(architecture))}{results}"


def license_of(model: nn.Module) -> dict[str, str]:
    """The license of the model something was made of: ``license``, and ``license_name`` and ``license_link``, if any.

    From the card in the directory the model was loaded from, else from its configuration, or that of timm; empty where
    none of them says one.
    """
    config = getattr(model, "config", None)
    place = str(getattr(config, "_name_or_path", None) or "")
    text = ""
    with suppress(OSError):
        if place and (card := Path(place) / CARD).is_file():
            with card.open(encoding="utf-8", errors="replace") as file:
                text, _ = _split_header(file.read(_LONGEST_CARD))
    found = {key: match[1] for key in _LICENSE if (match := re.search(_LICENSE[key], text, re.MULTILINE))}
    if "license" in found:
        return found
    timm: Any = getattr(model, "pretrained_cfg", None) or {}
    named = str(getattr(config, "license", None) or timm.get("license") or "")
    return {"license": named} if re.fullmatch(_WORD, named) else {}


def architecture_of(model: nn.Module) -> str | None:
    """The class transformers builds; None for a model of timm."""
    return saved_class(type(model)).__name__ if isinstance(model, PreTrainedModel) else None


def _split_header(text: str) -> tuple[str, str]:
    """YAML front matter, if any, and the rest."""
    if not text.startswith("---\n"):
        return "", text
    end = text.find("\n---\n", 3)
    return ("", text) if end < 0 else (text[: end + 5] + "\n", text[end + 5 :].lstrip("\n"))


def _auto_class(architecture: str) -> str:
    for head in ("ForCausalLM", "ForImageClassification", "ForSequenceClassification", "ForMaskedLM"):
        if architecture.endswith(head):
            return f"AutoModel{head}"
    return "AutoModelForCausalLM" if architecture.endswith("LMHeadModel") else "AutoModel"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _results(report: CompressionReport, license_fields: Mapping[str, str] | None) -> str:
    plan = report.plan
    layers = plan["layers"]
    sizes = [
        ("parameters of the model", plan["model"]["parameters"], plan["compressed_model"]["parameters"]),
        ("bytes of the model", plan["model"]["bytes"], plan["compressed_model"]["bytes"]),
        ("bytes of the compressed layers", layers["dense"]["bytes"], layers["factored"]["bytes"]),
    ]
    lines = ["", "## Compression", "", f"Made from `{_plain(report.source or 'a model in memory')}`, "]
    lines[-1] += f"{size_asked_for(report)} asked for."
    if license_fields:
        lines[-1] += f" Its license: {license_fields.get('license_name', license_fields['license'])}."
    lines += ["", "| | before | after | share |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {before:,} | {after:,} | {after / before:.1%} |" for name, before, after in sizes]
    quality, report.quality = report.quality, None  # in a table of its own
    lines += ["", *_table(("", ""), [row for row in report.rows() if row[0] != "note"])]
    lines += ["", "## Quality", "", *_quality(quality)]
    lines += ["", "## Data", "", _data_line(report.data), "", "## Errors", ""]
    rows = [(str(one["name"]), str(len(one["blocks"])), _number(one["relative_error_final"])) for one in report.groups]
    lines += _table(("group", "blocks", "relative block error"), rows)
    versions = ", ".join(
        f"{key} {report.environment[key]}" for key in ("fips", "torch", "transformers") if key in report.environment
    )
    lines += ["", f"Made with {_plain(versions) or 'fips'}; all settings are in `{REPORT_FILE}`.", ""]
    return "\n".join(lines)


def _quality(quality: Mapping[str, Any] | None) -> list[str]:
    if quality is None:
        return ["Not evaluated when this card was written: `fips evaluate DIR --data DATA --against MODEL` does it."]
    rows = [(score.name, score.before or "", score.after) for score in scores(quality)]
    return [_data_line(quality.get("data", {})), "", *_table(("", "original", "this model"), rows)]


def _data_line(data: Mapping[str, Any]) -> str:
    """What examples were used."""
    if data.get("source") is None:
        return "Batches that were given in memory." if not data else f"{data.get('num_samples', 'Some')} examples."
    split = f", split `{_plain(data['split'])}`" if data.get("split") else ""
    return f"{data.get('num_samples', 'Some')} examples of `{_plain(data['source'])}`{split}, seed {data.get('seed')}."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows),
    ]


def _plain(text: Any) -> str:
    """A text as one line that ends no cell, no code and opens no tag."""
    return " ".join(str(text).split()).replace("|", "/").replace("`", "'").replace("<", "&lt;")
