"""Several methods on one model at equal stored bytes: quality, error, size and time of each, none left out."""

from __future__ import annotations

import copy
import json
import logging
import statistics as stats
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import Tensor, nn

from fips.app.plots import quality_plot
from fips.bars import Bars
from fips.calibration.inputs import decoder_inputs
from fips.compression import compress
from fips.config import CompressionConfig
from fips.data import Batches
from fips.errors import BudgetError, ConfigError
from fips.evaluation import Divergence, EmbeddingDistance, evaluate
from fips.methods.workbench import MomentCache
from fips.storage.work import WorkDirectory

__all__ = ["Comparison", "Run", "compare", "method_config", "write_comparison"]

log = logging.getLogger("fips.app.compare")

ORIGINAL = "original"
"""Name of its piece among the runs that are kept."""
MOST_REMEMBERED = 1 << 28
"""Bytes of what the original returns that are kept between the runs of a comparison."""


@dataclass(frozen=True, slots=True)
class Run:
    """One method at one size with one seed."""

    method: str
    bits: float
    seed: int
    stored_bits: float | None = None
    """Stored bits per weight of the layers, measured; None where the method could not run."""
    quality: float | None = None
    against: Divergence | EmbeddingDistance | None = None
    """How far the predictions on the evaluation data are from the original's."""
    relative_error: float | None = None
    """Mean over blocks of the squared error of their output relative to its variance, on original inputs."""
    relative_error_start: float | None = None
    """The same before any gradient step."""
    seconds: float | None = None
    """Time of the compression; moments are measured once per seed, in the first run that needs them."""
    shared_groups: int | None = None
    """Groups that ended with a shared basis."""
    formats: tuple[str, ...] = ()
    failure: str | None = None

    @classmethod
    def kept(cls, fields: Mapping[str, Any]) -> Run:
        """What ``asdict`` took apart, read from JSON."""
        against = fields["against"]
        if against is not None:
            against = (Divergence if "kl" in against else EmbeddingDistance)(**against)
        return cls(**{**fields, "against": against, "formats": tuple(fields["formats"])})


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs beside the original."""

    metric: str
    higher_is_better: bool
    original: float
    runs: tuple[Run, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """One row per method and size: medians over seeds, and the spread of the quality."""
        found = []
        for method in dict.fromkeys(run.method for run in self.runs):
            for size in sorted({run.bits for run in self.runs if run.method == method}):
                runs = [run for run in self.runs if (run.method, run.bits) == (method, size)]
                good = [run for run in runs if run.quality is not None]
                row: dict[str, Any] = {"method": method, "bits": size, "seeds": len(good)}
                if not good:
                    row["failure"] = runs[0].failure
                for name in ("stored_bits", "quality", "relative_error", "seconds"):
                    row[name] = _median(getattr(run, name) for run in good)
                for name in ("kl", "agreement_percent"):
                    row[name] = _median(getattr(run.against, name, None) for run in good)
                qualities = [run.quality for run in good if run.quality is not None]
                row["spread"] = max(qualities) - min(qualities) if len(qualities) > 1 else None
                found.append(row)
        return found


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return stats.median(known) if known else None


GIVEN = {
    "method": "as its name",
    "bits": "by the sizes",
    "size": "by the sizes, in stored bits per weight",
    "budget": "by the sizes, in stored bits per weight",
    "seed": "by the seeds",
}


def method_config(text: str, *, bits: float, seed: int, layers: str = "blocks") -> CompressionConfig:
    """Settings of ``name`` or ``name+field=value+section.field=value``, such as ``fips+distill.steps=100``.

    ``layers`` are the same for all methods, whatever their default is.

    ``name`` is that of a method or of some settings of one, as ``no-sharing`` for our solver without a shared basis.
    Raises ``ConfigError`` for what is not a setting, and for those that are given for all methods alike.
    """
    name, *changes = text.split("+")
    fields: dict[str, Any] = {"layers": layers, "method": name, "bits": bits, "seed": seed}
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"method `{text}`: wanted `field=value`, got `{change}`")
        if path in GIVEN:
            raise ConfigError(f"method `{text}`: `{path}` is given for all methods alike, {GIVEN[path]}")
        *sections, field = path.split(".")
        place: Any = fields
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"method `{text}`: `{section}` has no fields, got `{change}`")
        try:
            place[field] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"method `{text}`: wanted `field=value`, a value as in YAML, got `{change}`") from None
    return CompressionConfig(**fields)


def compare(
    model: nn.Module,
    calibration: Callable[[int], Iterable[Any]],
    evaluation: Batches,
    *,
    methods: Sequence[str],
    sizes: Sequence[float],
    seeds: Sequence[int] = (0,),
    layers: str = "blocks",
    on_run: Callable[[Run], None] | None = None,
    store: WorkDirectory | None = None,
    bars: Bars | None = None,
) -> Comparison:
    """Compress copies of ``model`` with every method at every size and evaluate them; the model stays as it is.

    ``calibration(seed)`` gives the batches of a seed. A size that a method cannot reach is recorded as such. What is
    in the ``store`` is taken from there, and what is finished is kept in it. Raises ``ConfigError`` before any work if
    a method is unknown.
    """
    jobs = [
        (method, method_config(method, bits=size, seed=seed, layers=layers))
        for seed in seeds
        for method in methods
        for size in sizes
    ]
    bars = bars or Bars(Console(quiet=True))
    reference = _Remembering(model)
    original = _original(model, evaluation, reference, store, bars)
    runs = []
    moments: MomentCache = {}
    for done, (method, config) in enumerate(jobs):
        if config.seed != jobs[done - 1][1].seed:  # other data
            moments.clear()
        name = f"{method} at {config.bits:g} bits"
        piece = f"{name}, seed {config.seed}"
        known = None if store is None else store.get(piece)
        bars.show("compare", done, len(jobs), group=name if known is None else f"{name}, kept from before")
        if known is not None:
            runs.append(Run.kept(known[1]))
            continue
        made = _run(model, method, config, calibration(config.seed), evaluation, moments, reference, bars)
        runs.append(made)
        if store is not None:
            store.put(piece, {}, asdict(made))
            store.log(f"{piece}: {made.failure or f'{made.quality:.5g} in {made.seconds:.0f} s'}")
        if on_run is not None:
            on_run(made)
    bars.show("compare", len(jobs), len(jobs))
    return Comparison(original["metric"], original["higher_is_better"], original["original"], tuple(runs))


def _original(
    model: nn.Module, evaluation: Batches, reference: _Remembering, store: WorkDirectory | None, bars: Bars
) -> dict[str, Any]:
    """The headline of the original's evaluation."""
    known = None if store is None else store.get(ORIGINAL)
    if known is not None:
        return known[1]
    headline = evaluate(model, evaluation, against=reference, progress=_shown(bars, "the original")).headline
    found = {"metric": headline.name, "higher_is_better": headline.higher_is_better, "original": headline.value}
    if store is not None:
        store.put(ORIGINAL, {}, found)
    return found


