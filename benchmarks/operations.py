"""What the default costs at sizes that no machine here has: operations by kind, and the time they would take on GPUs.

    python benchmarks/operations.py --output benchmarks/results/operations.json

Counted on the meta device for 128 texts of 2,048 tokens at 4.25 bits, as `fips compress --dry-run` does. Times are
estimates: the rates are those of one measured run, Llama-3.2-1B whole on an H200 by `--effort fast`
(real-sizes-h200.json), whose seconds of measuring and solving are set against its operations; larger matrices run
closer to what a GPU can do. Reading weights and files is left out. `gpus` share the work evenly.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from output import result_file

import fips
from fips.estimate.time import Operations, operations
from fips.models.transformers import build_empty, config_from_fields
from fips.plan.plan import plan_compression
from fips.recipes import load_recipe

TEXTS, TOKENS, BITS = 128, 2048, 4.25
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "Llama-3.2-1B": ("paper-llama-3.2-1b", 1),
    "Llama-3.1-8B": ("paper-llama-3.1-8b", 1),
    "Llama-3.1-70B": (None, 8),
}
RATES = "Llama-3.2-1B", "fast"
RESULTS = Path(__file__).parent / "results"


def counted(recipe: str | None, effort: str) -> Operations:
    fields = LLAMA_70B if recipe is None else load_recipe(recipe).architecture
    model = build_empty(config_from_fields(dict(fields or {})))
    config = fips.CompressionConfig(bits=BITS, effort=effort, layers="mlp")

    def examples(count: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.empty(count, TOKENS, dtype=torch.int64, device="meta")}

    found = operations(
        model, plan_compression(model, config), config, examples, count=TEXTS, device=torch.device("meta")
    )
    if found is None:
        raise SystemExit(f"the operations of {recipe} cannot be counted")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=result_file, required=True)
    args = parser.parse_args()
    run = json.loads((RESULTS / "real-sizes-h200.json").read_text(encoding="utf-8"))["runs"][0]
    stages = run["stages_s"]
    whole = {
        (name, effort): counted(recipe, effort)
        for name, (recipe, _) in MODELS.items()
        for effort in ("fast", "default")
    }
    one = whole[RATES]
    rates = {
        "products": one.products / (stages["measuring"] + stages["allotting"]),
        "solving": (one.roots + one.rounding) / stages["solving"],
    }
    rows: list[dict[str, Any]] = []
    for (name, effort), work in whole.items():
        gpus = MODELS[name][1]
        seconds = (work.products / rates["products"] + (work.roots + work.rounding) / rates["solving"]) / gpus
        rows.append({
            "model": name, "effort": effort, "products": work.products, "roots": work.roots, "rounding": work.rounding,
            "gpus": gpus, "estimated_s": round(seconds, 1),
        })  # fmt: skip
        sys.stdout.write(f"{rows[-1]}\n")
    record = {
        "benchmark": "operations at real sizes",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/operations.py", *sys.argv[1:]]),
        "texts": TEXTS, "tokens": TOKENS, "bits": BITS,
        "rates_per_s": rates, "rates_of": "real-sizes-h200.json, Llama-3.2-1B, fast",
        "models": rows,
    }  # fmt: skip
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
