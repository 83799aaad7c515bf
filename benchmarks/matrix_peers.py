"""One matrix in the formats of fips and of the libraries of the field: time of a product, in turn, in one run.

    python benchmarks/matrix_peers.py --threads 1 --output benchmarks/results/matrix-peers-1.json \\
        --peers-python /tmp/peers/bin/python --llama-python /tmp/llamacpp/bin/python

The first of these Pythons has what `peers-requirements.txt` names, the second llama-cpp-python and numpy. Every
library is a process of its own (`matrix_peer_workers.py`): llama.cpp's ggml, ONNX Runtime's MatMulNBits and the
compressed weights of OpenVINO and torchao. All hold many copies of the matrix, so that weights come from memory, and
multiply by 16 of them in one call, as they would compute a model. They are asked in turn, in another order every round,
and only what ran in the same round is compared: a ratio is the median of the peer's time over that of fips, above 1
where fips is ahead. Between turns there is a rest, in which threads that wait actively fall asleep; a turn begins with
calls that are not counted, since threads that wake up may share a core at first. Inputs are of the type that suits a
library: bfloat16 for fips, as in a model, and for most of torchao, float32 for the rest; all but torchao's int4 round
them to 8 bits within the time. A product that differs by more than 15 % from that in floats (of what is stored, for
fips) is not timed. With more than 64 tokens there are a third of the rounds. A library that is
missing or fails is named with its reason. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matrix_peer_workers import LIBRARIES
from output import result_file

from fips.kernels import cpu
from fips.record import environment

OURS = "fips"
LARGEST_ERROR = 0.15
REST_S = 0.03
FEW = 16
"""Tokens up to which a turn visits all copies; with more it visits those of one call, since that takes long enough."""


class EndedError(RuntimeError):
    """A process is not there to answer."""


class Peer:
    """A library in a process of its own."""

    def __init__(self, library: str, python: str, args: argparse.Namespace) -> None:
        threads = str(args.threads)
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        script = Path(__file__).with_name("matrix_peer_workers.py")
        command = [python, script, library, "--threads", threads, "--part", args.part, "--megabytes", args.megabytes]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **dict.fromkeys(names, threads)},
        )  # fmt: skip

    def ask(self, *request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass  # said below
        if not answer:
            raise EndedError(f"its process ended with {self.process.wait()} when asked for {request}")
        return json.loads(answer)


class Peers:
    """All libraries; those whose process ended are left out from then on, with the reason in ``about``."""

    def __init__(self, args: argparse.Namespace) -> None:
        pythons = {"llama.cpp": args.llama_python, "OpenVINO": args.peers_python, "torchao": args.peers_python}
        self.running = {name: Peer(name, pythons.get(name, sys.executable), args) for name in args.libraries}
        self.about: dict[str, dict[str, Any]] = {name: {} for name in self.running}
        for name, answer in self.ask_all("about").items():
            self.about[name] = answer
            if "failed" in answer:
                self.running.pop(name).process.communicate("")

    def ask(self, library: str, *request: object) -> Any:
        """None where there is no answer."""
        if library not in self.running:
            return None
        try:
            return self.running[library].ask(*request)
        except EndedError as error:
            del self.running[library]
            self.about[library]["failed"] = str(error)
            print(library, error, flush=True)
            return None

    def ask_all(self, *request: object) -> dict[str, Any]:
        """One after the other."""
        answers = {library: self.ask(library, *request) for library in list(self.running)}
        return {library: answer for library, answer in answers.items() if answer is not None}

    def end(self) -> None:
        for peer in self.running.values():
            peer.process.communicate("")


def prepared(peers: Peers, tokens: int, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows that multiply so many tokens, by library and name, and others that fail to."""
    found = {}
    for library, errors in peers.ask_all("tokens", tokens).items():
        for name, error in errors.items():
            row = {**rows[f"{library} {name}"], "asked": (library, name)}
            if isinstance(error, str):
                row["failed"] = error
            else:
                row["relative_error"] = error
                if not error <= LARGEST_ERROR:
                    row["failed"] = f"the product differs by more than {LARGEST_ERROR}"
            found[f"{library} {name}"] = row
    return found


def measure(peers: Peers, tokens: int, rows: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    found = prepared(peers, tokens, rows)
    asked = {name: row.pop("asked") for name, row in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name, row in found.items() if "failed" not in row}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(seconds), len(seconds)):
            time.sleep(REST_S)
            library, row = asked[name]
            taken = peers.ask(library, "time", row, None if tokens <= FEW else 1)
            if taken is None:
                del seconds[name]
                found[name]["failed"] = peers.about[library]["failed"]
            else:
                seconds[name].append(taken)
    for name, runs in seconds.items():
        found[name] |= {"median_us": 1e6 * median(runs), "rounds_us": [round(1e6 * run, 1) for run in runs]}
    ours = [name for name in seconds if asked[name][0] == OURS]
    ratios = {
        name: {
            peer: median(theirs / mine for theirs, mine in zip(seconds[peer], seconds[name], strict=True))
            for peer in seconds
            if peer not in ours
        }
        for name in ours
    }
    return {"tokens": tokens, "rows": found, "ratios": ratios}


def described(peers: Peers, rows: int, cols: int) -> dict[str, dict[str, Any]]:
    """All rows of a shape, also those that cannot be made."""
    return {
        f"{library} {name}": {"library": library, **row}
        for library, made in peers.ask_all("shape", rows, cols).items()
        for name, row in made.items()
    }


def machine(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return {
        **environment(torch.device("cpu")),
        "kernels": list(cpu.isa_names()),
        "threads": threads,
        "cpu_flags": [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "gfni"))],
        "third_level_cache": cache.read_text(encoding="utf-8").strip() if cache.exists() else None,
    }


def show(shape: tuple[int, int], run: dict[str, Any]) -> None:
    for name, row in run["rows"].items():
        what = row.get("failed") or f"{row['median_us']:9.0f} us  {row['bits']:.2f} bits  {row['relative_error']:.4f}"
        print(*shape, run["tokens"], f"{name:45}", what)
    for name, ratios in run["ratios"].items():
        print(*shape, run["tokens"], name, {peer: round(ratio, 2) for peer, ratio in ratios.items()}, flush=True)


def shape_of(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", type=shape_of, nargs="+", default=[(8192, 2048), (2048, 8192)], help="OUTPUTSxINPUTS"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--part", type=int, default=16, help="matrices multiplied in one call")
    parser.add_argument("--megabytes", type=float, default=300, help="copies of every row, at least")
    parser.add_argument("--peers-python", default=sys.executable, help="has OpenVINO, torchao and torch")
    parser.add_argument("--llama-python", default=sys.executable, help="has llama-cpp-python")
    parser.add_argument("--output", type=result_file, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    torch.set_num_threads(args.threads)  # of the processes, too
    peers = Peers(args)
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "environment": machine(args.threads),
        "part": args.part,
        "libraries": peers.about,
        "results": [],
    }
    for rows, cols in args.shapes:
        made = described(peers, rows, cols)
        failed = {name: row for name, row in made.items() if "failed" in row}
        for tokens in args.tokens:
            rounds = args.rounds if tokens <= 64 else max(3, args.rounds // 3)
            run = measure(peers, tokens, made, rounds)
            run["rows"] |= failed
            record["results"].append({"rows_by_cols": (rows, cols), **run})
            show((rows, cols), run)
            args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    peers.end()


if __name__ == "__main__":
    main()
