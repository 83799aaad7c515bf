"""A trained model of real size through the command line: time, memory and bytes of `fips compress` by several methods,
and what `fips evaluate --against` says of each on other data.

    python benchmarks/real_models.py MODEL --data TRAIN --eval-data TEST --out FILE \
        --runs "--bits 4.2" "--bits 4.2 --effort fast" "--bits 4.2 --method gptq"

Data and models are local directories or hub ids, as for `fips`. Runs follow each other; nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from compare_methods import overfit_of
from output import result_file
from paper_recipe import fips

from fips.record import environment


def measure(args: argparse.Namespace, options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch) / "small")
        started = time.perf_counter()
        report = fips("compress", args.model, "--data", args.data, "--output", output, *shlex.split(options))
        seconds = time.perf_counter() - started
        quality = fips(
            *("evaluate", output, "--against", args.model, "--data", args.eval_data),
            *("--num-samples", str(args.eval_samples), "--sequence-length", str(args.eval_length)),
        )
    layers = report["layers"]
    return {
        "options": options,
        "stored_bits": 8 * layers["factored"]["bytes"] / layers["dense"]["parameters"],
        "compress_seconds": report["seconds"],
        "process_seconds": seconds,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "directory_bytes": report["directory_bytes"],
        "formats": sorted({part for group in report["groups"] for part in group["values"].split(", ")}),
        "overfit": overfit_of(report["overfit"].values()),
        "quality": quality,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-samples", type=int, default=24)
    parser.add_argument("--eval-length", type=int, default=512)
    parser.add_argument("--runs", nargs="+", required=True, help="options of `fips compress`, one string for each run")
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    runs = []
    for options in args.runs:
        runs.append(measure(args, options))
        quality = runs[-1]["quality"]
        print(options, f"{runs[-1]['compress_seconds']:.0f} s", json.dumps(quality)[:300], flush=True)
        command = shlex.join(
            ["python", "benchmarks/real_models.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]
        )
        result = {
            "command": command,
            "environment": environment(torch.device("cpu")),
            "model": Path(args.model).name,
            "runs": runs,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
