"""Quality, size, time and memory of the paper's recipe on real models; one JSON file per model.

    python benchmarks/paper_recipe.py vit --models ../shared/models --data ../shared/data --output benchmarks/results

Every compression runs in a process of its own, so that its peak memory is its own. Results that came out badly are
written like the others.
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

BUDGETS = (0.25, 0.5, 0.75)


def jobs(name: str, models: Path, data: Path) -> dict[str, list[str] | str]:
    """Model, calibration options and evaluation options of one benchmark."""
    stories = str(data / "text" / "tinystories_sample_2MB.txt")
    text = ["--sequence-length", "512", "--document-separator", "<|endoftext|>"]
    if name == "vit":
        images = data / "tiny-imagenet"
        return {
            "model": str(models / "vit-tiny-tinyimagenet"),
            "calibration": ["--data", str(images / "train"), "--num-samples", "3840", "--batch-size", "64"],
            "evaluation": ["--data", str(images / "validation"), "--batch-size", "50"],
        }
    return {
        "model": str(models / name),
        "calibration": ["--data", stories, *text, "--num-samples", "320", "--batch-size", "16"],
        "evaluation": ["--data", stories, *text, "--batch-size", "16"],
    }


def fips(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fips.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure(job: dict[str, Any], budget: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "compressed"
        options = ["--recipe", "paper", "--budget", str(budget), "--seed", str(seed), "--output", str(output)]
        record = fips("compress", job["model"], *job["calibration"], *options)
        evaluation = fips("evaluate", str(output), *job["evaluation"])
        size = (output / "model.safetensors").stat().st_size
    return {
        "budget": budget,
        "seed": seed,
        "evaluation": evaluation,
        "file_bytes": size,
        "mlp": record["mlp"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "groups": record["results"],
        "config": record["config"],
        "environment": record["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("vit", "stories260k", "tinystories-656k"))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    job = jobs(args.name, args.models, args.data)
    original = fips("evaluate", str(job["model"]), *job["evaluation"])
    print(json.dumps(original["headline"]), flush=True)
    result: dict[str, Any] = {
        "benchmark": f"paper recipe, {args.name}",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "calibration": job["calibration"],
        "evaluation": job["evaluation"],
        "original": {
            "evaluation": original,
            "file_bytes": (Path(str(job["model"])) / "model.safetensors").stat().st_size,
        },
        "compressed": [],
    }
    target = args.output / f"paper-recipe-{args.name}.json"
    for budget in BUDGETS:
        result["compressed"].append(measure(job, budget, args.seed))
        last = result["compressed"][-1]
        print(budget, json.dumps(last["evaluation"]["headline"]), last["file_bytes"], last["seconds"], flush=True)
        target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
