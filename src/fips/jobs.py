"""What each subcommand does, without its printing: check everything cheap first, then load, work and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fips.compare import Comparison, Run, compare, method_config, write_comparison
from fips.compress import Progress, compress
from fips.config import DataConfig, Recipe
from fips.data import Batches, load_batches
from fips.errors import ConfigError, DataError, ModelError
from fips.evaluate import EvaluationResult, evaluate
from fips.integrations.lm_eval import run_tasks
from fips.integrations.onnx import export_onnx
from fips.integrations.sources import (
    empty_model,
    is_compressed_source,
    kind_of,
    longest_sequence,
    processor_of,
    read_model,
)
from fips.integrations.timm import PixelBatches, is_timm_model
from fips.integrations.transformers import (
    build_empty,
    config_from_fields,
    example_inputs,
    load_dense,
    load_processor,
    model_kind,
    quiet,
    resolve_dtype,
)
from fips.merge import merge
from fips.plan import CompressionPlan, plan_compression
from fips.report.record import CompressionReport, environment
from fips.storage.checkpoint import load, save
from fips.storage.files import complete_directory, require_free

__all__ = [
    "Compression",
    "Export",
    "compare_source",
    "compress_to_directory",
    "evaluate_source",
    "evaluate_tasks",
    "export_directory",
    "pick_device",
    "plan_source",
]


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
    source: str | None, recipe: Recipe, *, trust_remote_code: bool = False
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
    return model, plan_compression(model, recipe.compression)


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
) -> Compression:
    """Compress a model and write it; everything that can be refused is refused before the weights are read."""
    if recipe.data is None:
        raise DataError("no calibration data: give --data, or a recipe with `data`")
    require_free(output)
    place = pick_device(device)
    dtype = resolve_dtype(dtype)
    empty, _ = plan_source(source, recipe, trust_remote_code=trust_remote_code)
    batches, processor = _batches(
        source, recipe.data, empty, purpose="calibration", trust_remote_code=trust_remote_code
    )
    model = read_model(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    examples = PixelBatches(batches) if is_timm_model(model) else batches
    report = compress(model, examples, recipe.compression, progress=progress)
    report.source = source
    used = recipe.model_copy(update={"model": source, "architecture": None})
    files = None if is_timm_model(model) else processor  # timm keeps the transform in its config.json
    tensor_bytes = save(model, output, processor=files, recipe=used.to_yaml())
    file_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Compression(report, tensor_bytes, file_bytes)


def evaluate_source(
    source: str,
    data: DataConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Any = None,
) -> EvaluationResult:
    """Accuracy or perplexity of a compressed directory or of a dense model."""
    place = pick_device(device)
    dtype = resolve_dtype(dtype)
    empty = empty_model(source, trust_remote_code=trust_remote_code)
    batches, _ = _batches(source, data, empty, purpose="evaluation", trust_remote_code=trust_remote_code)
    if is_compressed_source(source):
        model = load(source, device=place, trust_remote_code=trust_remote_code)
    else:
        model = read_model(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    return evaluate(model, batches, progress=progress)


def compare_source(
    source: str,
    calibration: DataConfig,
    evaluation: DataConfig,
    output: Path,
    *,
    methods: Sequence[str],
    sizes: Sequence[float],
    seeds: Sequence[int],
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Any = None,
) -> Comparison:
    """Compare methods on a model and write table, JSON and plot to a directory that is absent or empty."""
    require_free(output)
    place = pick_device(device)
    for method in methods:
        method_config(method, target_bytes=sizes[0], seed=0)
    dtype = resolve_dtype(dtype)
    empty = empty_model(source, compressed=False, trust_remote_code=trust_remote_code)
    scored, _ = _batches(source, evaluation, empty, purpose="evaluation", trust_remote_code=trust_remote_code)
    model = read_model(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)

    def examples(seed: int) -> Any:
        data = calibration.replace(seed=seed)
        batches, _ = _batches(source, data, empty, purpose="calibration", trust_remote_code=trust_remote_code)
        return PixelBatches(batches) if is_timm_model(model) else batches

    done: list[Run] = []
    total = len(methods) * len(sizes) * len(seeds)

    def on_run(run: Run) -> None:
        done.append(run)
        if progress is not None:
            progress(len(done), total)

    result = compare(model, examples, scored, methods=methods, sizes=sizes, seeds=seeds, on_run=on_run)
    facts = {
        "source": Path(source).name,
        "calibration": calibration.model_dump(mode="json", exclude_none=True),
        "evaluation": evaluation.model_dump(mode="json", exclude_none=True),
        "environment": environment(place),
    }
    write_comparison(result, output, facts=facts)
    return result


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
    if kind_of(empty_model(source, trust_remote_code=trust_remote_code)) != "text":
        raise ModelError(f"`--tasks` are for language models; `{source}` reads images: give --data")
    tokenizer = load_processor(source, "text", trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ModelError(f"`{source}` has no tokenizer, which tasks need; save one beside the model")
    if is_compressed_source(source):
        model = load(source, device=place, trust_remote_code=trust_remote_code)
    else:
        model = load_dense(source, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
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
    relative_error: float | None
    """Of ONNX Runtime against torch; None for a dense checkpoint."""


def export_directory(
    source: str, output: Path, *, fmt: str, data: DataConfig | None = None, trust_remote_code: bool = False
) -> Export:
    """Write a compressed directory in a form that needs nothing of fips.

    ``dense`` is a plain checkpoint of the original architecture; ``onnx`` a ``model.onnx`` with packed constants,
    checked with ONNX Runtime on the first batch of ``data``, or on made-up inputs without it. Tokenizer or image
    processor are copied. Raises ``ConfigError`` for another format and everything ``load`` raises.
    """
    if fmt not in ("dense", "onnx"):
        raise ConfigError(f"`--format` must be dense or onnx, got {fmt!r}")
    require_free(output)
    if not is_compressed_source(source):
        raise ModelError(f"`{source}` is not a compressed model; `fips compress` makes one")
    model = load(source, trust_remote_code=trust_remote_code)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"`{source}` holds a `{type(model).__name__}`; only transformers models can be exported")
    processor = load_processor(source, model_kind(model), trust_remote_code=trust_remote_code)
    error = None
    with complete_directory(output) as scratch:
        if fmt == "onnx":
            example = _example(source, model, data, trust_remote_code=trust_remote_code)
            error = export_onnx(model, scratch / "model.onnx", example).relative_error
        merge(model)
        with quiet():
            if fmt == "onnx":
                model.config.save_pretrained(scratch)
            else:
                model.save_pretrained(scratch)
            if processor is not None:
                processor.save_pretrained(scratch)
    return Export(fmt, sum(path.stat().st_size for path in output.rglob("*") if path.is_file()), error)


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
        data, processor=processor, kind=kind_of(model), purpose=purpose, context_length=longest_sequence(model)
    )
    return batches, processor
