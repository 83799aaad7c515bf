"""A place to write to: tried for real and held before the work, complete or absent after it.

What is written goes to a scratch directory on the same file system, locked for as long as its process lives. A
directory that is absent appears by one rename. One that is there and empty stays itself (it may be a mount point, the
working directory of a shell, or all that its owner may write): files move into it one by one, the manifest last.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from fips.errors import FipsError, OutputError
from fips.signals import FINISHED, uninterrupted

__all__ = [
    "MANIFEST",
    "Output",
    "complete_directory",
    "require_apart",
    "require_empty",
    "require_file",
    "require_free",
    "require_outside_models",
]

log = logging.getLogger("fips.storage")

MANIFEST = "fips_manifest.json"
SCRATCH = ".partial"
"""Ends the name of a scratch directory."""
KEPT = "-unfinished"
"""Ends the name under which finished parts are kept when the rest cannot be written."""
LARGEST_FILE = 5_000_000_000
"""Bytes of one file of weights; larger models are cut into several."""
LONGEST_NAME = 255
TRIAL = "trial"
"""What is written and removed again to see that it can be."""


def require_empty(directory: Path) -> None:
    """Raise ``OutputError`` unless ``directory`` is absent or an empty directory, links followed, and in no model."""
    place = _resolved(directory)
    require_outside_models(directory)
    try:
        if place.exists() and not place.is_dir():
            raise OutputError(f"output `{directory}` exists and is not a directory; choose another")
        left = place / SCRATCH
        if place.is_dir() and left.is_dir() and len(_content(place)) > 1 and not _is_held(left):
            raise OutputError(
                f"output directory `{directory}` was being filled when its run was killed; what is missing lies in "
                f"`{left}`: `mv {left}/* {place}` completes it"
            )
        if place.is_dir() and any(name != SCRATCH for name in _content(place)):
            raise OutputError(f"output directory `{directory}` is not empty; choose another or remove it first")
    except OSError as error:
        raise OutputError(_cannot_write(directory, error)) from None


def require_outside_models(path: Path) -> None:
    """Raise ``OutputError`` for a place within a compressed directory, which holds what its manifest lists, no more."""
    for parent in _resolved(path).parents:
        with suppress(OSError):
            if (parent / MANIFEST).is_file():
                raise OutputError(
                    f"`{path}` lies in the compressed model `{parent}`, whose manifest lists all that it holds; choose "
                    "another place"
                )


def require_apart(output: Path, work: Path) -> None:
    """Raise ``OutputError`` where of an output and a work directory one holds the other, links followed."""
    result, kept = _resolved(output), _resolved(work)
    if result == kept:
        wrong = f"`{output}` is both the output and the work directory"
    elif kept in result.parents:
        wrong = f"the output `{output}` lies in the work directory `{kept}`"
    elif result in kept.parents:
        wrong = f"the work directory `{work}` lies in the output `{result}`"
    else:
        return
    raise OutputError(f"{wrong}; choose another with `--work`")


def require_free(directory: Path) -> None:
    """Raise ``OutputError`` unless ``directory`` is absent or empty and can be written, which is tried."""
    with Output(directory):
        pass


@contextmanager
def complete_directory(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes ``directory`` when the ``with`` block succeeds and vanishes when it does not."""
    with Output(directory) as output:
        yield output.scratch
        output.commit()


def _missing_parents(path: Path) -> list[Path]:
    """Directories above a path that are not there, the nearest first."""
    return [parent for parent in path.parents if not parent.exists()]


def require_file(path: Path) -> None:
    """Raise ``OSError`` where a file cannot be written; directories that are missing are made for it, and removed."""
    missing = _missing_parents(path)
    probe = path.with_name(f".fips-probe.{os.getpid()}")
    try:
        path.exists()  # of a name too long
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        for one in missing:
            with suppress(OSError):
                one.rmdir()


