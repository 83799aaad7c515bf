"""The ``fips`` command: one public function per subcommand, results to stdout, progress and words to stderr.

Exit codes: 0 success, 1 failure, 2 wrong usage or setting, 128 + n ended by signal n (130 Ctrl-C, 143 SIGTERM).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fips.errors import ConfigError, FipsError
from fips.signals import FINISHED, Stopped, stoppable

app = typer.Typer(
    name="fips",
    help="Smaller transformers: MLPs as one shared basis times sparse factors (arXiv 2411.09816).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Results(Console):
    """Standard output. That it takes nothing more (a full disk, a closed pipe) costs no work: ``main`` says so last."""

    failure: OSError | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        with self._taking():
            super().print(*objects, **options)

    def write(self, text: str) -> None:
        """The text as it is."""
        with self._taking():
            self.file.write(text)
            self.file.flush()

    @contextmanager
    def _taking(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            with suppress(OSError, ValueError):  # what is left in its buffer would fail again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling, instead of ending the process


stdout = Results()
stderr = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id.", show_default=False)]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Model directory or hub id.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, ...")]
Dtype = Annotated[
    str, typer.Option(help="Type to load the weights in: auto (the checkpoint's), float32, bfloat16 or float16.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that lies in the model's repository.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Recipe name or YAML file; options override it.")]
Budget = Annotated[float | None, typer.Option(help="Fraction of the layers' parameters to keep.")]
Bits = Annotated[float | None, typer.Option(help="Stored bits per weight of the layers, patterns and scales included.")]
Sparsity = Annotated[float | None, typer.Option(help="Fraction of zeros in the factors.")]
Pattern = Annotated[str | None, typer.Option(help="auto, unstructured, N:M such as 4:16, block4 or block8.")]
ShareBlocks = Annotated[int | None, typer.Option(help="Consecutive blocks that share a basis.")]
Groups = Annotated[str | None, typer.Option(help="Explicit groups of block indices, such as `0-3,4-7,8-11`.")]
Targets = Annotated[
    list[str] | None, typer.Option(help="Layers to compress: name, suffix, glob or re:... (repeatable).")
]
Ignore = Annotated[list[str] | None, typer.Option(help="Layers to leave alone (repeatable).")]
Data = Annotated[str | None, typer.Option(help="Image folder, text file, or datasets id[:configuration].")]
Split = Annotated[str | None, typer.Option(help="Split of the data.")]
Column = Annotated[str | None, typer.Option(help="Column with the text or the image.")]
NumSamples = Annotated[int | None, typer.Option(help="Images or text windows to use.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per text window.")]
Separator = Annotated[str | None, typer.Option("--document-separator", help="String between the documents of a text.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples per batch.")]
Seed = Annotated[int | None, typer.Option(help="Seed of samples and batch order.")]


@app.command()
def inspect(
    model: ModelArgument,
    recipe: RecipeOption = None,
    budget: Budget = None,
    bits: Bits = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    share_blocks: ShareBlocks = None,
    groups: Groups = None,
    targets: Targets = None,
    ignore: Ignore = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """List the layers found, their groups, ranks, parameters and bytes; changes nothing and reads no weights."""
    from fips.app.commands import plan_source

    setting = _recipe(recipe, compression=_given(locals(), COMPRESSION), default_size=8.0)
    _, plan = plan_source(model, setting, trust_remote_code=trust_remote_code)
    _print_plan(plan, as_json=as_json, with_layers=True)


@app.command()
def compress(
    model: OptionalModel = None,
    data: Data = None,
    budget: Budget = None,
    bits: Bits = None,
    output: Annotated[Path | None, typer.Option(help="Directory to write; absent or empty.")] = None,
    recipe: RecipeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; needs no weights.")] = False,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    method: Annotated[str | None, typer.Option(help="fips, fips-paper, or a method to compare with.")] = None,
    group: Annotated[
        str | None, typer.Option(help="Who shares a basis: `auto` as measured, `none`, or a number of blocks.")
    ] = None,
    values: Annotated[str | None, typer.Option(help="Type of the values: auto, float, or int2 to int8.")] = None,
    activation_bits: Annotated[
        int | None, typer.Option(help="8: layers of integers may round their inputs to 8 bits.")
    ] = None,
    distill: Annotated[
        int | None, typer.Option(metavar="STEPS", help="End-to-end steps with the original as teacher.")
    ] = None,
    effort: Annotated[str | None, typer.Option(help="fast, default or max.")] = None,
    schedule: Annotated[str | None, typer.Option(help="static, gmp or rigl.")] = None,
    threshold_scope: Annotated[str | None, typer.Option(help="One threshold per `group` or per `layer`.")] = None,
    share_blocks: ShareBlocks = None,
    groups: Groups = None,
    targets: Targets = None,
    ignore: Ignore = None,
    factor_dtype: Annotated[str | None, typer.Option(help="Storage type: float32, bfloat16 or float16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of block-wise reconstruction per group.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="Calibration arithmetic: auto, float32, bfloat16.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="For what is measured, such as 6GiB: two thirds moments, a third activations.")
    ] = None,
    activation_memory: Annotated[str | None, typer.Option(help="RAM for recorded activations, such as 2GiB.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where finished blocks are kept until the end; default: OUTPUT.work.")
    ] = None,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Leave that directory there at the end.")] = False,
    split: Split = None,
    column: Column = None,
    num_samples: NumSamples = None,
    sequence_length: SequenceLength = None,
    document_separator: Separator = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compress layers of a model, by default its MLPs, and write a directory that `fips.load` reads."""
    from fips.app.commands import compress_to_directory, plan_batches, plan_source

    options = locals()
    setting = _recipe(
        recipe,
        compression=_given(options, COMPRESSION),
        reconstruction=_given(options, RECONSTRUCTION),
        data=_data_fields(options),
    )
    if dry_run:
        empty, plan = plan_source(model, setting, trust_remote_code=trust_remote_code)
        estimate = plan_batches(
            empty, plan, setting, device=device, chosen=batch_size is not None, output=output or Path()
        )
        _print_plan(plan, as_json=as_json, estimate=estimate)
        return
    source = model or setting.model
    if source is None:
        raise ConfigError("no model: give MODEL, or a recipe that names one")
    if output is None:
        raise ConfigError("no output directory: give --output DIR, or --dry-run to see the plan")
    with _progress_bars() as progress:
        done = compress_to_directory(
            source, setting, output, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress,
            announce=_say, work=work, keep_work=keep_work,
        )  # fmt: skip
    if done is not None:
        _print_compression(done, output, as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="Compressed directory, model directory or hub id.")],
    data: Data = None,
    split: Split = None,
    column: Column = None,
    num_samples: NumSamples = None,
    sequence_length: SequenceLength = None,
    document_separator: Separator = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original: KL and agreement of the predictions with it.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks instead of --data, such as arc_easy,piqa.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples before each question of a task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory with further lm-eval task files.")] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Top-1 and top-5 of an image classifier, perplexity and bits per byte of a language model, or lm-eval tasks."""
    from fips.app.commands import evaluate_source, evaluate_tasks
    from fips.config import DataConfig

    fields = _data_fields(locals())
    if tasks is not None and against is not None:
        raise ConfigError("`--against` compares predictions on `--data`; lm-eval tasks have none to compare")
    if (tasks is None) == ("source" not in fields):
        raise ConfigError("no data: give --data or --tasks" if tasks is None else "give either --data or --tasks")
    if tasks is not None:
        metrics = evaluate_tasks(
            model, tasks.split(","), device=device, dtype=dtype, batch_size=batch_size, limit=limit,
            num_fewshot=num_fewshot, include_path=include_path, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        _print_json(metrics) if as_json else _print_tasks(metrics)
        return
    with _counter("evaluate") as progress:
        result = evaluate_source(
            model, DataConfig(**fields), against=against, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    _print_json(result.to_dict()) if as_json else _print_evaluation(model, result)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Compressed directory.")],
    output: Annotated[Path, typer.Option(help="Directory to write; absent or empty.")],
    format_: Annotated[str, typer.Option("--format", help="dense (a plain checkpoint) or onnx.")] = "dense",
    data: Data = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model for tools that do not know fips; ONNX files are checked on the first batch of --data."""
    from dataclasses import asdict

    from fips.app.commands import export_directory
    from fips.config import DataConfig

    example = DataConfig(source=data, num_samples=2) if data is not None else None
    done = export_directory(model, output, fmt=format_, data=example, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(asdict(done))
        return
    checked = "" if done.relative_error is None else f"; ONNX Runtime differs from torch by {done.relative_error:.1e}"
    stdout.print(f"written to {output}: {done.file_bytes:,} bytes{checked}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help="Calibration data, as for `fips compress`.")],
    output: Annotated[Path, typer.Option(help="Directory for compare.json, compare.md and compare.svg.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; `name+field=value` changes a setting, as in fips+distill.steps=100. Default: all."
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option("--bits", help="Stored bits per weight of the layers, with commas between them.")
    ] = "4,4.8,6.4,8",
    seeds: Annotated[str, typer.Option(help="Seeds of calibration samples and solvers.")] = "0",
    eval_data: Annotated[str | None, typer.Option(help="Data to score on; default: --data.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Its split.")] = None,
    eval_samples: Annotated[int | None, typer.Option(help="How many of them; default: all.")] = None,
    split: Split = None,
    column: Column = None,
    num_samples: NumSamples = None,
    sequence_length: SequenceLength = None,
    document_separator: Separator = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compare methods at equal stored bits: quality, block error, size and time of each."""
    from fips.app.commands import compare_source
    from fips.app.tables import comparison_table
    from fips.config import DataConfig

    fields = _data_fields({**locals(), "seed": None})
    scored = {**fields, "source": eval_data or data, "split": eval_split, "num_samples": eval_samples}
    with _counter("compare") as progress:
        result = compare_source(
            model, DataConfig(**fields), DataConfig(**scored), output, methods=methods.split(",") if methods else None,
            sizes=_numbers("--bits", sizes, float), seeds=_numbers("--seeds", seeds, int), dtype=dtype,
            device=device, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    _print_json(result.to_dict()) if as_json else stdout.print(comparison_table(result))


@app.command()
def bench(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Compressed directory.", show_default=False)],
    against: Annotated[str | None, typer.Option(help="Model to compare with; else DIR merged to dense layers.")] = None,
    policy: Annotated[str, typer.Option(help="auto, speed, packed, decode, merge or merged.")] = "auto",
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes (repeatable); 1, 8 and 64 unless given.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Prompt lengths (repeatable); else 1, 128, 1024.")] = None,
    repeats: Annotated[int, typer.Option(help="Alternating runs per case.")] = 9,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time a compressed model beside the dense one, and print memory and file sizes."""
    from fips.app.bench import BATCHES, PROMPTS
    from fips.app.bench import bench as run_bench

    result = run_bench(
        directory, against=against, policy=policy, batches=batch or BATCHES, prompts=prompt or PROMPTS,
        repeats=repeats, seed=seed or 0, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _print_json(result) if as_json else _print_bench(result)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that ship with fips."""
    from rich.table import Table

    from fips.recipes import load_recipe, recipe_names

    entries = {name: load_recipe(name) for name in recipe_names()}
    if as_json:
        _print_json({name: entry.model_dump(mode="json", exclude_none=True) for name, entry in entries.items()})
        return
    table = Table("recipe", "model", "keeps", "description")
    for name, entry in entries.items():
        setting = entry.compression
        size = f"{setting.budget:g} parameters" if setting.budget else f"{setting.bits:g} bits"
        table.add_row(name, entry.model or "any", size, entry.description)
    stdout.print(table)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory to write; absent or empty.")] = Path("fips-demo"),
    bits: Annotated[
        float, typer.Option(help="Stored bits per weight of the layers, patterns and scales included.")
    ] = 4.8,
    as_json: Json = False,
) -> None:
    """Compress the embedded byte-level Llama on your interpreter's standard library; no network, under 3 minutes."""
    from fips.demo import run_demo

    console = stderr if as_json else stdout
    with _progress_bars() as progress:
        result = run_demo(output, bits=bits, console=console, progress=progress)
    if as_json:
        _print_json(result)


COMPRESSION = ("budget", "bits", "method", "effort", "values", "sparsity", "pattern", "schedule", "threshold_scope",
               "share_blocks", "groups", "targets", "ignore", "factor_dtype", "activation_bits", "precision",
               "activation_memory", "seed")  # fmt: skip
RECONSTRUCTION = ("steps", "learning_rate")
DATA = ("split", "column", "num_samples", "sequence_length", "document_separator", "batch_size", "seed")


def _given(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options the user set, by field name."""
    fields = {name: options[name] for name in names if options.get(name) not in (None, [])}
    if "groups" in fields:
        fields["groups"] = _parse_groups(fields["groups"])
    if names is COMPRESSION and options.get("group") is not None:
        fields |= _parse_group(options["group"])
    if names is COMPRESSION and options.get("distill") is not None:
        fields["distill"] = {"steps": options["distill"]}
    if names is COMPRESSION and options.get("memory") is not None:
        fields |= _parse_memory(options["memory"])
    return fields


def _parse_memory(text: str) -> dict[str, Any]:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise ConfigError(f"`--memory` wants a size such as 6GiB, got {text!r}") from None
    return {"metric": {"memory": 2 * size // 3}, "activation_memory": size // 3}


def _parse_group(text: str) -> dict[str, Any]:
    if text in ("auto", "none"):
        return {"sharing": "auto" if text == "auto" else "never"}
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"`--group` wants `auto`, `none` or a number of blocks, got {text!r}")
    return {"sharing": "always", "share_blocks": int(text)}


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"`{option}` wants numbers with commas between them, got {text!r}") from None


def _data_fields(options: dict[str, Any]) -> dict[str, Any]:
    fields = _given(options, DATA)
    if options["data"] is not None:
        fields["source"] = options["data"]
    if "document_separator" in fields:
        fields["document_separator"] = fields["document_separator"].encode().decode("unicode_escape")
    return fields


def _parse_groups(text: str) -> list[list[int]]:
    try:
        groups = []
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            groups.append(list(range(int(first), int(last or first) + 1)))
    except ValueError:
        raise ConfigError(f"`--groups` wants ranges such as `0-3,4-7`, got {text!r}") from None
    return groups


def _recipe(
    name: str | None,
    *,
    compression: dict[str, Any],
    reconstruction: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    default_size: float | None = None,
) -> Any:
    """The recipe asked for, or the method's own, with the options given on the command line in its place."""
    from fips.config import DEFAULT_METHOD, DataConfig, Recipe, settings_of
    from fips.recipes import load_recipe

    base = load_recipe(name or settings_of(compression.get("method", DEFAULT_METHOD)).recipe)
    sized = "budget" in compression or "bits" in compression
    if name is None and not sized:
        if default_size is None:
            raise ConfigError(
                "no size: give --bits (stored bits per weight), --budget (fraction of parameters) or --recipe"
            )
        compression = {**compression, "bits": default_size}
    if sized or name is None:
        compression = {"budget": None, "bits": None, **compression}
    method = settings_of(compression.get("method", base.compression.method))
    if "pattern" in compression and "sparsity" in method.model_fields:
        compression = {"sparsity": None, **compression}
    if "share_blocks" in compression and "groups" not in compression:
        compression = {**compression, "groups": None}
    settings = base.compression.replace(**compression)
    if reconstruction:
        before = getattr(settings, "reconstruction", None)  # methods without one say whose it is
        fields = reconstruction if before is None else before.replace(**reconstruction)
        settings = settings.replace(reconstruction=fields)
    if not data:
        return Recipe(**{**_fields(base), "compression": settings})
    known = (
        _fields(base.data) if base.data is not None and data.get("source", base.data.source) == base.data.source else {}
    )
    if "source" not in {**known, **data}:
        raise ConfigError("data options without data: give --data")
    return Recipe(**{**_fields(base), "compression": settings, "data": DataConfig(**{**known, **data})})


def _fields(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.model_fields_set}


def _print_json(value: Any) -> None:
    stdout.write(json.dumps(value, indent=2) + "\n")


def _print_plan(plan: Any, *, as_json: bool, with_layers: bool = False, estimate: Any = None) -> None:
    from fips.app.tables import layer_table, plan_table, size_table, skipped_lines

    if as_json:
        _print_json({**plan.to_dict(), **({} if estimate is None else {"estimate": estimate.to_dict()})})
        return
    if with_layers:
        stdout.print(layer_table(plan))
    stdout.print(plan_table(plan.groups))
    stdout.print(size_table(plan))
    for line in skipped_lines(plan):
        stdout.print(line, highlight=False)
    if estimate is not None:
        stdout.print(estimate.line(), highlight=False, soft_wrap=True)


def _print_compression(done: Any, output: Path, *, as_json: bool) -> None:
    from fips.app.tables import format_bytes, left_dense_lines, result_table

    if as_json:
        record = {"output": str(output), "tensor_bytes": done.tensor_bytes, "directory_bytes": done.file_bytes}
        _print_json({**record, **done.report.to_dict()})
        return
    stdout.print(result_table(done.report))
    for line in (*left_dense_lines(done.report.plan), *done.report.notes):
        stdout.print(line, highlight=False, soft_wrap=True)
    before = done.report.plan["model"]["bytes"]
    peak = done.report.peak_memory_bytes
    stdout.print(
        f"{format_bytes(before)} -> {format_bytes(done.tensor_bytes)} of tensors, {done.report.seconds:.0f} s, "
        f"peak memory {'not measured' if peak is None else format_bytes(peak)}",
        highlight=False,
    )
    stdout.print(f'written to {output}; load it with fips.load("{output}")', highlight=False, soft_wrap=True)


def _print_evaluation(name: str, result: Any) -> None:
    from rich.table import Table

    table = Table("measure", "value", title=name, title_justify="left")
    fields = result.to_dict()
    for key, value in {**fields, **(fields["against"] or {})}.items():
        if value is not None and not isinstance(value, dict):
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    stdout.print(table)


def _print_tasks(metrics: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    table = Table("task", "metric", "value")
    for task, values in metrics.items():
        for name, value in values.items():
            table.add_row(task, name, f"{value:.4f}")
    stdout.print(table)


def _print_bench(result: dict[str, Any]) -> None:
    from rich.table import Column, Table

    from fips.app.tables import format_bytes

    table = Table(Column("median ± half spread, ms", no_wrap=True), "dense", "compressed", "speedup", "per second")
    for name, case in result["cases"].items():
        dense, compressed = (
            f"{1e3 * side['median_s']:.2f} ± {500 * (side['quartiles_s'][1] - side['quartiles_s'][0]):.2f}"
            for side in (case["dense"], case["compressed"])
        )
        table.add_row(name, dense, compressed, f"{case['speedup']:.2f}", f"{case['compressed']['per_second']:.0f}")
    stdout.print(table)
    for words, sizes in (("file", result["file_bytes"]), ("peak memory", result["peak_memory_bytes"])):
        dense, compressed = (format_bytes(sizes[side]) if sizes[side] else "-" for side in ("dense", "compressed"))
        stdout.print(f"{words}: {dense} dense, {compressed} compressed", highlight=False)
    runtime = result["runtime"]
    stdout.print(
        f"packed layers: {format_bytes(runtime['stored_bytes'])} stored, {format_bytes(runtime['extra_bytes'])} beside "
        f"them at run time, {format_bytes(runtime['dense_bytes'])} as dense matrices",
        highlight=False,
    )


class _Bars:
    """Progress on stderr: bars on a terminal, a line per tenth of the work in a log.

    Nothing appears before the first step, so that an early error stays a single line.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=stderr)
        self._tasks: dict[str, TaskID] = {}

    def show(self, label: str, done: int, total: int, note: str = "") -> None:
        with suppress(OSError, ValueError):  # a terminal or a pipe that is gone must not cost the work
            self._show(label, done, total, note)

    def _show(self, label: str, done: int, total: int, note: str) -> None:
        if not stderr.is_terminal:
            if done in (1, total) or (total >= 10 and done % (total // 10) == 0):
                stderr.print(f"{label} {done}/{total or '?'} {note}".rstrip(), highlight=False)
            return
        if not self._tasks:
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total or None, note="")
        self._bars.update(self._tasks[label], completed=done, total=total or None, note=note)

    def stop(self) -> None:
        with suppress(OSError, ValueError):
            if self._tasks:
                self._bars.stop()


@contextmanager
def _progress_bars() -> Iterator[Any]:
    """A ``fips.compress.Progress`` that draws one bar per stage of every group."""
    bars = _Bars()
    try:
        yield lambda event: bars.show(
            f"{event.stage} {event.group}",
            event.done,
            event.total,
            "" if event.loss is None else f"loss {event.loss:.3g}",
        )
    finally:
        bars.stop()


@contextmanager
def _counter(label: str) -> Iterator[Any]:
    bars = _Bars()
    try:
        yield lambda done, total: bars.show(label, done, total)
    finally:
        bars.stop()


def main(argv: list[str] | None = None) -> int:
    """Run the command; errors become one line on stderr and an exit code."""
    stdout.failure = None
    try:
        with stoppable():
            result = app(args=argv, standalone_mode=False)
        if stdout.failure is not None:
            if not isinstance(stdout.failure, BrokenPipeError):  # a reader that has seen enough needs no words
                reason = f"cannot write to standard output: {stdout.failure.strerror}"
                _say(f"error: {'; '.join([reason, *FINISHED])}")
            return 1
        return result if isinstance(result, int) else 0
    except FipsError as error:
        _say(f"error: {'; '.join([str(error), *_notes(error)])}")
        return error.exit_code
    except (Stopped, KeyboardInterrupt, typer.Abort) as stopped:
        _say(f"interrupted: {'; '.join(_notes(stopped)) or 'nothing was written'}")
        return stopped.exit_code if isinstance(stopped, Stopped) else 128 + signal.SIGINT
    except Exception as error:
        show = getattr(error, "show", None)  # usage errors of the option parser print themselves
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, and what was finished before it."""
    return list(dict.fromkeys([*getattr(error, "__notes__", []), *FINISHED]))


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that is gone
        print(line, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
