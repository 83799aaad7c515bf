"""How fast and how large a compressed model is, beside the dense one: alternating runs, medians and spread.

A language model is timed on prompts of several lengths (one forward pass, batch 1, logits of the last token as for
generation) and on the step that adds one token to a cache, for several batch sizes; of an encoder-decoder the decoder
takes that step, and a prompt is what the encoder reads; other models of text are timed on batches of texts, those of
images on batches of images. A fresh process of each loads the model and answers the longest prompt, or one image: how
long that takes, and the peak of its memory.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fips.config import SEEDS
from fips.errors import ConfigError, ModelError
from fips.kernels import cpu
from fips.kernels.runtime import POLICIES
from fips.kernels.select import check_policy
from fips.layers.linear import factored_layers
from fips.layers.merge import merge
from fips.models.gguf import is_gguf_source
from fips.models.tasks import task_name
from fips.models.transformers import context_length, load_dense, model_kind, require_one_input
from fips.record import environment, peak_memory_bytes
from fips.storage.checkpoint import is_compressed, load

__all__ = ["BATCHES", "PROMPTS", "backend_report", "bench", "load_any", "runtime_report", "set_policy"]

BATCHES = (1, 8, 64)
PROMPTS = (1, 128, 1024)
MOST_EXAMPLES = 1 << 16
MOST_TOKENS = 1 << 24
"""Beyond what any memory takes."""
CACHED = 32
"""Tokens already in the cache when one more is timed."""
Case = tuple[str, Callable[[PreTrainedModel], Any], int]


def bench(
    directory: str,
    *,
    against: str | Sequence[str] | None = None,
    policy: str = "auto",
    batches: Iterable[int] = BATCHES,
    prompts: Iterable[int] = PROMPTS,
    repeats: int = 9,
    memory: bool = True,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time a compressed directory against models, or against itself merged to dense layers.

    One other model is called ``dense`` in the result, several are by their names, and so are then the speed-ups over
    them. Every case runs all models in turn, ``repeats`` times or for about 10 s; the result holds the median, the
    quartiles and every run. ``progress`` is told what is done and what there is to do, ``policy`` is that of
    ``fips.kernels.runtime``. Prompts longer than the model reads are left out. Raises ``ModelError`` for a directory
    that is not compressed, ``ConfigError`` for numbers of examples, tokens or runs that nobody can take.
    """
    batches, prompts = tuple(batches), tuple(prompts)
    _check_counts(batches, prompts, repeats, seed)
    check_policy(policy)
    if not is_compressed(directory):
        raise ModelError(f"`{directory}` is not a compressed directory; give one written by `fips compress`")
    sources = [against] if isinstance(against, str) else list(dict.fromkeys(against or ()))
    compressed = load(directory, trust_remote_code=trust_remote_code)
    set_policy(compressed, policy)
    others: dict[str, PreTrainedModel | None] = dict.fromkeys(sources if len(sources) > 1 else ["dense"])
    places = dict(zip(others, sources, strict=False))
    for name in others:
        others[name] = load_any(places[name], trust_remote_code) if places else merge(copy.deepcopy(compressed))
    models = {**others, "compressed": compressed}
    cases = _cases(compressed, batches, prompts, torch.Generator().manual_seed(seed))
    fresh = {**places, "compressed": str(directory)} if memory else {}
    total, results = len(cases) + len(fresh), {}
    report = progress or (lambda done, total: None)
    for done, (name, run, items) in enumerate(cases, start=1):
        results[name] = _compare(run, models, items, repeats)
        report(done, total)
    first: dict[str, Any] = dict.fromkeys(models)
    for done, (name, source) in enumerate(fresh.items(), start=len(cases) + 1):
        first[name] = _first_answer(source, policy, prompts, trust_remote_code)
        report(done, total)
    return {
        "directory": str(directory),
        "against": (sources[0] if len(sources) == 1 else sources) or "the compressed model merged to dense layers",
        "environment": {**environment(torch.device("cpu")), "kernels": list(cpu.isa_names())},
        "policy": policy,
        "seed": seed,
        "cases": results,
        "runtime": runtime_report(compressed),
        "backends": backend_report(compressed),
        "file_bytes": {name: _file_bytes({**places, "compressed": directory}.get(name)) for name in models},
        "first_answer": first,
        "peak_memory_bytes": {
            name: None if found is None else found.pop("peak_bytes") for name, found in first.items()
        },
    }


