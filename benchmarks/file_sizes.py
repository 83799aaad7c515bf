"""Sizes of whole files before and after compression, at the settings of compare_methods.py; one JSON file.

    python benchmarks/file_sizes.py demo stories260k --models ../shared/models --data ../shared/data --output FILE.json

A model is compressed once per size with seed 0, and the tensor files of both directories are measured.
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

import torch
from compare_methods import settings

from fips.app.commands import compress_to_directory
from fips.config import CompressionConfig, Recipe
from fips.record import environment


def tensor_files(directory: Path) -> int:
    """Bytes of all safetensors files of a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def measure(name: str, size: float, models: Path, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source, calibration, _ = settings(name, models, data, scratch)
        recipe = Recipe(compression=CompressionConfig(bits=size, layers="mlp"), data=calibration)
        done = compress_to_directory(source, recipe, scratch / "compressed")
        return {
            "model": name,
            "bits": size,
            "file_bytes": {"before": tensor_files(Path(source)), "after": tensor_files(scratch / "compressed")},
            "seconds": round(done.report.seconds, 1),
            "mlp": done.report.to_dict()["layers"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=("vit", "demo", "stories260k", "tinystories-656k"))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", default="4.8")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {
        "benchmark": "sizes of whole files",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "environment": environment(torch.device("cpu")),
        "results": [],
    }
    for name in args.names:
        for size in args.bits.split(","):
            result["results"].append(measure(name, float(size), args.models, args.data))
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(result["results"][-1]), flush=True)


if __name__ == "__main__":
    main()
