"""What each subcommand does, without its printing: check everything cheap first, then load, work and write."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fips.app.compare import Comparison, Run, compare, method_config, write_comparison
from fips.app.fitting import fitting_data
from fips.app.forecast import Forecast, forecast
from fips.app.outline import outline_of_directory
from fips.app.page import PAGE, report_page
from fips.app.sources import empty_model, is_compressed_source, read_model
from fips.compression import Progress, compress
from fips.config import DataConfig, Recipe
from fips.data import Batches, load_batches
from fips.errors import BudgetError, ConfigError, DataError, ModelError, OutputError
from fips.evaluation import EvaluationResult, check_evaluation, evaluate
from fips.files.output import Output, require_empty
from fips.integrations.gguf import Kind, Vocabulary, export_gguf, require_family, vocabulary_of
from fips.integrations.lm_eval import run_tasks
from fips.integrations.onnx import export_onnx
from fips.layers.merge import merge
from fips.methods.registry import aliases
from fips.methods.workbench import measured
from fips.models.reading import kind_of, longest_sequence, processor_of
from fips.models.tasks import task_name, task_of
from fips.models.timm import PixelBatches, is_timm_model
from fips.models.transformers import (
    build_empty,
    config_from_fields,
    example_inputs,
    load_processor,
    model_kind,
    quiet,
    resolve_dtype,
)
from fips.optional import require
from fips.plan.footprint import state_bytes
from fips.plan.plan import CompressionPlan, plan_compression, settle_size
from fips.ranks import joined
from fips.record import CompressionReport, environment
from fips.storage.checkpoint import load, save, write_model
from fips.storage.work import Keeper, kept_work

__all__ = [
    "Compression",
    "Evaluable",
    "Export",
    "compare_source",
    "compress_to_directory",
    "evaluable_source",
    "evaluate_source",
    "evaluate_tasks",
    "export_directory",
    "pick_device",
    "plan_batches",
    "plan_source",
]

log = logging.getLogger("fips.app.commands")


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one; raises ``ConfigError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device `{name}` is not available: {str(error).splitlines()[0]}") from None
    return device


def plan_source(
    source: str | None, recipe: Recipe, *, dtype: Any = "auto", trust_remote_code: bool = False
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
    model: nn.Module, plan: CompressionPlan, recipe: Recipe, *, device: str, chosen: bool, output: Path | None = None
) -> Forecast | None:
    """Say or refuse, as ``fitting_data`` does, what a run would, and what it would take; None for devices not here."""
    try:
        place = pick_device(device)
        kind_of(model)
    except (ConfigError, ModelError):
        return None
    data = recipe.data or DataConfig(source="")
    sized = settle_size(plan, model, recipe.compression)
    data, need = fitting_data(model, plan, sized, data, device=place, chosen=chosen, only_planned=True)
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
    after a crash. ``announce`` is given a line about what the run will take. Of the processes that ``torchrun`` has
    started, the first writes; the others return None.
    """
    if recipe.data is None:
        raise DataError("no calibration data: give --data, or a recipe with `data`")
    place_of_output = Path(os.path.abspath(output))  # resolve() would fail on links that cannot be followed
    work = work or place_of_output.with_name(f"{place_of_output.name}.work")
    dtype = resolve_dtype(dtype)
    with joined() as ranks, kept_work(work, first=ranks.first, keep=keep_work) as keeper:
        if ranks.first:
            require_empty(output)
        place = ranks.device(pick_device(device))
        empty, plan = plan_source(source, recipe, dtype=dtype, trust_remote_code=trust_remote_code)
        sized = settle_size(plan, empty, recipe.compression)
        data, need = fitting_data(
            empty, plan, sized, recipe.data, device=place,
            chosen="batch_size" in recipe.data.model_fields_set,
        )  # fmt: skip
        recipe = recipe.model_copy(update={"data": data})
        with Output(output, needed=plan.compressed_bytes) if ranks.first else nullcontext() as target:
            batches, processor = _batches(
                source, data, empty, purpose="calibration", trust_remote_code=trust_remote_code
            )
            if evaluation is not None and target is not None:
                quality = _at_the_end(
                    source, evaluation, empty, calibration=data, dtype=dtype, device=place,
                    trust_remote_code=trust_remote_code, progress=on_evaluation,
                )  # fmt: skip
            if target is not None and processor is not None and not is_timm_model(empty):
                with target.writing("the tokenizer or image processor"):  # timm keeps the transform in its config.json
                    processor.save_pretrained(target.scratch)
            if announce is not None and ranks.first:
                expected = forecast(
                    empty, plan, sized, data, need, device=place, count=batches.num_samples, output=output
                )
                announce(expected.line())
            model = read_model(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
            examples = PixelBatches(batches) if is_timm_model(model) else batches
            report = compress(model, examples, recipe.compression, progress=progress, work=work)
            if target is None:
                return None
            report.source = source
            if quality is not None:
                found = measured("quality", partial(quality, model))
                report.quality = None if found is None else found.to_dict()
            used = recipe.model_copy(update={"model": source, "architecture": None})
            beside = partial(_write_page, output, trust_remote_code=trust_remote_code)
            return Compression(report, *_write(model, target, processor, used.to_yaml(), keeper, beside))


def _at_the_end(
    source: str,
    evaluation: DataConfig,
    empty: nn.Module,
    *,
    calibration: DataConfig,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool,
    progress: Callable[[int, int], None] | None,
) -> Callable[[nn.Module], EvaluationResult]:
    """An evaluation beside the original, checked now and run when there is a compressed model."""
    if (evaluation.source, evaluation.split) == (calibration.source, calibration.split):
        log.warning("evaluating on the data that is calibrated on, where the model is better than on other data")
    batches, _ = _batches(source, evaluation, empty, purpose="evaluation", trust_remote_code=trust_remote_code)
    check_evaluation(empty, batches, compared=True)

    def run(model: nn.Module) -> EvaluationResult:
        original = read_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return evaluate(model, batches, against=original, progress=progress)

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
        file_bytes = _size(target.scratch)
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


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True, slots=True)
class Evaluable:
    """A model with its examples, and the original it is compared with."""

    model: nn.Module
    original: nn.Module | None
    batches: Batches
    processor: Any
    """Tokenizer or image processor."""

    def evaluate(self, progress: Any = None) -> EvaluationResult:
        return evaluate(self.model, self.batches, against=self.original, progress=progress)


