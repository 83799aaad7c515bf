"""Whether what was made from tensors still holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["Snapshot"]


class Snapshot:
    """Where tensors lay, and what was in them, when something was made from them.

    A tensor changes under the same name in three ways, and each needs a look of its own: another object takes its place
    (``load_state_dict(assign=True)``, ``del``), its memory is exchanged (``.data =``, ``.to``; seen by ``data_ptr`` and
    ``nbytes``), or it is written to where it lies (an optimiser, ``copy_``; seen by ``_version``, which tensors of
    inference mode lack). Of ``places`` a kernel keeps only the address and reads the numbers in every call, so writing
    does not count; of ``contents`` something was computed. The tensors are held: while they live no other can lie at
    their address and be taken for them.
    """

    __slots__ = ("_seen",)

    def __init__(self, *, places: Iterable[Tensor | None] = (), contents: Iterable[Tensor | None] = ()) -> None:
        self._seen: list[tuple[Tensor, int, int, int | None]]
        self._seen = [(t, t.data_ptr(), t.nbytes, None) for t in places if t is not None]
        for t in contents:
            if t is not None:
                self._seen.append((t, t.data_ptr(), t.nbytes, None if t.is_inference() else t._version))

    def holds(self) -> bool:
        """Whether the same objects still are what they were."""
        for tensor, place, size, version in self._seen:  # written out: it is part of every small product
            if tensor.data_ptr() != place or tensor.nbytes != size:
                return False
            if version is not None and tensor._version != version:
                return False
        return True

    def equals(self, other: Snapshot) -> bool:
        """Whether another, of tensors that may be other objects, saw the same memory in the same state."""
        return [seen[1:] for seen in self._seen] == [seen[1:] for seen in other._seen]
