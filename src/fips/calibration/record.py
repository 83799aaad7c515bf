"""Record what blocks receive and return, within a stated bound of memory.

Tensors up to the bound stay in RAM; the rest goes to one unnamed temporary file that the system removes with the
process. A tensor seen twice (the output of one block that is the input of the next, a mask shared by all blocks) is
kept once, and so are tensors equal in all batches, such as position embeddings.
"""

from __future__ import annotations

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

__all__ = ["ActivationSpool", "BlockCall", "record_blocks"]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where one tensor is: in RAM, or at an offset of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    ram: Tensor | None
    offset: int


class ActivationSpool(AbstractContextManager["ActivationSpool"]):
    """Append-only store of tensors: RAM up to ``memory_limit`` bytes, then a temporary file."""

    def __init__(self, memory_limit: int) -> None:
        self.memory_limit = memory_limit
        self.ram_bytes = 0
        self.file_bytes = 0
        self._file: IO[bytes] | None = None

    def put(self, tensor: Tensor) -> _Stored:
        local = tensor.detach().to("cpu", copy=True).contiguous()
        size = local.numel() * local.element_size()
        shape, dtype = tuple(local.shape), local.dtype
        if self.ram_bytes + size <= self.memory_limit:
            self.ram_bytes += size
            return _Stored(shape, dtype, local, 0)
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fips-activations-")  # noqa: SIM115 - closed by __exit__
        offset = self.file_bytes
        self._file.seek(offset)
        self._file.write(local.flatten().view(torch.uint8).numpy().data)
        self.file_bytes += size
        return _Stored(shape, dtype, None, offset)

    def get(self, stored: _Stored) -> Tensor:
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
    output: _Stored
    counted: Tensor | None = None
    """Which rows of the output are no padding, flat; None: all."""

    def arguments(self, spool: ActivationSpool, device: torch.device) -> tuple[Any, Any]:
        def load(leaf: Any) -> Any:
            return spool.get(leaf).to(device) if isinstance(leaf, _Stored) else leaf

        return _map_leaves(self.args, load), _map_leaves(self.kwargs, load)

    def rows(self, output: Tensor) -> Tensor:
        """The rows (T, D) of the block's output that count, or of another output in its place."""
        rows_TD = output.reshape(-1, output.shape[-1])
        return rows_TD if self.counted is None else rows_TD[self.counted.to(output.device)]


@dataclass(slots=True)
class _Recorder:
    """State of one recording pass."""

    spool: ActivationSpool
    constants: list[tuple[Tensor, _Stored]] = field(default_factory=list)
    current: list[tuple[Tensor, _Stored]] = field(default_factory=list)
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
    recorder = _Recorder(spool)
    records: list[dict[str, BlockCall]] = []
    last = list(blocks)[-1]
    some = False
    with ExitStack() as stack:
        record: dict[str, BlockCall] = {}
        side: list[Tensor] = []
        for name, block in blocks.items():
            before, after = _hooks(name, recorder, record, side, stop=name == last)
            for handle in (
                block.register_forward_pre_hook(before, with_kwargs=True),
                block.register_forward_hook(after, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        recorder.tracker = stack.enter_context(TokenTracker(model, blocks))
        for batch in batches:
            with suppress(_Stop):
                run(model, batch)
            some = True
            if record:
                records.append(dict(record))
                recorder.next_batch(side)
            record.clear()
            side.clear()
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


def _hooks(
    name: str, recorder: _Recorder, record: dict[str, BlockCall], side: list[Tensor], *, stop: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in record:
            hidden = args[0] if args else None
            _map_leaves((args, kwargs), lambda leaf: side.append(leaf) if _is_side(leaf, hidden) else None)
            recorder.pending = (_map_leaves(args, recorder.keep), _map_leaves(kwargs, recorder.keep))

    def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        if name not in record:
            assert recorder.pending is not None
            assert recorder.tracker is not None
            hidden = first_tensor(output)
            counted = recorder.tracker.counted(hidden)
            counted = None if counted is None else counted.to("cpu", copy=True)
            record[name] = BlockCall(*recorder.pending, recorder.keep(hidden), counted)
        if stop:
            raise _Stop

    return before, after


def _is_side(leaf: Any, hidden: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf is not hidden


def _map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map_leaves(value, function) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_map_leaves(value, function) for value in tree)
    return function(tree)
