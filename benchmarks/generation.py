"""A whole language model that generates: packed directories, the dense model and llama.cpp, one after the other.

    python benchmarks/generation.py make --recipe paper-llama-3.2-1b --values tc4g64 nl4g64 --dense --gguf Q4_0 Q4_K_M \
        --llama-python /tmp/llamacpp/bin/python --output ~/.cache/fips-generation
    python benchmarks/generation.py run ~/.cache/fips-generation/* --compiled tc4g64 --rounds 3 --threads 2 \
        --llama-python /tmp/llamacpp/bin/python --out benchmarks/results/generation.json
    python benchmarks/generation.py turns ~/.cache/fips-generation/int5g64 ~/.cache/fips-generation/Q4_K_M.gguf \
        --llama-python /tmp/llamacpp/bin/python --out benchmarks/results/generation-turns.json

``make`` writes models of the shapes of a recipe in random numbers: speed does not depend on them. All matrices of
packed models, embedding and head included, have the same values, columns turned in blocks of 64. ``run`` starts every
contestant in a process of its own, all in turn, ``--rounds`` times: it loads the model, reads a prompt, then
generates token after token, as ``generate`` does, after 8 tokens and after the prompt. Those named in ``--compiled``
run once more with a static cache and ``torch.compile``, as ``generate`` does it with a ``compile_config``. ``turns``
keeps all contestants loaded and lets them generate a few tokens in turn, then read the prompt, ``--rounds`` times: on a
machine whose memory others use, too, only what ran within the same second compares. llama.cpp needs a Python with
llama-cpp-python. Nothing else should run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from output import result_directory, result_file

LLAMA_CPP = ".gguf"
"""Files that it reads; all else is for transformers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make")
    making.add_argument("--recipe", default="paper-llama-3.2-1b")
    making.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    making.add_argument("--values", nargs="*", default=[])
    making.add_argument("--dense", action="store_true")
    making.add_argument("--gguf", nargs="*", default=[])
    making.add_argument("--llama-python", default=sys.executable)
    making.add_argument("--output", type=result_directory, required=True)
    making.set_defaults(run=make)
    of_all = argparse.ArgumentParser(add_help=False)
    of_all.add_argument("models", nargs="+", type=Path)
    of_all.add_argument("--threads", type=int, default=2)
    of_all.add_argument("--prompt", type=int, default=512)
    of_all.add_argument("--llama-python", default=sys.executable)
    of_all.add_argument("--out", type=result_file, required=True)
    running = commands.add_parser("run", parents=[of_all])
    running.add_argument("--compiled", nargs="*", default=[])
    running.add_argument("--rounds", type=int, default=3)
    running.add_argument("--tokens", type=int, default=48)
    running.set_defaults(run=run)
    turning = commands.add_parser("turns", parents=[of_all])
    turning.add_argument("--rounds", type=int, default=15)
    turning.add_argument("--tokens", type=int, default=8)
    turning.set_defaults(run=turns)
    of_one = argparse.ArgumentParser(add_help=False)
    of_one.add_argument("model", type=Path)
    for count in ("threads", "prompt", "tokens"):
        of_one.add_argument(count, type=int)
    commands.add_parser("take", parents=[of_one]).set_defaults(run=take)
    one = commands.add_parser("one", parents=[of_one])
    one.add_argument("--compiled", action="store_true")
    one.set_defaults(run=measure)
    args = parser.parse_args()
    args.run(args)


def make(args: argparse.Namespace) -> None:
    import torch

    import fips
    from fips.models.transformers import build_empty, config_from_fields
    from fips.recipes import load_recipe

    fields = dict(load_recipe(args.recipe).architecture or {})
    if args.blocks:
        fields["num_hidden_layers"] = args.blocks
    config = config_from_fields(fields)
    for values in args.values:
        directory = args.output / values
        if not directory.exists():
            model = build_empty(copy.deepcopy(config)).to(torch.bfloat16)
            fips.save(packed(model, values), directory)
            print(directory, sum(path.stat().st_size for path in directory.iterdir()), flush=True)
    if args.dense or args.gguf:
        directory = args.output / "dense"
        if not directory.exists():
            filled(build_empty(copy.deepcopy(config)).to(torch.bfloat16)).save_pretrained(directory)
    for kind in args.gguf:
        to_gguf(args.output / "dense", kind, args.llama_python)
    if not args.dense and (args.output / "dense").exists():
        shutil.rmtree(args.output / "dense")


