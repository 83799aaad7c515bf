"""The commands that measure: ``evaluate``, ``compare`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fips.bars import progress_bars
from fips.cli.app import MEASURE, app
from fips.cli.console import stderr, stdout
from fips.cli.options import (
    DATA_PANEL,
    MODEL,
    TASKS,
    BatchSize,
    Chat,
    Column,
    Data,
    Device,
    Dtype,
    EvalSamples,
    EvalSplit,
    GgufFile,
    Json,
    Layers,
    ModelArgument,
    NumSamples,
    Seed,
    Separator,
    SequenceLength,
    Split,
    Stream,
    Trust,
    data_fields,
    named_source,
    numbers,
)
from fips.cli.printing import print_bench, print_evaluation, print_json, print_tasks
from fips.cli.threads import wait_briefly
from fips.errors import ConfigError

__all__ = ["bench", "compare", "evaluate"]


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
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Examples per task.", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Worked examples before each question of a task.", rich_help_panel=TASKS),
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
            help="Comma-separated; `name+field=value` changes a setting, as in fips+distill.steps=100. Default: all "
            "that train nothing (not: fips-paper, fips-shared, no-sharing).",
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
    wait_briefly()
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
            dtype=dtype, device=device, trust_remote_code=trust_remote_code, bars=bars,
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
        list[int] | None, typer.Option(min=1, metavar="N", help="Examples at once (repeatable); else 1, 8 and 64.")
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="TOKENS", help="Lengths of the prompt (repeatable); else 1, 128, 1024."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Alternating runs per case.")] = 9,
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
