"""Kill a compression by several processes at random moments until it is done, and compare with an undisturbed run.

    python benchmarks/kill_and_resume.py --model ../shared/models/stories260k --kills 20 \
        --data ../shared/data/text/tinystories_sample_2MB.txt --output benchmarks/results/kill-and-resume.json

Every kill is SIGKILL to all processes, a random moment after a random number of further pieces have been finished.
After it the output must be absent or complete; where it is complete the next run starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from output import result_file


def start(args: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks),
        "-m", "fips", "compress", str(args.model), "--data", str(args.data), "--bits", "4.25", "--num-samples", "32",
        "--sequence-length", "256", "--batch-size", "2", "--memory", "400kB", "--output", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (output.parent / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def finish(args: argparse.Namespace, output: Path) -> None:
    """Run to the end without a kill; a failure shows what the run said."""
    status = start(args, output).wait()
    if status:
        raise RuntimeError(f"exit status {status}:\n{(output.parent / 'stderr.txt').read_text(errors='replace')}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """The launcher and its workers, which are in sessions of their own."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    family = [process.pid]
    for pid in family:
        family += children.get(pid, [])
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def digest(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=result_file, required=True)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    moments: list[dict[str, Any]] = []
    completed = half_written = kept = 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        started = time.perf_counter()
        finish(args, place / "whole")
        seconds = time.perf_counter() - started
        expected = digest(place / "whole")
        while len(moments) < args.kills:
            process = start(args, place / "out")
            work, wanted, begun = place / "out.work", kept + rng.randint(1, 4), time.perf_counter()
            while process.poll() is None and len(list(work.glob("*.safetensors"))) < wanted:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            kill(process)
            if (place / "out").exists():
                half_written += digest(place / "out") != expected
                shutil.rmtree(place / "out")
                completed, kept = completed + 1, 0
                continue
            kept = len(list(work.glob("*.safetensors")))
            moments.append({"after_s": round(time.perf_counter() - begun, 1), "pieces_kept": kept})
            sys.stdout.write(f"{moments[-1]}\n")
            sys.stdout.flush()
        while not (place / "out").exists():
            finish(args, place / "out")
        same = digest(place / "out") == expected
        left = sorted(path.name for path in place.iterdir() if path.name not in ("out", "whole", "stderr.txt"))
    record = {
        "benchmark": "kill and resume",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "ranks": args.ranks,
        "undisturbed_s": round(seconds, 1),
        "kills": moments,
        "runs_completed_before_their_kill": completed,
        "half_written_outputs": half_written,
        "same_bytes": same,
        "left_behind": left,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"same bytes: {same}; half-written: {half_written}; left behind: {left}\n")


if __name__ == "__main__":
    main()
