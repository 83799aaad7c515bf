"""How threads wait: briefly in commands that work for minutes, as told where something is told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOWN = """
import os, sys
import fips.cli.commands.compressing as commands
assert "torch" not in sys.modules, "torch has read how threads wait before it was said"
commands.wait_briefly()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing said", "count given", "policy given"],
)
def test_threads_of_a_command_give_way_unless_told_otherwise(given: dict[str, str], wanted: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN], env={**kept, **given}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wanted
