"""Train the embedded demo model: a byte-level Llama on the source files of the Python standard library.

The result (bf16 safetensors, config, tokenizer, training log) is what ``fips demo`` compresses. Modules named in
``src/fips/demo/held_out.txt`` and their tests never enter the training set: the demo measures bits per byte on them.

    python scripts/train_demo_model.py --output src/fips/demo/model --steps 3600

Runs on a GPU if there is one, else on the CPU (2 cores with AMX: about an hour). Byte ``b`` is token ``b``; token 256
separates files and opens every window.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SEPARATOR_ID = 256
SEPARATOR = "<|endoftext|>"
HELD_OUT = Path(__file__).resolve().parents[1] / "src" / "fips" / "demo" / "held_out.txt"


def demo_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=257,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
        pad_token_id=SEPARATOR_ID,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: the id of a byte is the byte; every text opens with the separator."""
    vocabulary = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SEPARATOR])
    assert tokenizer.token_to_id(SEPARATOR) == SEPARATOR_ID
    tokenizer.post_processor = TemplateProcessing(
        single=f"{SEPARATOR} $A", pair=f"{SEPARATOR} $A {SEPARATOR} $B", special_tokens=[(SEPARATOR, SEPARATOR_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
        model_max_length=demo_config().max_position_embeddings,
    )


def training_files(stdlib: Path, held_out: set[str]) -> Iterator[Path]:
    """Every UTF-8 ``.py`` file but the held-out modules, their tests, and generated character tables."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        names = {part.removesuffix(".py").removeprefix("test_") for part in parts}
        if "site-packages" in parts or parts[0] == "encodings" or names & held_out:
            continue
        yield path


def load_bytes(files: Iterator[Path]) -> tuple[np.ndarray, int]:
    chunks: list[np.ndarray] = []
    for path in files:
        raw = path.read_bytes()
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        chunks += [np.array([SEPARATOR_ID], dtype=np.int16), np.frombuffer(raw, dtype=np.uint8).astype(np.int16)]
    return np.concatenate(chunks), len(chunks) // 2


def windows(tokens: np.ndarray, *, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(0, len(tokens) - length - 1, size=batch)
        yield torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def optimizers(model: nn.Module, *, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, *, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def bits_per_byte(model: nn.Module, paths: list[Path], *, length: int, device: torch.device) -> float:
    total_bits, total_bytes = 0.0, 0
    for path in paths:
        tokens = torch.tensor(list(path.read_bytes()))
        for window in tokens.split(length):
            ids = torch.cat([torch.tensor([SEPARATOR_ID]), window]).to(device)[None]
            logits = model(ids[:, :-1]).logits.float()
            total_bits += cross_entropy(logits[0], ids[0, 1:], reduction="sum").item() / math.log(2)
            total_bytes += len(window)
    return total_bits / total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stdlib = Path(sysconfig.get_path("stdlib"))
    held_out = set(HELD_OUT.read_text().split())
    tokens, num_files = load_bytes(training_files(stdlib, held_out))
    held_paths = [stdlib / f"{name}.py" for name in sorted(held_out)]
    print(f"{num_files} files, {len(tokens):,} bytes; {len(held_paths)} modules held out", flush=True)

    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(demo_config()).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    groups = optimizers(model, lr=args.lr)
    forward = torch.compile(model, dynamic=False)
    started, losses = time.perf_counter(), []
    batches = windows(tokens, length=args.length, batch=args.batch, seed=args.seed)
    for step, batch in zip(range(args.steps), batches, strict=False):
        for optimizer in groups:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, steps=args.steps, warmup=100)
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = forward(batch[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / math.log(2))
        if step % 50 == 49:
            rate = (step + 1) * args.batch * args.length / (time.perf_counter() - started)
            print(f"step {step + 1}: {sum(losses[-50:]) / 50:.4f} bits/byte, {rate:,.0f} bytes/s", flush=True)
    minutes = (time.perf_counter() - started) / 60

    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.output)
    byte_tokenizer().save_pretrained(args.output)
    reloaded = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32).to(device)
    record = {
        "held_out_bits_per_byte": bits_per_byte(reloaded, held_paths, length=args.length, device=device),
        "held_out_window": args.length,
        "train_bits_per_byte_last_200_steps": sum(losses[-200:]) / len(losses[-200:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_files": num_files,
        "training_bytes": len(tokens),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "minutes": round(minutes, 1),
        "hardware": platform.processor() or platform.machine(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
