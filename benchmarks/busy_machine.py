"""Tokens a second while another program keeps a core busy, by how long waiting threads stay awake.

    python benchmarks/busy_machine.py ~/.cache/fips-generation/tc4g64 ~/.cache/fips-generation/dense \
        ~/.cache/fips-generation/Q4_K_M.gguf --llama-python /tmp/llamacpp/bin/python \
        --out benchmarks/results/busy-machine.json

Threads that share a product wait for each other awake, and where a core has something else to do they wait for the
slices of time that the system gives to that. How long they wait before they sleep is said by variables that OpenMP
reads when it is loaded. Every model is loaded once for each of ``SETTINGS``, in a process of its own, and generates a
few tokens with nothing else running and then beside a loop of Python, ``--rounds`` times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import generation
from output import result_file

SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--out", type=result_file, required=True)
    parser.set_defaults(prompt=16)
    args = parser.parse_args()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    results: dict[str, dict[str, Any]] = {}
    for model in args.models:
        for name, variables in SETTINGS.items():
            with generation.taker(model, args, {**plain, **variables}) as process:
                speeds: dict[str, list[float]] = {"quiet": [], "busy": []}
                for number in range(args.rounds + 1):
                    quiet = args.tokens / generation.asked(process, "tokens")
                    if not number:
                        continue  # the first warms up
                    speeds["quiet"].append(quiet)
                    with busy_core():
                        speeds["busy"].append(args.tokens / generation.asked(process, "tokens"))
                process.communicate("")
            found = {state: {"median": median(each), "runs": each} for state, each in speeds.items()}
            results.setdefault(model.name, {})[name] = found
            print(model.name, name, {state: round(one["median"], 2) for state, one in found.items()}, flush=True)
    generation.write(args, results)


@contextmanager
def busy_core() -> Iterator[None]:
    """A program of somebody else, who has a session of their own, as a second user or container has."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
