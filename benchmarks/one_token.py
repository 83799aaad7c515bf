"""What one token takes beside its matrices: the compiled library beside torch, in turn.

    python benchmarks/one_token.py --out benchmarks/results/one-token.json [--models ~/.cache/fips-generation/int4g64]

Of attention microseconds of a call from Python, medians of rounds, and the ratio within a round. torch's way is the one
that fips takes without its library: queries that share keys and values together, as if they were several tokens. Of
models, such as ``benchmarks/generation.py make`` writes them, what a token takes behind a prompt of some length, or of
several texts padded in front, with neither, with attention, with attention and norms, and with whole blocks by the
library.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from output import result_file
from transformers import AutoModelForCausalLM

from fips.kernels import attention
from fips.layers import decoding
from fips.layers.blocks import MARK, forget_blocks
from fips.layers.norms import forget_norms, quicken_norms
from fips.record import environment

HEADS = {
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Llama-3.1-8B": (32, 8, 128),
    "Qwen2.5-7B": (28, 4, 128),
    "GPT-2": (12, 12, 64),
}
"""Of queries, of keys and values, and the numbers of each."""
LENGTHS = 16, 128, 512, 2048, 8192
SECONDS = 0.02
"""Of one measurement."""
PROMPTS = (1, 512), (1, 2048), (4, 512)
"""Texts at a time and tokens of each; several are padded in front, each more than the one before."""
PADDING = 40
TOKENS = 60
"""Generated in either way behind a prompt."""
WAYS = {"library": attention.suits, "torch": lambda *_: False}


def seconds_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        decoding.attend(query, key, value, None, 0.125)
    return (time.perf_counter() - start) / calls


def calls(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for model, (heads, shared, size) in HEADS.items():
        for length in LENGTHS:
            query = torch.randn(1, heads, 1, size).bfloat16()
            key, value = (torch.randn(1, shared, length, size).bfloat16() for _ in range(2))
            found: dict[str, list[float]] = {name: [] for name in WAYS}
            for turn in range(-1, rounds):
                for name in WAYS if turn % 2 else reversed(WAYS):
                    attention.suits = WAYS[name]
                    count = max(1, round(SECONDS / seconds_of(query, key, value, 3)))
                    found[name].append(seconds_of(query, key, value, count))
            row = {"model": model, "heads": heads, "key_heads": shared, "size": size, "length": length}
            rows.append(row | compared({name: times[1:] for name, times in found.items()}, "us", 1e6))
            print(rows[-1])
    return rows


def compared(found: dict[str, list[float]], unit: str, times: float) -> dict[str, float]:
    """Medians, and those of the ratios of torch to the others within a round."""
    row = {f"{name}_{unit}": round(times * median(each), 2) for name, each in found.items()}
    for name in found:
        if name != "torch":
            row[f"{name}_ratio"] = round(median(t / own for t, own in zip(found["torch"], found[name], strict=True)), 3)
    return row


def tokens(path: Path) -> list[dict[str, Any]]:
    """What a token takes behind prompts, every fourth one in the same way, each with a cache of its own."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    marks = {module: vars(module)[MARK] for module in model.modules() if MARK in vars(module)}
    rows = []
    for examples, length in PROMPTS:
        prompt = torch.arange(300, 300 + length).expand(examples, -1)
        mask = torch.ones(examples, length + TOKENS, dtype=torch.long)
        for example in range(examples):
            mask[example, : PADDING * example] = 0

        def given(tokens: int, mask: torch.Tensor = mask) -> dict[str, Any]:
            places = mask[:, :tokens].cumsum(1).sub(1).clamp_min(0)
            return {"attention_mask": mask[:, :tokens], "position_ids": places, "use_cache": True, "logits_to_keep": 1}

        outs = {way: model(prompt, **given(length)) for way in ("torch", "attention", "norms", "blocks")}
        found: dict[str, list[float]] = {way: [] for way in outs}
        for turn in range(TOKENS):
            for way in found if turn % 2 else reversed(found):
                attention.suits = WAYS["torch" if way == "torch" else "library"]
                (quicken_norms if way in ("norms", "blocks") else forget_norms)(model)
                forget_blocks(model)
                if way == "blocks":
                    for module, mark in marks.items():
                        setattr(module, MARK, mark)
                token, options = outs[way].logits[:, -1:].argmax(-1), given(length + turn + 1)
                options |= {"position_ids": options["position_ids"][:, -1:], "cache": outs[way].past_key_values}
                start = time.perf_counter()
                outs[way] = model(token, **options)
                found[way].append(time.perf_counter() - start)
        found = {way: times[5:] for way, times in found.items()}
        rows.append({"model": path.name, "examples": examples, "length": length} | compared(found, "ms", 1e3))
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=Path, default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fields = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cpu")), "threads": args.threads},
        "attention": calls(args.rounds),
        "models": [row for path in args.models for row in tokens(path)],
    }
    Path(args.out).write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
