"""Options that several commands share, and settings from the options given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fips.errors import ConfigError

MODEL, SIZE, LAYERS, DATA_PANEL = "Model and output", "Size (give one)", "Layers", "Data"
METHOD, SHARING, TRAINING = "Method", "Shared bases", "Training"
TASKS, MACHINE = "Tasks of lm-eval", "Machine and work"
"""Panels of the help."""
DEFAULT_BITS = 4.8
"""Of a plan without a size, as in the demo."""
MOST_BLOCKS = 100_000
"""No model has as many."""

VALUES = [
    f"{kind}{bits}{scale}"
    for kind, most in (("int", 8), ("nl", 5), ("tc", 4))
    for bits in range(2, most + 1)
    for scale in ("", "g64")
]
Complete = Callable[[str], list[str]]


def offer(*values: str) -> Complete:
    """What the shell completes an option with; it keeps those that begin as what was typed."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def _offer_methods(incomplete: str) -> list[str]:
    from fips.config import known_methods

    return offer(*known_methods())(incomplete)


def _offer_recipes(incomplete: str) -> list[str]:
    from fips.recipes import recipe_names

    return offer(*recipe_names())(incomplete)


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model directory, hub id or .gguf file.", show_default=False)
]
ModelOrPacked = Annotated[
    str,
    typer.Argument(metavar="MODEL|DIR", help="Model directory, hub id or compressed directory.", show_default=False),
]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Model directory, hub id or .gguf file.", show_default=False)
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        "--gguf-file", metavar="NAME", help="File of MODEL to read, as floating numbers.", rich_help_panel=MODEL
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=MODEL)]
Device = Annotated[
    str,
    typer.Option(
        autocompletion=offer("auto", "cpu", "cuda"),
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:1, ...",
        rich_help_panel=MACHINE,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        autocompletion=offer("auto", "float32", "bfloat16", "float16"),
        metavar="TYPE",
        help="To load the weights in: auto (the checkpoint's), float32, bfloat16 (bf16) or float16 (fp16).",
        rich_help_panel=MODEL,
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that lies in the model's repository.", rich_help_panel=MODEL),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        autocompletion=_offer_recipes,
        metavar="NAME|FILE",
        help="Recipe name or YAML file; options override it.",
        rich_help_panel=METHOD,
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION", help="Parameters of the layers to keep, 0 to 1, as in the paper.", rich_help_panel=SIZE
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Stored bits per weight of the layers, patterns and scales included, such as 4.8.",
        rich_help_panel=SIZE,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Of all tensors in the file: bytes (400MB), a share (25%), or 4x smaller.",
        rich_help_panel=SIZE,
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(metavar="FRACTION", help="Zeros in the factors, 0 to 1.", rich_help_panel=SHARING),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("auto", "unstructured", "4:16", "2:4", "block4", "block8"),
        metavar="NAME",
        help="Which entries are kept: auto, unstructured, N:M (4:16), block4 or block8.",
        rich_help_panel=METHOD,
    ),
]
ShareBlocks = Annotated[
    int | None,
    typer.Option(min=1, metavar="BLOCKS", help="Consecutive blocks that share a basis.", rich_help_panel=SHARING),
]
Groups = Annotated[
    str | None,
    typer.Option(
        metavar="RANGES", help="Explicit groups of block indices, such as 0-3,4-7,8-11.", rich_help_panel=SHARING
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("mlp", "blocks", "all"),
        metavar="mlp|blocks|all",
        help="mlp; blocks (the default of fips): attention too; all: also embedding and head.",
        rich_help_panel=LAYERS,
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Layers to compress: name, suffix, glob or re:... (repeatable).", rich_help_panel=LAYERS
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to leave alone (repeatable).", rich_help_panel=LAYERS),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Image folder, text file, or datasets id, also id:configuration; several: a.txt:0.7,b.txt:0.3.",
        rich_help_panel=DATA_PANEL,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Split of the data; default: train, to evaluate test or validation.",
        rich_help_panel=DATA_PANEL,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column with the text or the image; several with commas, such as question,answer.",
        rich_help_panel=DATA_PANEL,
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat", help="The column holds messages: read them in the tokenizer's template.", rich_help_panel=DATA_PANEL
    ),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read only what is needed of a table or datasets id; default: of an id when calibrating.",
        rich_help_panel=DATA_PANEL,
    ),
]
NumSamples = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Images or text windows to use; default: all, but 1,024 images or 128 windows when calibrating.",
        rich_help_panel=DATA_PANEL,
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Tokens per text window; default: 512 when calibrating, else the model's context up to 2,048.",
        rich_help_panel=DATA_PANEL,
    ),
]
Separator = Annotated[
    str | None,
    typer.Option(
        "--document-separator",
        metavar="TEXT",
        help="String between the documents of a text; windows then cross none.",
        rich_help_panel=DATA_PANEL,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Examples per batch; default: 32.", rich_help_panel=DATA_PANEL)
]
Seed = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Seed of samples and batch order.", rich_help_panel=DATA_PANEL)
]
EvalData = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="To evaluate on at the end, beside the original; never calibrated on.",
        rich_help_panel=DATA_PANEL,
    ),
]  # fmt: skip
EvalSplit = Annotated[str | None, typer.Option(metavar="NAME", help="Split of that.", rich_help_panel=DATA_PANEL)]
EvalSamples = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Images, texts or windows of that; default: all.", rich_help_panel=DATA_PANEL
    ),
]
Output = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Directory to write; absent or empty.", rich_help_panel=MODEL)
]
Written = Annotated[
    Path, typer.Option(metavar="DIR", help="Directory to write; absent or empty.", rich_help_panel=MODEL)
]

