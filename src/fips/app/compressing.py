"""``fips plan`` and ``fips compress``: check everything cheap first, then load, work and write."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fips.app.fitting import fitting_data
from fips.app.forecast import Forecast, forecast
from fips.app.outline import outline_of_directory
from fips.app.page import PAGE, report_page
from fips.app.sources import Source, empty_model, pick_device
from fips.compression import Progress, compress
from fips.config import DataConfig, Recipe, same_data
from fips.data.mixture import mixture_of
from fips.data.source import describe_source
from fips.errors import ConfigError, ModelError, OutputError
from fips.evaluation import EvaluationResult, check_evaluation, evaluate
from fips.files.names import base_name
from fips.files.output import Output
from fips.methods.workbench import measured
from fips.models.reading import kind_of
from fips.models.timm import PixelBatches, is_timm_model
from fips.models.transformers import build_empty, config_from_fields, resolve_dtype
from fips.plan.plan import CompressionPlan, plan_compression, settle_size
from fips.ranks import joined
from fips.record import CompressionReport
from fips.storage.checkpoint import save, write_model
from fips.storage.work import Keeper, kept_seconds, kept_work

__all__ = ["Compression", "compress_to_directory", "plan_batches", "plan_source"]

log = logging.getLogger("fips.app.compressing")


def plan_source(
    source: str | None, recipe: Recipe, *, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, CompressionPlan]:
    """The plan for a model, built without weights from its configuration or from the recipe's own."""
    if source is not None:
        model = empty_model(source, compressed=False, trust_remote_code=trust_remote_code)
    elif recipe.architecture is not None:
        model = build_empty(config_from_fields(recipe.architecture))
    elif recipe.model is not None:
        model = empty_model(recipe.model, compressed=False, trust_remote_code=trust_remote_code)
    else:
        raise ConfigError("no model: give MODEL, or a recipe that names one")
    wanted = resolve_dtype(dtype)
    if wanted != "auto":
        model.to(dtype=getattr(torch, wanted))  # sizes are those of the types that weights are loaded in
    return model, plan_compression(model, recipe.compression)


def plan_batches(
    model: nn.Module,
    plan: CompressionPlan,
    recipe: Recipe,
    *,
    source: str | None,
    device: str,
    chosen: bool,
    output: Path | None = None,
) -> Forecast | None:
    """Say or refuse, as ``fitting_data`` does, what a run would, and what it would take; None for devices not here.

    ``model`` and ``plan`` are what ``plan_source`` gave for ``source`` and the recipe. Raises ``DataError`` for data
    that is not there.
    """
    data = recipe.data or DataConfig(source="")
    for one in mixture_of(data.source) or [data.source]:
        if one:
            describe_source(one)
    try:
        place = pick_device(device)
        kind_of(model)
    except (ConfigError, ModelError):
        return None
    sized = settle_size(plan, model, recipe.compression)
    name = source or recipe.model
    mapped = 0 if name is None else Source(name, device=place).mapped_bytes(model)
    data, need = fitting_data(model, plan, sized, data, device=place, chosen=chosen, only_planned=True, mapped=mapped)
    return forecast(model, plan, sized, data, need, device=place, output=output)


@dataclass(frozen=True, slots=True)
class Compression:
    """What ``compress_to_directory`` wrote."""

    report: CompressionReport
    tensor_bytes: int
    file_bytes: int


