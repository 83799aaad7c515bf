"""``fips demo``: the whole path on the embedded model, as a user would call it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from fips.app.compressing import compress_to_directory, plan_source
from fips.app.evaluating import evaluable_source
from fips.app.outline import outline_of_plan
from fips.app.page import PAGE
from fips.app.tables import format_bytes, kind_table, layer_table, result_table
from fips.bars import progress_bars
from fips.config import CompressionConfig, DataConfig, Recipe
from fips.demo.corpus import calibration_files, copy_files, held_out_files
from fips.evaluation import Divergence, EvaluationResult
from fips.files.manifest import require_free
from fips.recipes import load_recipe

__all__ = ["MODEL_DIRECTORY", "demo_recipe", "run_demo"]

MODEL_DIRECTORY = Path(__file__).parent / "model"
WINDOW = 512
EVALUATION_WINDOWS = 256


def demo_recipe(*, bits: float) -> Recipe:
    """The shipped ``demo`` recipe at a size."""
    recipe = load_recipe("demo")
    fields = {**recipe.compression.model_dump(exclude_unset=True), "bits": bits}
    return recipe.model_copy(update={"compression": CompressionConfig(**fields)})


def run_demo(output: Path, *, bits: float, console: Console, bars: Console | None = None) -> dict[str, Any]:
    """Compress the embedded model into ``output`` and print each step; returns the figures as a JSON-able dict.

    Progress is drawn on ``bars``, if given, while nothing is printed.
    """
    started = time.perf_counter()
    recipe = demo_recipe(bits=bits)
    require_free(output)
    source = str(MODEL_DIRECTORY)
    model, plan = plan_source(source, recipe)
    console.print(layer_table(plan))
    console.print(kind_table(outline_of_plan(model, plan, recipe.compression).kinds))
    beside = bars or Console(quiet=True)
    drawn = progress_bars(beside)
    with tempfile.TemporaryDirectory(prefix="fips-demo-") as scratch, drawn as progress:
        held_out = copy_files(held_out_files(), Path(scratch) / "held-out")
        calibration = copy_files(calibration_files(seed=recipe.compression.seed), Path(scratch) / "calibration")
        assert recipe.data is not None
        recipe = recipe.model_copy(update={"data": recipe.data.replace(source=str(calibration))})
        evaluation = DataConfig(
            source=str(held_out), num_samples=EVALUATION_WINDOWS, sequence_length=WINDOW, batch_size=16
        )
        original = evaluable_source(source, evaluation)
        before = original.evaluate(progress.counter("score the original"))
        scored: list[EvaluationResult] = []

        def quality(compressed: nn.Module) -> EvaluationResult:
            pair = replace(original, model=compressed, original=original.model)
            scored.append(pair.evaluate(progress.counter("score the compressed")))
            return scored[0]

        def say(line: str) -> None:
            beside.print(line, highlight=False, soft_wrap=True)

        done = compress_to_directory(source, recipe, output, progress=progress.event, quality=quality, announce=say)
        assert done is not None  # a single process
        after = scored[0] if scored else evaluable_source(str(output), evaluation).evaluate()
    console.print(result_table(done.report))
    console.print(_quality_table(before, after))
    seconds = time.perf_counter() - started
    original_file = (MODEL_DIRECTORY / "model.safetensors").stat().st_size
    compressed_file = (output / "model.safetensors").stat().st_size
    console.print(
        f"model.safetensors: {format_bytes(original_file)} -> {format_bytes(compressed_file)}; {seconds:.0f} s in all",
        highlight=False,
    )
    for line in (
        f"Compressed model in {output}, a report on it in {output / PAGE}.",
        f'Load it:\n\n    import fips\n    model = fips.load("{output}")\n',
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return {
        "output": str(output),
        "bits_per_byte": {"before": before.to_dict(), "after": after.to_dict()},
        "file_bytes": {"before": original_file, "after": compressed_file},
        "seconds": round(seconds, 1),
        "report": done.report.to_dict(),
    }


def _quality_table(before: EvaluationResult, after: EvaluationResult) -> Table:
    table = Table("held-out modules", "before", "after", title="Quality", title_justify="left")
    first, second = before.to_dict(), after.to_dict()
    for key in ("bits_per_byte", "perplexity"):
        table.add_row(key, f"{first[key]:.4f}", f"{second[key]:.4f}")
    if isinstance(after.against, Divergence):
        table.add_row("KL to the original", "", f"{after.against.kl:.3g}")
        table.add_row("same likeliest byte", "", f"{after.against.agreement_percent:.1f} %")
    return table
