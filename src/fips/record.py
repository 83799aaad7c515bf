"""The record of one compression: settings, sizes, errors, time, memory and the machine it ran on."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Self

import torch
import transformers

from fips.config import CompressionConfig
from fips.formats.patterns import FILE_NAMES, FULL
from fips.plan.footprint import format_bytes
from fips.training.reconstruct import BlockError

__all__ = [
    "REPORT_FILE",
    "CompressionReport",
    "GroupResult",
    "Score",
    "environment",
    "in_html",
    "in_lines",
    "peak_memory_bytes",
    "scores",
    "size_asked_for",
]

REPORT_FILE = "fips_report.json"
REPORT_VERSION = 1
LATER_KEYS = ("left_dense",)
"""Parts of the plan that reports of earlier versions lack."""


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Errors and losses of one group."""

    name: str
    blocks: tuple[str, ...]
    start: tuple[BlockError, ...]
    """What was solved (by the paper's recipe: the SVD, pruned at once), before any gradient step; empty where not
    measured."""
    final: tuple[BlockError, ...]
    """Empty where not measured."""
    losses: tuple[float, ...]
    seconds: float

    @staticmethod
    def mean_relative(errors: tuple[BlockError, ...]) -> float | None:
        return sum(error.relative for error in errors) / len(errors) if errors else None

    def to_dict(self) -> dict[str, Any]:
        start, final = ({error.block: error for error in errors} for errors in (self.start, self.final))
        return {
            "name": self.name,
            "seconds": round(self.seconds, 2),
            "relative_error_start": self.mean_relative(self.start),
            "relative_error_final": self.mean_relative(self.final),
            "blocks": [
                {"name": name, **_error_fields("start", start.get(name)), **_error_fields("final", final.get(name))}
                for name in self.blocks
            ],
            "loss_first_step": self.losses[0] if self.losses else None,
            "loss_last_step": self.losses[-1] if self.losses else None,
        }


def _error_fields(when: str, error: BlockError | None) -> dict[str, float | None]:
    return {
        f"mse_{when}": None if error is None else error.mse,
        f"relative_{when}": None if error is None else error.relative,
    }


