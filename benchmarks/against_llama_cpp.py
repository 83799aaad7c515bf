"""A trained language model whole, by fips and as llama.cpp quantizes it, at the same bytes of tensors.

    python benchmarks/against_llama_cpp.py ~/.cache/real-models/smollm2-135m --types Q8_0 Q5_K_M Q4_K_M Q3_K_M \\
        --data ../shared/data/text/wikitext2_valid.txt --eval-data ../shared/data/text/wikitext2_test.txt \\
        --llama-python /tmp/llamacpp/bin/python --keep /tmp/whole --out benchmarks/results/against-llama-cpp.json

The original becomes a GGUF file in 16 bits, which llama.cpp quantizes without calibration data, as many published files
are. For every file fips makes a model of as many bytes (`layers: all`), and so does `field-gptq` of field_methods.py,
in its finest format that fits. Each is scored on the same windows of other text, every token once, beside the original
in its own type: llama.cpp computes the logits of its files itself, with its 8-bit inputs. The file is written
after every run and a later call goes on where it ended; `--keep` keeps models and files for benchmarks/generation.py.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare_methods
import torch
from generation import quantized
from output import result_file
from torch import Tensor, nn

import fips
from fips.config import DataConfig
from fips.evaluation import evaluate
from fips.integrations.gguf import export_gguf, vocabulary_of
from fips.layers.linear import factored_layers
from fips.models.transformers import load_dense, load_processor
from fips.plan.footprint import state_bytes
from fips.record import environment

SERVER = """
import struct, sys
import llama_cpp, numpy as np

model = llama_cpp.Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_batch=int(sys.argv[2]), n_ubatch=int(sys.argv[2]),
                        n_threads=int(sys.argv[3]), n_threads_batch=int(sys.argv[3]), logits_all=True, verbose=False)
out = sys.stdout.buffer
while header := sys.stdin.buffer.read(4):
    (count,) = struct.unpack("<i", header)
    ids = np.frombuffer(sys.stdin.buffer.read(4 * count), dtype=np.int32)
    model.reset()
    model.eval(ids.tolist())
    out.write(np.ascontiguousarray(model.scores[:count], dtype=np.float32).tobytes())
    out.flush()
"""


class LlamaCpp(nn.Module):
    """A GGUF file that llama.cpp runs in a process of its own, as a model that returns logits."""

    def __init__(self, path: Path, python: str, *, vocabulary: int, length: int, threads: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.here = nn.Parameter(torch.zeros(1))
        self.process = subprocess.Popen(
            [python, "-c", SERVER, str(path), str(length), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SimpleNamespace:
        assert attention_mask is None or bool(attention_mask.all()), "windows are full"
        return SimpleNamespace(logits=torch.stack([self.logits_of(ids) for ids in input_ids]))

    def logits_of(self, ids: Tensor) -> Tensor:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(struct.pack("<i", len(ids)) + ids.to(torch.int32).numpy().tobytes())
        self.process.stdin.flush()
        found = bytearray(self.process.stdout.read(4 * len(ids) * self.vocabulary))
        return torch.frombuffer(found, dtype=torch.float32).view(len(ids), self.vocabulary)


def tensor_bytes(path: Path) -> int:
    """Of a GGUF file, without its tokenizer."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)


def types_of(path: Path) -> dict[str, int]:
    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors))


def by_llama_cpp(args: argparse.Namespace, kind: str, place: Path, scored: Any, original: Any) -> dict[str, Any]:
    path, whole = place / f"{kind}.gguf", place / "whole.gguf"
    if not whole.exists():
        tokenizer = load_processor(args.model, "text")
        vocabulary = vocabulary_of(tokenizer, original.config, source=args.model)
        export_gguf(original, whole, vocabulary, name=Path(args.model).name)
    started = time.perf_counter()
    if not path.exists():
        quantized(whole, path, kind, args.llama_python)
    seconds = time.perf_counter() - started
    model = LlamaCpp(
        path, args.llama_python, vocabulary=original.config.vocab_size, length=args.eval_length,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    found = evaluate(model, scored, against=original)
    model.process.kill()
    return {
        "bytes": tensor_bytes(path), "file_bytes": path.stat().st_size, "seconds": seconds, "formats": types_of(path),
        "quality": asdict(found),
    }  # fmt: skip


def by_compression(
    args: argparse.Namespace, method: str, size: int, place: Path, examples: Any, scored: Any, original: Any
) -> dict[str, Any]:
    model = load_dense(args.model, dtype="bfloat16", device=torch.device("cpu"))
    config = fips.CompressionConfig(method=method, layers="all", size=f"{size / 1e6:.6f}MB")
    started = time.perf_counter()
    fips.compress(model, examples, config)
    seconds = time.perf_counter() - started
    facts = {
        "bytes": state_bytes(model), "seconds": seconds,
        "formats": dict(Counter(layer.kind for layer in factored_layers(model).values())),
    }  # fmt: skip
    if method == "fips":
        directory = place / f"fips-{size}"
        if not directory.exists():
            fips.save(model, directory)
        facts["file_bytes"] = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    found = evaluate(fips.merge(model, dtype=torch.float32).float(), scored, against=original)
    return {**facts, "quality": asdict(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=24)
    parser.add_argument("--eval-length", type=int, default=512)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M"])
    parser.add_argument("--methods", nargs="*", default=["field-gptq", "fips"])
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    facts = {
        "benchmark": f"whole models beside llama.cpp's files, {Path(args.model).name}",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]), "environment": environment(torch.device("cpu")),
    }  # fmt: skip
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    original = load_dense(args.model, dtype="auto", device=torch.device("cpu"))
    facts["bytes_before"] = state_bytes(original)
    windows = {"sequence_length": args.eval_length, "batch_size": 8}
    examples, scored = compare_methods.load_examples(
        args.model, original,
        (DataConfig(source=args.data, num_samples=args.samples, **windows), "calibration"),
        (DataConfig(source=args.eval_data, num_samples=args.eval_samples, **windows), "evaluation"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        place = args.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        for kind in args.types:
            for method in ("llama.cpp", *args.methods):
                if any((one["method"], one["type"]) == (method, kind) for one in runs):
                    continue
                if method == "llama.cpp":
                    found = by_llama_cpp(args, kind, place, scored, original)
                else:
                    size = next(one["bytes"] for one in runs if (one["method"], one["type"]) == ("llama.cpp", kind))
                    found = by_compression(args, method, size, place, examples, scored, original)
                runs.append({"type": kind, "method": method, **found})
                print(json.dumps(runs[-1])[:700], flush=True)
                args.out.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
