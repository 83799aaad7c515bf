"""One function per subcommand: its options, the call that does the work, and the printing of its result.

What does the work is imported when it is called, so that ``--help`` stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fips.cli.console import counter, progress_bars, say, stderr, stdout
from fips.cli.options import (
    COMPRESSION,
    RECONSTRUCTION,
    BatchSize,
    Bits,
    Budget,
    Column,
    Data,
    Device,
    Dtype,
    Groups,
    Ignore,
    Json,
    Layers,
    ModelArgument,
    NumSamples,
    OptionalModel,
    Pattern,
    RecipeOption,
    Seed,
    Separator,
    SequenceLength,
    ShareBlocks,
    Size,
    Sparsity,
    Split,
    Targets,
    Trust,
    data_fields,
    given,
    numbers,
    settings_of_options,
)
from fips.cli.printing import print_bench, print_compression, print_evaluation, print_json, print_plan, print_tasks
from fips.errors import ConfigError

app = typer.Typer(
    name="fips",
    help="Smaller transformers: MLPs as one shared basis times sparse factors (arXiv 2411.09816).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def inspect(
    model: ModelArgument,
    recipe: RecipeOption = None,
    budget: Budget = None,
    bits: Bits = None,
    size: Size = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    share_blocks: ShareBlocks = None,
    groups: Groups = None,
    layers: Layers = None,
    targets: Targets = None,
    ignore: Ignore = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """List the layers found, their groups, ranks, parameters and bytes; changes nothing and reads no weights."""
    from fips.app.commands import plan_source

    setting = settings_of_options(recipe, compression=given(locals(), COMPRESSION), default_size=8.0)
    _, plan = plan_source(model, setting, trust_remote_code=trust_remote_code)
    print_plan(plan, as_json=as_json, with_layers=True)


@app.command()
def compress(
    model: OptionalModel = None,
    data: Data = None,
    budget: Budget = None,
    bits: Bits = None,
    size: Size = None,
    output: Annotated[Path | None, typer.Option(help="Directory to write; absent or empty.")] = None,
    recipe: RecipeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; needs no weights.")] = False,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    method: Annotated[str | None, typer.Option(help="fips, fips-paper, or a method to compare with.")] = None,
    group: Annotated[
        str | None, typer.Option(help="Who shares a basis: `auto` as measured, `none`, or a number of blocks.")
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(help="Type of the values: auto, float, int2 to int8, nl2 to nl5; nl4g64: a scale per 64."),
    ] = None,
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
    layers: Layers = None,
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
    setting = settings_of_options(
        recipe,
        compression=given(options, COMPRESSION),
        reconstruction=given(options, RECONSTRUCTION),
        data=data_fields(options),
    )
    if dry_run:
        empty, plan = plan_source(model, setting, dtype=dtype, trust_remote_code=trust_remote_code)
        estimate = plan_batches(
            empty, plan, setting, device=device, chosen=batch_size is not None, output=output or Path()
        )
        print_plan(plan, as_json=as_json, estimate=estimate)
        return
    source = model or setting.model
    if source is None:
        raise ConfigError("no model: give MODEL, or a recipe that names one")
    if output is None:
        raise ConfigError("no output directory: give --output DIR, or --dry-run to see the plan")
    with progress_bars() as progress:
        done = compress_to_directory(
            source, setting, output, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress,
            announce=say, work=work, keep_work=keep_work,
        )  # fmt: skip
    if done is not None:
        print_compression(done, output, as_json=as_json)


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

    fields = data_fields(locals())
    if tasks is not None and against is not None:
        raise ConfigError("`--against` compares predictions on `--data`; lm-eval tasks have none to compare")
    if (tasks is None) == ("source" not in fields):
        raise ConfigError("no data: give --data or --tasks" if tasks is None else "give either --data or --tasks")
    if tasks is not None:
        metrics = evaluate_tasks(
            model, tasks.split(","), device=device, dtype=dtype, batch_size=batch_size, limit=limit,
            num_fewshot=num_fewshot, include_path=include_path, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        print_json(metrics) if as_json else print_tasks(metrics)
        return
    with counter("evaluate") as progress:
        result = evaluate_source(
            model, DataConfig(**fields), against=against, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    print_json(result.to_dict()) if as_json else print_evaluation(model, result)


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
        print_json(asdict(done))
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

    fields = data_fields({**locals(), "seed": None})
    scored = {**fields, "source": eval_data or data, "split": eval_split, "num_samples": eval_samples}
    with counter("compare") as progress:
        result = compare_source(
            model, DataConfig(**fields), DataConfig(**scored), output, methods=methods.split(",") if methods else None,
            sizes=numbers("--bits", sizes, float), seeds=numbers("--seeds", seeds, int), dtype=dtype,
            device=device, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    print_json(result.to_dict()) if as_json else stdout.print(comparison_table(result))


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
    print_json(result) if as_json else print_bench(result)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that ship with fips."""
    from rich.table import Table

    from fips.recipes import load_recipe, recipe_names

    entries = {name: load_recipe(name) for name in recipe_names()}
    if as_json:
        print_json({name: entry.model_dump(mode="json", exclude_none=True) for name, entry in entries.items()})
        return
    table = Table("recipe", "model", "keeps", "description")
    for name, entry in entries.items():
        setting = entry.compression
        size = setting.size or (f"{setting.budget:g} parameters" if setting.budget else f"{setting.bits:g} bits")
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
    with progress_bars() as progress:
        result = run_demo(output, bits=bits, console=console, progress=progress)
    if as_json:
        print_json(result)