class Output(AbstractContextManager["Output"]):
    """A directory to write, held from now on: no other run gets it, and what can be known to fail fails now.

    Write into ``scratch``, then ``commit``. Left without, the scratch directory vanishes, and so do parents that were
    made for it. ``needed`` are the bytes that will be written.

    Raises ``OutputError`` where the directory is in use, not empty or a file, and where making, filling, allocating
    ``needed`` bytes or renaming fails. What a run that was killed left in the same place is removed and named.
    """

    def __init__(self, directory: str | Path, *, needed: int = 0) -> None:
        self.directory = Path(directory)
        self.kept: Path | None = None
        """Where finished parts are after a failure, see ``writing``."""
        self._lock: int | None = None
        self._parents: list[Path] = []
        require_empty(self.directory)
        self._place = _resolved(self.directory)
        self._in_place = self._place.is_dir()
        self.scratch = self._place / SCRATCH if self._in_place else self._place.with_name(_scratch_name(self._place))
        self._complete = False
        try:
            self._make_parents()
            if self._in_place:
                _clear_beside(self._place, self.directory)
            self._lock = _hold(self.scratch, self.directory)
            self._try_to_write()
            self.require_room(needed)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise OutputError(_cannot_write(self.directory, error)) from None
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._complete and error is not None:
            error.add_note(self._is_complete())
        self.discard()

    def _is_complete(self) -> str:
        return f"`{self.directory}` is complete"

    def written_bytes(self) -> int:
        """Of all files in ``scratch`` so far."""
        return sum(path.stat().st_size for path in self.scratch.rglob("*") if path.is_file())

    def commit(self) -> None:
        """Make the directory appear, complete.

        Raises ``OutputError`` if it cannot: with ``kept`` set where only the name was taken meanwhile, without where
        what was written did not reach the disk.
        """
        with self.writing("the files"):
            rights = _rights_of_files()
            for path in self.scratch.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    path.chmod(path.stat().st_mode | rights)  # writers of weights keep theirs to their owner alone
                _flush(path)
        with uninterrupted(), self.writing("the last names", finished="everything"):
            if self._in_place:
                self._move_in()
            else:
                self.scratch.rename(self._place)
            self._complete = True
            FINISHED.append(self._is_complete())
            self._release()
        with suppress(OSError):
            _flush(self._place.parent)

    def require_room(self, needed: int) -> None:
        """Raise ``OutputError`` where ``needed`` bytes, or a file of as many, cannot be written."""
        try:
            usage = os.statvfs(self.scratch)
            free = usage.f_bavail * usage.f_frsize
            if usage.f_blocks and free < needed:
                raise OutputError(
                    f"`{self.directory}` needs about {_amount(needed)}, its file system has {_amount(free)} free; make "
                    "room or choose another place"
                )
            trial = self.scratch / TRIAL
            with trial.open("wb") as file:
                _allocate(file.fileno(), min(needed, LARGEST_FILE))
            trial.unlink()
        except OSError as error:
            raise OutputError(_cannot_write(self.directory, error)) from None

    @contextmanager
    def writing(self, what: str, *, finished: str | None = None) -> Iterator[None]:
        """Turn a failure to write into an ``OutputError`` that says where the finished parts are.

        ``finished`` names what lies in the scratch directory already and is worth keeping: it gets a name of its own,
        in ``kept``. Errors of fips pass as they are.
        """
        try:
            yield
        except FipsError:
            raise
        except Exception as error:
            cause = f"cannot write {what} to `{self.directory}`: {_words(error)}"
            if finished is None:
                raise OutputError(cause) from error
            place = self._keep()
            raise OutputError(f"{cause}; {finished} is complete in `{place}`, write the rest there") from error

    def _keep(self) -> Path:
        """Give what was written a name that says it is not complete, and let go of it; returns its place."""
        with uninterrupted():
            base = self._place / "fips" if self._in_place else self._place
            names = (_within(base.name, f"{KEPT}{'' if number == 1 else f'-{number}'}") for number in range(1, 1000))
            free = next((base.with_name(name) for name in names if not base.with_name(name).exists()), None)
            self.kept = self.scratch
            if free is not None:
                with suppress(OSError):
                    self.kept = self.scratch.rename(free)
            self._release()
            return self.kept

    def discard(self) -> None:
        """Remove what was written and not committed or kept."""
        with uninterrupted():
            if self._lock is not None:
                shutil.rmtree(self.scratch, ignore_errors=True)
                self._release()
            if not self._complete and self.kept is None:
                for parent in reversed(self._parents):
                    with suppress(OSError):
                        parent.rmdir()

    def _make_parents(self) -> None:
        for parent in reversed(_missing_parents(self._place)):
            parent.mkdir()
            self._parents.append(parent)

    def _try_to_write(self) -> None:
        """Do once what will be done in the end: write and rename."""
        trial = self.scratch / TRIAL
        with trial.open("wb") as file:
            file.write(b"fips")
        trial.unlink()
        if not self._in_place:
            trial.mkdir()
            trial.rename(self._place)
            self._place.rmdir()

    def _move_in(self) -> None:
        last = ("config.json", MANIFEST)
        names = sorted(os.listdir(self.scratch), key=lambda name: (last.index(name) if name in last else -1, name))
        for name in names:
            (self.scratch / name).rename(self._place / name)
        self.scratch.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _resolved(directory: Path) -> Path:
    try:
        return directory.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise OutputError(_cannot_write(directory, error)) from None


