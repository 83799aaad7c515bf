"""One function per subcommand: its options, the call that does the work, and the printing of its result.

What does the work is imported when it is called, so that ``--help`` stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fips.bars import progress_bars
from fips.cli.console import say, stderr, stdout
from fips.cli.options import (
    COMPRESSION,
    DATA_PANEL,
    DEFAULT_BITS,
    MODEL,
    RECONSTRUCTION,
    SIZE,
    TASKS,
    ActivationBits,
    ActivationMemory,
    BatchSize,
    Bits,
    Budget,
    Chat,
    Column,
    Data,
    Device,
    Distill,
    DryRun,
    Dtype,
    Effort,
    EvalData,
    EvalSamples,
    EvalSplit,
    FactorDtype,
    GgufFile,
    Group,
    Groups,
    Ignore,
    Json,
    KeepWork,
    Layers,
    LearningRate,
    Memory,
    Method,
    ModelArgument,
    ModelOrPacked,
    NumSamples,
    OptionalModel,
    Output,
    Pattern,
    Precision,
    RecipeOption,
    RestDtype,
    Schedule,
    Seed,
    Separator,
    SequenceLength,
    ShareBlocks,
    Size,
    Sparsity,
    Split,
    Steps,
    Stream,
    Targets,
    ThresholdScope,
    Trust,
    ValueType,
    Work,
    Written,
    data_fields,
    evaluation_data,
    given,
    named_source,
    numbers,
    offer,
    settings_of_options,
)
from fips.cli.printing import (
    print_bench,
    print_compression,
    print_evaluation,
    print_json,
    print_packed,
    print_plan,
    print_tasks,
    tell_file,
)
from fips.errors import ConfigError

app = typer.Typer(
    name="fips",
    help="Smaller transformers: matrices as numbers of few bits, measured by the output of the model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
COMPRESS, MEASURE, LOOK = "Compress", "Measure", "Look"
"""Panels of commands."""


def _print_version(asked: bool) -> None:
    """Of fips and of what models are built with, which are not imported for it."""
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        from fips.version import __version__

        stdout.print(f"fips {__version__}", highlight=False)
        for name in ("torch", "transformers"):
            try:
                stdout.print(f"{name} {version(name)}", highlight=False)
            except PackageNotFoundError:
                stdout.print(f"{name} is not installed", highlight=False)
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Versions of fips, torch and transformers."
        ),
    ] = False,
) -> None:
    """Smaller transformers: matrices as numbers of few bits, chosen by what they do to the output of the model."""


@app.command(rich_help_panel=COMPRESS)
def compress(
    model: OptionalModel = None,
    bits: Bits = None,
    size: Size = None,
    budget: Budget = None,
    output: Output = None,
    gguf_file: GgufFile = None,
    data: Data = None,
    num_samples: NumSamples = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = None,
    split: Split = None,
    column: Column = None,
    chat: Chat = None,
    stream: Stream = None,
    document_separator: Separator = None,
    seed: Seed = None,
    eval_data: EvalData = None,
    eval_split: EvalSplit = None,
    eval_samples: EvalSamples = None,
    layers: Layers = None,
    targets: Targets = None,
    ignore: Ignore = None,
    recipe: RecipeOption = None,
    method: Method = None,
    effort: Effort = None,
    values: ValueType = None,
    pattern: Pattern = None,
    activation_bits: ActivationBits = None,
    factor_dtype: FactorDtype = None,
    rest_dtype: RestDtype = None,
    group: Group = None,
    share_blocks: ShareBlocks = None,
    groups: Groups = None,
    sparsity: Sparsity = None,
    schedule: Schedule = None,
    threshold_scope: ThresholdScope = None,
    distill: Distill = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    precision: Precision = None,
    memory: Memory = None,
    activation_memory: ActivationMemory = None,
    work: Work = None,
    keep_work: KeepWork = False,
    dry_run: DryRun = False,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compress a model, by default its MLPs and attention, into a directory that `fips.load` reads."""
    from fips.app.compressing import compress_to_directory, plan_batches, plan_source
    from fips.app.outline import outline_of_plan

    options = locals()
    _require_given(options)
    model = named_source(model, gguf_file)
    setting = settings_of_options(
        recipe,
        compression=given(options, COMPRESSION),
        reconstruction=given(options, RECONSTRUCTION),
        data=data_fields(options),
    )
    if dry_run:
        empty, made = plan_source(model, setting, dtype=dtype, trust_remote_code=trust_remote_code)
        estimate = plan_batches(
            empty, made, setting, source=model, device=device, chosen=batch_size is not None, output=output or Path()
        )
        print_plan(outline_of_plan(empty, made, setting.compression), as_json=as_json, estimate=estimate)
        return
    source = model or setting.model
    if source is None:
        raise ConfigError("no model: give MODEL, or a recipe that names one")
    if output is None:
        raise ConfigError("no output directory: give --output DIR, or --dry-run to see the plan")
    scored = evaluation_data(options, setting.data)
    with progress_bars(stderr) as bars:
        done = compress_to_directory(
            source, setting, output, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
            progress=bars.event, announce=say, work=work, keep_work=keep_work, evaluation=scored,
            on_evaluation=bars.counter("evaluate"),
        )  # fmt: skip
    if done is not None:
        print_compression(done, output, as_json=as_json)
        if not as_json:
            tell_file(str(source))


