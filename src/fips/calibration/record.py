"""Record what blocks receive and return, within a stated bound of memory.

Tensors up to the bound stay in RAM; the rest goes to one unnamed temporary file that the system removes with the
process. A tensor seen twice (the output of one block that is the input of the next, a mask shared by all blocks) is
kept once, and so are tensors equal in all batches, such as position embeddings.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor, nn

from fips.calibration.heads import first_tensor
from fips.calibration.tokens import TokenTracker
from fips.errors import DataError

__all__ = ["ActivationSpool", "BlockCall", "BlockRecorder", "Stored", "map_leaves", "record_blocks"]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Where one tensor is: in RAM, or at an offset of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    ram: Tensor | None
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ActivationSpool(AbstractContextManager["ActivationSpool"]):
    """Store of tensors: RAM up to ``memory_limit`` bytes, then a temporary file, where places are used again."""

    def __init__(self, memory_limit: int) -> None:
        self.memory_limit = memory_limit
        self.ram_bytes = 0
        self.file_bytes = 0
        self._file: IO[bytes] | None = None
        self._free: dict[int, list[int]] = {}
        """Offsets in the file that were given up, by the bytes there."""

    def put(self, tensor: Tensor) -> Stored:
        local = tensor.detach().to("cpu", copy=True).contiguous()
        size = local.numel() * local.element_size()
        shape, dtype = tuple(local.shape), local.dtype
        if self.ram_bytes + size <= self.memory_limit:
            self.ram_bytes += size
            return Stored(shape, dtype, local, 0)
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fips-activations-")  # noqa: SIM115 - closed by __exit__
        places = self._free.get(size)
        offset = places.pop() if places else self.file_bytes
        self._file.seek(offset)
        self._file.write(local.flatten().view(torch.uint8).numpy().data)
        self.file_bytes = max(self.file_bytes, offset + size)
        return Stored(shape, dtype, None, offset)

    def forget(self, stored: Stored) -> None:
        """Give up the place of a tensor that will not be asked for again."""
        if stored.ram is None:
            self._free.setdefault(stored.nbytes, []).append(stored.offset)
        else:
            self.ram_bytes -= stored.nbytes

    def get(self, stored: Stored) -> Tensor:
        if stored.ram is not None:
            return stored.ram
        assert self._file is not None
        empty = torch.empty(stored.shape, dtype=stored.dtype)
        self._file.seek(stored.offset)
        self._file.readinto(empty.flatten().view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return empty

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(slots=True)
class BlockCall:
    """One call of one block: where its arguments and its output are."""

    args: Any
    kwargs: Any
    output: Stored
    counted: Tensor | None = None
    """Which rows of the output are no padding, flat; None: all."""

    def arguments(self, spool: ActivationSpool, device: torch.device) -> tuple[Any, Any]:
        def load(leaf: Any) -> Any:
            return spool.get(leaf).to(device) if isinstance(leaf, Stored) else leaf

        return map_leaves(self.args, load), map_leaves(self.kwargs, load)

    def rows(self, output: Tensor) -> Tensor:
        """The rows (T, D) of the block's output that count, or of another output in its place."""
        rows_TD = output.reshape(-1, output.shape[-1])
        return rows_TD if self.counted is None else rows_TD[self.counted.to(output.device)]