@dataclass(slots=True, repr=False)
class CompressionReport:
    """Result of ``fips.compress``; saved as ``fips_report.json`` beside the weights."""

    config: CompressionConfig
    plan: dict[str, Any]
    """``CompressionPlan.to_dict()``: sizes before and after, groups, what was skipped and why."""
    groups: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int | None
    activation_file_bytes: int
    """Most bytes of activations that were in the temporary file at once."""
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    """Model the compression started from, as given."""
    notes: list[str] = field(default_factory=list)
    """What went otherwise than asked for, one sentence each."""
    overfit: dict[str, float] = field(default_factory=dict)
    """By layer the error on half of the data over that on the other half, which was fitted; where it was measured."""
    distilled: dict[str, Any] = field(default_factory=dict)
    """Of distillation ``steps`` done, after how many what is ``kept`` was reached, and the loss on data ``held_out``
    by steps done: ``Distilled.to_dict()``; empty without."""
    created: str | None = None
    """When, as ISO 8601 with the time zone."""
    asked: dict[str, float | str] = field(default_factory=dict)
    """The size asked for: ``bits``, ``size`` or ``budget``, as given; ``config`` has the bits that a size came to."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by stage of ``ProgressEvent``, in the process that wrote the report, and of ``earlier runs``, whose work
    it went on from; parts of ``seconds``."""
    quality: dict[str, Any] | None = None
    """``EvaluationResult.to_dict()`` of the compressed model, where somebody evaluated it before it was saved."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "report_version": REPORT_VERSION,
            "source": self.source,
            "config": self.config.model_dump(mode="json"),
            "data": self.data,
            **self.plan,
            "results": self.groups,
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "activation_file_bytes": self.activation_file_bytes,
            "environment": self.environment,
            "notes": self.notes,
            "overfit": {name: round(ratio, 3) for name, ratio in self.overfit.items()},
            "distilled": self.distilled,
            "created": self.created,
            "asked": self.asked,
            "phases": {stage: round(seconds, 2) for stage, seconds in self.phases.items()},
            "quality": self.quality,
        }

    def summary(self) -> str:
        """What became of the model, in a few lines for people."""
        return in_lines(self.rows())

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return in_html(self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """What ``summary`` shows: names and values, the notes last."""
        dense, packed = (self.plan["layers"][key] for key in ("dense", "factored"))
        bits = 8 * packed["bytes"] / dense["parameters"]
        left = self.plan.get("left_dense", {}).get("layers", [])
        errors = [group["relative_error_final"] for group in self.groups if group["relative_error_final"] is not None]
        peak = self.peak_memory_bytes
        rows = [
            ("method", self.config.method),
            ("layers", f"{_bytes_after(dense['bytes'], packed['bytes'])}, {bits:.2f} bits per weight"),
            ("model", _bytes_after(self.plan["model"]["bytes"], self.plan["compressed_model"]["bytes"])),
            ("values", _each(group.get("values", "float") for group in self.plan["groups"])),
            ("patterns", _each(group["format"] for group in self.plan["groups"])),
        ]
        trained = [
            f"{stage.steps:,} steps {how}"
            for field, how in (("reconstruction", "of every group"), ("distill", "of the whole model"))
            if (stage := getattr(self.config, field, None)) is not None and stage.steps
        ]
        if trained:
            rows.append(("trained", ", ".join(trained)))
        if line := self.distillation():
            rows.append(("distilled", line))
        if errors:
            mean = sum(errors) / len(errors)
            rows.append(("error", f"{mean:.3g} of the variance of block outputs, calibration data"))
        if self.overfit:
            mean = sum(self.overfit.values()) / len(self.overfit)
            rows.append(("held out", f"errors are {mean:.3f} times those on the data that was fitted"))
        if self.quality is not None:
            rows += [(score.name, score.line()) for score in scores(self.quality)]
        if left:
            rows.append(
                ("left dense", f"{len(left)} layers: {'; '.join(dict.fromkeys(one['reason'] for one in left))}")
            )
        rows.append(("took", f"{self.seconds:.0f} s" + ("" if peak is None else f", peak memory {format_bytes(peak)}")))
        return [*rows, *(("note", note) for note in self.notes)]

    def distillation(self) -> str:
        """What distillation gave on data it was not trained on; nothing where that was not measured."""
        losses = dict(self.distilled.get("held_out", ()))
        if not losses:
            return ""
        kept, steps = self.distilled["kept"], self.distilled["steps"]
        return f"loss on data held out {losses[0]:.4g} → {losses[kept]:.4g}, after {kept} of {steps} steps"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        plan_keys = ("model", "compressed_model", "layers", "groups", "skipped")
        if "mlp" in fields:  # what reports called the layers while only MLPs were compressed
            fields = {**fields, "layers": fields["mlp"]}
        fields = {**fields, "groups": [_renamed(group) for group in fields["groups"]]}
        return cls(
            config=CompressionConfig.from_record(fields["config"]),
            plan={key: fields[key] for key in plan_keys} | {key: fields[key] for key in LATER_KEYS if key in fields},
            groups=fields["results"],
            notes=fields.get("notes", []),
            overfit=fields.get("overfit", {}),
            distilled=fields.get("distilled", {}),
            created=fields.get("created"),
            asked=fields.get("asked", {}),
            phases=fields.get("phases", {}),
            quality=fields.get("quality"),
            **{
                key: fields[key]
                for key in (
                    "seconds",
                    "peak_memory_bytes",
                    "activation_file_bytes",
                    "data",
                    "environment",
                    "source",
                )
            },
        )


def in_lines(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, a line each."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def in_html(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values as the table that a notebook shows."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="fips-report" style="text-align: left">{cells}</table>'


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One measure of quality, in words."""

    name: str
    before: str | None
    """Of the original; None where it was not measured, and for what compares the two."""
    after: str

    def line(self) -> str:
        return self.after if self.before is None else f"{self.before} -> {self.after}"


def scores(quality: Mapping[str, Any]) -> list[Score]:
    """What an evaluation (``EvaluationResult.to_dict()``) says about a model and the original beside it."""
    if "scores" not in quality:  # a record of an earlier version
        headline = quality["headline"]
        return [Score(name=headline["name"].replace("_", " "), before=None, after=f"{headline['value']:.4g}")]
    return [Score(**one) for one in quality["scores"]]


def size_asked_for(report: CompressionReport) -> str:
    """The size that was asked for, in words."""
    kept = report.config
    asked = report.asked or {name: getattr(kept, name) for name in ("size", "bits", "budget")}
    if asked.get("size") is not None:
        return f"{asked['size']} for the whole file"
    if asked.get("bits") is not None:
        return f"{asked['bits']:.4g} bits per weight"
    return f"{asked['budget']:.4g} of the parameters"


def _each(lists: Iterable[str]) -> str:
    """Every word of lists with commas, once."""
    return ", ".join(dict.fromkeys(word for words in lists for word in words.split(", ")))


def _bytes_after(before: int, after: int) -> str:
    return f"{format_bytes(before)} -> {format_bytes(after)} ({after / before:.1%})"


def _renamed(group: dict[str, Any]) -> dict[str, Any]:
    """The plan of a group in a report of an earlier version, under the names of now."""
    names = {"columns": "hidden", "nonzeros": "kept"}
    found = {names.get(key, key): value for key, value in group.items()}
    if "sparsity" in found:
        found["density"] = 1 - found.pop("sparsity")
    words = found["format"].split(", ")
    return {**found, "format": ", ".join(FULL if word == FILE_NAMES[FULL] else word for word in words)}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions a figure was measured with."""
    from fips.version import __version__

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fips": __version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory the process held so far: on the GPU if the device is one, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # what ``getrusage`` says includes the process that started this one
        with open("/proc/self/status", encoding="utf-8") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