def _check_counts(batches: Sequence[int], prompts: Sequence[int], repeats: int, seed: int) -> None:
    for name, numbers, most in (("batches", batches, MOST_EXAMPLES), ("prompts", prompts, MOST_TOKENS)):
        odd = [number for number in numbers if not 1 <= number <= most]
        if odd or not numbers:
            raise ConfigError(
                f"`{name}` wants numbers from 1 to {most:,}, at least one, got {odd[0] if odd else 'none'}"
            )
    if repeats < 1:
        raise ConfigError(f"`repeats` wants at least 1, got {repeats}")
    if not 0 <= seed < SEEDS:
        raise ConfigError(f"`seed` wants a number from 0 to {SEEDS - 1}, got {seed}")


def set_policy(model: PreTrainedModel, policy: str) -> None:
    """Say how all packed layers of a model compute: one of ``fips.kernels.runtime.POLICIES``."""
    for layer in factored_layers(model).values():
        layer.runtime.policy = policy


def runtime_report(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the packed layers as stored, of what their kernels add, and of the dense matrices they replace."""
    layers = factored_layers(model).values()
    bases = {id(layer.basis): layer.basis.weight for layer in layers if layer.basis is not None}
    stored = sum(layer.packed().nbytes() for layer in layers)
    itemsize = next((layer.values.element_size() for layer in layers if layer.kind == "float"), 2)
    return {
        "stored_bytes": stored + sum(weight.numel() * weight.element_size() for weight in bases.values()),
        "extra_bytes": sum(layer.runtime.extra_bytes for layer in layers),
        "dense_bytes": sum(layer.in_features * layer.out_features * itemsize for layer in layers),
    }


def backend_report(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """For every backend the number of packed layers that it multiplies by (``yes``), and that it does not, with why."""
    report: dict[str, Counter[str]] = {}
    for layer in factored_layers(model).values():
        for name, answer in layer.backends().items():
            report.setdefault(name, Counter())[answer] += 1
    return {name: dict(answers) for name, answers in report.items()}


def load_any(source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A compressed directory, or a dense model in its own type."""
    read = load if is_compressed(source) else load_dense
    model: PreTrainedModel = read(source, trust_remote_code=trust_remote_code)
    return model


def _cases(
    model: PreTrainedModel, batches: tuple[int, ...], prompts: tuple[int, ...], generator: torch.Generator
) -> list[Case]:
    """``(name, run, items)``: items are the images or tokens that one run handles."""
    if model_kind(model) == "image":
        size, channels = model.config.image_size, model.config.num_channels
        size = (size, size) if isinstance(size, int) else tuple(size)
        images = torch.randn(max(batches), channels, *size, generator=generator).to(model.dtype)
        return [(f"images, batch {n}", _forward("pixel_values", images[:n]), n) for n in batches]
    task = task_name(model)
    if task != "seq2seq-lm":
        require_one_input(model)
    limit = context_length(model.config) or max(prompts)
    vocabulary = model.config.get_text_config().vocab_size
    lengths = [n for n in prompts if n <= limit] or [limit]
    tokens = torch.randint(0, vocabulary, (max(batches), max(*lengths, CACHED)), generator=generator)
    if not model.can_generate():
        return [
            (f"{n} tokens, batch {count}", _forward("input_ids", tokens[:count, :n]), n * count)
            for n in lengths
            for count in batches
        ]
    first = {"decoder_input_ids": tokens[:1, :1]} if task == "seq2seq-lm" else {}
    cases: list[Case] = [(f"prompt of {n}", _forward("input_ids", tokens[:1, :n], **first), n) for n in lengths]
    cached = tokens[:, : min(CACHED, limit - 1)]
    step = _NextDecoderToken if task == "seq2seq-lm" else _NextToken
    return cases + [(f"next token, batch {n}", step(cached[:n]), n) for n in batches]


def _forward(name: str, inputs: Tensor, **more: Tensor) -> Callable[[PreTrainedModel], Any]:
    def run(model: PreTrainedModel) -> Any:
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        return model(**{name: inputs}, **more, **last)

    return run


class _NextToken:
    """One step of generation after a short prompt; the cache is cut back to the prompt after every step."""

    reads = "input_ids"

    def __init__(self, prompt: Tensor) -> None:
        self.prompt = prompt
        self._begun: dict[int, tuple[Any, dict[str, Any]]] = {}

    def __call__(self, model: PreTrainedModel) -> Any:
        # transformers 5.24 calls "cache" what was "past_key_values"
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        if id(model) not in self._begun:
            output = model(**self.first(), use_cache=True)
            self._begun[id(model)] = output[name], self.beside(output)
        cache, beside = self._begun[id(model)]
        output = model(**{self.reads: self.prompt[:, -1:]}, **beside, use_cache=True, **{name: cache})
        cache.crop(-1)
        return output

    def first(self) -> dict[str, Tensor]:
        """What is read before the step that is timed."""
        return {"input_ids": self.prompt}

    def beside(self, output: Any) -> dict[str, Any]:
        """What the step is given of it, beside the cache."""
        return {}


class _NextDecoderToken(_NextToken):
    """The same for a decoder that has begun, whose encoder has read the prompt."""

    reads = "decoder_input_ids"

    def first(self) -> dict[str, Tensor]:
        return {"input_ids": self.prompt, "decoder_input_ids": self.prompt[:, :8]}

    def beside(self, output: Any) -> dict[str, Any]:
        return {"encoder_outputs": (output.encoder_last_hidden_state,)}


@torch.inference_mode()
def _compare(
    run: Callable[[PreTrainedModel], Any], models: dict[str, PreTrainedModel], items: int, repeats: int
) -> dict[str, Any]:
    for model in models.values():
        run(model)
        run(model)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    begin = time.perf_counter()
    for index in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            run(model)
            seconds[name].append(time.perf_counter() - start)
        if index >= 2 and time.perf_counter() - begin > 10:
            break
    result: dict[str, Any] = {name: _summary(runs, items) for name, runs in seconds.items()}
    gains = {name: side["median_s"] / result["compressed"]["median_s"] for name, side in result.items()}
    del gains["compressed"]
    result["speedup"] = gains["dense"] if list(gains) == ["dense"] else gains
    return result


def _summary(runs: list[float], items: int) -> dict[str, Any]:
    quartiles = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else [runs[0]] * 3
    return {
        "median_s": quartiles[1],
        "quartiles_s": [quartiles[0], quartiles[2]],
        "per_second": items / quartiles[1],
        "runs_s": runs,
    }


def _file_bytes(source: str | None) -> int | None:
    if source is not None and is_gguf_source(source) and Path(source).is_file():
        return Path(source).stat().st_size
    if source is None or not Path(source).is_dir():
        return None
    return sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))


def _first_answer(source: str, policy: str, prompts: Iterable[int], trust_remote_code: bool) -> dict[str, Any]:
    """Seconds and peak resident bytes of a process that loads a model and runs it once."""
    script = "import sys; from fips.app.bench import _report_first; _report_first(*sys.argv[1:])"
    lengths = ",".join(map(str, prompts))
    command = [sys.executable, "-c", script, source, policy, lengths, *(["trust"] if trust_remote_code else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.inference_mode()
def _report_first(source: str, policy: str, lengths: str, trust: str = "") -> None:
    assert policy in POLICIES
    started = time.perf_counter()
    model = load_any(source, bool(trust))
    set_policy(model, policy)
    loaded = time.perf_counter()
    cases = _cases(model, (1,), tuple(map(int, lengths.split(","))), torch.Generator().manual_seed(0))
    name, run, _ = max((case for case in cases if "next" not in case[0]), key=lambda case: case[2], default=cases[0])
    ready = time.perf_counter()
    run(model)
    seconds = {"load_s": loaded - started, "first_s": time.perf_counter() - ready}
    sys.stdout.write(json.dumps({"case": name, **seconds, "peak_bytes": peak_memory_bytes(torch.device("cpu"))}) + "\n")
