"""Runs a command; errors become one line on stderr and an exit code."""

from __future__ import annotations

import errno
import signal

import typer

from fips.cli import commands  # noqa: F401 - adds the commands to the app
from fips.cli.app import app
from fips.cli.console import say, stdout
from fips.errors import FipsError
from fips.signals import FINISHED, Stopped, stoppable


def main(argv: list[str] | None = None) -> int:
    """Run the command; errors become one line on stderr and an exit code."""
    stdout.failure = None
    try:
        with stoppable():
            result = app(args=argv, standalone_mode=False, prog_name="fips")  # also as `python -m fips`
        if stdout.failure is not None:
            if not isinstance(stdout.failure, BrokenPipeError):  # a reader that has seen enough needs no words
                reason = f"cannot write to standard output: {stdout.failure.strerror}"
                say(f"error: {'; '.join([reason, *FINISHED])}")
            return 1
        return result if isinstance(result, int) else 0
    except FipsError as error:
        say(f"error: {'; '.join([str(error), *_notes(error)])}")
        return error.exit_code
    except (Stopped, KeyboardInterrupt, typer.Abort) as stopped:
        say(f"interrupted: {'; '.join(_notes(stopped)) or 'nothing was written'}")
        return stopped.exit_code if isinstance(stopped, Stopped) else 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # asked for by whatever looks first
            name = f"{str(error.filename)[:60]}..."
            say(f"error: `{name}` is longer than a name of a file can be; give a path or a hub id")
            return 1
        show = getattr(error, "show", None)  # of the option parser
        if show is None:
            raise
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError" or context is None:
            show()
        else:
            words = " ".join(str(error.format_message()).split()).rstrip(".")  # type: ignore[attr-defined]
            end = " " if words.endswith("?") else "; "
            say(f"error: {words}{end}`{context.command_path} --help` lists the options")
        return int(getattr(error, "exit_code", 2))


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, and what was finished before it."""
    return list(dict.fromkeys([*getattr(error, "__notes__", []), *FINISHED]))
