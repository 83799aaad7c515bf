"""What 8-bit inputs cost in quality: compressed directories scored with exact and with rounded inputs.

    python benchmarks/activation_bits.py DIR=DATA... --output benchmarks/results/activation-bits.json

Every layer takes the packed way, as the others do not round. DATA as for `fips evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from fips.app.commands import evaluate_source
from fips.config import DataConfig
from fips.kernels import cpu
from fips.record import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="DIR=DATA")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    os.environ["FIPS_RUNTIME"] = "packed"
    rows = []
    for pair in args.pairs:
        directory, source = pair.split("=")
        for bits in ("", "8"):
            os.environ["FIPS_ACTIVATION_BITS"] = bits
            result = evaluate_source(directory, DataConfig(source=source))
            rows.append({"directory": directory, "activation_bits": int(bits) if bits else None, **result.to_dict()})
            print(rows[-1], flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "environment": {**environment(torch.device("cpu")), "kernels": list(cpu.isa_names())},
        "results": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