def compress_to_directory(
    source: str,
    recipe: Recipe,
    output: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    work: Path | None = None,
    keep_work: bool = False,
    quality: Callable[[nn.Module], EvaluationResult] | None = None,
    evaluation: DataConfig | None = None,
    on_evaluation: Callable[[int, int], None] | None = None,
) -> Compression | None:
    """Compress a model and write it; everything that can be refused is refused before the weights are read.

    ``evaluation`` names other data that the compressed model is evaluated on at the end, beside the original, which is
    read again for it, with ``on_evaluation`` as progress; ``quality`` is an evaluation of another kind. What is found
    goes into the record, the model card and the page that are written with the model.

    What is finished is kept in ``work``, by default a directory beside the output, so that the same command goes on
    after a crash. ``announce`` is given a line about what the run will take, and one if it goes on from another.
    Of the processes that ``torchrun`` has started, the first writes; the others return None.
    """
    if recipe.data is None:
        raise ConfigError("no calibration data: give --data, or a recipe with `data`")
    place_of_output = Path(os.path.abspath(output))  # resolve() would fail on links that cannot be followed
    work = work or place_of_output.with_name(f"{place_of_output.name}.work")
    original = Source.named(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with (
        joined() as ranks,
        Output(output) if ranks.first else nullcontext() as target,
        kept_work(work, output, first=ranks.first, keep=keep_work) as keeper,
    ):
        original = replace(original, device=ranks.device(original.device))
        empty, plan = plan_source(source, recipe, dtype=dtype, trust_remote_code=trust_remote_code)
        sized = settle_size(plan, empty, recipe.compression)
        chosen = "batch_size" in recipe.data.model_fields_set
        mapped = original.mapped_bytes(empty)
        data, need = fitting_data(empty, plan, sized, recipe.data, device=original.device, chosen=chosen, mapped=mapped)
        recipe = recipe.model_copy(update={"data": data})
        if target is not None:
            target.require_room(plan.compressed_bytes)
        batches, processor = original.batches(data, empty, purpose="calibration")
        if evaluation is not None and target is not None:
            quality = _at_the_end(original, evaluation, empty, calibration=data, progress=on_evaluation)
        if target is not None and processor is not None and not is_timm_model(empty):
            with target.writing("the tokenizer or image processor"):  # timm keeps the transform in its config.json
                processor.save_pretrained(target.scratch)
        if announce is not None and ranks.first:
            expected = forecast(
                empty, plan, sized, data, need, device=original.device, count=batches.num_samples, output=output
            )
            announce(expected.line())
            _tell_of_work(work, announce)
        model = original.dense()
        examples = PixelBatches(batches) if is_timm_model(model) else batches
        report = compress(model, examples, recipe.compression, progress=progress, work=work)
        if target is None:
            return None
        report.source = source
        if quality is not None:
            found = measured("quality", partial(quality, model))
            report.quality = None if found is None else found.to_dict()
        beside = partial(_write_page, output, trust_remote_code=trust_remote_code)
        return Compression(report, *_write(model, target, processor, _used(recipe, source), keeper, beside))


def _tell_of_work(work: Path, announce: Callable[[str], None]) -> None:
    """Say that a run goes on from another, if it does."""
    if kept := kept_seconds(work):
        words = f"`{work.name}` keeps what earlier runs finished in {kept:.0f} s"
        announce(f"{words}: a run with the same settings and data goes on from there")


def _used(recipe: Recipe, source: str) -> str:
    """The recipe, as YAML, that makes the same of the same model."""
    words = f"The settings that {base_name(source)} was compressed with."
    return recipe.model_copy(update={"description": words, "model": source, "architecture": None}).to_yaml()


def _at_the_end(
    source: Source,
    evaluation: DataConfig,
    empty: nn.Module,
    *,
    calibration: DataConfig,
    progress: Callable[[int, int], None] | None,
) -> Callable[[nn.Module], EvaluationResult]:
    """An evaluation beside the original, checked now and run when there is a compressed model."""
    if same_data(evaluation, calibration):
        log.warning("evaluating on the data that is calibrated on, where the model is better than on other data")
    batches, _ = source.batches(evaluation, empty, purpose="evaluation")
    check_evaluation(empty, batches, compared=True)

    def run(model: nn.Module) -> EvaluationResult:
        return evaluate(model, batches, against=source.dense(), progress=progress)

    return run


def _write(
    model: nn.Module,
    target: Output,
    processor: Any,
    recipe: str,
    keeper: Keeper,
    beside: Callable[[Path], None],
) -> tuple[int, int]:
    """Bytes of tensors and of files written; what cannot be written where it should is written elsewhere."""
    try:
        tensor_bytes = write_model(model, target, recipe=recipe, beside=beside)
        file_bytes = target.written_bytes()
        target.commit()
    except Exception as error:
        if target.kept is not None:
            raise
        files = None if is_timm_model(model) else processor
        place = _rescue(model, target.directory, files, recipe)
        keeper.finished = place is not None
        raise OutputError(
            f"{error}; the compressed model is complete in `{place}` instead: move it to where it should be"
            if place is not None
            else f"{error}; it could be written nowhere else either"
        ) from error
    return tensor_bytes, file_bytes


def _write_page(output: Path, directory: Path, *, trust_remote_code: bool) -> None:
    """The report on what was written into ``directory``, which will be ``output``."""
    packed = outline_of_directory(str(directory), trust_remote_code=trust_remote_code)
    page = report_page(packed, name=output.resolve().name)
    (directory / PAGE).write_text(page, encoding="utf-8")


def _rescue(model: nn.Module, directory: Path, processor: Any, recipe: str) -> Path | None:
    """Save a model that its output did not take at the first other place that does."""
    name = f"{directory.resolve().name[:100]}-rescued-{os.getpid()}"
    for parent in (directory.resolve().parent, Path(tempfile.gettempdir()), Path.cwd(), Path.home()):
        for files in (processor, None):
            try:
                save(model, parent / name, processor=files, recipe=recipe)
            except Exception as error:
                log.warning("`%s` does not take the model either: %s", parent, error)
            else:
                return parent / name
    return None
