"""Time and peak memory of a compression beside llm-compressor's: one model, one machine, alternating, as a ratio.

    python3 -m venv OTHER && OTHER/bin/pip install -r benchmarks/llm-compressor-requirements.txt
    python benchmarks/against_llm_compressor.py --python OTHER/bin/python --repeats 3 \
        --ours '{"method": "gptq", "bits": 4.25}' '{"bits": 4.0}'

llm-compressor asks for an older transformers than fips and so has an environment of its own. The model is a Llama with
random bfloat16 weights and tied embeddings. Its vocabulary is 32,000, 31 times its width as in Llama-3.1-8B, so that
the head weighs what it does there: fips runs it, llm-compressor leaves it out of its calibration. Only the linear
layers of the MLPs are compressed, by llm-compressor to `W4A16` by GPTQ and to half of their entries by SparseGPT, with
its default settings, and by fips with the settings given, each a JSON object of fields of ``CompressionConfig``. All
read the same windows of random tokens, `--batch-size` at a time; 1 is llm-compressor's default. llm-compressor
computes in the type that the model is loaded in. It is run with each of `--dtypes`, as a CPU without bfloat16 products
needs many times longer for them; fips loads the model as it is saved and chooses by itself.

Every run is a process of its own with `--threads` threads. All runs take turns, and each repeat starts with another
one. Three figures are kept of each: `compress_s`, from a loaded model to a compressed one in memory (the one call of
``oneshot`` or ``fips.compress``, no imports, no loading, no saving); `process_s`, from the start of the process to the
saved directory; and the peak of resident memory up to the end of the compression. Random weights say nothing about
quality. That llm-compressor did its work is checked in its weights: at most 16 values in every group, or half zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from output import result_file

# This file runs in both environments, and a new process starts with the peak memory of the one that made it: torch and
# what needs it are imported where they are used, in the processes that are measured and never in the one that waits.

T = TypeVar("T")
RESULT = Path(__file__).parent / "results" / "against-llm-compressor.json"
MLP = r"re:.*mlp\.(gate|up|down)_proj$"
GROUP, LEVELS = 128, 16
"""Of `W4A16`."""
SPARSITY = 0.5
THEIRS = {
    "GPTQ": {"modifier": "gptq", "fields": {"scheme": "W4A16"}},
    "SparseGPT": {"modifier": "sparsegpt", "fields": {"sparsity": SPARSITY, "mask_structure": "0:0"}},
}
REFERENCE = "llm-compressor GPTQ"
DTYPES = ("bfloat16", "float32")
MEASURES = ("compress_s", "process_s", "peak_bytes", "loaded_peak_bytes")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model and the calibration data, under the names of transformers."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    windows: int
    tokens: int
    seed: int

    @property
    def mlp_weights(self) -> int:
        return 3 * self.blocks * self.hidden * self.intermediate


def make(scratch: Path, workload: Workload, ours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The model and the windows; settings are checked before either is made."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import fips
    from fips.kernels import cpu
    from fips.record import environment

    for settings in ours:
        fips.CompressionConfig(**settings)
    config = LlamaConfig(
        vocab_size=workload.vocabulary, hidden_size=workload.hidden, intermediate_size=workload.intermediate,
        num_hidden_layers=workload.blocks, num_attention_heads=workload.heads, num_key_value_heads=workload.kv_heads,
        max_position_embeddings=max(2048, workload.tokens), tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(workload.seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(scratch / "model")
    windows = torch.randint(workload.vocabulary, (workload.windows, workload.tokens))
    save_file({"input_ids": windows}, scratch / "windows.safetensors")
    return {**environment(torch.device("cpu")), "kernels": list(cpu.isa_names())}


def load(scratch: Path, batch_size: int, *, dtype: str) -> tuple[Any, list[dict[str, Any]]]:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    windows = load_file(scratch / "windows.safetensors")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(scratch / "model", dtype=dtype)
    return model, [{"input_ids": batch} for batch in windows.split(batch_size)]


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What a compression returns, and what it took. Far less processor time than seconds: the machine was busy."""
    loaded, begin, begin_cpu = peak(), time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    return result, {"compress_s": seconds, "compress_cpu_s": cpu, "loaded_peak_bytes": loaded, "peak_bytes": peak()}