def _shown(bars: Bars, name: str) -> Callable[[int, int], None]:
    return lambda done, total: bars.show("evaluate", done, total, group=name)


class _Remembering(nn.Module):
    """A model that is asked the same again and again, in the same order, and computes it once.

    What it returns is kept as long as they take no more than ``MOST_REMEMBERED`` bytes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.prepare_decoder_input_ids_from_labels = decoder_inputs(model)
        self._kept: list[Any] | None = []
        self._at = 0

    def begin(self) -> None:
        """The first batch is next."""
        self._at = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._kept is not None and self._at < len(self._kept):
            self._at += 1
            return self._kept[self._at - 1]
        output = self.model(*args, **kwargs)
        found = getattr(output, "logits", output)
        if isinstance(found, Mapping):  # without a head: embeddings are made of these
            found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        self._at += 1
        if self._kept is not None:
            self._kept.append(found)
            if sum(map(_bytes, self._kept)) > MOST_REMEMBERED:
                self._kept = None
        return found


def _bytes(output: Any) -> int:
    return sum(map(_bytes, output.values())) if isinstance(output, Mapping) else int(output.nbytes)


def _run(
    model: nn.Module,
    method: str,
    config: CompressionConfig,
    calibration: Iterable[Any],
    evaluation: Batches,
    moments: MomentCache,
    reference: _Remembering,
    bars: Bars,
) -> Run:
    assert config.bits is not None
    candidate = copy.deepcopy(model)
    try:
        report = compress(candidate, calibration, config, moments=moments, progress=bars.drawn.event)
    except BudgetError as error:
        return Run(method, config.bits, config.seed, failure=str(error))
    reference.begin()
    result = evaluate(candidate, evaluation, against=reference, progress=_shown(bars.drawn, method))
    layers = report.plan["layers"]
    groups = report.groups
    return Run(
        method=method,
        bits=config.bits,
        seed=config.seed,
        stored_bits=8 * layers["factored"]["bytes"] / layers["dense"]["parameters"],
        quality=result.headline.value,
        against=result.against,
        relative_error=_mean([group["relative_error_final"] for group in groups]),
        relative_error_start=_mean([group["relative_error_start"] for group in groups]),
        seconds=round(report.seconds, 2),
        shared_groups=sum(group["rank"] > 0 for group in report.plan["groups"]),
        formats=tuple(dict.fromkeys(group["format"] for group in report.plan["groups"])),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what was measured in all groups; None where one lacks it."""
    known = [value for value in values if value is not None]
    return stats.fmean(known) if len(known) == len(values) else None


def write_comparison(comparison: Comparison, directory: Path, *, facts: dict[str, Any]) -> None:
    """``compare.json`` (with ``facts`` about the run), ``compare.md`` and, where it can be drawn, ``compare.svg``."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, **comparison.to_dict()}, indent=2)
    (directory / "compare.json").write_text(text + "\n", encoding="utf-8")
    (directory / "compare.md").write_text(_markdown(comparison), encoding="utf-8")
    try:
        quality_plot(
            comparison.rows(), directory / "compare.svg", metric=comparison.metric, original=comparison.original,
            higher_is_better=comparison.higher_is_better,
        )  # fmt: skip
    except Exception as error:  # the numbers are there; fonts and drawing libraries fail in ways of their own
        log.warning("no plot drawn: %s: %s", type(error).__name__, error)
        (directory / "compare.svg").unlink(missing_ok=True)


LARGEST_THAT_FITS = "A method takes the largest of its settings that fits into the size asked for, which may be less."


def _markdown(comparison: Comparison) -> str:
    lines = [
        f"Original: {comparison.metric} {comparison.original:.4g}. Bits: stored bits per weight of the layers. "
        f"{LARGEST_THAT_FITS} "
        "KL (nats) and agreement (percent of the most likely outcomes): with the original on the evaluation data.",
        "",
        f"| method | bits | {comparison.metric} | spread | KL | agreement | block error | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in comparison.rows():
        if row["quality"] is None:
            lines.append(f"| {row['method']} | {row['bits']:g} | does not fit | | | | | |")
            continue
        measures = {"spread": ".3g", "kl": ".4g", "agreement_percent": ".2f", "relative_error": ".4g"}
        shown = ("" if row[name] is None else format(row[name], digits) for name, digits in measures.items())
        lines.append(
            f"| {row['method']} | {row['stored_bits']:.3f} | {row['quality']:.4g} | {' | '.join(shown)} | "
            f"{row['seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"
