"""A checkpoint of the shapes of a recipe's model in random bfloat16 numbers, written a shard at a time.

    python benchmarks/random_checkpoint.py paper-llama-3.1-8b DIR

So a model is tried at its real size where its weights are not at hand, on a machine that could not hold it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fips.models.transformers import build_empty, config_from_fields
from fips.recipes import load_recipe

SHARD = 2 << 30
"""Bytes of a file, at least."""


def write_checkpoint(config: Any, directory: Path) -> int:
    """Write weights of standard deviation 0.02, norms of ones and biases of zeros; returns their bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    model = build_empty(config)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    total = 0
    for name, parameter in model.named_parameters():
        value = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        shard[name] = value if value.dim() == 1 else value.normal_(0, 0.02, generator=generator)
        total += value.nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    config = config_from_fields(dict(load_recipe(args.recipe).architecture or {}))
    print(args.directory, write_checkpoint(config, args.directory), "bytes")


if __name__ == "__main__":
    main()
