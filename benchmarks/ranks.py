"""Time of a compression by 1, 2 and 3 processes, one thread each, beside one process with as many threads as cores.

    python benchmarks/ranks.py --model ../shared/models/vit-tiny-tinyimagenet \
        --data ../shared/data/tiny-imagenet/train --output benchmarks/results/ranks.json -- --num-samples 384

What follows ``--`` goes to `fips compress`. The runs take turns; seconds are those of the report, without imports and
loading, and medians over ``--repeats``. However many processes there are, those of one thread must write the same
bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from output import result_file

from fips.record import environment

RANKS = (1, 2, 3)


def run(args: argparse.Namespace, ranks: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [
            sys.executable, *(launcher if ranks > 1 else []), "-m", "fips", "compress", str(args.model),
            "--data", str(args.data), "--bits", str(args.bits), "--output", str(output), *args.more,
        ]  # fmt: skip
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
        report = json.loads((output / "fips_report.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    found = {"ranks": ranks, "threads": threads, "seconds": report["seconds"], "sha256": digest}
    sys.stdout.write(f"{found}\n")
    sys.stdout.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=4.25)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=result_file, required=True)
    parser.add_argument("more", nargs="*", help="further options of `fips compress`")
    args = parser.parse_args()
    jobs = [(ranks, 1) for ranks in RANKS] + [(1, os.cpu_count() or 1)]
    runs = [run(args, *job) for _ in range(args.repeats) for job in jobs]
    seconds = {job: median(one["seconds"] for one in runs if (one["ranks"], one["threads"]) == job) for job in jobs}
    alone = seconds[1, 1]
    record = {
        "benchmark": "compression by several processes",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/ranks.py", *sys.argv[1:]]),
        "environment": environment(torch.device("cpu")),
        "runs": runs,
        "speed_up": {
            f"{ranks} x {threads} threads": round(alone / value, 2) for (ranks, threads), value in seconds.items()
        },
        "same_bytes": len({one["sha256"] for one in runs if one["threads"] == 1}) == 1,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record["speed_up"]) + f" same bytes: {record['same_bytes']}\n")


if __name__ == "__main__":
    main()