def run_fips(scratch: Path, batch_size: int, started: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    import fips

    model, batches = load(scratch, batch_size, dtype="auto")
    config = fips.CompressionConfig(**{"layers": "mlp", **settings})
    report, done = timed(lambda: fips.compress(model, batches, config))
    fips.save(model, scratch / "output")
    done |= {"process_s": time.monotonic() - started, "process_peak_bytes": peak()}
    layers = sum(isinstance(module, fips.FactoredLinear) for module in model.modules())
    return {**done, "layers": layers, "warnings": report.notes, "versions": report.environment}


def run_llm_compressor(scratch: Path, batch_size: int, started: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.pruning import SparseGPTModifier  # type: ignore[import-not-found]
    from loguru import logger  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader

    modifier = {"gptq": GPTQModifier, "sparsegpt": SparseGPTModifier}[settings["modifier"]]
    recipe = modifier(targets=[MLP], **settings["fields"])
    warnings: list[str] = []
    logger.add(lambda line: warnings.append(str(line).strip()), filter=is_warning, format="{message}")
    model, batches = load(scratch, batch_size, dtype=settings["dtype"])
    data: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    processor = no_tokenizer()
    _, done = timed(lambda: oneshot(model=model, recipe=recipe, dataset=data, processor=processor))
    begin = time.perf_counter()  # before saving, which packs the layers of the model in memory
    layers = sum(done_to(layer.weight, settings["modifier"]) for layer in mlp_layers(model))
    checked_s = time.perf_counter() - begin
    model.save_pretrained(scratch / "output", save_compressed=True)
    done |= {"process_s": time.monotonic() - started - checked_s, "process_peak_bytes": peak()}
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    return {**done, "layers": layers, "warnings": list(dict.fromkeys(warnings)), "versions": versions}


def is_warning(record: Mapping[str, Any]) -> bool:
    """Of llm-compressor's log, which has a level for measurements above that of warnings."""
    return record["level"].name in ("WARNING", "ERROR", "CRITICAL")


def no_tokenizer() -> Any:
    """``oneshot`` wants one, or looks for one beside the model, for tokens too."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))


def mlp_layers(model: Any) -> list[Any]:
    return [layer for name, layer in model.named_modules() if re.match(MLP.removeprefix("re:"), name)]


def done_to(weight_OI: Any, modifier: str) -> bool:
    """Whether a matrix is what the modifier should make of it."""
    if modifier == "gptq":
        ordered = weight_OI.detach().reshape(-1, GROUP).sort(dim=1).values
        values = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)
        return bool(values.max() <= LEVELS)
    return abs(float((weight_OI == 0).float().mean()) - SPARSITY) < 0.01


def peak() -> int:
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


STAGES: dict[str, Callable[..., dict[str, Any]]] = {"fips": run_fips, "llm-compressor": run_llm_compressor}


def stage(name: str, scratch: Path, fields: dict[str, Any]) -> None:
    """What one process does; its result is in a file, as libraries write to both of its streams."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if name == "make":
        result = make(scratch, Workload(**fields["workload"]), fields["ours"])
    else:
        result = STAGES[name](scratch, **fields)
    (scratch / "result.json").write_text(json.dumps(result), encoding="utf-8")


def start(python: str, name: str, scratch: Path, threads: int, **fields: Any) -> Any:
    """Run a stage in a process of its own and return its result."""
    (scratch / "result.json").unlink(missing_ok=True)
    shutil.rmtree(scratch / "output", ignore_errors=True)
    count = str(threads)
    variables = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    variables |= {"TOKENIZERS_PARALLELISM": "false"}
    command = [python, __file__, "--stage", name, str(scratch), json.dumps(fields)]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"`{name}` with {python} failed:\n{ended.stdout[-2000:]}{ended.stderr[-6000:]}")
    return json.loads((scratch / "result.json").read_text(encoding="utf-8"))


def tensors(directory: Path) -> dict[str, int]:
    """Bytes of every tensor in the safetensors files of a directory."""
    found: dict[str, int] = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        places = {name: fields["data_offsets"] for name, fields in header.items() if name != "__metadata__"}
        found |= {name: end - begin for name, (begin, end) in places.items()}
    return found


def stored_bits(scratch: Path, workload: Workload) -> float:
    """Bits per weight of the MLPs of the saved model, in all tensors that are not those of another layer."""
    others = {name for name in tensors(scratch / "model") if ".mlp." not in name}
    size = sum(size for name, size in tensors(scratch / "output").items() if name not in others)
    return 8 * size / workload.mlp_weights


def measure(
    name: str, job: Mapping[str, Any], scratch: Path, workload: Workload, args: argparse.Namespace
) -> dict[str, Any]:
    python = sys.executable if job["stage"] == "fips" else args.python
    load_average, begin = os.getloadavg()[0], time.monotonic()  # one clock for all processes
    run: dict[str, Any] = start(
        python, job["stage"], scratch, args.threads,
        batch_size=args.batch_size, started=begin, settings=job["settings"],
    )  # fmt: skip
    if run["layers"] != 3 * workload.blocks:
        raise SystemExit(f"{name}: {run['layers']} of {3 * workload.blocks} linear layers of MLPs are compressed")
    return {"name": name, "load_average_before": load_average, "stored_bits": stored_bits(scratch, workload), **run}


def summary(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Medians of every run, and their ratios to each of llm-compressor's GPTQ."""
    taken = {name: [run for run in runs if run["name"] == name] for name in names}
    references = [name for name in names if name.startswith(REFERENCE)]
    return {
        name: {
            "stored_bits": taken[name][0]["stored_bits"],
            "medians": {key: median(run[key] for run in taken[name]) for key in MEASURES},
            "ratios": {reference: ratios(taken[name], taken[reference]) for reference in references},
        }
        for name in names
    }


def ratios(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the medians, and the least and the largest within one repeat."""
    found = {}
    for key in MEASURES:
        pairs = [run[key] / other[key] for run, other in zip(runs, others, strict=True)]
        middle = median(run[key] for run in runs) / median(other[key] for other in others)
        found[key] = {"of_medians": middle, "least": min(pairs), "largest": max(pairs)}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Ratios in brackets are the least and the largest of a repeat."""
    references = [name for name in results if name.startswith(REFERENCE)]
    short = [f"x {name.removeprefix('llm-compressor ')}" for name in references]
    head = ["", "bits", "compression", *short, "process", *short, "peak memory", *short]
    lines = [head, ["---"] * len(head)]
    for name, result in results.items():
        medians, of = result["medians"], [result["ratios"][reference] for reference in references]
        lines.append([
            name, f"{result['stored_bits']:.2f}",
            f"{medians['compress_s']:.1f} s", *(spread(ratio["compress_s"]) for ratio in of),
            f"{medians['process_s']:.1f} s", *(f"{ratio['process_s']['of_medians']:.2f}" for ratio in of),
            f"{medians['peak_bytes'] / 1e9:.2f} GB", *(f"{ratio['peak_bytes']['of_medians']:.2f}" for ratio in of),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['of_medians']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"


def jobs_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    ours: Sequence[Mapping[str, Any]] = args.ours
    theirs = {
        f"llm-compressor {name} {dtype}": {"stage": "llm-compressor", "settings": {**THEIRS[name], "dtype": dtype}}
        for name in args.theirs
        for dtype in args.dtypes
    }
    return theirs | {f"fips {json.dumps(settings)}": {"stage": "fips", "settings": settings} for settings in ours}


def compare(args: argparse.Namespace, workload: Workload, scratch: Path) -> dict[str, Any]:
    jobs = jobs_of(args)
    machine = start(sys.executable, "make", scratch, args.threads, workload=asdict(workload), ours=args.ours)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    runs: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "benchmark": "time and memory of a compression beside llm-compressor's",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "environment": machine,
        "workload": {**asdict(workload), "batch_size": args.batch_size, "threads": args.threads},
        "jobs": jobs,
        "unfinished": True,
        "runs": runs,
    }
    names = list(jobs)
    for repeat in range(args.repeats):
        turn = repeat % len(names)
        for name in (*names[turn:], *names[:turn]):
            run = {"repeat": repeat, **measure(name, jobs[name], scratch, workload, args)}
            runs.append(run)
            args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            print(repeat, name, *(f"{key}={run[key]:.4g}" for key in MEASURES), file=sys.stderr, flush=True)
    del record["unfinished"]
    return {**record, "results": summary(runs, names)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of the environment that has llm-compressor")
    parser.add_argument("--ours", nargs="+", type=json.loads, required=True, metavar="JSON", help="settings of fips")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="what llm-compressor computes in")
    parser.add_argument(
        "--theirs", nargs="+", choices=list(THEIRS), default=list(THEIRS), help="runs of llm-compressor"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1, help="windows per batch, of both")
    parser.add_argument("--out", type=result_file, default=RESULT)
    sizes = {"blocks": 8, "hidden": 1024, "intermediate": 3584, "heads": 16, "kv-heads": 8, "vocabulary": 32000}
    for name, size in {**sizes, "windows": 16, "tokens": 512, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    if args.hidden % GROUP or args.intermediate % GROUP:
        parser.error(f"`--hidden` and `--intermediate` must be multiples of {GROUP}, the group size of W4A16")
    if len(jobs_of(args)) != len(args.theirs) * len(args.dtypes) + len(args.ours):
        parser.error("`--ours` or `--dtypes` has something twice")
    return args


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        name, scratch, fields = sys.argv[2:]
        stage(name, Path(scratch), json.loads(fields))
        return
    args = parse()
    workload = Workload(**{name: getattr(args, name) for name in Workload.__dataclass_fields__})
    with tempfile.TemporaryDirectory() as scratch:
        record = compare(args, workload, Path(scratch))
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(record["results"]))


if __name__ == "__main__":
    main()
