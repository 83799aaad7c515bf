"""Time and peak memory of whole compressions, the default method beside the paper's recipe, one after the other.

    python benchmarks/time_and_memory.py --models ../shared/models --data ../shared/data \
        --output benchmarks/results/time-and-memory.json

Each is the command a user would type, in a process of its own, with the calibration data it is used with elsewhere:
1,024 images for the default, 3,840 for 600 steps per group of the paper's recipe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from output import result_file
from paper_recipe import fips, image_job

JOBS: dict[str, list[str]] = {
    "fips, 4.8 bits": ["--bits", "4.8", "--num-samples", "1024"],
    "fips-paper, budget 0.5 (0.61 of the bytes)": ["--recipe", "paper", "--budget", "0.5"],
    "fips, 8 bits": ["--bits", "8.0", "--num-samples", "1024"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=result_file, required=True)
    args = parser.parse_args()
    job = image_job(args.models, args.data)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "benchmark": "time and memory of a compression, ViT-Tiny",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "runs": rows,
    }
    for name, options in JOBS.items():
        with tempfile.TemporaryDirectory() as scratch:
            output = str(Path(scratch) / "compressed")
            done = fips(
                *("compress", job["model"], "--layers", "mlp"), *job["calibration"], *options, "--output", output
            )
            quality = fips("evaluate", output, *job["evaluation"])
        errors = [group["relative_error_final"] for group in done["results"]]
        rows.append(
            {
                "method": name,
                "seconds": done["seconds"],
                "peak_memory_bytes": done["peak_memory_bytes"],
                "relative_error": sum(errors) / len(errors),
                "relative_error_start": sum(group["relative_error_start"] for group in done["results"]) / len(errors),
                "headline": quality["headline"],
                "mlp": done["layers"],
                "environment": done["environment"],
            }
        )
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "environment"}), flush=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
