"""Whole models at sizes of the whole file: `layers: all` by fips and by the field's methods, on data not seen.

    python benchmarks/whole_models.py smollm2-135m --models ~/.cache/real-models --data ../shared/data \
        --sizes 51%,35%,27%,21% --methods field-gptq,fips --out benchmarks/results/whole-smollm2-135m.json

Sizes are of all tensors of the model in 16 bits. Every model is compressed in bfloat16, merged to float32 and scored
beside the original in its own type: top-1 or perplexity, KL of the predictions and how often the first ones agree.
`rtn`, `awq` and `field-gptq` are those of field_methods.py, which take the finest of their formats that fits. fips gets
exactly the bytes that the first method needed. The file is written after every run, and a later call goes on where it
ended.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import compare_methods
import torch
from output import result_file

import fips
from fips.evaluation import evaluate
from fips.layers.linear import factored_layers
from fips.models.transformers import load_dense
from fips.plan.footprint import state_bytes
from fips.record import environment


def run(
    args: argparse.Namespace, method: str, size: str, given: str, examples: Any, scored: Any, source: str
) -> dict[str, Any]:
    """One method at one size."""
    model = load_dense(source, dtype="bfloat16", device=torch.device("cpu"))
    before = state_bytes(model)
    started = time.perf_counter()
    report = fips.compress(model, examples, fips.CompressionConfig(method=method, layers=args.layers, size=given))
    seconds = time.perf_counter() - started
    original = load_dense(source, dtype="auto", device=torch.device("cpu"))
    size_after = state_bytes(model)
    formats = dict(Counter(layer.kind for layer in factored_layers(model).values()))
    found = evaluate(fips.merge(model, dtype=torch.float32).float(), scored, against=original)
    return {
        "method": method, "size": size, "given": given, "bytes_before": before, "bytes": size_after, "seconds": seconds,
        "formats": formats, "quality": asdict(found),
        "overfit": compare_methods.overfit_of(report.overfit.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", default="51%,35%,27%,21%")
    parser.add_argument("--methods", default="field-gptq,fips")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {
        "benchmark": f"whole models, {args.name}", "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]), "commit": commit, "environment": environment(torch.device("cpu")),
    }  # fmt: skip
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        source, calibration, evaluation = compare_methods.settings(args.name, args.models, args.data, Path(scratch))
        model = load_dense(source, dtype="bfloat16", device=torch.device("cpu"))
        examples, scored = compare_methods.load_examples(
            source, model, (calibration, "calibration"), (evaluation, "evaluation")
        )
        del model
        for size in args.sizes.split(","):
            for method in args.methods.split(","):
                if any((one["method"], one["size"]) == (method, size) for one in runs):
                    continue
                same = [one["bytes"] for one in runs if one["size"] == size and one["method"] != "fips"]
                given = f"{same[0] / 1e6:.6f}MB" if method == "fips" and same else size
                runs.append(run(args, method, size, given, examples, scored, source))
                print(json.dumps(runs[-1])[:600], flush=True)
                args.out.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")
                gc.collect()


if __name__ == "__main__":
    main()
