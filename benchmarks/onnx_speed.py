"""ONNX Runtime on a Llama of random numbers: float32 beside blocks of 4 and 8 bits, in one process, all in turn.

    python benchmarks/onnx_speed.py --out benchmarks/results/onnx-speed.json

Each contestant is what ``fips export --format onnx`` writes: the dense model, and the model with all matrices of its
blocks in a value format, with inputs as they are or rounded to 8 bits. Speed does not depend on the numbers. Nothing
else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from output import result_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fips.integrations.onnx import export_onnx
from fips.layers.linear import FactoredLinear, replace_everywhere
from fips.models.sites import Role
from fips.record import environment

CONTESTANTS: dict[str, tuple[str | None, int]] = {
    "float32": (None, 16),
    "int4g32": ("int4g32", 16),
    "int4g32, inputs of 8 bits": ("int4g32", 8),
    "int8": ("int8", 16),
    "int8, inputs of 8 bits": ("int8", 8),
}
"""Value format, and bits of inputs that layers may round to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fips-onnx-") as scratch:
        written = {name: export(Path(scratch), number, name, args) for number, name in enumerate(CONTESTANTS)}
        sessions = {name: session(path, args.threads) for name, (path, _) in written.items()}
        cases = [case(sessions, tokens, args.rounds) for tokens in args.tokens]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cpu")), "onnxruntime": onnxruntime.__version__},
        "load_average": os.getloadavg(),
        "threads": args.threads,
        "shapes": {"hidden": args.hidden, "intermediate": args.intermediate, "blocks": args.blocks},
        "files": {name: facts for name, (_, facts) in written.items()},
        "cases": cases,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def export(scratch: Path, number: int, name: str, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    values, bits = CONTESTANTS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.blocks,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 256, vocab_size=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for place, layer in list(model.named_modules()):
        if values is not None and isinstance(layer, nn.Linear) and place != "lm_head":
            role = Role("down" if place.endswith(("o_proj", "down_proj")) else "up")
            weight = role.to_factor(layer.weight.detach())
            packed = FactoredLinear.from_factor(
                None, weight, torch.ones_like(weight, dtype=torch.bool), role=role.value, fmt="full", values=values
            )
            replace_everywhere(model, place, packed)
    ids = torch.randint(512, (2, 8))
    path = scratch / f"{number}.onnx"
    file = export_onnx(model, path, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, activation_bits=bits)
    return path, {"bytes": file.bytes, "relative_error": file.relative_error, "blocked_layers": file.blocked}


def session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def case(sessions: dict[str, Any], tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of every run of every contestant, which take turns."""
    ids = np.arange(tokens, dtype=np.int64)[None] % 512
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + 2):
        for name, one in sessions.items():
            start = time.perf_counter()
            one.run(None, inputs)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    middle = {name: median(found) for name, found in times.items()}
    return {
        "tokens": tokens,
        "median_s": middle,
        "times_as_fast_as_float32": {name: middle["float32"] / found for name, found in middle.items()},
        "runs_s": times,
    }


if __name__ == "__main__":
    main()
