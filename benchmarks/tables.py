"""Writes the tables of README.md, docs/results.md and docs/speed.md from the JSON files under benchmarks/results.

    python benchmarks/tables.py            # rewrites what differs
    python benchmarks/tables.py --check    # changes nothing, exits 1 and names the tables that differ

A table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a key of ``TABLES``. Sizes are
in bits per weight: all stored bits of the compressed layers (values, patterns, scales, bases) over the number of
weights that the original layers have. The JSON files hold the same as a fraction of 16 bits. Where a method ran with
several seeds a table shows the median.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/speed.md", "docs/export.md", "docs/guides/sharing.md")
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
REFERENCE_BITS = 16

MODELS = {
    "vit": "ViT-Tiny, top-1 %",
    "stories260k": "stories260k, perplexity",
    "tinystories-656k": "tinystories-656k, perplexity",
    "demo": "demo model, perplexity",
}
DIGITS = {"vit": 2, "stories260k": 3, "tinystories-656k": 2, "demo": 3, "antiberty": 3}
METHODS = {
    "fips": "fips",
    "gptq": "gptq, all weights kept",
    "sparsegpt+values=int8": "sparsegpt, 8-bit values",
    "wanda+values=int8": "wanda, 8-bit values",
    "magnitude+values=int8": "magnitude, 8-bit values",
    "fips+values=int8": "fips, 8-bit values only",
    "fips+values=float": "fips, 16-bit values only",
    "sparsegpt": "sparsegpt, 16-bit values",
    "svd-llm": "svd-llm",
    "basis-sharing": "basis-sharing",
    "svd": "svd",
}


def load(name: str) -> Any:
    """One result file, without its suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def quality(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def asked(run: dict[str, Any]) -> float:
    """The size asked for as a fraction of 16 bits, as older results have it."""
    return float(run["bits"] / REFERENCE_BITS if "bits" in run else run["target_bytes"])


def stored(run: dict[str, Any]) -> float:
    """The size measured, likewise."""
    return float(run["stored_bits"] / REFERENCE_BITS if "stored_bits" in run else run["stored_bytes"])


def nats(kl: float) -> str:
    """A divergence with four decimals, or two digits where that would be less."""
    return f"{kl:.4f}" if kl >= 1e-3 or kl <= 0 else f"{kl:.{1 - math.floor(math.log10(kl))}f}"


class Comparison:
    """The runs of one ``fips compare``, by method and size asked for."""

    def __init__(self, name: str) -> None:
        self.fields = load(f"compare-{name}/compare")
        self.original: float = self.fields["original"]

    def runs(self, method: str, size: float) -> list[dict[str, Any]]:
        return [run for run in self.fields["runs"] if (run["method"], asked(run)) == (method, size)]

    def quality(self, method: str, size: float) -> float | None:
        runs = self.runs(method, size)
        return median(run["quality"] for run in runs) if runs else None

    def bits(self, method: str, size: float) -> float:
        runs = [run for run in self.runs(method, size) if run["quality"] is not None]
        return REFERENCE_BITS * float(median(stored(run) for run in runs))

    def median(self, method: str, size: float, field: str) -> float:
        """Of a field of what runs say against the original."""
        return float(median(run["against"][field] for run in self.runs(method, size) if run["against"] is not None))

    def divergence(self, method: str, size: float, *, used: bool = False) -> str:
        """KL to the original, with the bits ``used`` in brackets where they are clearly fewer than those asked for."""
        found = [run["against"]["kl"] for run in self.runs(method, size) if run["against"] is not None]
        if not found:
            return ""
        bits = self.bits(method, size)
        return nats(median(found)) + (f" ({bits:.2f})" if used and bits < 0.97 * REFERENCE_BITS * size else "")

    def best(self, size: float) -> str:
        """The other method that is nearest to the original; none where no other has that size."""
        there = [other for other in OTHERS if any(run["against"] is not None for run in self.runs(other, size))]
        return min(there, key=lambda other: self.median(other, size, "kl"), default="")

    def cell(self, method: str, size: float, digits: int, *, always: bool = False) -> str:
        """The quality, and the bits in brackets where they are not those asked for."""
        found = self.quality(method, size)
        if found is None:
            return ""
        bits = self.bits(method, size)
        differs = always or abs(bits - REFERENCE_BITS * size) > 0.12
        return quality(found, digits) + (f" ({bits:.2f})" if differs else "")


WEIGHTS = {"vit": 3538944, "stories260k": 165120, "tinystories-656k": 294912, "demo": 2654208}
"""Weights in the compressed layers."""

OTHERS = {
    "field-gptq": "GPTQ, zero points",
    "gptq": "GPTQ, symmetric",
    "awq": "AWQ",
    "rtn": "plain rounding",
    "sparsegpt+values=int4": "SparseGPT, int4",
}
"""What the default is compared with."""


WHOLE = {
    "smollm2-135m": "SmolLM2-135M, perplexity",
    "demo": "demo model, perplexity",
    "vit": "ViT-Tiny, top-1 %",
    "dinov2-small": "DINOv2-small, top-1 %",
    "antiberty": "AntiBERTy, pseudo-perplexity",
}
OVERVIEW_SIZE = "27%"


def _name(model: str) -> str:
    """Without what it is measured by."""
    return {**MODELS, **WHOLE}[model].partition(",")[0]


def _whole_rows() -> Iterable[tuple[str, list[str]]]:
    """Size asked for, and the cells of a row of ``whole``, for every model and size that both methods have."""
    for name, label in WHOLE.items():
        if not (RESULTS / f"whole-{name}.json").exists():
            continue
        runs = {(run["method"], run["size"]): run for run in load(f"whole-{name}")["runs"]}
        for size in dict.fromkeys(size for _, size in runs):
            if not {("fips", size), ("field-gptq", size)} <= runs.keys():
                continue
            ours, theirs = runs["fips", size], runs["field-gptq", size]
            before, after = ours["bytes_before"], ours["bytes"]
            least = min(_kl(ours), _kl(theirs))
            shown = [f"**{nats(_kl(run))}**" if _kl(run) == least else nats(_kl(run)) for run in (ours, theirs)]
            yield size, [
                label, f"{megabytes(before)} → {megabytes(after)} ({100 * after / before:.0f} %)",
                _score(ours, before=True), _score(ours), _score(theirs), *shown, f"{_kl(ours) / _kl(theirs):.2f}",
            ]  # fmt: skip


def _kl(run: dict[str, Any]) -> float:
    return float(run["quality"]["against"]["kl"])


def _score(run: dict[str, Any], *, before: bool = False) -> str:
    """The score of a run, or of the original as the paired difference has it."""
    found, change = run["quality"], run["quality"]["against"]["change"]
    perplexity = found.get("perplexity", found.get("pseudo_perplexity"))
    if perplexity is not None:
        return f"{perplexity * math.exp(-change if before else 0):.3f}"
    return f"{found['top1_percent'] - (change if before else 0):.2f}"


WHOLE_HEAD = ["", "whole file, 16 bits → packed", "original", "fips", "GPTQ", "KL, fips", "KL, GPTQ", "ratio"]


def overview() -> str:
    return markdown(WHOLE_HEAD, [cells for size, cells in _whole_rows() if size == OVERVIEW_SIZE])


def whole() -> str:
    """Whole models at sizes of the file."""
    return markdown(WHOLE_HEAD, [cells for _, cells in _whole_rows()])


GENERATION = {
    "dense": "bfloat16, transformers", "tc4g64": "fips, `tc4g64`", "nl4g64": "fips, `nl4g64`",
    "int4g64": "fips, `int4g64`", "nl5g64": "fips, `nl5g64`", "int5g64": "fips, `int5g64`",
    "tc4g64, compiled": "fips, `tc4g64`, `torch.compile`", "int4g64, compiled": "fips, `int4g64`, `torch.compile`",
    "Q4_K_M.gguf": "llama.cpp, Q4_K_M",
}  # fmt: skip


def generation() -> str:
    """A whole language model that generates, beside llama.cpp."""
    found = load("generation")["results"]
    rows = []
    for run, label in GENERATION.items():
        if run not in found:
            continue
        one = found[run]["median"]
        rows.append([
            label, f"{one['file_bytes'] / 1e6:.0f} MB", f"{one['tokens_per_s']:.1f}",
            f"{one['tokens_after_prompt_per_s']:.1f}", f"{one['prompt_per_s']:.0f}", f"{one['first_prompt_s']:.1f} s",
            f"{one['imports_s']:.1f} s", f"{one['load_s']:.1f} s", f"{one['peak_bytes'] / 1e9:.2f} GB",
        ])  # fmt: skip
    head = [
        "", "file", "tokens a second", "behind the prompt", "prompt, tokens a second", "first prompt", "imports",
        "load", "peak memory",
    ]  # fmt: skip
    return markdown(head, rows)


TURNS = ("avx2", "avx-vnni", "avx512", "zen5", "gemma-2-2b")


def generation_turns(run: str) -> str:
    """Models that generate in turn, and how many times as fast as llama.cpp within a turn."""
    found = load(f"generation-turns-{run}")["results"]
    rows = [
        [
            label, f"{one['file_bytes'] / 1e6:.0f} MB", f"{one['tokens_per_s']:.1f}", f"{one['tokens_ratio']:.2f}",
            f"{one['prompt_per_s']:.0f}", f"{one['prompt_ratio']:.2f}",
        ]
        for label, one in ((label, found[name]) for name, label in GENERATION.items() if name in found)
    ]  # fmt: skip
    return markdown(
        ["", "file", "tokens a second", "times llama.cpp", "prompt, tokens a second", "times llama.cpp"], rows
    )


def busy_machine() -> str:
    """Tokens a second alone and beside a busy core, by how long threads wait awake."""
    results = load("busy-machine")["results"]
    settings = list(dict.fromkeys(name for found in results.values() for name in found))

    def cell(found: dict[str, Any]) -> str:
        return " / ".join(f"{found[state]['median']:.1f}" for state in ("quiet", "busy")) if found else ""

    rows = [[GENERATION.get(name, name), *(cell(one.get(way)) for way in settings)] for name, one in results.items()]
    return markdown(["tokens a second, alone / beside a busy core", *(_as_code(name) for name in settings)], rows)


def attention() -> str:
    """Attention of one token by the library beside torch, by tokens before it."""
    found = load("one-token")["attention"]
    lengths = sorted({row["length"] for row in found})
    rows = []
    for model in dict.fromkeys(row["model"] for row in found):
        own = {row["length"]: row for row in found if row["model"] == model}
        heads = "{heads} / {key_heads} of {size}".format(**own[lengths[0]])
        cells = [f"{own[n]['library_us']:.0f} ({own[n]['library_ratio']:.1f})" for n in lengths]
        rows.append([model, heads, *cells])
    return markdown(["", "heads", *(f"{length:,} tokens" for length in lengths)], rows)


TOKEN_MODELS = {
    "": "Llama-3.2-1B",
    "smollm2": "SmolLM2-135M",
    "gemma-2-2b": "Gemma-2-2B",
    "olmo-2-1b": "OLMo-2-1B",
    "phi-3-mini": "Phi-3-mini",
}
"""By what stands before the values in the name of a directory."""


def one_token() -> str:
    """What that, norms and whole blocks mean for a token of a model."""
    rows = []
    for row in load("one-token")["models"]:
        begin, _, values = row["model"].rpartition("-")
        ways = [f"{row[f'{way}_ms']:.1f} ({row[f'{way}_ratio']:.2f})" for way in ("attention", "norms", "blocks")]
        before = f"{row['length']:,}" + (f" of {row['examples']} padded texts" if row["examples"] > 1 else "")
        rows.append([f"{TOKEN_MODELS[begin]}, `{values}`", before, f"{row['torch_ms']:.1f}", *ways])
    ways = ["torch", "attention by the library", "norms too", "whole blocks"]
    return markdown(["ms a token", "tokens before", *ways], rows)


def _as_code(setting: str) -> str:
    return f"`{setting}`" if "=" in setting else setting


LOADS = {"rested": "had to be given", "touched": "was there"}


def load_time(machine: str) -> str:
    """Loading and the first prompt beside llama.cpp, by what a virtual machine had of its memory."""
    run = load(f"load-time{machine}")
    rows = []
    for state, label in LOADS.items():
        for name, one in run["results"][state].items():
            found, ratio = one["median"], one["ratio"]
            rows.append([
                GENERATION[name], label, f"{run['file_bytes'][name] / 1e6:.0f} MB", f"{found['load_s']:.2f} s",
                f"{ratio['load_s']:.2f}", f"{found['both_s']:.1f} s", f"{ratio['both_s']:.2f}",
                f"{found['peak_bytes'] / 1e9:.2f} GB", f"{ratio['peak_bytes']:.2f}",
            ])  # fmt: skip
    head = [
        "", "memory", "file", "load", "times llama.cpp", "and first prompt", "times llama.cpp", "peak memory",
        "times llama.cpp",
    ]  # fmt: skip
    return markdown(head, rows)


PEERS = {
    "llama.cpp Q4_K": ("llama.cpp Q4_K",),
    "llama.cpp Q5_K": ("llama.cpp Q5_K",),
    "ONNX Runtime, 4 bits": ("ONNX Runtime 4 bits",),
    "OpenVINO, groups of 64": ("OpenVINO int4, group 64",),
    "OpenVINO, groups of 128": ("OpenVINO int4, group 128",),
    "8 bits, the fastest": (
        "llama.cpp Q8_0",
        "ONNX Runtime 8 bits",
        "OpenVINO int8",
        "torchao torch's int8",
        "torchao int8,",
    ),
}
"""Columns of the table of one matrix: the names of their rows begin so."""


def matrix_peers(machine: str) -> str:
    """One matrix: how many times as fast as the fastest row of a peer each format is, beside 8 bits `int8`.

    Without Python, which no peer has between the 16 products of a call, but for torchao.
    """
    rows = []
    for run in load(f"matrix-peers-{machine}")["results"]:
        shape, ratios = run["rows_by_cols"], run["ratios"]

        def cell(start: tuple[str, ...], ratios: dict[str, dict[str, float]] = ratios) -> str:
            formats = ("int8",) if len(start) > 1 else ("int4g64", "tc4g64", "nl5g64")
            least = (
                min(ratio for peer, ratio in ratios[f"fips {name}, without Python"].items() if peer.startswith(start))
                for name in formats
            )
            return " / ".join(f"{ratio:.2f}" for ratio in least)

        rows.append([f"{shape[0]} x {shape[1]}", str(run["tokens"]), *(cell(start) for start in PEERS.values())])
    return markdown(["outputs x inputs", "tokens", *PEERS], rows)


def generation_smollm2() -> str:
    """A small model that generates: files of fips beside those of llama.cpp that take as many bytes."""
    found = {name: one["median"] for name, one in load("generation-smollm2")["results"].items()}
    rows = []
    for name in sorted(found, key=lambda name: -found[name]["file_bytes"]):
        one = found[name]
        label = "fips" if name.startswith("fips-") else f"llama.cpp, {Path(name).stem}"
        rows.append([
            label, f"{one['file_bytes'] / 1e6:.0f} MB", f"{one['tokens_per_s']:.0f}",
            f"{one['prompt_per_s']:.0f}", f"{one['first_prompt_s']:.2f} s", f"{one['load_s']:.1f} s",
            f"{one['peak_bytes'] / 1e9:.2f} GB",
        ])  # fmt: skip
    head = ["", "file", "tokens a second", "prompt, tokens a second", "first prompt", "load", "peak memory"]
    return markdown(head, rows)


def overfit() -> str:
    """Error on data held out over that on the data fitted."""
    rows = [[run["model"], f"{run['median']:.2f}", f"{run['largest']:.2f}"] for run in load("overfit")["runs"]]
    return markdown(["", "median of the layers", "largest"], rows)


def dense_layers() -> str:
    """Layers that stay dense in bfloat16: how many times as fast the kernels are as torch."""
    found = load("dense-layers")["results"]
    tokens = sorted({one["tokens"] for one in found})
    shapes = list(dict.fromkeys((one["rows"], one["cols"]) for one in found))
    faster = {(one["rows"], one["cols"], one["tokens"]): one["torch_s"] / one["kernels_s"] for one in found}
    rows = [[f"{rows} x {cols}", *(f"{faster[rows, cols, count]:.1f}" for count in tokens)] for rows, cols in shapes]
    return markdown(["outputs x inputs", *(f"{count} token{'s' * (count > 1)}" for count in tokens)], rows)


def now() -> str:
    """The default beside what the field runs: quality, and KL to the original."""
    rows = []
    larger = {name: WHOLE[name] for name in ("dinov2-small", "antiberty", "smollm2-135m")}
    for name, label in {**MODELS, **larger}.items():
        found, digits = Comparison(f"{name}-default"), DIGITS.get(name, 2)
        for size in sorted({asked(run) for run in found.fields["runs"]}, reverse=True):
            if not found.runs("fips", size):
                continue
            best = found.best(size)
            ratio = found.median("fips", size, "kl") / found.median(best, size, "kl") if best else None
            rows.append([
                label, f"{REFERENCE_BITS * size:g}", found.cell("fips", size, digits),
                f"**{found.divergence('fips', size)}**",
                *(found.divergence(other, size, used=True) for other in OTHERS),
                "" if ratio is None else f"{ratio:.2f}",
            ])  # fmt: skip
    head = ["", "bits asked", "fips", "KL: fips", *OTHERS.values(), "fips / best other"]
    return markdown(head, rows)


def forced_sharing() -> str:
    """KL where every group of blocks has to share a basis, beside the default, which shares none."""
    rows = []
    for name in ("vit", "dinov2-small", "antiberty", "smollm2-135m", "stories260k", "tinystories-656k", "demo"):
        shared, default = Comparison(f"{name}-shared"), Comparison(f"{name}-default")
        for size in sorted({asked(run) for run in shared.fields["runs"]}, reverse=True):
            if not default.runs("fips", size):
                continue
            cells = [default.divergence("fips", size)]
            for method in ("fips-shared", "fips-shared+values=nl3", "fips-paper"):
                cell = shared.divergence(method, size)
                times = shared.median(method, size, "kl") / default.median("fips", size, "kl") if cell else 0
                cells += [
                    cell or ("impossible" if shared.runs(method, size) else ""),
                    f"{times:.{1 if times < 20 else 0}f}" if times else "",
                ]
            rows.append([_name(name), f"{REFERENCE_BITS * size:g}", *cells])
    head = ["", "bits", "the default, KL", "shared, KL", "times", "shared, values of 3 bits, KL", "times"]
    head += ["the paper's recipe, KL", "times"]
    return markdown(head, rows)


def blocks() -> str:
    """All matrices of the blocks instead of the MLPs alone."""
    rows = []
    for name in ("stories260k", "tinystories-656k", "demo"):
        found = Comparison(f"{name}-blocks")
        for size in sorted({asked(run) for run in found.fields["runs"]}, reverse=True):
            methods = ("fips+layers=blocks", "field-gptq+layers=blocks", "gptq+layers=blocks", "fips")
            cells = (found.divergence(method, size, used=True) for method in methods)
            rows.append([_name(name), f"{REFERENCE_BITS * size:g}", *cells])
    return markdown(["", "bits", "fips", OTHERS["field-gptq"], OTHERS["gptq"], "fips, MLPs alone"], rows)


def real_model() -> str:
    rows = []
    for run in load("real-models-smollm2")["runs"]:
        found = run["quality"]["against"]
        rows.append([
            f"`{run['options']}`", f"{run['stored_bits']:.2f}", megabytes(run["directory_bytes"]),
            f"{run['compress_seconds']:.0f} s", f"{run['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{run['quality']['perplexity']:.2f}", f"{found['kl']:.4f} ± {found['kl_standard_error']:.4f}",
            f"{found['agreement_percent']:.1f}",
        ])  # fmt: skip
    return markdown(
        ["SmolLM2-135M", "bits", "directory", "time", "peak memory", "perplexity", "KL", "same top 1, %"], rows
    )


def comparison(name: str) -> str:
    found, digits = Comparison(name), DIGITS[name]
    sizes = sorted({asked(run) for run in found.fields["runs"]} - {0.35}, reverse=True)
    rows = [[label, *(found.cell(method, size, digits) for size in sizes)] for method, label in METHODS.items()]
    head = f"{MODELS[name]} (original {quality(found.original, digits)})"
    return markdown(
        [head, *(f"{REFERENCE_BITS * size:.1f} bits" for size in sizes)], (row for row in rows if any(row[1:]))
    )


def low_bits() -> str:
    """fips where *gptq* has nearly the same size, which 4.8 bits is not."""
    rows = []
    for name, pairs in {
        "vit": [("vit", 0.2, "vit", 0.2)],
        "stories260k": [("stories260k-distill", 0.25, "stories260k", 0.3)],
        "tinystories-656k": [("tinystories-656k-distill", 0.25, "tinystories-656k", 0.3)],
        "demo": [("demo-distill", 0.25, "demo", 0.3), ("demo-distill", 0.2, "demo-distill", 0.2)],
    }.items():
        for ours, our_size, theirs, their_size in pairs:
            fips = Comparison(ours).cell("fips", our_size, DIGITS[name], always=True)
            gptq = Comparison(theirs).cell("gptq", their_size, DIGITS[name], always=True)
            rows.append([MODELS[name], quality(Comparison(ours).original, DIGITS[name]), fips, gptq])
    return markdown(["", "original", "fips (bits)", "gptq (bits)"], rows)


DISTILLED = ("stories260k", "tinystories-656k", "demo", "vit", "antiberty")


def distillation() -> str:
    """The default, and the same with 60 steps of distillation: KL to the original, and quality."""
    rows = []
    for name in DISTILLED:
        found, digits = Comparison(f"{name}-trained"), DIGITS[name]
        for size in sorted({asked(run) for run in found.fields["runs"]}, reverse=True):
            methods = ("fips", "fips+distill.steps=60")
            before, after = (found.median(method, size, "kl") for method in methods)
            rows.append([
                {**MODELS, **WHOLE}[name], f"{REFERENCE_BITS * size:g}", nats(before), f"**{nats(after)}**",
                f"{after / before:.2f}", quality(found.original, digits),
                *(found.cell(method, size, digits) for method in methods),
            ])  # fmt: skip
    head = ["", "bits", "KL", "KL, 60 steps", "ratio", "original", "quality", "60 steps"]
    return markdown(head, rows)


def parts() -> str:
    labels = {
        "fips": "`--effort max`",
        "fips+sharing=always": "a shared basis in every group",
        "fips+pattern=block4": "pruning in blocks of 4 only",
        "fips+metric.token_floor=1.0": "all tokens count alike",
        "fips+metric.token_floor=0.0": "tokens count by their gradient alone",
        "fips+metric.propagate_errors=true": "each group measured behind the compressed ones",
        "fips+calibration.steps=60+calibration.learning_rate=0.0001": "60 block-wise training steps per group",
    }
    found = Comparison("stories260k-parts")
    rows = [[label, found.cell(method, 0.25, 3)] for method, label in labels.items()]
    return markdown([f"stories260k at 4.0 bits (original {found.original:.3f})", "perplexity"], rows)


def paper() -> str:
    names = ("vit", "stories260k", "tinystories-656k")
    files = {name: load(f"paper-recipe-{name}") for name in names}
    rows = []
    for index in (2, 1, 0):
        cells = []
        for name in names:
            run = files[name]["compressed"][index]
            stored = run["mlp"]["factored"]
            bits = 8 * (stored["value_bytes"] / 2 + stored["pattern_bytes"]) / WEIGHTS[name]
            cells.append(f"{quality(run['evaluation']['headline']['value'], DIGITS[name])} ({bits:.2f})")
        rows.append([f"{files['vit']['compressed'][index]['budget']:.2f}", *cells])
    originals = [quality(files[name]["original"]["evaluation"]["headline"]["value"], DIGITS[name]) for name in names]
    return markdown(["budget", *(MODELS[name] for name in names)], [["original", *originals], *rows])


def time_and_memory() -> str:
    rows = []
    for label, run in zip(("fips", "paper's recipe, budget 0.5"), load("time-and-memory")["runs"], strict=True):
        stored = run["mlp"]["factored"]
        halves = 1 if label == "fips" else 2
        bits = 8 * (stored["value_bytes"] / halves + stored["pattern_bytes"]) / WEIGHTS["vit"]
        rows.append([
            label, f"{bits:.2f}", f"{run['headline']['value']:.2f}", f"{run['relative_error_start']:.4f}",
            f"{run['relative_error']:.4f}", f"{run['seconds']:.0f} s", f"{run['peak_memory_bytes'] / 1e9:.1f} GB",
        ])  # fmt: skip
    head = ["ViT-Tiny", "bits per weight", "top-1 %", "block error before training", "after", "time", "peak memory"]
    return markdown(head, rows)


def solver_cost() -> str:
    rows = []
    for row in load("solver-cost")["rows"]:
        up, down, sharing = (_seconds(row[part]) for part in ("up", "down", "sharing"))
        memory = [row[part]["solver_bytes"] for part in ("up", "down", "sharing") if "solver_bytes" in row[part]]
        most = f"{max(memory) / 1e9:.1f} GB" if memory else ""
        hidden = row["hidden"] if "hidden" in row else row["columns"]  # the name in files of earlier versions
        rows.append([str(row["width"]), str(hidden), up, down, sharing, f"{row['group_s']:,.0f} s", most])
    head = ["width", "hidden", "one `up` matrix", "one `down` matrix", "trial of sharing", "gated group of 4 blocks",
            "memory above the layers"]  # fmt: skip
    return markdown(head, rows)


def solver_cost_large() -> str:
    rows = []
    for row in load("solver-cost-4096-zen4")["rows"]:
        for role in ("up", "down"):
            if role in row:
                part = row[role]
                seconds = part.get("seconds_less_pauses", part["seconds"])
                rows.append(
                    [str(row["width"]), f"`{role}`", f"{seconds:,.0f} s", f"{part['solver_bytes'] / 1e9:.1f} GB"]
                )
    return markdown(["width", "one matrix", "time, at most", "memory above the layers"], rows)


def _seconds(part: dict[str, Any]) -> str:
    return f"{part['seconds']:,.0f} s" + (" (extrapolated)" if part.get("extrapolated") else "")


def activation_bits() -> str:
    rows = []
    for run in load("activation-bits")["results"]:
        exact, rounded = (run[key]["against"]["kl"] for key in ("exact", "rounded"))
        change = f"{100 * (rounded / exact - 1):+.1f} %"
        rows.append([run["model"], f"{run['bits']:.1f}", f"{exact:.4f}", f"{rounded:.4f}", change])
    return markdown(["KL", "bits per weight", "exact inputs", "8-bit inputs", "change"], rows)


def layer_speed(name: str, long: int) -> str:
    cases: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for run in load(f"mlp-layers-{name}")["results"]:
        cases.setdefault((run["level"], run["kind"]), {})[run["role"], run["tokens"]] = run
    rows = []
    for (_, kind), runs in cases.items():
        bits = REFERENCE_BITS * runs["up", 1]["stored_ratio"]
        rows.append([kind, f"{bits:.1f}", *(_speeds(runs, tokens) for tokens in (1, 16, long))])
    return markdown(["speed-up, `up` / `down`", "bits per weight", "1 token", "16 tokens", f"{long} tokens"], rows)


def _speeds(runs: dict[tuple[str, int], dict[str, Any]], tokens: int) -> str:
    pair = [runs[role, tokens] for role in ("up", "down")]
    exact = " / ".join(f"{run['speedup']:.1f}" for run in pair)
    if tokens == 1 or any(run.get("speedup_8_bit_inputs") is None for run in pair):
        return exact
    eight = " / ".join(f"{run['speedup_8_bit_inputs']:.1f}" for run in pair)
    return f"{exact} [{eight}]"


def gpu_layers() -> str:
    cases: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for run in load("gpu-layers")["results"]:
        cases.setdefault((run["model"], run["kind"]), {})[run["role"], run["tokens"]] = run
    names = {"llama-1b": "Llama-3.2-1B", "llama-8b": "Llama-3.1-8B"}
    rows = [
        [f"{names[model]}, {kind}", *(_microseconds(runs, tokens) for tokens in (1, 16, 64, 512))]
        for (model, kind), runs in cases.items()
    ]
    return markdown(["µs of a layer: dense, packed, decode", "1 token", "16 tokens", "64 tokens", "512 tokens"], rows)


def gpu_generation() -> str:
    keys = {"tokens_per_s": "tokens a second", "compiled_tokens_per_s": "compiled", "prompt_per_s": "prompt of 512"}
    rows = [
        [name, megabytes(run["weights_bytes"]), *(f"{run[key]:,.0f}" for key in keys)]
        for name, run in load("gpu-generation")["results"].items()
    ]
    return markdown(["", "weights", *keys.values()], rows)


def _microseconds(runs: dict[tuple[str, int], dict[str, Any]], tokens: int) -> str:
    """Of the two roles on average."""
    times = [runs[role, tokens]["graph_s"] for role in ("up", "down")]
    return ", ".join(f"{1e6 * sum(time[way] for time in times) / 2:.0f}" for way in ("dense", "packed", "decode"))


def real_sizes() -> str:
    """Whole runs, or those of some blocks."""
    models = {
        "real-sizes-deit-b": "DeiT-B, 12 blocks",
        "real-sizes-swin-l": "Swin-L, 24 blocks",
        "real-sizes-1b": "Llama-3.2-1B, 2 of 16 blocks",
        "real-sizes-8b": "Llama-3.1-8B, 1 of 32 blocks",
    }
    rows = []
    for name, title in models.items():
        record = load(name)
        examples = record["examples"]
        seen = examples["windows"] * (examples["tokens"] if "llama" in record["recipe"] else 1)
        for run in record["runs"]:
            stages = run["stages_s"]
            rows.append(
                [
                    title,
                    run["settings"].get("effort", "default"),
                    f"{seen:,}",
                    f"{run['seconds']:.0f} s",
                    f"{stages['measuring']:.0f} s",
                    f"{stages['solving']:.0f} s",
                    f"{run['peak_bytes'] / 1e9:.1f} GB",
                ]
            )
    head = ["model", "effort", "tokens or images", "time", "of it measuring", "of it solving", "peak memory"]
    return markdown(head, rows)


def layer_cost() -> str:
    """Trials and solution of one layer by width."""
    record = load("layer-cost")
    widths = sorted({row["width"] for row in record["layers"]})
    rows = []
    for role in ("up", "down"):
        own = {row["width"]: row for row in record["layers"] if row["role"] == role}
        times = [f"{own[width]['trials'] + own[width]['solution']:.1f} s" for width in widths]
        rows.append([f"`{role}`", *times, f"{record[f'exponent_{role}']:.1f}"])
    return markdown(["one matrix, width", *map(str, widths), "exponent"], rows)


def ranks() -> str:
    """Processes and threads of one compression."""
    fields = load("ranks")
    seconds = {(run["ranks"], run["threads"]): run["seconds"] for run in fields["runs"]}
    rows = [
        [str(count), str(threads), f"{value:.0f} s", f"{seconds[1, 1] / value:.2f}"]
        for (count, threads), value in seconds.items()
    ]
    return markdown(["processes", "threads of each", "time", "as fast"], rows)


def operations() -> str:
    """Counted operations, and the time they would take."""
    rows = []
    for run in load("operations")["models"]:
        gpus = "one GPU" if run["gpus"] == 1 else f"{run['gpus']} GPUs"
        time = f"{run['estimated_s']:.0f} s" if run["estimated_s"] < 120 else f"{run['estimated_s'] / 60:.0f} min"
        counts = (f"{run[name]:.1e}" for name in ("products", "roots", "rounding"))
        rows.append([f"{run['model']}, `{run['effort']}`", *counts, f"{time}, {gpus}"])
    return markdown(["", "products", "roots", "rounding", "estimated"], rows)


def value_formats() -> str:
    """Times as fast as the dense product in bfloat16."""
    better = [run for run in load("value-formats")["runs"] if run["isa"] != "avx2"]  # those beside AVX-512 for torch
    runs = load("value-formats-avx2")["runs"] + better
    names = [name for name in runs[0]["milliseconds"] if name != "bfloat16"]
    rows = []
    for run in runs:
        dense = run["milliseconds"]["bfloat16"]
        speeds = (f"{dense / run['milliseconds'][name]:.1f}" for name in names)
        tokens = f"{run['tokens']} token{'s' if run['tokens'] > 1 else ''}"
        rows.append([f"{run['isa']}, {run['rows']} x {run['cols']}, {tokens}", *speeds])
    return markdown(["", *(f"`{name}`" for name in names)], rows)


def against_llm_compressor() -> str:
    names = {
        "llm-compressor GPTQ float32": "llm-compressor, GPTQ W4A16",
        'fips {"bits": 4.25, "effort": "fast", "layers": "mlp"}': "fips, `--effort fast`, 4.25 bits",
        'fips {"bits": 4.25, "layers": "mlp"}': "fips, the default, 4.25 bits",
    }
    results = load("against-llm-compressor")["results"]
    first = results["llm-compressor GPTQ float32"]["medians"]
    rows = []
    for name, title in names.items():
        medians = results[name]["medians"]
        seconds, peak = medians["compress_s"], medians["peak_bytes"]
        ratios = f"{seconds / first['compress_s']:.2f}", f"{peak / first['peak_bytes']:.2f}"
        rows.append([title, f"{seconds:.0f} s", ratios[0], f"{peak / 1e9:.2f} GB", ratios[1]])
    return markdown(["", "time", "ratio", "peak memory", "ratio"], rows)


MEASURED = {
    "demo": "demo model", "vit-tiny": "ViT-Tiny", "dinov2-small": "DINOv2-small", "antiberty": "AntiBERTy",
    "smollm2-135m": "SmolLM2-135M",
}  # fmt: skip


def model_speed() -> str:
    """Whole small models in four sizes beside their originals and GPTQ."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for result in load("model-speed")["results"]:
        by_model.setdefault(result["model"], []).append(result)
    rows = []
    for name, results in by_model.items():
        before = results[0]["file_bytes"]["dense"]
        files = (map(one["file_bytes"].get, SIDES) for one in results)
        sizes = (f"{megabytes(own)} ({megabytes(other) if other else 'none'})" for own, other in files)
        rows.append([f"{MEASURED[name]}, {megabytes(before)}", "file (GPTQ's)", *sizes])
        peaks = (one["peak_memory_bytes"] for one in results)
        saved = ([(a - b) / 1e6 for a, b in zip(each["dense"], each["compressed"], strict=True)] for each in peaks)
        rows.append(["", "process memory saved", *map(_span, saved)])
        for case in results[0]["cases"]:
            rows.append(["", case, *(_speed_cell(one["cases"][case]) for one in results)])
    head = "a second (times as fast as the original, every run; as GPTQ)"
    return markdown(["original", head, "51 %", "35 %", "27 %", "21 %"], rows)


SIDES = "compressed", "gptq"


def _speed_cell(timing: dict[str, Any]) -> str:
    gains = (", ".join(f"{gain:.2f}" for gain in sorted(every)) for every in timing["speedups"].values())
    return f"{_rate(median(timing['compressed']))} ({'; '.join(gains)})"


def against_llama_cpp() -> str:
    """A whole language model at the bytes of llama.cpp's files."""
    found = load("against-llama-cpp")
    runs = {(run["type"], run["method"]): run for run in found["runs"]}
    rows = []
    for kind in dict.fromkeys(run["type"] for run in found["runs"]):
        theirs = runs[kind, "llama.cpp"]
        bits = 8 * theirs["bytes"] / (found["bytes_before"] / 4)
        cells = [kind, megabytes(theirs["bytes"]), f"{bits:.1f}"]
        others = [runs.get((kind, method)) for method in ("llama.cpp", "field-gptq", "fips")]
        best = min((run["quality"]["against"]["kl"] for run in others if run), default=0)
        for run in others:
            if run is None:
                cells += ["", ""]
                continue
            kl = run["quality"]["against"]["kl"]
            shown = f"{kl:.4f} ± {run['quality']['against']['kl_standard_error']:.4f}"
            cells += [f"{run['quality']['perplexity']:.2f}", f"**{shown}**" if kl == best else shown]
        rows.append(cells)
    head = ["", "tensors", "bits", "llama.cpp", "KL", "GPTQ", "KL", "fips", "KL"]
    return markdown(head, rows)


WAYS = {
    "none": "as compressed", "head": "its head alone", "rest": "all but packed numbers", "labels": "everything, labels",
    "teacher": "everything, the original's predictions",
}  # fmt: skip
TUNED = {
    "vit": ("ViT-Tiny, top-1 %", "top1_percent", 2),
    "vit-turned": ("ViT-Tiny, quarters that an image is turned by, top-1 %", "top1_percent", 2),
    "dinov2-small": ("DINOv2-small, 200 new classes, top-1 % of 2,000", "top1_percent", 2),
    "dinov2-small-2.3-bits": ("the same, top-1 % of 1,000", "top1_percent", 2),
    "smollm2": ("SmolLM2-135M, perplexity", "perplexity", 2),
    "smollm2-shakespeare": ("SmolLM2-135M on Shakespeare, perplexity", "perplexity", 2),
}  # fmt: skip


def fine_tuning() -> str:
    """Training after compression."""
    rows = []
    for name, (label, metric, digits) in TUNED.items():
        for run in load(f"fine-tuning-{name}")["runs"]:
            quality = run["quality"]
            against = quality.get("against")
            dense = run["values"] == "original"
            rows.append([
                label, "dense" if dense else f"{run['bits']:g}, {VALUE_NAMES.get(run['values'], run['values'])}",
                "not" if dense and run["way"] == "none" else WAYS[run["way"]], f"{quality[metric]:.{digits}f}",
                "" if against is None else f"{against['kl']:.4f}",
                "" if run["way"] == "none" or run["seconds"] is None else minutes(run["seconds"]),
            ])  # fmt: skip
    return markdown(["", "bits, values", "trained", "quality", "KL", "time"], rows)


VALUE_NAMES = {"auto": "the default"}
SHARING = {"all": "all blocks", "four": "4 blocks", "own": "own", "random": "random"}


def shared_basis() -> str:
    """A basis of full rank in the MLPs of several blocks: errors relative to those without one."""
    rows = []
    for name in ("vit", "antiberty", "dinov2-small", "smollm2-135m"):
        found, label = load(f"shared-basis-{name}"), _name(name)
        runs = {(run["values"], run["way"]): run for run in found["runs"]}
        for values in dict.fromkeys(run["values"] for run in found["runs"]):
            plain = runs[values, "none"]
            cells = [label, values.replace("-as-is", ", not turned"), f"{plain['quality']['against']['kl']:.4f}"]
            for way in SHARING:
                run = runs.get((values, way))
                if run is None:
                    cells.append("")
                    continue
                left = [one["loss_readers"] + one["loss_writers"] for one in (run, plain)]
                more = f" (+{run['basis_bits_per_weight']:.2f} bits)" if way != "random" else ""
                cells.append(f"{left[0] / left[1]:.3f}{more}, {run['quality']['against']['kl']:.4f}")
            rows.append(cells)
        cells = [label, "by the formula", ""]
        parts = {"readers": plain["loss_readers"], "writers": plain["loss_writers"]}
        for way in SHARING:
            known = [found["possible"].get(f"{part}, {way}") for part in parts]
            total = sum(loss * left for loss, left in zip(parts.values(), known, strict=True) if left is not None)
            cells.append("" if None in known else f"{total / sum(parts.values()):.3f}")
        rows.append(cells)
    return markdown(["", "values", "no basis, KL", *(f"{way}: error, KL" for way in SHARING.values())], rows)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def onnx_speed() -> str:
    result = load("onnx-speed")
    cases = result["cases"]
    rows = [
        [
            name,
            megabytes(facts["bytes"]),
            "all of the blocks" if facts["blocked_layers"] else "none",
            *(f"{case['times_as_fast_as_float32'][name]:.2f}" for case in cases),
        ]
        for name, facts in result["files"].items()
    ]
    head = ["", "file", "`MatMulNBits`", *(f"{case['tokens']} token{'s' * (case['tokens'] > 1)}" for case in cases)]
    return markdown(head, rows)


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return f"{low} MB" if low == high else f"{low} to {high} MB"


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "whole": whole,
    "generation": generation,
    **{f"generation-turns-{run}": functools.partial(generation_turns, run) for run in TURNS},
    "generation-smollm2": generation_smollm2,
    "attention": attention,
    "one-token": one_token,
    "busy-machine": busy_machine,
    **{f"load-time{machine}": functools.partial(load_time, machine) for machine in ("", "-zen5")},
    **{f"matrix-peers-{machine}": functools.partial(matrix_peers, machine) for machine in ("avx512", "zen5")},
    "dense-layers": dense_layers,
    "overfit": overfit,
    **{f"compare-{name}": functools.partial(comparison, name) for name in MODELS},
    "now": now,
    "blocks": blocks,
    "real-model": real_model,
    "low-bits": low_bits,
    "distillation": distillation,
    "parts": parts,
    "paper": paper,
    "time-and-memory": time_and_memory,
    "against-llm-compressor": against_llm_compressor,
    "real-sizes": real_sizes,
    "layer-cost": layer_cost,
    "ranks": ranks,
    "onnx-speed": onnx_speed,
    "operations": operations,
    "value-formats": value_formats,
    "solver-cost": solver_cost,
    "solver-cost-4096": solver_cost_large,
    "activation-bits": activation_bits,
    "model-speed": model_speed,
    "against-llama-cpp": against_llama_cpp,
    "fine-tuning": fine_tuning,
    "forced-sharing": forced_sharing,
    "shared-basis": shared_basis,
    "layers-gpu": gpu_layers,
    "gpu-generation": gpu_generation,
    **{
        f"layers-{model}-{machine}": functools.partial(layer_speed, model + suffix, long)
        for model, long in (("llama", 512), ("deit", 197))
        for machine, suffix in (("zen4", "-zen4"), ("amx", ""), ("avx2", "-avx2"))
    },
}


def rewrite(text: str) -> str:
    """A page with all its tables made anew. Raises ``KeyError`` for a name that is not in ``TABLES``."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[4]}", text)


def stale(text: str) -> list[str]:
    """Names of the tables of a page that are not what the JSON files say."""
    return [found[2] for found in MARKED.finditer(text) if found[3] != f"\n{TABLES[found[2]]()}\n"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table differs")
    args = parser.parse_args()
    differing = 0
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        for name in stale(text):
            differing += 1
            print(f"{page}: table `{name}` {'differs from' if args.check else 'is written anew from'} the JSON files")
        if not args.check:
            path.write_text(rewrite(text), encoding="utf-8")
    return int(args.check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
