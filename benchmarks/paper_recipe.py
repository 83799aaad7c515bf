"""Quality, size, time and memory of the paper's recipe on real models; one JSON file per model.

    python benchmarks/paper_recipe.py vit --models ../shared/models --data ../shared/data --output benchmarks/results

Images: calibrated on the training folder, scored on the validation folder. Stories: calibrated on the first fifth of
the text, scored on all the rest, every token once, windows of 512 that never cross a story; stories with characters
the tokenizer does not know are left out of both. Every compression runs in a process of its own, so that its peak
memory is its own. Results that came out badly are written like the others.
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

from output import result_directory

BUDGETS = (0.25, 0.5, 0.75)
SEPARATOR = "<|endoftext|>"
CALIBRATION_SHARE = 0.2
STORY_WINDOWS = {"stories260k": 320, "tinystories-656k": 160}


def image_job(models: Path, data: Path) -> dict[str, Any]:
    images = data / "tiny-imagenet"
    return {
        "model": str(models / "vit-tiny-tinyimagenet"),
        "calibration": ["--data", str(images / "train"), "--num-samples", "3840", "--batch-size", "64"],
        "evaluation": ["--data", str(images / "validation"), "--batch-size", "50"],
    }


def story_job(name: str, models: Path, data: Path, scratch: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    model = models / name
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = (data / "text" / "tinystories_sample_2MB.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split(SEPARATOR) if story.strip()]
    known = [story for story in stories if tokenizer.unk_token_id not in tokenizer(story)["input_ids"]]
    cut = int(CALIBRATION_SHARE * len(known))
    for part, chosen in (("calibration", known[:cut]), ("evaluation", known[cut:])):
        (scratch / f"{part}.txt").write_text(SEPARATOR.join(chosen), encoding="utf-8")
    options = ["--sequence-length", "512", "--document-separator", SEPARATOR, "--batch-size", "16"]
    samples = ["--num-samples", str(STORY_WINDOWS[name])]
    return {
        "model": str(model),
        "stories": {"all": len(stories), "without unknown tokens": len(known), "calibration": cut},
        "calibration": ["--data", str(scratch / "calibration.txt"), *options, *samples],
        "evaluation": ["--data", str(scratch / "evaluation.txt"), *options],
    }


def fips(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fips", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


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
        "mlp": record["layers"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "groups": record["results"],
        "config": record["config"],
        "environment": record["environment"],
    }


def run(name: str, job: dict[str, Any], *, seed: int, target: Path) -> None:
    original = fips("evaluate", job["model"], *job["evaluation"])
    print("original", json.dumps(original["headline"]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    size = (Path(job["model"]) / "model.safetensors").stat().st_size
    result: dict[str, Any] = {
        "benchmark": f"paper recipe, {name}",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "job": {**job, "model": Path(job["model"]).name},
        "original": {"evaluation": original, "file_bytes": size},
        "compressed": [],
    }
    for budget in BUDGETS:
        last = measure(job, budget, seed)
        result["compressed"].append(last)
        print(budget, json.dumps(last["evaluation"]["headline"]), last["file_bytes"], last["seconds"], flush=True)
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("vit", *STORY_WINDOWS))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=result_directory, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.name == "vit":
            job = image_job(args.models, args.data)
        else:
            job = story_job(args.name, args.models, args.data, Path(scratch))
        run(args.name, job, seed=args.seed, target=args.output / f"paper-recipe-{args.name}.json")


if __name__ == "__main__":
    main()