@dataclass(slots=True)
class _Recorder:
    """State of one recording pass."""

    spool: ActivationSpool
    constants: list[tuple[Tensor, Stored]] = field(default_factory=list)
    current: list[tuple[Tensor, Stored]] = field(default_factory=list)
    pending: tuple[Any, Any] | None = None
    tracker: TokenTracker | None = None

    def keep(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for known, stored in self.current:
            if known is leaf:
                return stored
        for known, stored in self.constants:
            if known.shape == leaf.shape and known.dtype == leaf.dtype and torch.equal(known, leaf):
                return stored
        stored = self.spool.put(leaf)
        self.current.append((leaf, stored))
        return stored

    def next_batch(self, side_inputs: Sequence[Tensor]) -> None:
        """After the first batch its side inputs (all but hidden states) become candidates for constants."""
        if not self.constants:
            ids = {id(tensor) for tensor in side_inputs}
            self.constants = [(tensor, stored) for tensor, stored in self.current if id(tensor) in ids]
        self.current.clear()


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass after the last block of interest."""


class BlockRecorder(AbstractContextManager["BlockRecorder"]):
    """Hooks that keep the arguments and the output of blocks, pass after pass.

    Only the first call of a block in a pass is kept, and only passes that run one of them at all. ``stop`` ends every
    pass after the last block by an exception.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], spool: ActivationSpool, *, stop: bool = False
    ) -> None:
        self.records: list[dict[str, BlockCall]] = []
        self.wants = True
        """Whether the next passes are kept."""
        self._recorder = _Recorder(spool)
        self._record: dict[str, BlockCall] = {}
        self._side: list[Tensor] = []
        self._stack = ExitStack()
        self._names = list(blocks)
        last = self._names[-1]
        for name, block in blocks.items():
            before, after = self._hooks(name, stop=stop and name == last)
            for handle in (
                block.register_forward_pre_hook(before, with_kwargs=True),
                block.register_forward_hook(after, with_kwargs=True),
            ):
                self._stack.callback(handle.remove)
        self._recorder.tracker = self._stack.enter_context(TokenTracker(model, blocks))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _hooks(self, name: str, *, stop: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        record, recorder = self._record, self._recorder

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.wants and name not in record:
                hidden = args[0] if args else None
                map_leaves((args, kwargs), lambda leaf: self._side.append(leaf) if _is_side(leaf, hidden) else None)
                recorder.pending = (map_leaves(args, recorder.keep), map_leaves(kwargs, recorder.keep))

        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            if self.wants and name not in record:
                assert recorder.pending is not None
                assert recorder.tracker is not None
                hidden = first_tensor(output)
                counted = recorder.tracker.counted(hidden)
                counted = None if counted is None else counted.to("cpu", copy=True)
                record[name] = BlockCall(*recorder.pending, recorder.keep(hidden), counted)
            if stop:
                raise _Stop

        return before, after

    @property
    def missing(self) -> bool:
        """Whether some block is in no record yet."""
        return bool(_missing(self._names, self.records))

    def end_pass(self) -> None:
        """Close the record of a pass."""
        if self._record:
            self.records.append(dict(self._record))
            self._recorder.next_batch(self._side)
        self._record.clear()
        self._side.clear()


def record_blocks(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batches: Iterable[Any],
    spool: ActivationSpool,
    run: Callable[[nn.Module, Any], None],
    *,
    limit: int | None = None,
) -> list[dict[str, BlockCall]]:
    """Arguments and outputs of ``blocks`` (in order of execution) for every batch, or until there are ``limit`` records
    and every block is in one.

    ``run(model, batch)`` makes the forward pass, which is cut short after the last block. Only the first call of a
    block in a pass is recorded, and only batches that run one of them at all. Raises ``DataError`` if there is no batch
    or a block never runs.
    """
    some = False
    with BlockRecorder(model, blocks, spool, stop=True) as recorder:
        records = recorder.records
        for batch in batches:
            with suppress(_Stop):
                run(model, batch)
            some = True
            recorder.end_pass()
            if limit is not None and len(records) >= limit and not _missing(blocks, records):
                break
    if not some:
        raise DataError("the calibration data has no batch; give at least one")
    missing = _missing(blocks, records)
    if missing:
        raise DataError(f"block `{missing[0]}` did not run on the calibration data; leave it out with `ignore`")
    return records


def _missing(blocks: Iterable[str], records: Sequence[Mapping[str, BlockCall]]) -> list[str]:
    return [name for name in blocks if not any(name in record for record in records)]


def _is_side(leaf: Any, hidden: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf is not hidden


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: map_leaves(value, function) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(map_leaves(value, function) for value in tree)
    return function(tree)
