"""Memory of their own for tensors that lie in mapped files of weights."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["MappedFiles", "copied"]

MOST_THREADS = 4
HUGE_PAGES, SMALL_PAGES, POPULATE = 14, 15, 23
"""``MADV_HUGEPAGE``, ``MADV_NOHUGEPAGE`` and ``MADV_POPULATE_WRITE`` of Linux; an error, as where a kernel
has none, changes nothing."""
LARGE = 4 << 20
"""Bytes of a tensor from which on it holds a whole huge page of 2 MiB, wherever it begins."""
STEP = 8 << 20
SLOW = 2e9
"""Bytes a second and thread below which huge pages come slowly, measured anew after ``STEP`` bytes.

A machine fills memory that it has with zeros at 10 GB/s; a host that has to find it for its guest gave .3 to .6.
"""


class MappedFiles:
    """Tensors out of files of weights that are mapped into memory, copied without holding them twice.

    The pages that were read count as memory of the process as long as the file is mapped, which is until its last
    tensor is copied; they are given back one tensor after the other where the system says which addresses are such a
    file's (Linux). Large tensors lie in huge pages where the system has them: what is read from end to end for every
    token is read faster where fewer addresses have to be looked up. Where huge pages come slowly, as from a host that
    took the memory back, small ones are taken, which the system puts together when it finds the time.
    """

    def __init__(self) -> None:
        self._huge_pages = True
        self._places: list[tuple[int, int]] = []
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines:
                if line.endswith(".safetensors"):
                    first, last = line.split(" ", 1)[0].split("-")
                    self._places.append((int(first, 16), int(last, 16)))
        except (OSError, ValueError):
            self._places = []

    def copies(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The tensors in memory of their own, several at a time: most of the time goes into getting that memory."""
        with ThreadPoolExecutor(max(min(torch.get_num_threads(), MOST_THREADS), 1)) as pool:
            yield from pool.map(self._copy, tensors)

    def _copy(self, tensor: Tensor) -> Tensor:
        found = copied(tensor) if tensor.nbytes < LARGE or not tensor.is_contiguous() else self._large_copy(tensor)
        self._give_back(tensor)
        return found

    def _large_copy(self, tensor: Tensor) -> Tensor:
        found = torch.empty_like(tensor)
        first, last = _pages(found.data_ptr(), found.nbytes)
        _advise(first, last, HUGE_PAGES if self._huge_pages else SMALL_PAGES)
        for begin in range(0, found.nbytes, STEP):
            length = min(STEP, found.nbytes - begin)
            if self._huge_pages and not _comes_quickly(*_pages(found.data_ptr() + begin, length)):
                self._huge_pages = False
                _advise(first, last, SMALL_PAGES)
            ctypes.memmove(found.data_ptr() + begin, tensor.data_ptr() + begin, length)
        _advise(first, last, HUGE_PAGES)
        return found

    def _give_back(self, tensor: Tensor) -> None:
        """Let go of the pages of a file that hold nothing but this tensor: they are read anew if asked for."""
        first = tensor.data_ptr()
        last = first + tensor.nbytes
        if any(start <= first and last <= end for start, end in self._places):
            begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                _advise(begin, end, mmap.MADV_DONTNEED)


def copied(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, by this thread alone; a large one in huge pages where the system has them."""
    found = torch.empty_like(tensor)
    if found.nbytes >= LARGE:
        _advise(*_pages(found.data_ptr(), found.nbytes), HUGE_PAGES)
    if tensor.is_contiguous():  # `copy_` would share it among threads of its own, which wait for each other awake
        ctypes.memmove(found.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    else:
        found.copy_(tensor)
    return found


def _comes_quickly(begin: int, end: int) -> bool:
    """Get the memory of whole pages that nothing was written to, and say whether it came quickly."""
    start = time.thread_time()  # what other threads do with the processor does not count
    _advise(begin, end, POPULATE)
    return end - begin >= SLOW * (time.thread_time() - start)


def _pages(address: int, length: int) -> tuple[int, int]:
    """The addresses of the pages that hold these bytes."""
    return address // mmap.PAGESIZE * mmap.PAGESIZE, -(-(address + length) // mmap.PAGESIZE) * mmap.PAGESIZE


def _advise(begin: int, end: int, what: int) -> None:
    """``madvise`` of whole pages, on Linux; what it refuses changes nothing."""
    if sys.platform == "linux":
        _madvise()(begin, end - begin, what)


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
