"""Copies out of mapped files: the same bytes in memory of their own, in huge pages unless those come slowly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open, save_file

from fips.storage import memory


@pytest.fixture
def mapped(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors that lie in a mapped file: two large ones of several steps, an odd one, an empty one."""
    sizes = {"a": (5 << 20) + 3, "b": memory.STEP * 2 + 4099, "small": 1001, "empty": 0}
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in sizes.items()}, path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sizes}


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the system is told, and is not."""
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_advise", lambda begin, end, what: given.append((begin, end, what)))
    return given


def clock(seconds_a_look: float) -> Callable[[], float]:
    looks = iter(range(1_000_000))
    return lambda: next(looks) * seconds_a_look


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(tensors, memory.MappedFiles().copies(list(tensors.values())), strict=True))


def test_copies_are_equal_and_elsewhere(mapped):
    for name, found in copies(mapped).items():
        assert torch.equal(found, mapped[name])
        assert found.untyped_storage().resizable()  # a mapped file is not
        assert not found.numel() or found.data_ptr() != mapped[name].data_ptr()


def test_what_is_not_contiguous_and_what_is_wide(mapped):
    turned = {"a": mapped["b"][: 4 << 20].view(2048, 2048).T, "b": mapped["b"][: 8 << 20].view(torch.float32)}
    for name, found in copies(turned).items():
        assert torch.equal(found.view(torch.uint8), turned[name].contiguous().view(torch.uint8))


def test_quick_memory_comes_in_huge_pages(mapped, advice, monkeypatch):
    monkeypatch.setattr(memory.time, "thread_time", clock(0))
    copies({"b": mapped["b"]})
    given = [what for _, _, what in advice if what in (memory.HUGE_PAGES, memory.SMALL_PAGES, memory.POPULATE)]
    assert given == [memory.HUGE_PAGES, *[memory.POPULATE] * 3, memory.HUGE_PAGES]


def test_slow_memory_comes_in_small_pages_that_may_grow(mapped, advice, monkeypatch):
    monkeypatch.setattr(memory.time, "thread_time", clock(memory.STEP / memory.SLOW * 1.1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = copies({"b": mapped["b"], "a": mapped["a"]})
    given = [(begin, what) for begin, _, what in advice if what != memory.mmap.MADV_DONTNEED]
    first, second = (found[name].data_ptr() // memory.mmap.PAGESIZE * memory.mmap.PAGESIZE for name in "ba")
    assert given == [
        (first, memory.HUGE_PAGES),
        (first, memory.POPULATE),
        (first, memory.SMALL_PAGES),
        (first, memory.HUGE_PAGES),
        (second, memory.SMALL_PAGES),
        (second, memory.HUGE_PAGES),
    ]
