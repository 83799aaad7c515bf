"""Whole small models as users have them: `fips compress --layers all`, then `fips bench` beside the original.

    python benchmarks/model_speed.py --models ../shared/models --data ../shared/data \
        --real-models ~/.cache/real-models --names demo --sizes 51% 35% 27% 21% \
        --out benchmarks/results/model-speed.json

Speed does not hang on how well weights were chosen, so few examples are calibrated on, by `--effort fast`. Both sides
compute in the type of the original; `fips bench` runs them in turn in one process. Nothing else should run. The file
is written after every model, and a later call goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from output import result_file
from paper_recipe import fips

from fips.demo import MODEL_DIRECTORY
from fips.record import environment

CALIBRATION = ["--num-samples", "32", "--batch-size", "8", "--effort", "fast", "--layers", "all"]
IMAGES = ["--batch", "1", "--batch", "32"]
TEXTS = ["--prompt", "32", "--prompt", "256", "--batch", "1"]


def jobs(args: argparse.Namespace) -> dict[str, tuple[Path, Path, list[str]]]:
    """Model, data to calibrate on, options of `fips bench`."""
    text, images = args.data / "text" / "wikitext2_valid.txt", args.data / "tiny-imagenet" / "train"
    return {
        "demo": (MODEL_DIRECTORY, text, TEXTS),
        "vit-tiny": (args.models / "vit-tiny-tinyimagenet", images, IMAGES),
        "antiberty": (args.real_models / "antiberty", args.data / "antibodies" / "calibration.txt", TEXTS),
        "smollm2-135m": (args.real_models / "smollm2-135m", text, TEXTS),
        "dinov2-small": (args.real_models / "dinov2-small", images, IMAGES[:2]),  # images of 518 x 518
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--real-models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--sizes", nargs="+", default=["25%"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    facts = {
        "benchmark": "whole small models", "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]), "environment": environment(torch.device("cpu")),
    }  # fmt: skip
    results: list[dict[str, Any]] = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    for name, (model, data, options) in jobs(args).items():
        if args.names and name not in args.names:
            continue
        length = [] if options[0] == "--batch" else ["--sequence-length", "128"]
        for size in args.sizes:
            if any((one["model"], one["size"]) == (name, size) for one in results):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                small = str(Path(scratch) / "small")
                fips(
                    "compress",
                    str(model),
                    "--data",
                    str(data),
                    *length,
                    *CALIBRATION,
                    "--size",
                    size,
                    "--output",
                    small,
                )
                rounds = [fips("bench", small, "--against", str(model), *options) for _ in range(args.rounds)]
            cases = {
                case: {
                    "speedups": [one["cases"][case]["speedup"] for one in rounds],
                    **{
                        side: sorted(one["cases"][case][side]["per_second"] for one in rounds)
                        for side in ("dense", "compressed")
                    },
                }
                for case in rounds[0]["cases"]
            }
            results.append({
                "model": name, "size": size, "options": options, "file_bytes": rounds[0]["file_bytes"], "cases": cases,
                **{
                    key: {side: [one[key][side] for one in rounds] for side in ("dense", "compressed")}
                    for key in ("peak_memory_bytes", "first_answer")
                },
            })  # fmt: skip
            print(json.dumps(results[-1])[:500], flush=True)
            args.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
