"""Processes in which torch, or more, is imported already, which takes longer than most tests.

Each is the fork of a process that has imported it: torch alone, transformers without fips, as in other people's
interpreters, or all that the command needs.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SERVER = """
import json, os, select, signal, socket, sys
import torch
{imports}

channel = socket.socket(fileno=int(sys.argv[1]))
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.set_wakeup_fd(wake)
answers = {{}}
while True:
    ready, _, _ = select.select([channel, woken], [], [])
    if woken in ready:
        os.read(woken, 1 << 12)
        while answers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            os.write(answers[pid], str(os.waitstatus_to_exitcode(status)).encode())
            os.close(answers.pop(pid))
    if channel in ready:
        message, files, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        if not message:
            os._exit(0)
        task = json.loads(message)
        pid = os.fork()
        if pid == 0:
            break
        answers[pid] = files.pop()
        channel.sendall(b"%d\\n" % pid)
        for file in files:
            os.close(file)

signal.set_wakeup_fd(-1)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.alarm(task["seconds"])
for number, file in enumerate(files[:3]):
    os.dup2(file, number)
os.closerange(3, max(files) + 1)
os.environ.clear()
os.environ.update(task["environment"])
os.chdir(task["directory"])
sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
sys.argv = task["words"]
exec(compile(task["code"], "<fresh>", "exec"), {{"__name__": "__main__"}})
"""
"""What the fork runs ends as the script does: what it printed is flushed, and said to be lost, by the interpreter."""

COMMAND = "import sys\nfrom fips.cli import main\nsys.exit(main())"
TRANSFORMERS = (
    "from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, "
    "LlamaForCausalLM\n"
)
IMPORTS = {
    "torch": "",
    "transformers": TRANSFORMERS,
    "fips": f"{TRANSFORMERS}import rich, typer, fips.app.compressing, fips.app.evaluating, fips.app.exporting",
}


@dataclass
class Process:
    """A fork, with what ``subprocess.Popen`` has of it."""

    pid: int
    answer: int
    returncode: int | None = field(default=None, init=False)

    def wait(self, timeout: float = 120) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self.answer], [], [], timeout)
            if not ready:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
            self.returncode = int(os.read(self.answer, 16) or -9)
            os.close(self.answer)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Server:
    """A process that has imported what takes long, and forks."""

    def __init__(self, imports: str) -> None:
        self.channel, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(imports=imports), str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        atexit.register(self.process.kill)

    def start(
        self, code: str, words: Sequence[object], files: Sequence[int], environment: Mapping[str, str] | None
    ) -> Process:
        answer, theirs = os.pipe()
        task = {
            "code": code, "words": ["fips", *map(str, words)], "directory": str(Path.cwd()), "seconds": 120,
            "environment": dict(os.environ if environment is None else environment),
        }  # fmt: skip
        socket.send_fds(self.channel, [json.dumps(task).encode()], [*files, theirs])
        os.close(theirs)
        pid = b""
        while not pid.endswith(b"\n"):
            part = self.channel.recv(32)
            assert part, "the server of processes has ended"
            pid += part
        return Process(int(pid), answer)


server = functools.cache(lambda kind: Server(IMPORTS[kind]))


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


def python(code: str, *arguments: object, imported: str = "transformers") -> Finished:
    """Run ``code`` with these ``sys.argv``; only ``code`` decides what else is imported."""
    unseen = {"torch": ["transformers", "fips"], "transformers": ["fips"]}[imported]
    code = f"import sys\nassert not {{*{unseen}}} & {{*sys.modules}}\n{code}"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        files = nothing.fileno(), out.fileno(), err.fileno()
        status = server(imported).start(code, arguments, files, None).wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return Finished(status, *texts)


def start_fips(
    *words: object,
    stdin: int = 0,
    stdout: int = 1,
    stderr: int = 2,
    environment: Mapping[str, str] | None = None,
    code: str = COMMAND,
) -> Process:
    """Start the command, or ``code``, with these descriptors."""
    return server("fips").start(code, words, (stdin, stdout, stderr), environment)
