"""Several processes of one run, as ``torchrun`` starts them; a single process is the only one of its kind.

Ranks share what they find through the work directory and, for sums, through ``torch.distributed``: gloo for tensors in
memory, nccl for those on GPUs. All of them do the same steps in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from fips.errors import ConfigError

__all__ = ["ALONE", "Ranks", "joined"]

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a rank waits for the others: one may be solving a large matrix. torchrun ends all when one dies."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process, ``index``, among ``count``."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def owner(self, number: int) -> int:
        """Whose turn the piece of work with this number is."""
        return number % self.count

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.count > 1:
            distributed.barrier()

    def collect(self, tensor: Tensor, source: int, target: int) -> Tensor:
        """The tensor of rank ``source`` at rank ``target``; elsewhere, and if they are one, the tensor given."""
        if source != target and self.index == source:
            distributed.send(tensor.contiguous(), target)
        elif source != target and self.index == target:
            tensor = torch.empty_like(tensor)
            distributed.recv(tensor, source)
        return tensor

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in the order of ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this rank where any will do."""
        if device.type != "cuda" or device.index is not None or self.count == 1:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.index)))


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` has started (it sets ``WORLD_SIZE``), joined for as long as the block runs.

    A group that the caller has initialized is used and left as it is. Raises ``ConfigError`` if they cannot be joined.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot join the processes of this run: {error}; start them with `torchrun`") from None
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
