"""What inputs of 8 bits cost in quality: compressed models with exact inputs and with inputs rounded to 8 bits.

    python benchmarks/activation_bits.py demo stories260k tinystories-656k vit --models ../shared/models \
        --data ../shared/data --bits 3.2,4.2 --output benchmarks/results/activation-bits.json

All matrices that `--layers all` takes (of image models those of the blocks) are compressed with `effort: fast`, then
every layer takes the packed way, as the others do not round. KL is to the original, in float32 but for the inputs.
Needs a processor with AVX-512, where kernels round. Models that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import compare_methods
import torch
from output import result_file

import fips
from fips.evaluation import evaluate
from fips.kernels import cpu
from fips.layers.linear import factored_layers
from fips.models.transformers import load_dense, model_kind
from fips.record import environment


def with_inputs(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    for layer in factored_layers(model).values():
        layer.runtime.policy, layer.runtime.activation_bits = "packed", bits
    return model


def measure(args: argparse.Namespace, name: str, sizes: list[float], scratch: Path) -> list[dict[str, Any]]:
    source, calibration, evaluation = compare_methods.settings(name, args.models, args.data, scratch)
    model = load_dense(source, dtype="auto", device=torch.device("cpu")).float()
    kind = model_kind(model)
    few, many = {"image": (256, 500), "text": (64, 64)}[kind]
    examples, scored = compare_methods.load_examples(
        source, model, (calibration.replace(num_samples=few), "calibration"),
        (evaluation.replace(num_samples=many), "evaluation"),
    )  # fmt: skip
    found = []
    for bits in sizes:
        small = copy.deepcopy(model)
        layers = "all" if kind == "text" else "blocks"
        fips.compress(small, examples, fips.CompressionConfig(bits=bits, layers=layers, effort="fast"))
        exact = copy.deepcopy(with_inputs(small, 16))
        results = {
            "exact": evaluate(exact, scored, against=model),
            "rounded": evaluate(with_inputs(small, 8), scored, against=model),
        }
        found.append({"model": name, "bits": bits, **{key: asdict(value) for key, value in results.items()}})
        print(name, bits, {key: value.against for key, value in results.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", default="3.2,4.2")
    parser.add_argument("--output", type=result_file, required=True)
    args = parser.parse_args()
    before = json.loads(args.output.read_text()) if args.output.exists() else {"results": []}
    results = list(before["results"])
    for name in args.names:
        if not any(one["model"] == name for one in results):
            with tempfile.TemporaryDirectory() as scratch:
                results += measure(args, name, [float(part) for part in args.bits.split(",")], Path(scratch))
    record = {
        "command": " && ".join([*filter(None, [before.get("command")]), " ".join(["python", *sys.argv])]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "environment": {**environment(torch.device("cpu")), "kernels": list(cpu.isa_names())},
        "results": results,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
