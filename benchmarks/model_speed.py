"""Whole small models as users have them: `fips compress --layers all`, then `fips bench` beside the original and GPTQ.

    python benchmarks/model_speed.py --models ../shared/models --data ../shared/data \
        --real-models ~/.cache/real-models --names demo --sizes 51% 35% 27% 21% --work /tmp/models \
        --out benchmarks/results/model-speed.json

GPTQ is `--method gptq`: integers, every matrix in the same bits, of the size asked for or the next smaller one that
they can have; it is left out where they can have none. Speed does not hang on how well weights were chosen, so few
examples are calibrated on, by `--effort fast`. All sides compute in the type of the original; `fips bench` runs them in
turn in one process. Nothing else should run meanwhile; compressing can be done before (`--only-compress`), as what is
in `--work` stays there. The file is written after every model, and a later call goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from output import result_file
from paper_recipe import fips

from fips.demo import MODEL_DIRECTORY
from fips.record import environment

CALIBRATION = ["--num-samples", "32", "--batch-size", "8", "--layers", "all"]
SIDES = {"compressed": ["--effort", "fast"], "gptq": ["--method", "gptq"]}
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


def timed(places: dict[str, str], options: list[str], rounds: int) -> dict[str, Any]:
    """What `fips bench` finds in several processes, by sides."""
    others = {path: side for side, path in places.items() if side != "compressed"}
    against = [part for path in others for part in ("--against", path)]
    found = [fips("bench", places["compressed"], *against, *options) for _ in range(rounds)]

    def sides(by_path: Any) -> dict[str, Any]:
        if not isinstance(by_path, dict):
            return {"dense": by_path}  # the only one
        return {others.get(path, path): value for path, value in by_path.items()}

    def every(key: str) -> dict[str, list[Any]]:
        return {side: [sides(one[key])[side] for one in found] for side in places}

    cases: dict[str, dict[str, Any]] = {}
    for case in found[0]["cases"]:
        timings = [sides(one["cases"][case]) for one in found]
        gains = [sides(timing["speedup"]) for timing in timings]
        cases[case] = {"speedups": {side: [gain[side] for gain in gains] for side in others.values()}}
        cases[case] |= {side: sorted(timing[side]["per_second"] for timing in timings) for side in places}
    return {
        "file_bytes": sides(found[0]["file_bytes"]), "cases": cases,
        "peak_memory_bytes": every("peak_memory_bytes"), "first_answer": every("first_answer"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--real-models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--sizes", nargs="+", default=["25%"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="where compressed models are kept")
    parser.add_argument("--only-compress", action="store_true")
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
            places = {"dense": str(model)}
            for side, chosen in SIDES.items():
                place = args.work / f"{name}-{size.rstrip('%')}-{side}"
                source = ["compress", str(model), "--data", str(data), "--size", size, "--output", str(place)]
                if not place.exists():
                    try:
                        fips(*source, *length, *CALIBRATION, *chosen)
                    except SystemExit as failed:
                        if side != "gptq":
                            raise
                        print(failed, file=sys.stderr)  # it has no size so small
                        continue
                places[side] = str(place)
            if args.only_compress:
                continue
            results.append({"model": name, "size": size, "options": options, **timed(places, options, args.rounds)})
            print(json.dumps(results[-1])[:500], flush=True)
            args.out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
