"""``fips report``: the page about a packed directory, evaluated first if data is given, written to a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fips.app.evaluating import evaluable_source
from fips.app.examples import examples_of
from fips.app.outline import outline_of_directory
from fips.app.page import GENERATOR, Example, report_page
from fips.app.sources import is_compressed_source
from fips.config import DataConfig
from fips.errors import ConfigError, ModelError, OutputError
from fips.files.output import require_file, require_outside_models
from fips.models.building import naming
from fips.storage.checkpoint import local_directory

__all__ = ["WrittenReport", "report_on"]


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """What ``report_on`` wrote."""

    path: Path
    bytes: int
    quality: dict[str, Any] | None
    """Of the evaluation that was run for it."""
    examples: int


def report_on(
    source: str,
    output: Path,
    *,
    data: DataConfig | None = None,
    against: str | None = None,
    examples: int = 3,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenReport:
    """Write the HTML report of a packed directory, or of a hub id with one, to a file; the directory stays as it is.

    With ``data`` the model is evaluated on it, beside the original ``against`` if that is given, and shown a few
    examples. Raises ``ConfigError`` for ``against`` without data, ``ModelError`` for a model that is not compressed,
    ``OutputError`` where the file cannot be written or is something else than such a report, ``CheckpointError`` for a
    damaged directory or record, and what evaluating raises.
    """
    if against is not None and data is None:
        raise ConfigError("`--against` compares predictions on data; give --data")
    if examples < 0:
        raise ConfigError(f"`--examples` must be at least 0, got {examples}")
    if not is_compressed_source(source):
        raise ModelError(f"`{source}` is not a compressed model; `fips compress` makes one")
    _check_output(output)
    directory = local_directory(source)
    packed = outline_of_directory(str(directory), trust_remote_code=trust_remote_code)
    quality: dict[str, Any] | None = None
    shown: list[Example] = []
    if data is not None:
        found = evaluable_source(
            source, data, against=against, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        quality = found.evaluate(progress).to_dict()
        models = {"original": found.original} if found.original is not None else {}
        shown = examples_of({**models, "compressed": found.model}, found.batches, found.processor, count=examples)
    name = directory.resolve().name if Path(source).is_dir() else source
    with naming(directory, "no compression that can be reported on"):
        page = report_page(packed, name=name, quality=quality, examples=shown)
    _write(output, page)
    return WrittenReport(output, len(page.encode()), quality, len(shown))


def _check_output(output: Path) -> None:
    """Raise ``OutputError`` for a place that would not take the file, or should not."""
    try:
        if output.is_dir():
            raise OutputError(
                f"output `{output}` is a directory; give the name of a file, such as `{output}/report.html`"
            )
        require_outside_models(output)
        if output.exists() and not _is_report(output):
            raise OutputError(f"output `{output}` exists and is no report of fips; choose another or remove it first")
        require_file(output)
    except OSError as error:
        raise OutputError(f"cannot write to `{output}`: {error.strerror}; choose another output") from None


def _is_report(path: Path) -> bool:
    """Whether a file is a page of ours; what is no regular file, a pipe or a device, is not read."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(2000)


def _write(output: Path, page: str) -> None:
    """The whole file or none."""
    scratch = output.with_name(f".{output.name[:100]}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(output)
    except OSError as error:
        raise OutputError(f"cannot write to `{output}`: {error.strerror}; choose another output") from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