def filled(model: Any, device: str = "cpu") -> Any:
    """The model with random numbers in all that is still on the meta device."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    return with_positions(model)


def with_positions(model: Any) -> Any:
    """Buffers that are computed, not loaded, made again."""
    for module in model.modules():
        if hasattr(module, "rope_init_fn") or type(module).__name__.endswith("RotaryEmbedding"):
            module.__init__(config=module.config)
    model.tie_weights()
    return model.eval()


def random_layer(rows: int, cols: int, *, role: str, values: str, rotation: int, generator: Any) -> Any:
    """A layer that leaves no entry out, of random codes, on the device of the generator."""
    import torch

    from fips.layers.linear import FactoredLinear

    width, hidden = (cols, rows) if role == "up" else (rows, cols)
    layer = FactoredLinear(
        None, role=role, hidden=hidden, kept=rows * cols, fmt="full", dtype=torch.bfloat16, width=width, values=values,
        rotation=rotation,
    )  # fmt: skip

    def random(low: int, high: int, like: torch.Tensor) -> torch.Tensor:
        return torch.randint(low, high, like.shape, generator=generator, device=generator.device, dtype=torch.uint8)

    numbers = layer.value_format
    layer.values = random(0, 256, layer.values).view(layer.values.dtype)
    layer.scales = torch.full_like(layer.scales, 0.02 / (16 if numbers.scale_group else 1) / numbers.largest)
    if numbers.scale_group:
        layer.group_scales = random(8, 24, layer.group_scales)
    return layer.to(generator.device).eval()


def packed(model: Any, values: str, device: str = "cpu") -> Any:
    """The model with random codes of a value format in all matrices."""
    import torch
    from torch import nn

    from fips.formats.values import values_named
    from fips.layers.linear import BASES, basis_owner
    from fips.storage.layout import replace_embedding, replace_linear
    from fips.storage.quantizer import attach

    numbers, generator = values_named(values), torch.Generator(device).manual_seed(0)
    rotation = 64 if numbers.bits and numbers.bits < 6 and not values.startswith("int") else 1
    layer_of = partial(random_layer, values=values, rotation=rotation, generator=generator)
    tied = bool(model.config.tie_word_embeddings)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    embedding = next(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    heads = [name for name in linear if model.get_submodule(name) is model.get_output_embeddings()]
    ends = {embedding: layer_of(*model.get_submodule(embedding).weight.shape, role="up")}
    layers = {
        name: layer_of(*module.weight.shape, role="down" if name.endswith(("o_proj", "down_proj")) else "up")
        for name, module in linear.items()
        if not (tied and name in heads)
    }
    filled(model, device)
    model.requires_grad_(False)
    setattr(basis_owner(model), BASES, nn.ModuleDict())
    for name, layer in layers.items():
        replace_linear(model, name, layer)
    for name, layer in ends.items():
        replace_embedding(model, name, layer, heads if tied else [])
    attach(model)
    return model


def to_gguf(dense: Path, kind: str, python: str) -> None:
    """The dense model as llama.cpp quantizes it."""
    from transformers import AutoModelForCausalLM

    from fips.integrations.gguf.tokens import Vocabulary
    from fips.integrations.gguf.write import export_gguf

    whole, target = dense.parent / "whole.gguf", dense.parent / f"{kind}.gguf"
    if target.exists():
        return
    if not whole.exists():
        model = AutoModelForCausalLM.from_pretrained(dense)
        count = model.config.vocab_size
        tokens = [f"<0x{index:02X}>" if index < 256 else f"word{index}" for index in range(count)]
        types = [6 if index < 256 else 1 for index in range(count)]
        vocabulary = Vocabulary(
            model="llama", pre="default", tokens=tokens, types=types, scores=[0.0] * count, merges=[],
            special={"bos": 256, "eos": 257, "unk": 258}, adds={"bos": False, "eos": False, "space": False},
            template=None, ambiguous=0,
        )  # fmt: skip
        export_gguf(model, whole, vocabulary, name="random")
    quantized(whole, target, kind, python)


def quantized(whole: Path, target: Path, kind: str, python: str) -> None:
    """A GGUF file as llama.cpp quantizes it without calibration data, such as to ``Q4_K_M``."""
    script = (
        "import sys, llama_cpp\n"
        "source, target, kind, threads = sys.argv[1:]\n"
        "settings = llama_cpp.llama_model_quantize_default_params()\n"
        "settings.nthread, settings.ftype = int(threads), getattr(llama_cpp, 'LLAMA_FTYPE_MOSTLY_' + kind)\n"
        "sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))\n"
    )
    subprocess.run([python, "-c", script, str(whole), str(target), kind, str(os.cpu_count())], check=True)


def run(args: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    contestants = [(model, False) for model in args.models]
    contestants += [(model, True) for model in args.models if model.name in args.compiled]
    for index in range(args.rounds):
        for model, compiled in contestants:
            python = args.llama_python if model.suffix == LLAMA_CPP else sys.executable
            command = [python, __file__, "one", model, args.threads, args.prompt, args.tokens]
            command += ["--compiled"] if compiled else []
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{model}: {done.stderr[-2000:]}")
            name = f"{model.name}, compiled" if compiled else model.name
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(index, name, found[name][-1], flush=True)
    keys = next(iter(found.values()))[0].keys()
    results = {
        name: {"runs": runs, "median": {key: median(one[key] for one in runs) for key in keys}}
        for name, runs in found.items()
    }
    write(args, results)


def write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    import torch

    from fips.record import environment

    fields = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cpu")), "threads": args.threads},
        "prompt": args.prompt,
        "tokens": args.tokens,
        "results": results,
    }
    args.out.write_text(json.dumps(fields, indent=1) + "\n")


TURNS = ("tokens", "prompt")


def turns(args: argparse.Namespace) -> None:
    """All models loaded at a time, each in its process; the last one is what the others are compared with."""
    workers = {model.name: taker(model, args) for model in args.models}
    speeds: dict[str, dict[str, list[float]]] = {name: {what: [] for what in TURNS} for name in workers}
    for index in range(args.rounds + 1):
        for what, count in zip(TURNS, (args.tokens, args.prompt), strict=True):
            for name, worker in workers.items():
                speeds[name][what].append(count / asked(worker, what))
        print(
            index,
            {name: {what: round(one[-1], 1) for what, one in of.items()} for name, of in speeds.items()},
            flush=True,
        )
    for worker in workers.values():
        worker.communicate("")
    results: dict[str, Any] = {}
    *_, last = speeds.values()
    for model in args.models:
        found = {what: speeds[model.name][what][1:] for what in TURNS}  # the first warms up
        ratios = {what: [a / b for a, b in zip(found[what], last[what][1:], strict=True)] for what in TURNS}
        results[model.name] = {
            "file_bytes": model.stat().st_size if model.is_file() else tensor_bytes(model),
            **{f"{what}_per_s": median(found[what]) for what in TURNS},
            **{f"{what}_ratio": median(ratios[what]) for what in TURNS},
            "rounds": {what: [round(one, 3) for one in found[what]] for what in TURNS},
        }
        print(model.name, {key: value for key, value in results[model.name].items() if key != "rounds"})
    write(args, results)


def taker(model: Path, args: argparse.Namespace, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that has a model and does what it is ``asked``."""
    python = args.llama_python if model.suffix == LLAMA_CPP else sys.executable
    command = [python, __file__, "take", model, args.threads, args.prompt, args.tokens]
    return subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def asked(process: subprocess.Popen[str], what: str) -> float:
    """Seconds that one of ``TURNS`` took."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def take(args: argparse.Namespace) -> None:
    """Reads what to do, line by line, and answers with the seconds it took."""
    work = (llama_turns if args.model.suffix == LLAMA_CPP else transformers_turns)(args)
    for line in sys.stdin:
        sys.stdout.write(f"{work[line.strip()]()}\n")
        sys.stdout.flush()


def transformers_turns(args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    import torch
    from transformers import AutoModelForCausalLM

    import fips.storage.quantizer  # noqa: F401 - teaches transformers packed layers

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    ids = torch.randint(300, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))

    class Times(list[float]):  # the prompt and every token
        def put(self, _: Any) -> None:
            self.append(time.perf_counter())

        def end(self) -> None: ...

    def generated(length: int, tokens: int) -> Times:
        times = Times()
        model.generate(
            ids[:, :length], attention_mask=torch.ones_like(ids[:, :length]), max_new_tokens=tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0, streamer=times,
        )  # fmt: skip
        return times

    def tokens() -> float:
        _, first, *_, last = generated(8, args.tokens + 1)
        return last - first

    def prompt() -> float:
        before, after = generated(args.prompt, 1)
        return after - before

    return {"tokens": tokens, "prompt": prompt}


def llama_turns(args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    from llama_cpp import Llama

    model = Llama(
        str(args.model), n_ctx=args.prompt + args.tokens + 16, n_threads=args.threads, n_threads_batch=args.threads,
        n_batch=512, verbose=False,
    )  # fmt: skip
    ids = [300 + 37 * index % 30000 for index in range(args.prompt)]

    def read(*chunks: list[int]) -> float:
        start = time.perf_counter()
        for chunk in chunks:
            model.eval(chunk)
        return time.perf_counter() - start

    def tokens() -> float:
        model.reset()
        read(ids[:8])
        return read(*([token] for token in range(300, 300 + args.tokens)))

    def prompt() -> float:
        model.reset()
        return read(ids)

    return {"tokens": tokens, "prompt": prompt}


def measure(args: argparse.Namespace) -> None:
    """One process, one model: load, prompt, tokens; printed as JSON."""
    one = llama if args.model.suffix == LLAMA_CPP else transformers
    result = one(args)
    size = args.model.stat().st_size if args.model.is_file() else tensor_bytes(args.model)
    sys.stdout.write(json.dumps({"file_bytes": size, **result, "peak_bytes": peak()}) + "\n")


def tensor_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def transformers(args: argparse.Namespace) -> dict[str, float]:
    began = time.perf_counter()
    import torch
    import transformers as library
    from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

    import fips.storage.quantizer  # noqa: F401 - teaches transformers packed layers; else loading would import it

    for architecture in AutoConfig.from_pretrained(args.model).architectures:
        getattr(library, architecture)  # transformers imports a model when it is asked for it
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    loaded = time.perf_counter()
    ids = torch.randint(300, model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    if args.compiled:
        how = CompileConfig(mode="default", fullgraph=False)
        how._compile_all_devices = True  # else transformers compiles on GPUs only
        settings |= {"cache_implementation": "static", "compile_config": how}

    def generated(length: int, tokens: int) -> float:
        start = time.perf_counter()
        model.generate(ids[:, :length], attention_mask=mask[:, :length], max_new_tokens=tokens, **settings)
        return time.perf_counter() - start

    with torch.inference_mode(not args.compiled), torch.no_grad():
        first = generated(args.prompt, 1)
        compiling = generated(8, 4)
        prompt = generated(args.prompt, 1)
        generated(8, args.tokens + 1)  # a static cache of its own length may be compiled for
        seconds = generated(8, args.tokens + 1) - generated(8, 1)
        generated(args.prompt, args.tokens + 1)
        later = generated(args.prompt, args.tokens + 1) - generated(args.prompt, 1)
    return {
        "imports_s": started - began, "load_s": loaded - started, "first_prompt_s": first, "first_tokens_s": compiling,
        "prompt_per_s": args.prompt / prompt, "tokens_per_s": args.tokens / seconds,
        "tokens_after_prompt_per_s": args.tokens / later,
    }  # fmt: skip


def llama(args: argparse.Namespace) -> dict[str, float]:
    began = time.perf_counter()
    from llama_cpp import Llama

    started = time.perf_counter()
    model = Llama(
        str(args.model), n_ctx=args.prompt + 2 * args.tokens + 16, n_threads=args.threads, n_threads_batch=args.threads,
        n_batch=512, verbose=False,
    )  # fmt: skip
    loaded = time.perf_counter()
    ids = [300 + 37 * index % 30000 for index in range(args.prompt)]

    def read(tokens: list[int]) -> float:
        start = time.perf_counter()
        model.eval(tokens)
        return time.perf_counter() - start

    first = read(ids)
    model.reset()
    started_again = read(ids[:8]) + sum(read([token]) for token in range(300, 303))
    model.reset()
    prompt = read(ids)
    later = sum(read([token]) for token in range(300, 300 + args.tokens))
    model.reset()
    read(ids[:8])
    seconds = sum(read([token]) for token in range(300, 300 + args.tokens))
    return {
        "imports_s": started - began, "load_s": loaded - started, "first_prompt_s": first,
        "first_tokens_s": started_again,
        "prompt_per_s": args.prompt / prompt, "tokens_per_s": args.tokens / seconds,
        "tokens_after_prompt_per_s": args.tokens / later,
    }  # fmt: skip


if __name__ == "__main__":
    main()
