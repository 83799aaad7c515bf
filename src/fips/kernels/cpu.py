"""The compiled CPU kernels: loaded with ctypes, registered with torch, absent without a compiler.

``csrc/fips_kernels.h`` is the interface. The library reads packed tensors where they are: nothing is copied or laid
out anew. Only the index of every row's first value is added for patterns that do not imply it (4 bytes a row).

Set ``FIPS_KERNELS=off`` to do without, or to the path of a library to use that one; ``FIPS_ISA=avx2`` (or another of
``isa_names``) for no better instruction set than that, as on an older machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fips.errors import BackendError, ConfigError
from fips.formats.packed import Packed, check_packed
from fips.formats.trellis import RUN
from fips.formats.values import Values
from fips.kernels.backend import Backend, PreparedMatrix, kernel_refuses, unsupported_format
from fips.kernels.reference import check_inputs
from fips.kernels.together import Company
from fips.kernels.validity import Snapshot, is_plain, is_watched, needs_grad

__all__ = [
    "PATHS",
    "CpuBackend",
    "CpuMatrix",
    "Repeat",
    "available",
    "best_isa",
    "call",
    "free_scratch",
    "isa_names",
    "multiply",
    "multiply_columns",
    "prepare",
    "reads",
    "scratch_bytes",
    "search_paths",
    "span",
    "unavailable_reason",
    "vectors",
]

log = logging.getLogger("fips.kernels")

ABI = 16
_ON_ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = ("portable", "neon") if _ON_ARM else ("portable", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx")
"""By the numbers of ``fips_isa`` in ``csrc/fips_kernels.h``."""
PATHS = {"auto": 0, "direct": 1, "tokens": 2, "tiles": 3}
"""Ways to form the product, see ``csrc/fips_kernels.h``; for measurements and tests."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 3}
"""uint8 are packed integers of less than 8 bits."""
UNITS = 32.0
"""Integers that a squared error of one level is counted in by searches."""
_INVALID, _NO_MEMORY = -2, -3


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64), ("cols", c_int64), ("format", c_int32), ("value_type", c_int32), ("n", c_int32),
        ("m", c_int32), ("values", c_void_p), ("pattern", c_void_p), ("num_values", c_int64), ("value_bytes", c_int64),
        ("pattern_bytes", c_int64), ("row_start", c_void_p), ("scales", c_void_p), ("num_starts", c_int64),
        ("num_scales", c_int64), ("value_bits", c_int64), ("group_scales", c_void_p), ("num_group_scales", c_int64),
        ("scale_group", c_int64), ("levels", c_void_p), ("num_levels", c_int64), ("history", c_void_p),
        ("num_history", c_int64), ("memory", c_int64), ("run", c_int64), ("rotation", c_int64),
    ]  # fmt: skip


class _Search(ctypes.Structure):
    _fields_ = [
        ("wanted", c_void_p), ("weight", c_void_p), ("codes", c_void_p), ("numbers", c_void_p), ("columns", c_int64),
        ("rows", c_int64), ("length", c_int64), ("run", c_int64), ("bits", c_int64), ("memory", c_int64),
        ("levels", c_void_p), ("history", c_void_p), ("num_levels", c_int64), ("num_history", c_int64),
        ("threads", c_int64), ("isa", c_int64), ("unit", c_float),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("y", c_void_p), ("bias", c_void_p), ("tokens", c_int64), ("x_columns", c_int64),
        ("y_columns", c_int64), ("x_stride", c_int64), ("y_stride", c_int64), ("x_length", c_int64),
        ("y_length", c_int64), ("bias_length", c_int64), ("x_type", c_int32), ("y_type", c_int32), ("threads", c_int32),
        ("isa", c_int32), ("path", c_int32), ("activation_bits", c_int32), ("first_row", c_int64), ("end_row", c_int64),
    ]  # fmt: skip


class _Tables:
    """The levels of a value format, and what codes above add to their places, where C can read them."""

    def __init__(self, numbers: Values) -> None:
        history = bytes(number for row in numbers.history for number in row)
        self.levels = (ctypes.c_int8 * len(numbers.levels))(*numbers.levels)
        self.history = (ctypes.c_uint8 * len(history))(*history)
        self.where = [ctypes.addressof(table) if len(table) else None for table in (self.levels, self.history)]


