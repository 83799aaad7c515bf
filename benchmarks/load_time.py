"""How long a language model takes to load and to read its first prompt, beside llama.cpp, in turn.

    python benchmarks/load_time.py ~/.cache/fips-generation/nl5g64 ~/.cache/fips-generation/Q4_K_M.gguf \
        --llama-python /tmp/llamacpp/bin/python --out benchmarks/results/load-time.json

Models as ``benchmarks/generation.py make`` writes them, their files in the page cache; the last one is what the others
are compared with. Every load has a process of its own, which has imported what it needs before the clock starts.

A virtual machine may not have the memory that it shows: the host gives a page when it is written to for the first time,
and takes it back when it was free for a while. A library that copies weights pays for that, one that maps the file
does not, and on a machine whose memory is its own neither does. So every round is made twice: after ``--rest`` seconds,
and with memory that another process wrote to and gave back a moment before (``--touch``).
"""

from __future__ import annotations

import argparse
import json
import mmap
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from generation import LLAMA_CPP, peak, tensor_bytes
from output import result_file

STATES = ("rested", "touched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rest", type=float, default=8, help="seconds before a load without touched memory")
    parser.add_argument("--touch", type=int, default=3000, help="megabytes written to before a load")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--out", type=result_file)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    if args.out is None:
        parser.error("no --out to write to")
    import torch

    from fips.record import environment

    runs: dict[str, dict[str, list[dict[str, float]]]] = {
        state: {model.name: [] for model in args.models} for state in STATES
    }
    for index in range(args.rounds):
        for state in STATES:
            for model in args.models if index % 2 else reversed(args.models):
                runs[state][model.name].append(one(model, args, touched=state == "touched"))
        print(index, {state: {name: each[-1]["load_s"] for name, each in of.items()} for state, of in runs.items()})
    last = args.models[-1].name
    fields = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**environment(torch.device("cpu")), "threads": args.threads},
        "prompt": args.prompt,
        "rest_s": args.rest,
        "touched_megabytes": args.touch,
        "file_bytes": {
            model.name: model.stat().st_size if model.is_file() else tensor_bytes(model) for model in args.models
        },
        "results": {
            state: {
                name: {
                    "median": {key: median(each[key] for each in found) for key in found[0]},
                    "ratio": {
                        key: median(a[key] / b[key] for a, b in zip(found, of[last], strict=True)) for key in found[0]
                    },
                    "runs": found,
                }
                for name, found in of.items()
            }
            for state, of in runs.items()
        },
    }
    args.out.write_text(json.dumps(fields, indent=1) + "\n")


def one(model: Path, args: argparse.Namespace, *, touched: bool) -> dict[str, float]:
    """Seconds of one process to load a model, to read a prompt, and of both; its peak memory after either."""
    python = args.llama_python if model.suffix == LLAMA_CPP else sys.executable
    command = [python, __file__, model, "--worker", "--threads", args.threads, "--prompt", args.prompt]
    with subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            sys.exit(f"{model}: its process ended before it had loaded anything")
        if touched:
            subprocess.run([sys.executable, "-c", TOUCH, str(args.touch << 20)], check=True)
        else:
            time.sleep(args.rest)
        process.stdin.write("go\n")
        process.stdin.flush()
        return {key: float(value) for key, value in json.loads(process.stdout.readline()).items()}


TOUCH = f"""
import mmap, sys
room = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if hasattr(mmap, "MADV_HUGEPAGE"):
    room.madvise(mmap.MADV_HUGEPAGE)
for place in range(0, len(room), {mmap.PAGESIZE}):
    room[place] = 1
"""


def work(args: argparse.Namespace) -> None:
    """One load: everything imported, a line on either side says that it may begin and how long it took."""
    (model,) = args.models
    load = (llama if model.suffix == LLAMA_CPP else transformers)(model, args)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    read_prompt = load()
    loaded, loaded_peak = time.perf_counter(), peak()
    read_prompt()
    ended = time.perf_counter()
    found = {
        "load_s": loaded - start, "first_prompt_s": ended - loaded, "both_s": ended - start,
        "load_peak_bytes": loaded_peak, "peak_bytes": peak(),
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def transformers(path: Path, args: argparse.Namespace) -> Callable[[], Callable[[], Any]]:
    import torch
    import transformers as library
    from transformers import AutoConfig, AutoModelForCausalLM

    import fips.storage.quantizer  # noqa: F401 - teaches transformers packed layers; else loading would import it

    for architecture in AutoConfig.from_pretrained(path).architectures:
        getattr(library, architecture)  # transformers imports a model when it is asked for it
    torch.set_num_threads(args.threads)
    ids = torch.arange(300, 300 + args.prompt)[None]
    mask = torch.ones_like(ids)

    def load() -> Callable[[], Any]:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)

    return load


def llama(path: Path, args: argparse.Namespace) -> Callable[[], Callable[[], Any]]:
    from llama_cpp import Llama

    ids = list(range(300, 300 + args.prompt))

    def load() -> Callable[[], Any]:
        model = Llama(
            str(path), n_ctx=args.prompt + 16, n_threads=args.threads, n_threads_batch=args.threads, n_batch=512,
            verbose=False,
        )  # fmt: skip
        return lambda: model.eval(ids)

    return load


if __name__ == "__main__":
    main()
