"""How threads wait: briefly in commands that work for minutes, as told where something is told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOWN = """
import os, sys
from fips.cli import main
module, *command = sys.argv[1:]
sys.modules[module] = None  # the work: to import it fails
try:
    main(command)
except ModuleNotFoundError:
    assert "torch" not in sys.modules, "torch has read how threads wait before it was said"
    print(os.environ.get("GOMP_SPINCOUNT"))
"""
COMMANDS = {
    "compress": ("fips.app.compressing", "MODEL"),
    "compare": ("fips.app.compare", "MODEL", "--data", "DATA", "--output", "DIR"),
    "demo": ("fips.demo",),
}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing said", "count given", "policy given"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_threads_of_a_command_give_way_unless_told_otherwise(command: str, given: dict[str, str], wanted: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    module, *options = COMMANDS[command]
    line = [sys.executable, "-c", SHOWN, module, command, *options]
    done = subprocess.run(line, env={**kept, **given}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wanted