Method = Annotated[
    str | None,
    typer.Option(
        autocompletion=_offer_methods,
        metavar="NAME",
        help="fips, fips-paper, or a method to compare with.",
        rich_help_panel=METHOD,
    ),
]
Effort = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("fast", "default", "max"),
        metavar="LEVEL",
        help="fast, default or max.",
        rich_help_panel=METHOD,
    ),
]
ValueType = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("auto", "float", *VALUES),
        metavar="TYPE",
        help="Of the numbers: auto, float, int2 to int8, nl2 to nl5, tc2 to tc4; nl4g64: a scale per 64 weights.",
        rich_help_panel=METHOD,
    ),
]
ActivationBits = Annotated[
    int | None,
    typer.Option(
        metavar="BITS", help="8: layers of integers may round inputs to 8 bits; 16: never.", rich_help_panel=METHOD
    ),
]
RestDtype = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("float32", "bfloat16", "float16"),
        metavar="TYPE",
        help="Of all that is not compressed: bfloat16, float16 or float32; default: as it is.",
        rich_help_panel=METHOD,
    ),
]
FactorDtype = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("float32", "bfloat16", "float16"),
        metavar="TYPE",
        help="Of scales and floating values: float32, bfloat16 or float16.",
        rich_help_panel=METHOD,
    ),
]
Group = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("auto", "none"),
        metavar="auto|none|BLOCKS",
        help="Who shares a basis: auto (as measured), none, or a number of blocks.",
        rich_help_panel=SHARING,
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("static", "gmp", "rigl"),
        metavar="NAME",
        help="While training: static, gmp (pruned little by little) or rigl (some exchanged).",
        rich_help_panel=SHARING,
    ),
]
ThresholdScope = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("group", "layer"),
        metavar="group|layer",
        help="What one threshold of the paper's pruning holds for.",
        rich_help_panel=SHARING,
    ),
]
Distill = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="STEPS",
        help="End-to-end training steps with the original as teacher.",
        rich_help_panel=TRAINING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="STEPS", help="Training steps of every group, block by block.", rich_help_panel=TRAINING
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        metavar="RATE",
        help="Peak learning rate of --steps; default: 1e-4, of the paper 4e-4.",
        rich_help_panel=TRAINING,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        autocompletion=offer("auto", "float32", "bfloat16"),
        metavar="TYPE",
        help="Of calibration arithmetic: auto, float32 or bfloat16.",
        rich_help_panel=MACHINE,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="For what is measured, such as 6GiB: two thirds moments, a third activations.",
        rich_help_panel=MACHINE,
    ),
]
ActivationMemory = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="RAM for recorded activations, such as 2GiB.", rich_help_panel=MACHINE),
]
Work = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where finished blocks are kept until the end; default: OUTPUT.work.",
        rich_help_panel=MACHINE,
    ),
]
KeepWork = Annotated[
    bool, typer.Option("--keep-work", help="Leave that directory there at the end.", rich_help_panel=MACHINE)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan, and the time and memory of the run, and stop; reads no weights.",
        rich_help_panel=MODEL,
    ),
]