def evaluable_source(
    source: str,
    data: DataConfig,
    *,
    against: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Evaluable:
    """A compressed directory or a dense model, and ``against``, read after everything cheap has been checked."""
    place = pick_device(device)
    dtype = resolve_dtype(dtype)
    empty = empty_model(source, trust_remote_code=trust_remote_code)
    batches, processor = _batches(source, data, empty, purpose="evaluation", trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "device": place, "trust_remote_code": trust_remote_code}
    check_evaluation(empty, batches, compared=against is not None)
    original = None if against is None else _read(against, **options)
    return Evaluable(_read(source, **options), original, batches, processor)


def evaluate_source(
    source: str,
    data: DataConfig,
    *,
    against: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Any = None,
) -> EvaluationResult:
    """How good a compressed directory or a dense model is, by what it predicts, and how far it is from ``against``."""
    return evaluable_source(
        source, data, against=against, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    ).evaluate(progress)


def _read(source: str, *, dtype: Any, device: torch.device, trust_remote_code: bool) -> nn.Module:
    """A compressed directory, whose types are its own, or a dense model."""
    if is_compressed_source(source):
        found: nn.Module = load(source, device=device, trust_remote_code=trust_remote_code)
        return found
    return read_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def compare_source(
    source: str,
    calibration: DataConfig,
    evaluation: DataConfig,
    output: Path,
    *,
    methods: Sequence[str] | None,
    sizes: Sequence[float],
    seeds: Sequence[int],
    layers: str = "blocks",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Any = None,
) -> Comparison:
    """Compare methods (None: all) on a model and write table, JSON and plot to a directory that is absent or empty."""
    require_empty(output)
    place = pick_device(device)
    methods = methods or list(aliases())
    for method in methods:
        method_config(method, bits=sizes[0], seed=0, layers=layers)
    dtype = resolve_dtype(dtype)
    empty = empty_model(source, compressed=False, trust_remote_code=trust_remote_code)
    facts = {
        "source": Path(source).name,
        "calibration": calibration.model_dump(mode="json", exclude_none=True),
        "evaluation": evaluation.model_dump(mode="json", exclude_none=True),
        "environment": environment(place),
    }
    done: list[Run] = []
    total = len(methods) * len(sizes) * len(seeds)

    def on_run(run: Run) -> None:
        done.append(run)
        if progress is not None:
            progress(len(done), total)

    calibration = _fitting_comparison(empty, calibration, methods, sizes[0], place)
    with Output(output) as target:
        scored, _ = _batches(source, evaluation, empty, purpose="evaluation", trust_remote_code=trust_remote_code)
        model = read_model(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)

        def examples(seed: int) -> Any:
            data = calibration.replace(seed=seed)
            batches, _ = _batches(source, data, empty, purpose="calibration", trust_remote_code=trust_remote_code)
            return PixelBatches(batches) if is_timm_model(model) else batches

        try:
            result = compare(
                model, examples, scored, methods=methods, sizes=sizes, seeds=seeds, layers=layers, on_run=on_run
            )
            with target.writing("the comparison"):
                write_comparison(result, target.scratch, facts=facts)
            target.commit()
        except BaseException as error:
            if done and target.kept is None and target.scratch.is_dir():
                error.add_note(f"{len(done)} of {total} runs are in `{_keep_runs(done, target, facts)}`")
            raise
    return result


def _fitting_comparison(
    model: nn.Module, data: DataConfig, methods: Sequence[str], size: float, device: torch.device
) -> DataConfig:
    """Batches that fit whichever of the methods needs most."""
    chosen = "batch_size" in data.model_fields_set
    configs = [method_config(method, bits=size, seed=0) for method in methods]
    for config in {config.method: config for config in configs}.values():
        with suppress(BudgetError):
            plan = plan_compression(model, config)
            data, _ = fitting_data(model, plan, config, data, device=device, chosen=chosen)
    return data


def _keep_runs(done: Sequence[Run], target: Output, facts: Mapping[str, Any]) -> Path:
    """Keep the runs of a comparison that did not come to its end."""
    with suppress(OSError):
        runs = {**facts, "runs": [asdict(run) for run in done]}
        (target.scratch / "compare.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        return target.keep()
    place = Path(tempfile.mkdtemp(prefix="fips-compare-"))
    (place / "compare.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    return place


def evaluate_tasks(
    source: str,
    tasks: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Metrics of lm-eval tasks for a compressed directory or a dense language model."""
    place = pick_device(device)
    dtype = resolve_dtype(dtype)
    empty = empty_model(source, trust_remote_code=trust_remote_code)
    if task_name(empty) != "causal-lm":
        raise ModelError(f"`--tasks` are for language models, `{source}` holds a `{type(empty).__name__}`: give --data")
    tokenizer = load_processor(source, "text", trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ModelError(f"`{source}` has no tokenizer, which tasks need; save one beside the model")
    model = _read(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    return run_tasks(
        model,
        tokenizer,
        tasks,
        batch_size=batch_size or 8,
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
    )


@dataclass(frozen=True, slots=True)
class Export:
    """What ``export_directory`` wrote."""

    format: str
    file_bytes: int
    relative_error: float | None = None
    """Of ONNX Runtime against torch; None for other formats."""
    kinds: tuple[Kind, ...] = ()
    """What became of the tensors in a GGUF file."""
    notes: tuple[str, ...] = ()
    """What is worth knowing of it."""


def export_directory(
    source: str,
    output: Path,
    *,
    fmt: str,
    data: DataConfig | None = None,
    gguf_type: str | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """Write a compressed directory in a form that needs nothing of fips.

    ``dense`` is a plain checkpoint of the original architecture; ``onnx`` a ``model.onnx`` with packed constants,
    checked with ONNX Runtime on the first batch of ``data``, or on made-up inputs without it; both with the tokenizer
    or image processor. ``gguf`` is a ``model.gguf`` for llama.cpp, in which layers that it has no integers for are
    ``gguf_type``: ``q8_0``, the default, or ``f16``. Raises ``ConfigError`` for another format or type and everything
    ``load`` raises.
    """
    if fmt not in ("dense", "onnx", "gguf"):
        raise ConfigError(f"`--format` must be dense, onnx or gguf, got {fmt!r}")
    if gguf_type not in (None, "q8_0", "f16"):
        raise ConfigError(f"`--gguf-type` must be q8_0 or f16, got {gguf_type!r}")
    if gguf_type is not None and fmt != "gguf":
        raise ConfigError(f"`--gguf-type` goes with `--format gguf`, got {fmt}")
    require_empty(output)
    if not is_compressed_source(source):
        raise ModelError(f"`{source}` is not a compressed model; `fips compress` makes one")
    vocabulary = _vocabulary(source, trust_remote_code=trust_remote_code) if fmt == "gguf" else None
    with Output(output, needed=_export_bytes(source, fmt, trust_remote_code=trust_remote_code)) as target:
        model = load(source, trust_remote_code=trust_remote_code)
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"`{source}` holds a `{type(model).__name__}`; only transformers models can be exported")
        done = Export(fmt, 0)
        if vocabulary is not None:
            with target.writing("the GGUF file"):
                file = export_gguf(
                    model, target.scratch / "model.gguf", vocabulary,
                    name=Path(os.path.abspath(source)).name, packed_type="f16" if gguf_type == "f16" else "q8_0",
                )  # fmt: skip
            done = Export(fmt, 0, kinds=file.kinds, notes=file.notes)
        else:
            if fmt == "onnx":
                example = _example(source, model, data, trust_remote_code=trust_remote_code)
                with target.writing("the ONNX file"):
                    done = Export(fmt, 0, export_onnx(model, target.scratch / "model.onnx", example).relative_error)
            _write_plain(model, target, source, fmt, trust_remote_code=trust_remote_code)
        file_bytes = _size(target.scratch)
        target.commit()
    return replace(done, file_bytes=file_bytes)


def _vocabulary(source: str, *, trust_remote_code: bool) -> Vocabulary:
    """The tokenizer of a directory for llama.cpp, once it is known that a GGUF file can be written at all."""
    require("gguf", extra="gguf", purpose="export to GGUF")
    empty = empty_model(source, trust_remote_code=trust_remote_code)
    require_family(empty)
    tokenizer = load_processor(source, "text", trust_remote_code=trust_remote_code)
    return vocabulary_of(tokenizer, empty.config, source=source)


def _write_plain(model: PreTrainedModel, target: Output, source: str, fmt: str, *, trust_remote_code: bool) -> None:
    """A dense model, or its configuration beside an ONNX file, with the tokenizer or image processor."""
    merge(model)
    with quiet(), target.writing("the model"):
        if fmt == "onnx":
            model.config.save_pretrained(target.scratch)
        else:
            _save_dense(model, target.scratch, source)
    with quiet(), target.writing("the tokenizer or image processor", finished="the model"):
        processor = load_processor(source, model_kind(model), trust_remote_code=trust_remote_code)
        if processor is not None:
            processor.save_pretrained(target.scratch)


def _save_dense(model: PreTrainedModel, directory: Path, source: str) -> None:
    """A plain checkpoint with the generation settings of the source as they are.

    Loading leaves them behind, and ``save_pretrained`` refuses those of many models.
    """
    if model.can_generate():
        model.generation_config = GenerationConfig()
    model.save_pretrained(directory)
    settings = Path(source) / "generation_config.json"
    if settings.is_file():
        shutil.copyfile(settings, directory / settings.name)


def _export_bytes(source: str, fmt: str, *, trust_remote_code: bool) -> int:
    """About what an export writes at least: dense weights, or packed ones, half as much where float32 becomes F16."""
    if fmt == "dense":
        return state_bytes(empty_model(source, trust_remote_code=trust_remote_code))
    packed = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    return packed // 2 if fmt == "gguf" else packed


def _example(
    source: str, model: PreTrainedModel, data: DataConfig | None, *, trust_remote_code: bool
) -> dict[str, Tensor]:
    """Inputs to trace and check an export with: the first batch of the data, or made-up ones of the right shape."""
    if data is not None:
        batches, _ = _batches(source, data, model, purpose="calibration", trust_remote_code=trust_remote_code)
        batch = {key: value for key, value in next(iter(batches)).items() if key != "labels"}
    else:
        batch = example_inputs(model)
    if "input_ids" in batch:
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch


def _batches(
    source: str, data: DataConfig, model: nn.Module, *, purpose: Any, trust_remote_code: bool
) -> tuple[Batches, Any]:
    processor = processor_of(source, model, trust_remote_code=trust_remote_code)
    batches = load_batches(
        data, processor=processor, kind=kind_of(model), purpose=purpose, context_length=longest_sequence(model),
        task=task_of(model),
    )  # fmt: skip
    return batches, processor
