"""Files that travel beside packed weights: code for loading without importing fips, and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["CARD", "REMOTE_CODE", "architecture_of", "auto_map", "model_card", "write_card", "write_remote_code"]

REMOTE_CODE = "fips_remote.py"
CARD = "README.md"
_TEMPLATE_MARK = "has been automatically generated"

_REMOTE_TEXT = '''"""Runs under `trust_remote_code=True`: fips teaches transformers the layers of this model."""

import transformers

try:
    import fips  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the MLPs of this model are packed by fips, which is not installed; the model card says where to get it"
    ) from error


class {name}(transformers.{name}):
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


def auto_map(config: PretrainedConfig) -> dict[str, str] | None:
    """``auto_map`` for ``config.json``; None for a configuration class that transformers does not hold."""
    name = type(config).__name__
    return {"AutoConfig": f"{Path(REMOTE_CODE).stem}.{name}"} if hasattr(transformers, name) else None


def write_remote_code(directory: Path, config: PretrainedConfig) -> None:
    """The module that ``auto_map`` names."""
    if auto_map(config) is not None:
        (directory / REMOTE_CODE).write_text(_REMOTE_TEXT.format(name=type(config).__name__), encoding="utf-8")


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
    return type(model).__name__ if isinstance(model, PreTrainedModel) else None


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
    mlp, config = report["mlp"], report["config"]
    rows = [
        ("parameters of the model", report["model"]["parameters"], report["compressed_model"]["parameters"]),
        ("bytes of the model", report["model"]["bytes"], report["compressed_model"]["bytes"]),
        ("bytes of the compressed MLPs", mlp["dense"]["bytes"], mlp["factored"]["bytes"]),
    ]
    lines = ["", "## Compression", "", f"Source: `{report.get('source') or 'a model in memory'}`", ""]
    lines += ["| | before | after | kept |", "| --- | --- | --- | --- |"]
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
