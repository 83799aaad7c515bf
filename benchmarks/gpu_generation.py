"""A language model that generates on a GPU: packed in several value formats, and dense bfloat16.

    python benchmarks/gpu_generation.py --values int4g64 nl4g64 tc4g64 --output benchmarks/results/gpu-generation.json

Models have the shapes of a recipe and random numbers, as in `generation.py`: all matrices of packed ones, embedding and
head included, have the same values. Every contestant has a process of its own, all in turn, ``--rounds`` times. It
reads a prompt and generates with `generate`: as it is, where Python starts every kernel, and with a static cache, where
transformers compiles the step and replays it as a CUDA graph. Medians; nothing else should use the GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections import defaultdict
from statistics import median
from typing import Any

import torch
from generation import filled, packed
from output import result_file

from fips.models.transformers import build_empty, config_from_fields
from fips.recipes import load_recipe
from fips.record import environment

DENSE = "dense"
RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper-llama-3.2-1b")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--values", nargs="+", default=["int4g64", "nl4g64", "tc4g64"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=result_file)
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for name in (DENSE, *args.values):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(name, done.stderr[-3000:], flush=True)
                continue
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
            record = {
                "benchmark": "generation on a GPU",
                "command": " ".join(["python", *sys.argv]),
                "environment": environment(torch.device("cuda")),
                "recipe": args.recipe,
                "blocks": args.blocks or "all",
                "results": {
                    name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
                },
            }
            args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, float]:
    fields = copy.deepcopy(dict(load_recipe(args.recipe).architecture or {}))
    if args.blocks:
        fields["num_hidden_layers"] = args.blocks
    config = config_from_fields(fields)
    empty = build_empty(config).to(torch.bfloat16)
    model = filled(empty, "cuda") if args.one == DENSE else packed(empty, args.one, "cuda")
    model = model.to("cuda").eval()
    torch.cuda.synchronize()
    found: dict[str, float] = {"weights_bytes": torch.cuda.memory_allocated()}
    ids = torch.randint(300, config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1)).cuda()

    def seconds(length: int, tokens: int, **settings: Any) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids[:, :length], attention_mask=torch.ones_like(ids[:, :length]), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0, **settings,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def of_runs(length: int, tokens: int, **settings: Any) -> float:
        for _ in range(2):
            seconds(length, tokens, **settings)
        return median(seconds(length, tokens, **settings) for _ in range(RUNS))

    with torch.no_grad():
        found["prompt_per_s"] = args.prompt / of_runs(args.prompt, 1)
        found["tokens_per_s"] = args.tokens / (of_runs(8, args.tokens + 1) - of_runs(8, 1))
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        if not args.no_compile:
            start = time.perf_counter()
            static = {"cache_implementation": "static"}
            seconds(8, args.tokens + 1, **static)
            found["compile_s"] = time.perf_counter() - start
            found["compiled_tokens_per_s"] = args.tokens / (
                of_runs(8, args.tokens + 1, **static) - of_runs(8, 1, **static)
            )
    return found


if __name__ == "__main__":
    main()
