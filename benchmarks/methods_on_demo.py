"""The two methods on the embedded model, same budget, data, steps and seed: bits per byte on the held-out modules.

    python benchmarks/methods_on_demo.py --output benchmarks/results/methods-on-demo.json

Equal parameters, not equal bytes: the basis of full rank of `fips` needs fewer pattern bits, so its file is smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from fips.config import CompressionConfig, Recipe
from fips.demo import demo_recipe
from fips.demo import run as demo

VARIANTS: dict[str, dict[str, Any]] = {
    "fips-paper": {"method": "fips-paper"},
    "fips, no gradient step": {"method": "fips", "schedule": "static", "sparsity": None, "steps": 0},
    "fips": {"method": "fips", "schedule": "static", "sparsity": None},
}


def variant_recipe(changes: dict[str, Any], *, budget: float) -> Recipe:
    recipe = demo_recipe(budget=budget)
    fields = recipe.compression.model_dump(exclude_unset=True)
    steps = changes.get("steps", recipe.compression.calibration.steps)
    fields["calibration"]["steps"] = steps
    fields |= {key: value for key, value in changes.items() if key != "steps"}
    return recipe.model_copy(update={"compression": CompressionConfig(**fields)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.5)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "commit": commit, "runs": {}}
    for name, changes in VARIANTS.items():
        recipe = variant_recipe(changes, budget=args.budget)
        demo.demo_recipe = lambda recipe=recipe, **_: recipe
        with tempfile.TemporaryDirectory() as scratch:
            run = demo.run_demo(Path(scratch) / "out", budget=args.budget, console=Console(quiet=True))
        run.pop("output")
        result["runs"][name] = run
        before, after = (run["bits_per_byte"][key]["bits_per_byte"] for key in ("before", "after"))
        print(f"{name}: {before:.4f} -> {after:.4f} bits per byte, file {run['file_bytes']['after']}", flush=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