def _require_given(options: dict[str, Any]) -> None:
    """Raise ``ConfigError`` with all that a compression lacks; a recipe may bring everything but the output."""
    sized = any(options[name] is not None for name in ("bits", "size", "budget"))
    run = not options["dry_run"]
    wanted = {
        "MODEL": options["model"] is not None or options["recipe"] is not None,
        "a size (--bits, --size or --budget)": sized or options["recipe"] is not None,
        "--data DATA": options["data"] is not None or options["recipe"] is not None or not run,
        "--output DIR": options["output"] is not None or not run,
    }
    missing = [what for what, there in wanted.items() if not there]
    if len(missing) > 1:
        raise ConfigError(f"missing: {', '.join(missing)}")


@app.command(rich_help_panel=LOOK)
def plan(
    model: OptionalModel = None,
    bits: Bits = None,
    size: Size = None,
    budget: Budget = None,
    gguf_file: GgufFile = None,
    layers: Layers = None,
    targets: Targets = None,
    ignore: Ignore = None,
    recipe: RecipeOption = None,
    pattern: Pattern = None,
    sparsity: Sparsity = None,
    share_blocks: ShareBlocks = None,
    groups: Groups = None,
    rest_dtype: RestDtype = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Sizes by kind of layer before and after, and the smallest size there is; from the configuration alone."""
    from fips.app.compressing import plan_source
    from fips.app.outline import outline_of_plan

    options = given(locals(), COMPRESSION)
    setting = settings_of_options(recipe, compression=options, default_size=DEFAULT_BITS)
    source = named_source(model, gguf_file)
    empty, made = plan_source(source, setting, dtype=dtype, trust_remote_code=trust_remote_code)
    print_plan(outline_of_plan(empty, made, setting.compression), as_json=as_json)
    if not as_json:
        if recipe is None and not options.keys() & {"bits", "size", "budget"}:
            stdout.tell(f"no size was given: this is {DEFAULT_BITS:g} bits a weight")
        tell_file(source)


@app.command(rich_help_panel=LOOK)
def inspect(
    model: ModelOrPacked,
    bits: Bits = None,
    size: Size = None,
    budget: Budget = None,
    gguf_file: GgufFile = None,
    layers: Layers = None,
    targets: Targets = None,
    ignore: Ignore = None,
    recipe: RecipeOption = None,
    pattern: Pattern = None,
    sparsity: Sparsity = None,
    share_blocks: ShareBlocks = None,
    groups: Groups = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Layers of a model with roles and shapes, or of a compressed directory with bits, formats and errors.

    Changes nothing and reads no weights.
    """
    from fips.app.compressing import plan_source
    from fips.app.outline import outline_of_directory, outline_of_plan
    from fips.app.sources import is_compressed_source

    options = given(locals(), COMPRESSION)
    model = named_source(model, gguf_file)
    if is_compressed_source(model):
        if options or recipe is not None:
            name = next(iter(options), "recipe").replace("_", "-")
            raise ConfigError(f"`{model}` is compressed: what it is cannot be changed by --{name}; leave it out")
        print_packed(outline_of_directory(model, trust_remote_code=trust_remote_code), as_json=as_json)
        return
    setting = settings_of_options(recipe, compression=options, default_size=DEFAULT_BITS)
    empty, made = plan_source(model, setting, trust_remote_code=trust_remote_code)
    print_plan(outline_of_plan(empty, made, setting.compression), as_json=as_json, with_layers=True)


@app.command(rich_help_panel=LOOK)
def report(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Compressed directory, or hub id of one.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.", rich_help_panel=MODEL)] = Path(
        "report.html"
    ),
    data: Data = None,
    split: Split = None,
    column: Column = None,
    chat: Chat = None,
    stream: Stream = None,
    num_samples: NumSamples = None,
    sequence_length: SequenceLength = None,
    document_separator: Separator = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, to compare with on --data.")
    ] = None,
    examples: Annotated[
        int,
        typer.Option(metavar="N", help="Examples of the data to show.", rich_help_panel=DATA_PANEL),
    ] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Sizes, layers, settings and notes of a compressed directory as one HTML file; with --data also its quality."""
    from fips.app.reporting import report_on
    from fips.config import DataConfig

    fields = data_fields(locals())
    if fields and "source" not in fields:
        raise ConfigError("data options without data: give --data")
    with progress_bars(stderr) as bars:
        done = report_on(
            directory, output, data=DataConfig(**fields) if fields else None, against=against, examples=examples,
            device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=bars.counter("evaluate"),
        )  # fmt: skip
    if as_json:
        print_json({"output": str(done.path), "bytes": done.bytes, "quality": done.quality, "examples": done.examples})
        return
    stdout.tell(f"written to {done.path}: {done.bytes:,} bytes")


@app.command(rich_help_panel=MEASURE)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="Compressed directory, model directory, hub id or .gguf file.")
    ],
    gguf_file: GgufFile = None,
    data: Data = None,
    split: Split = None,
    column: Column = None,
    chat: Chat = None,
    stream: Stream = None,
    num_samples: NumSamples = None,
    sequence_length: SequenceLength = None,
    document_separator: Separator = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original: KL (nats), agreement (%); cosine of embeddings.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Instead of --data, such as arc_easy,piqa.", rich_help_panel=TASKS),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Examples per task.", rich_help_panel=TASKS)] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(metavar="N", help="Worked examples before each question of a task.", rich_help_panel=TASKS),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory with further lm-eval task files.", rich_help_panel=TASKS),
    ] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """How good a model is at what it predicts, and how far from its original.

    Perplexity of language models, pseudo-perplexity of masked ones, accuracy of classifiers, perplexity of the targets
    of encoder-decoders, embeddings beside the original's; or lm-eval tasks.
    """
    from fips.app.evaluating import evaluable_source, evaluate_tasks
    from fips.config import DataConfig

    fields = data_fields(locals())
    model = named_source(model, gguf_file)
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
    with progress_bars(stderr) as bars:
        found = evaluable_source(
            model, DataConfig(**fields), against=against, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        result = found.evaluate(bars.counter("evaluate"))
    print_json(result.to_dict()) if as_json else print_evaluation(model, result)


@app.command(rich_help_panel=COMPRESS)
def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Compressed directory.")],
    output: Written,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=offer("dense", "onnx", "gguf"),
            metavar="dense|onnx|gguf",
            help="A plain checkpoint, ONNX, or GGUF for llama.cpp.",
            rich_help_panel=MODEL,
        ),
    ] = "dense",
    gguf_type: Annotated[
        str | None,
        typer.Option(
            autocompletion=offer("q8_0", "f16"),
            metavar="q8_0|f16",
            help="Of packed layers that llama.cpp has no integers for; default: q8_0.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="Of ONNX: 8: layers may round inputs to 8 bits, and run as blocks of few bits; 16: never.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data: Data = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model for tools that do not know fips; ONNX files are checked on --data, or made-up inputs."""
    from dataclasses import asdict

    from fips.app.exporting import export_directory
    from fips.config import DataConfig

    example = DataConfig(source=data, num_samples=2) if data is not None else None
    done = export_directory(
        model, output, fmt=format_, data=example, gguf_type=gguf_type, activation_bits=activation_bits,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print_json(asdict(done))
        return
    for line in (*(kind.line() for kind in done.kinds), *done.notes):
        stdout.tell(line)
    checked = "" if done.relative_error is None else f"; ONNX Runtime differs from torch by {done.relative_error:.1e}"
    stdout.tell(f"written to {output}: {done.file_bytes:,} bytes{checked}")


@app.command(rich_help_panel=COMPRESS)
def merge(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Compressed directory.")],
    output: Written,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model with plain dense layers again, as `fips export --format dense` does."""
    export(model, output, trust_remote_code=trust_remote_code, as_json=as_json)


@app.command(rich_help_panel=MEASURE)
def compare(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option(metavar="DATA", help="Calibration data, as for `fips compress`.", rich_help_panel=DATA_PANEL)
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="For compare.json, compare.md and, with matplotlib, compare.svg.", rich_help_panel=MODEL
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated; `name+field=value` changes a setting, as in fips+distill.steps=100. Default: all.",
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option("--bits", metavar="BITS,...", help="Stored bits per weight of the layers.")
    ] = "4,4.8,6.4,8",
    seeds: Annotated[str, typer.Option(metavar="N,...", help="Seeds of calibration samples and solvers.")] = "0",
    layers: Layers = None,
    eval_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="To score on; default: --data.", rich_help_panel=DATA_PANEL)
    ] = None,
    eval_split: EvalSplit = None,
    eval_samples: EvalSamples = None,
    split: Split = None,
    column: Column = None,
    chat: Chat = None,
    stream: Stream = None,
    num_samples: NumSamples = None,
    sequence_length: SequenceLength = None,
    document_separator: Separator = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compare methods at the same stored bits at most: quality, size and time of each."""
    from fips.app.compare import LARGEST_THAT_FITS
    from fips.app.comparing import compare_source
    from fips.app.tables import comparison_table
    from fips.config import DataConfig

    fields = data_fields({**locals(), "seed": None})
    scored = {**fields, "source": eval_data or data, "split": eval_split, "num_samples": eval_samples}
    with progress_bars(stderr) as bars:
        result = compare_source(
            model, DataConfig(**fields), DataConfig(**scored), output, methods=methods.split(",") if methods else None,
            sizes=numbers("--bits", sizes, float), seeds=numbers("--seeds", seeds, int), layers=layers or "blocks",
            dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=bars.counter("compare"),
        )  # fmt: skip
    if as_json:
        print_json(result.to_dict())
        return
    stdout.print(comparison_table(result))
    stdout.tell(LARGEST_THAT_FITS)


@app.command(rich_help_panel=MEASURE)
def bench(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Compressed directory.", show_default=False)],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Model to compare with (repeatable); else DIR merged to dense layers."),
    ] = None,
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="auto, measure, speed, packed, decode, merge or merged.")
    ] = "auto",
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Examples at once (repeatable); else 1, 8 and 64.")
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(metavar="TOKENS", help="Lengths of the prompt (repeatable); else 1, 128, 1024.")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Alternating runs per case.")] = 9,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time a compressed model beside the dense one, and print memory and file sizes."""
    from fips.app.bench import BATCHES, PROMPTS
    from fips.app.bench import bench as run_bench

    with progress_bars(stderr) as bars:
        result = run_bench(
            directory, against=against, policy=policy, batches=batch or BATCHES, prompts=prompt or PROMPTS,
            repeats=repeats, seed=seed or 0, trust_remote_code=trust_remote_code, progress=bars.counter("bench"),
        )  # fmt: skip
    print_json(result) if as_json else print_bench(result)


@app.command(rich_help_panel=LOOK)
def recipes(as_json: Json = False) -> None:
    """List the recipes that ship with fips."""
    from fips.app.tables import recipe_table
    from fips.recipes import load_recipe, recipe_names

    entries = {name: load_recipe(name) for name in recipe_names()}
    if as_json:
        print_json({name: entry.model_dump(mode="json", exclude_none=True) for name, entry in entries.items()})
        return
    stdout.print(recipe_table(entries))


@app.command(rich_help_panel=COMPRESS)
def demo(
    output: Written = Path("fips-demo"),
    bits: Annotated[
        float,
        typer.Option(metavar="BITS", help="Stored bits per weight of the layers.", rich_help_panel=SIZE),
    ] = 4.8,
    as_json: Json = False,
) -> None:
    """Compress the embedded byte-level Llama on your interpreter's standard library; no network, under 3 minutes."""
    from fips.demo import run_demo

    result = run_demo(output, bits=bits, console=stderr if as_json else stdout, bars=stderr)
    if as_json:
        print_json(result)