COMPRESSION = ("budget", "bits", "size", "method", "effort", "values", "sparsity", "pattern", "schedule",
               "threshold_scope", "share_blocks", "groups", "layers", "targets", "ignore", "factor_dtype",
               "rest_dtype", "activation_bits", "precision", "activation_memory", "seed")  # fmt: skip
RECONSTRUCTION = ("steps", "learning_rate")
DATA = (
    "split",
    "column",
    "chat",
    "stream",
    "num_samples",
    "sequence_length",
    "document_separator",
    "batch_size",
    "seed",
)


def given(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
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
    from fips.config import bytes_of

    try:
        size = int(bytes_of(text))
    except ValueError as error:
        raise ConfigError(f"`--memory` {error}") from None
    return {"metric": {"memory": 2 * size // 3}, "activation_memory": size // 3}


def _parse_group(text: str) -> dict[str, Any]:
    if text in ("auto", "none"):
        return {"sharing": "auto" if text == "auto" else "never"}
    if not text.isdecimal() or len(text) > len(str(MOST_BLOCKS)) or int(text) < 1:
        raise ConfigError(f"`--group` wants `auto`, `none` or a number of blocks, got {text[:60]!r}")
    return {"sharing": "always", "share_blocks": int(text)}


def _parse_groups(text: str) -> list[list[int]]:
    try:
        ends = [part.strip().partition("-") for part in text.split(",")]
        ranges = [range(int(first), int(last or first) + 1) for first, _, last in ends]
    except ValueError:
        raise ConfigError(f"`--groups` wants ranges such as `0-3,4-7`, got {text[:60]!r}") from None
    if max(one.stop for one in ranges) > MOST_BLOCKS:  # before they are written out
        raise ConfigError(f"`--groups` wants indices of blocks, which are below {MOST_BLOCKS:,}, got {text[:60]!r}")
    return [list(one) for one in ranges]


def named_source(model: Any, gguf_file: str | None) -> Any:
    """MODEL, or the GGUF file of it that ``--gguf-file`` names."""
    if gguf_file is None:
        return model
    if model is None:
        raise ConfigError("`--gguf-file` without a model: give MODEL, the directory or hub id that holds it")
    from fips.models.gguf import join_gguf

    return join_gguf(model, gguf_file)


def numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"`{option}` wants numbers with commas between them, got {text!r}") from None


def data_fields(options: dict[str, Any]) -> dict[str, Any]:
    fields = given(options, DATA)
    if options["data"] is not None:
        fields["source"] = options["data"]
    if "document_separator" in fields:
        fields["document_separator"] = _unescaped(fields["document_separator"])
    return fields


def _unescaped(text: str) -> str:
    """With ``\\n`` and the like as the characters that they stand for."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"`--document-separator` {text!r} is no text: {error.reason}; write a backslash as two of them"
        ) from None


def evaluation_data(options: dict[str, Any], calibration: Any) -> Any:
    """Data to evaluate on (``DataConfig``), read as those for calibration are; None if none were named."""
    given_too = [name for name in ("eval_split", "eval_samples") if options[name] is not None]
    if options["eval_data"] is None:
        if given_too:
            raise ConfigError(f"`--{given_too[0].replace('_', '-')}` without data to evaluate on: give --eval-data")
        return None
    if calibration is None:
        raise ConfigError("no calibration data: give --data, or a recipe with `data`")
    return calibration.replace(
        source=options["eval_data"], split=options["eval_split"], num_samples=options["eval_samples"]
    )


def settings_of_options(
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
    sized = bool({"budget", "bits", "size"} & compression.keys())
    if name is None and not sized:
        if default_size is None:
            raise ConfigError(
                "no size: give --bits (stored bits per weight), --size (of the whole file), --budget (fraction of "
                "parameters) or --recipe"
            )
        compression = {**compression, "bits": default_size}
    if sized or name is None:
        compression = {"budget": None, "bits": None, "size": None, **compression}
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
