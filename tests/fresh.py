"""Interpreters without fips, as other people's are.

Torch and transformers are imported once for all of them, which takes longer than most tests.
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import json, os, signal, sys, traceback
import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, LlamaForCausalLM

for line in sys.stdin:
    code, arguments, errors = json.loads(line)
    pid = os.fork()
    if pid == 0:
        assert "fips" not in sys.modules
        signal.alarm(120)
        os.dup2(os.open(errors, os.O_WRONLY), 2)
        sys.argv = ["-c", *arguments]
        status = 1
        try:
            exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Finished:
    returncode: int
    stderr: str


def python(code: str, *arguments: object) -> Finished:
    """Run ``code`` with these ``sys.argv``; only ``code`` decides what is imported beside torch and transformers."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as errors:
        server.stdin.write(json.dumps([code, [str(argument) for argument in arguments], errors.name]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return Finished(status, Path(errors.name).read_text())


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server
