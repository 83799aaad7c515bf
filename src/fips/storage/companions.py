"""What travels beside packed weights: configuration, code for loading without importing fips, and the model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from fips.errors import ModelError
from fips.models.architectures import (
    REMOTE_MODULE,
    code_of,
    foreign_code,
    lies_in_repository,
    saved_class,
    saved_config_class,
)

__all__ = [
    "CARD",
    "REMOTE_CODE",
    "architecture_of",
    "auto_map",
    "model_card",
    "saved_classes",
    "saved_fields",
    "write_card",
    "write_remote_code",
]

REMOTE_CODE = f"{REMOTE_MODULE}.py"
CARD = "README.md"
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
> **The MLPs of this model are packed by fips** (shared basis times sparse factors,
> [arXiv 2411.09816](https://arxiv.org/abs/2411.09816)). Load it with fips installed and
> `import fips` before `from_pretrained`, or with `trust_remote_code=True`. Without either, loading stops with a size
> mismatch and the warning `Unknown quantization type, got fips`: never pass `ignore_mismatched_sizes=True`.
"""

_NOTICE_TIMM = """\
> **The MLPs of this timm model are packed by fips** (shared basis times sparse factors,
> [arXiv 2411.09816](https://arxiv.org/abs/2411.09816)). Load it with `import fips` and `fips.load`; timm alone refuses
> its weights.
"""

_USAGE_TIMM = """
```python
import fips

model = fips.load("{name}")
fips.merge(model)  # optional: plain dense layers, faster where memory does not matter
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
    fields.pop("quantization_config", None)
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


def write_card(directory: Path, *, name: str, architecture: str | None, report: Mapping[str, Any] | None) -> None:
    """Write the card of model ``name``; one that a person wrote is kept below the notice on how to load the model."""
    path = directory / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text or _TEMPLATE_MARK in text:
        path.write_text(model_card(name, architecture=architecture, report=report), encoding="utf-8")
    elif "import fips" not in text:
        header, body = _split_header(text)
        path.write_text(f"{header}{_NOTICE}\n{body}", encoding="utf-8")


def model_card(name: str, *, architecture: str | None, report: Mapping[str, Any] | None) -> str:
    """Model card with the loading notice first, then what was done and measured."""
    source = (report or {}).get("source")
    base = f"base_model: {source}\n" if source and not Path(source).exists() and source.count("/") == 1 else ""
    library = "transformers" if architecture else "timm"
    header = f"---\nlibrary_name: {library}\ntags:\n- fips\n{base}---\n\n"
    results = _results(report) if report else ""
    if architecture is None:
        return f"{header}{_NOTICE_TIMM}{_USAGE_TIMM.format(name=name)}{results}"
    return f"{header}{_NOTICE}{_USAGE.format(name=name, auto_class=_auto_class(architecture))}{results}"


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
    return "not measured" if value is None else f"{value:.5f}"


def _results(report: Mapping[str, Any]) -> str:
    layers, config = report["layers"], report["config"]
    rows = [
        ("parameters of the model", report["model"]["parameters"], report["compressed_model"]["parameters"]),
        ("bytes of the model", report["model"]["bytes"], report["compressed_model"]["bytes"]),
        ("bytes of the compressed layers", layers["dense"]["bytes"], layers["factored"]["bytes"]),
    ]
    lines = ["", "## Compression", "", f"Source: `{report.get('source') or 'a model in memory'}`", ""]
    lines += ["| | before | after | share |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {before:,} | {after:,} | {after / before:.1%} |" for name, before, after in rows]
    lines += ["", "| group | blocks | relative block error |", "| --- | --- | --- |"]
    lines += [
        f"| {result['name']} | {len(result['blocks'])} | {_number(result['relative_error_final'])} |"
        for result in report["results"]
    ]
    settings = ", ".join(
        f"{key} {config[key]}" for key in ("method", "budget", "sparsity", "pattern") if config.get(key)
    )
    environment = report.get("environment", {})
    versions = ", ".join(f"{key} {environment[key]}" for key in ("fips", "torch", "transformers") if key in environment)
    lines += ["", f"Settings: {settings}. {versions}.", ""]
    return "\n".join(lines)
