"""The commands that show what a model is, or will be: ``plan``, ``inspect``, ``report`` and ``recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fips.bars import progress_bars
from fips.cli.app import LOOK, app
from fips.cli.console import stderr, stdout
from fips.cli.options import (
    COMPRESSION,
    DATA_PANEL,
    DEFAULT_BITS,
    MODEL,
    BatchSize,
    Bits,
    Budget,
    Chat,
    Column,
    Data,
    Device,
    Dtype,
    GgufFile,
    Groups,
    Ignore,
    Json,
    Layers,
    ModelOrPacked,
    NumSamples,
    OptionalModel,
    Pattern,
    RecipeOption,
    RestDtype,
    Seed,
    Separator,
    SequenceLength,
    ShareBlocks,
    Size,
    Sparsity,
    Split,
    Stream,
    Targets,
    Trust,
    data_fields,
    given,
    named_source,
    settings_of_options,
)
from fips.cli.printing import print_json, print_packed, print_plan, tell_file
from fips.errors import ConfigError

__all__ = ["inspect", "plan", "recipes", "report"]


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
        typer.Option(min=0, metavar="N", help="Examples of the data to show.", rich_help_panel=DATA_PANEL),
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