def _content(directory: Path) -> list[str]:
    """What a directory holds, but for what an empty file system holds."""
    return [name for name in os.listdir(directory) if name != "lost+found" or not directory.is_mount()]


def _scratch_name(place: Path) -> str:
    return _within(f".{place.name}", SCRATCH)


def _within(name: str, ending: str) -> str:
    """The name with an ending; a long one is cut and told from others by a digest."""
    encoded = os.fsencode(name)
    if len(encoded) + len(ending) <= LONGEST_NAME:
        return name + ending
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return os.fsdecode(encoded[: LONGEST_NAME - len(ending) - 50]).encode("utf-8", "ignore").decode() + digest + ending


def _hold(scratch: Path, directory: Path) -> int:
    """Make and lock the scratch directory, emptied of what a dead run left; the lock is a descriptor to be closed."""
    for _ in range(100):
        made = True
        try:
            scratch.mkdir()
        except FileExistsError:
            made = False
        descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_uid != os.geteuid():
                _refuse_scratch(scratch, directory, "belongs to somebody else")
            if not _lock(descriptor, scratch, directory, made):
                continue
            if not made:
                _clear(scratch, directory)
            held, descriptor = descriptor, -1
            return held
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    _refuse_scratch(scratch, directory, "changes all the time")


def _clear_beside(place: Path, directory: Path) -> None:
    """Remove what a run left that found the directory absent, before somebody made it."""
    left = place.with_name(_scratch_name(place))
    if left.is_dir() and not left.is_symlink() and left.stat().st_uid == os.geteuid():
        os.close(_hold(left, directory))
        left.rmdir()


def _lock(descriptor: int, scratch: Path, directory: Path, made: bool) -> bool:
    """Whether the descriptor is now locked and still that of the scratch directory."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another run is writing to `{directory}` (`{scratch}` is locked); choose another") from None
    except OSError:  # a file system without locks: whether the owner of a directory we did not make lives is unknown
        if not made:
            _refuse_scratch(scratch, directory, "is of another run, which may be alive")
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(scratch), os.fstat(descriptor))
    return False


def _is_held(scratch: Path) -> bool:
    descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _clear(scratch: Path, directory: Path) -> None:
    """Remove what a run that was killed left, unless it is complete but for its name."""
    if (scratch / MANIFEST).is_file():
        raise OutputError(
            f"`{scratch}` holds the complete model of a run that was killed just before it was done; "
            f"`mkdir -p {directory} && mv {scratch}/* {directory}` brings it there, or remove it"
        )
    names = sorted(os.listdir(scratch))
    size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    for name in names:
        path = scratch / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if names:
        log.warning(
            "removed what a run that was killed left in `%s`: %d files, %s (%s)", scratch, len(names), _amount(size),
            ", ".join(names[:3]),
        )  # fmt: skip


def _refuse_scratch(scratch: Path, directory: Path, why: str) -> NoReturn:
    raise OutputError(f"cannot write to `{directory}`: `{scratch}` {why}; remove it or choose another output")


def _allocate(descriptor: int, size: int) -> None:
    """Take room in a file where that costs nothing, so that quotas and limits speak now.

    File systems in memory or on a network have no device; taking room there would cost memory or traffic.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise OSError(errno.EFBIG, f"files may have at most {limit} bytes here (ulimit -f), {size} are needed")
    if not size or sys.platform != "linux" or os.major(os.fstat(descriptor).st_dev) == 0:
        return
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(descriptor, 0, 0, size) != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _rights_of_files() -> int:
    """Those that a new file of this process has."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush(path: Path) -> None:
    """Bring a file or a directory to the disk: what does not fit on a network or a quota fails here, not later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _cannot_write(directory: Path, error: Exception) -> str:
    return f"cannot write to `{directory}`: {_words(error)}; choose another output"


def _words(error: BaseException) -> str:
    """One line of what an exception says, with its kind where that tells more."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" (`{error.filename}`)" if error.filename else "")
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size:,} bytes"