@functools.cache
def _tables_of(numbers: Values) -> _Tables:
    return _Tables(numbers)


class CpuMatrix(PreparedMatrix):
    """Borrows the stored tensors; owns the index of every row's first value and float32 scales."""

    def __init__(self, packed: Packed) -> None:
        check_packed(packed)
        super().__init__(packed)
        self.row_start: Tensor | None = None
        with _as_memory_error():
            self.scales = None if packed.scales_N is None else packed.scales_N.detach().float().contiguous()
            if packed.layout.group_kept is None:
                self.row_start = torch.empty(packed.shape[0], dtype=torch.int32)
        self.tables = _tables_of(packed.numbers)
        self.struct = _describe(packed, self.scales, self.tables)
        self._count()
        self.reference = ctypes.byref(self.struct)

    def _count(self) -> None:
        """Find where the values of every row begin, and hold their number against the pattern."""
        rows = 0 if self.row_start is None else self.row_start.numel()
        where = None if self.row_start is None else self.row_start.data_ptr()
        kept = _require().fips_row_starts(ctypes.byref(self.struct), where, rows)
        if kept < 0:
            raise _error(kept, self.packed, "its pattern")
        if kept != self.packed.kept:
            raise BackendError(
                f"the pattern keeps {kept} entries, but there are {self.packed.kept} values; load the checkpoint again"
            )
        self.struct.row_start, self.struct.num_starts = where, rows

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the stored tensors."""
        stored = self.packed.scales_N
        copied = self.scales is not None and stored is not None and self.scales.data_ptr() != stored.data_ptr()
        rows = self.packed.shape[0]
        return 4 * rows * (int(copied) + int(self.row_start is not None))


@contextmanager
def _as_memory_error() -> Iterator[None]:
    """Torch has no class of its own for memory that a CPU does not have."""
    try:
        yield
    except RuntimeError as error:
        if "alloc" not in str(error):
            raise
        raise MemoryError(f"no memory for what the CPU kernels need: {error}") from error


def _room(make: Callable[..., Tensor], *what: Any) -> Tensor:
    """A new tensor, or ``MemoryError``."""
    try:  # not the context above, which takes as long as a small product
        return make(*what)
    except RuntimeError as error:
        with _as_memory_error():
            raise error


def _error(status: int, packed: Packed, what: str) -> Exception:
    """What a status of the library means, see ``csrc/fips_kernels.h``."""
    matrix = f"format {packed.fmt}, values {packed.kind}, shape {packed.shape}"
    if status == _NO_MEMORY:
        return MemoryError(f"no memory to multiply by a packed matrix ({matrix}); use fewer tokens at a time")
    if status == _INVALID:
        return BackendError(f"the CPU kernels refuse {matrix} with {what}: the sizes or the pattern do not fit")
    return BackendError(f"no CPU kernel for {matrix}, {what}; use path `auto`, or torch")


_library: ctypes.CDLL | None = None
_available: bool | None = None  # plain values, so that a traced function may ask
_reason = ""
_best = len(ISAS) - 1


def available() -> bool:
    """Whether a compiled library was found and works; if not, the reason is logged once."""
    if _available is None:
        _load()
    return bool(_available)


def unavailable_reason() -> str:
    """Why not, in words; empty if it is."""
    return "" if available() else _reason


def isa_names() -> tuple[str, ...]:
    """Instruction sets of this machine that the library has kernels for, worst first, up to ``$FIPS_ISA``."""
    found = _require().fips_isas() if available() else 0
    return tuple(name for number, name in enumerate(ISAS[: _best + 1]) if found >> number & 1)


def vectors() -> bool:
    """Whether the library is there and has kernels for registers of 256 bits or more on this machine."""
    return available() and _has_vectors(_library, _best)


@functools.cache
def _has_vectors(library: ctypes.CDLL | None, best: int) -> bool:
    return library is not None and bool(library.fips_isas() & ((2 << best) - 1) > 1)


def reads(*tensors: Tensor, floats: tuple[Tensor, ...] = ()) -> bool:
    """Whether functions of the library that torch does not know as operators may take the place of its own.

    That is for tensors of one type of 16 bits in memory, ``floats`` of it or of float32, where nothing asks for
    gradients or watches operations, on a machine with ``vectors``.
    """
    if torch.compiler.is_compiling():
        return False
    kind = tensors[0].dtype
    if kind not in (torch.bfloat16, torch.float16):
        return False
    for t in tensors:  # written out: a generator would cost as much as a small call
        if t.dtype is not kind or not t.is_cpu:
            return False
    for t in floats:
        if t.dtype not in (kind, torch.float32) or not t.is_cpu:
            return False
    return is_plain(*tensors, *floats) and not needs_grad(*tensors, *floats) and not is_watched() and vectors()


def span(part: Tensor) -> int:
    """Elements from the first to the last of a part of a tensor."""
    elements = 1
    for count, stride in zip(part.shape, part.stride(), strict=True):
        elements += (count - 1) * stride
    return elements


def best_isa() -> int:
    """The number of the best instruction set that calls may use."""
    return _best


def call(function: str, arguments: ctypes.Structure, what: str) -> int:
    """Call a function of the library that takes one structure, and return what it counts, 0 for most.

    Raises ``BackendError`` or ``MemoryError``.
    """
    found = int(getattr(_require(), function)(ctypes.byref(arguments)))
    if found == _NO_MEMORY:
        raise MemoryError(f"no memory for {what}")
    if found < 0:
        raise BackendError(f"the compiled library refuses {what}: status {found}")
    return found


def scratch_bytes() -> int:
    """Memory that products of this process hold beside their tensors.

    That is beside the layers' ``extra_bytes``. A call takes up to 8 MiB for its inputs (more for rows so long that 64
    of them take more), some for every thread, and a byte for every value where integers of fewer bits have to be
    widened. Of that 8 MiB and one for each of its threads stay with the thread that called, for its next call; beyond
    it everything is given back. With about 100 tokens and more for every thread each of them takes, and keeps, as much
    for a part of the tokens.
    """
    return int(_require().fips_scratch_bytes()) if available() else 0


def free_scratch() -> int:
    """Give that memory back where no call is using it; returns how many bytes that were. The next calls ask again."""
    return int(_require().fips_free_scratch()) if available() else 0


def prepare(packed: Packed) -> CpuMatrix:
    """What ``multiply`` needs, once per matrix.

    Raises ``BackendError`` without a library or for damaged tensors, ``MemoryError`` where there is no room.
    """
    _require()
    return CpuMatrix(packed)


def multiply(
    x_TK: Tensor,
    prepared: CpuMatrix,
    bias_N: Tensor | None = None,
    *,
    path: str = "auto",
    isa: str | None = None,
    activation_bits: int | None = None,
) -> Tensor:
    r""":math:`y = x S^\top + b` in the type of ``x``, from the packed bytes; no autograd.

    Sums run in float32. Beside integers, machines with byte dot products turn every token into a fixed-point number
    of ``activation_bits``: 24 bits for float32 inputs and 16 for half types unless said otherwise. These have one scale
    for a token; with 16 the error stays below the rounding of bfloat16 while a token's largest entry is below about 200
    times its typical one. With 8 bits 64 entries share a scale. ``path`` and ``isa`` are for measurements and tests.

    NaN and Inf come out as from a dense layer with zeros where S keeps nothing: an entry that is not kept, or kept
    as 0, makes NaN of Inf, so a token with either has no finite output. Other tokens do not feel it.

    Raises ``ShapeError`` for inputs or a bias of another size, ``BackendError`` if the combination has no kernel or the
    pattern was changed so that it no longer fits the values, ``MemoryError`` where there is no room.
    """
    rows, cols = prepared.packed.shape
    check_inputs(x_TK, cols, bias_N, rows)
    x = _rows_of(x_TK, cols)
    y = _room(x.new_empty, (*x.shape[:-1], rows))
    bias = _bias_for(x, bias_N)  # held until the call is over
    call = _call(x, y, bias, isa, PATHS[path], activation_bits)
    status = _require().fips_multiply(prepared.reference, ctypes.byref(call))
    if status != 0:
        raise _error(status, prepared.packed, f"inputs {x.dtype}, path {path}")
    return y if x.dim() == x_TK.dim() else y.view(*x_TK.shape[:-1], rows)


class Repeat:
    """``multiply`` once more for inputs like the first: what does not change between calls is made once.

    Around a small product that is most of the time: 7 of 13 us, and more where the interpreter has left the cache.
    Layers that are called one after the other with the same input, as those of queries, keys and values are, are
    multiplied in one call of the library: see ``fips.kernels.together``.
    """

    MOST = 64
    """Tokens beyond which a product takes so long that its call does not count."""

    def __init__(self, x: Tensor, prepared: CpuMatrix, bias: Tensor | None, activation_bits: int | None) -> None:
        packed = prepared.packed
        self.prepared, self.bias, self.activation_bits = prepared, bias, activation_bits
        self.shape, self.dtype, self.threads = x.shape, x.dtype, torch.get_num_threads()
        out = (*x.shape[:-1], packed.shape[0])
        self.like = x.new_empty([1] * x.dim()).expand(out)
        """Without memory of its own: room like it takes two thirds of the time that room of a shape takes."""
        check_inputs(x, packed.shape[1], bias, packed.shape[0])
        borrowed = (packed.values_Z, packed.group_scales, bias)
        self.seen = Snapshot(places=borrowed, contents=(packed.pattern, packed.scales_N))
        """Where the matrix and the bias lay, and what of it was computed with."""
        self.call = _call(x, _room(x.new_empty, out), bias, None, PATHS["auto"], activation_bits)
        self.arguments = (prepared.reference, ctypes.byref(self.call))
        self.run = _require().fips_multiply_again
        self.company = Company(self, Repeat.joined)

    @staticmethod
    def suits(x: Tensor, bias: Tensor | None) -> bool:
        """Whether it is worth while and possible for such inputs."""
        few = 0 < x.numel() <= Repeat.MOST * x.shape[-1]
        return few and x.is_contiguous() and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous()))

    def holds(self) -> bool:
        """Whether the matrix and the bias still lie where they did, unchanged where it matters."""
        return self.seen.holds() and torch.get_num_threads() == self.threads

    def __call__(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        if x.dtype is not self.dtype or x.shape != self.shape or not x.is_contiguous():
            return multiply(x, self.prepared, bias, activation_bits=self.activation_bits)
        return self.company.product(x, self)

    def alone(self, x: Tensor) -> Tensor:
        """The product with this matrix."""
        y = _room(torch.empty_like, self.like)
        status = self.run(*self.arguments, x.data_ptr(), y.data_ptr())
        if status != 0:
            raise _error(status, self.prepared.packed, f"inputs {x.dtype}")
        return y

    @staticmethod
    def joined(members: Sequence[Repeat]) -> Callable[[Tensor], list[Tensor]]:
        """The products of an input with several matrices, in one call of the library; it keeps none of them alive."""
        pointers = c_void_p * len(members)
        matrices = pointers(*(ctypes.addressof(one.prepared.struct) for one in members))
        calls = pointers(*(ctypes.addressof(one.call) for one in members))
        likes, run = [one.like for one in members], _require().fips_multiply_together
        kinds = ", ".join(one.prepared.packed.kind for one in members)
        first = members[0].prepared.packed

        def multiply_together(x: Tensor) -> list[Tensor]:
            ys = [_room(torch.empty_like, like) for like in likes]
            status = run(matrices, calls, len(ys), x.data_ptr(), pointers(*(y.data_ptr() for y in ys)))
            if status != 0:
                raise _error(status, first, f"inputs {x.dtype}, together with {kinds}")
            return ys

        return multiply_together


def multiply_columns(x_TN: Tensor, prepared: CpuMatrix, *, isa: str | None = None) -> Tensor:
    """``x S`` for a dense S and at most four tokens: S is read once, in memory order; no autograd.

    Raises as ``multiply`` does.
    """
    rows, cols = prepared.packed.shape
    check_inputs(x_TN, rows)
    x = _rows_of(x_TN, rows)
    y = _room(x.new_empty, (*x.shape[:-1], cols))
    status = _require().fips_multiply_columns(prepared.reference, ctypes.byref(_call(x, y, None, isa, 0, None)))
    if status != 0:
        raise _error(status, prepared.packed, f"{x.shape[:-1].numel()} inputs {x.dtype} times its columns")
    return y if x.dim() == x_TN.dim() else y.view(*x_TN.shape[:-1], cols)


def _rows_of(x: Tensor, features: int) -> Tensor:
    """As it is where contiguous, else (tokens, features) with the features side by side; a view where possible."""
    if x.is_contiguous():
        return x
    flat = x.resolve_neg()
    flat = flat if flat.dim() == 2 else flat.reshape(-1, features)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _bias_for(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """In the type of the inputs, side by side."""
    return None if bias is None else bias.detach().to(x.dtype).contiguous()


def _call(x: Tensor, y: Tensor, bias: Tensor | None, isa: str | None, path: int, activation_bits: int | None) -> _Call:
    features, tokens = x.shape[-1], x.shape[:-1].numel()
    stride = x.stride(0) if x.dim() == 2 else features
    length = x.numel() if x.is_contiguous() or not tokens else (tokens - 1) * stride + features
    if x.dtype not in TYPES or not x.is_cpu or not (bias is None or bias.is_cpu):
        raise BackendError(f"no CPU kernel for inputs {x.dtype} on {x.device}; known: float32, bfloat16, float16")
    bits = activation_bits or (24 if x.dtype == torch.float32 else 16)
    return _Call(
        x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr(), tokens, features, y.shape[-1], stride,
        y.shape[-1], length, y.numel(), 0 if bias is None else bias.numel(), TYPES[x.dtype], TYPES[y.dtype],
        torch.get_num_threads(), _best if isa is None else ISAS.index(isa), path, bits, 0, y.shape[-1],
    )  # fmt: skip


def _describe(packed: Packed, scales: Tensor | None, tables: _Tables) -> _Matrix:
    layout, values, pattern, groups = packed.layout, packed.values_Z.detach(), packed.pattern, packed.group_scales
    code = layout.code(packed.block_axis)
    if code is None or not packed.numbers.compiled:
        raise BackendError(f"{unsupported_format(packed)}; use torch")
    if values.dtype not in TYPES or not all(t.is_cpu for t in (values, pattern, scales, groups) if t is not None):
        raise BackendError(f"no CPU kernel for values {values.dtype} on {values.device}; use torch")
    return _Matrix(
        *packed.shape, code, TYPES[values.dtype], layout.group_kept or 0, layout.group, values.data_ptr(),
        pattern.data_ptr(), packed.kept, values.nbytes, pattern.numel(), None,
        None if scales is None else scales.data_ptr(), 0, 0 if scales is None else scales.numel(), packed.bits or 8,
        None if groups is None else groups.data_ptr(), 0 if groups is None else groups.numel(),
        packed.numbers.scale_group or 0, tables.where[0], len(tables.levels), tables.where[1], len(tables.history),
        packed.numbers.memory, RUN if packed.numbers.memory else 0, packed.rotation,
    )  # fmt: skip


def search_paths(numbers: Values, wanted_JN: Tensor, weight_JN: Tensor) -> tuple[Tensor, Tensor]:
    """``(codes, numbers)`` of a value format with a memory next to wanted numbers, as ``Trellis.search`` finds them.

    Both tensors are float32 on the CPU, side by side; weights are about 1. Raises ``BackendError`` for a format that
    the library does not know.
    """
    tables = _tables_of(numbers)
    codes_JN, found_JN = torch.empty_like(wanted_JN, dtype=torch.int8), torch.empty_like(wanted_JN)
    search = _Search(
        wanted_JN.data_ptr(), weight_JN.data_ptr(), codes_JN.data_ptr(), found_JN.data_ptr(), *wanted_JN.shape,
        wanted_JN.numel(), RUN, numbers.bits or 0, numbers.memory, tables.where[0], tables.where[1],
        len(tables.levels), len(tables.history), torch.get_num_threads(), _best, UNITS,
    )  # fmt: skip
    with _as_memory_error():
        status = _require().fips_search_paths(ctypes.byref(search))
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory to search the codes of {len(wanted_JN)} columns")
    if status < 0:
        raise BackendError(f"the compiled library does not search codes of {numbers.name}")
    return codes_JN, found_JN


def _require() -> ctypes.CDLL:
    if not available() or _library is None:
        raise BackendError(f"the compiled CPU kernels are not available: {_reason}")
    return _library


def _load() -> None:
    global _library, _available, _reason, _best
    wish = os.environ.get("FIPS_ISA")
    if wish is not None and wish not in ISAS:
        raise ConfigError(f"unknown $FIPS_ISA {wish!r}; known: {', '.join(ISAS)}")
    _best = len(ISAS) - 1 if wish is None else ISAS.index(wish)
    _library, _reason = _open()
    _available = _library is not None
    if not _available:
        log.warning("CPU kernels unavailable, packed layers run on plain torch: %s", _reason)


def _open() -> tuple[ctypes.CDLL | None, str]:
    wish = os.environ.get("FIPS_KERNELS", "")
    if wish == "off":
        return None, "FIPS_KERNELS=off"
    path = Path(wish) if wish else next(_installed(), None)
    if path is None:
        return None, "fips was installed where no C++ compiler was found; reinstall it where there is one"
    try:
        library = ctypes.CDLL(str(path))
        if library.fips_abi() != ABI:
            return None, f"{path} belongs to another version of fips; reinstall it"
        library.fips_multiply.argtypes = [c_void_p, c_void_p]
        library.fips_multiply_again.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p]
        library.fips_multiply_columns.argtypes = [c_void_p, c_void_p]
        library.fips_multiply_together.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]
        library.fips_search_paths.argtypes = [c_void_p]
        library.fips_attend.argtypes = [c_void_p]
        library.fips_normalise.argtypes = [c_void_p]
        library.fips_run_block.argtypes = [c_void_p]
        library.fips_block_room.argtypes = [c_void_p]
        library.fips_row_starts.argtypes = [c_void_p, c_void_p, c_int64]
        for counting in (
            library.fips_row_starts, library.fips_scratch_bytes, library.fips_free_scratch, library.fips_block_room
        ):  # fmt: skip
            counting.restype = c_int64
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    return library, ""


def _installed() -> Iterator[Path]:
    """Compiled libraries in the folders of this package (an editable install has two)."""
    import fips.kernels

    for folder in fips.kernels.__path__:
        for name in ("libfips_kernels.so", "libfips_kernels.dylib", "fips_kernels.dll"):
            if (Path(folder) / name).is_file():
                yield Path(folder) / name


def _input_bits(x: Tensor, wanted: int | None) -> int | None:
    """8, or None: as exactly as their type says. Where nothing is said it is 8 for types of 16 bits."""
    return 8 if wanted == 8 or (wanted is None and x.dtype != torch.float32) else None


class CpuBackend(Backend):
    """The compiled kernels."""

    name = "cpu"
    repeats_up_to = Repeat.MOST

    def supports(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        if not available():
            return _reason
        if packed.values_Z.dtype not in TYPES:
            return f"values are {packed.values_Z.dtype}; known: floats of 16 and 32 bits, integers of 2 to 8"
        if not packed.values_Z.is_floating_point() and packed.shape[1] > 65536:
            return f"rows of {packed.shape[1]} integers; at most 65536 are summed"
        return kernel_refuses(packed, device, dtype, "cpu")

    def prepare(self, packed: Packed) -> CpuMatrix:
        return prepare(packed)

    def multiply(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, *, activation_bits: int | None = None
    ) -> Tensor:
        return multiply(x, cast(CpuMatrix, prepared), bias, activation_bits=_input_bits(x, activation_bits))

    def repeat(
        self, x: Tensor, prepared: PreparedMatrix, bias: Tensor | None, activation_bits: int | None
    ) -> Repeat | None:
        bits = _input_bits(x, activation_bits)
        return Repeat(x, cast(CpuMatrix, prepared), bias, bits) if Repeat.suits(x, bias) else None

    def few_tokens(self, packed: Packed) -> int:
        if isa_names() == ("portable",):  # slower than torch
            return 0
        return 4 if packed.values_Z.dtype in (torch.float32, torch.bfloat16) else 0

    def multiply_columns(self, x: Tensor, prepared: PreparedMatrix) -> Tensor:
        return multiply_columns(x, cast(CpuMatrix, prepared))
