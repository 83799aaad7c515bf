"""Plots; matplotlib is optional and asked for only here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["quality_plot"]

log = logging.getLogger(__name__)


def quality_plot(
    rows: Sequence[Mapping[str, Any]], path: Path, *, metric: str, original: float, higher_is_better: bool
) -> bool:
    """Quality against stored bits per weight, a line per method; False, and one line of log, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot: matplotlib is not installed; `pip install fips[plot]`")
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [row for row in rows if row["method"] == method and row["quality"] is not None]
        axes.plot([row["stored_bits"] for row in points], [row["quality"] for row in points], marker="o", label=method)
    axes.axhline(original, color="black", linewidth=0.8, linestyle="--", label="original")
    if not higher_is_better:
        axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight of the compressed layers")
    axes.set_ylabel(metric)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return True
