"""The commands that write a model: ``compress``, ``export``, ``merge`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fips.bars import progress_bars
from fips.cli.app import COMPRESS, app
from fips.cli.console import say, stderr, stdout
from fips.cli.options import (
    COMPRESSION,
    MODEL,
    RECONSTRUCTION,
    SIZE,
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
    offer,
    settings_of_options,
)
from fips.cli.printing import print_compression, print_json, print_plan, tell_file
from fips.cli.threads import wait_briefly
from fips.errors import ConfigError

__all__ = ["compress", "demo", "export", "merge"]


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
    wait_briefly()
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


@app.command(rich_help_panel=COMPRESS)
def demo(
    output: Written = Path("fips-demo"),
    bits: Annotated[
        float,
        typer.Option(metavar="BITS", help="Stored bits per weight of the layers.", rich_help_panel=SIZE),
    ] = 4.8,
    as_json: Json = False,
) -> None:
    """Compress the embedded byte-level Llama on the standard library; no network, a few minutes."""
    wait_briefly()
    from fips.demo import run_demo

    result = run_demo(output, bits=bits, console=stderr if as_json else stdout, bars=stderr)
    if as_json:
        print_json(result)
