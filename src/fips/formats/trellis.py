r"""Values coded together: the number of an entry depends on its code and on the codes above it in its column.

With the code :math:`c_n` of row n, b bits as they lie in the stream, and codes of rows above,

.. math:: v_n = L[\,c_n \oplus A_1[c_{n-1}] \oplus \dots \oplus A_m[c_{n-m}]\,],

L a table of more levels than a code can tell apart. From where a column has come :math:`2^b` of them can be reached,
others from elsewhere, and the way through all rows with the least error is found by the algorithm of Viterbi. On normal
numbers that leaves 0.56 to 0.65 of the squared error of the best levels of as many bits each for itself: 0.0761, 0.0203
and 0.0055 at 2, 3 and 4 bits, where no code can leave less than 0.0625, 0.0156 and 0.0039. Decoding takes a few byte
shuffles more. Every ``RUN`` rows a column starts afresh, as if the codes above were 0.

Codes of a column depend on nothing beside it, so error feedback from column to column stays as it is.

The tables were found by trying random A, with L fitted to normal numbers in turns with the search.

References: Marcellin & Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, 1990; Tseng et al.,
QTIP, arXiv 2406.11235, who code along the other side, with larger tables or computed numbers.

Shape legend: N stored rows, K stored columns, J columns at a time, C codes, P places of the table L.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fips.formats.constants import kept
from fips.formats.values import SCALE_GROUPS, VALUES, Values, signed

__all__ = ["RUN", "Trellis"]

RUN = 256
"""Rows after which a column starts afresh: runs can be searched side by side."""


class _Code(NamedTuple):
    levels: tuple[int, ...]
    masks: tuple[int, ...]
    """What every bit of the codes above adds to the place, those of the row next above first."""
    deviation: float
    """Standard deviation of the normal numbers that the levels are for."""
    error: float
    """Squared error that it leaves of them, relative to their variance."""


_CODES = {
    2: _Code(
        (-126, -31, 7, 46, -92, -29, 9, 51, -80, -24, 14, 56, -75, -27, 10, 59,
         -54, -10, 26, 76, -55, -11, 29, 80, -48, -8, 30, 94, -48, -5, 30, 127),
        (11, 30, 29, 4, 3, 14), 1 / 0.01872, 0.0761,
    ),
    3: _Code(
        (-126, 3, -31, 32, -55, 18, -13, 56, -70, 9, -20, 44, -41, 25, -5, 84,
         -84, 3, -29, 40, -49, 19, -12, 64, -60, 13, -20, 49, -33, 30, -5, 101,
         -101, 1, -28, 33, -47, 17, -11, 65, -67, 13, -18, 52, -39, 29, -2, 83,
         -81, 4, -26, 41, -45, 21, -8, 71, -57, 14, -17, 54, -34, 33, 2, 127),
        (56, 15, 3, 55, 37, 1), 1 / 0.02229, 0.0203,
    ),
    4: _Code(
        (-124, -65, -46, -36, -24, -18, -10, -5, -1, 8, 16, 22, 31, 40, 52, 74,
         -99, -60, -47, -35, -27, -19, -12, -4, 4, 10, 16, 25, 32, 42, 55, 85,
         -84, -54, -41, -31, -25, -17, -10, -2, 4, 11, 19, 25, 35, 46, 60, 101,
         -73, -52, -40, -31, -22, -15, -8, 1, 5, 13, 21, 28, 37, 47, 66, 127),
        (52, 51, 2, 42, 58, 29, 5, 30), 1 / 0.02390, 0.0055,
    ),
}  # fmt: skip


@VALUES.register
class Trellis(Values):
    """Trellis-coded values, with a scale per row or groups of them as integers have."""

    known: ClassVar[tuple[str, ...]] = (f"tcB and tcBgG with B of 2 to 4 and G of {', '.join(map(str, SCALE_GROUPS))}",)
    automatic: ClassVar[tuple[str, ...]] = ("tc2", "tc2g64", "tc3", "tc3g64", "tc4", "tc4g64")
    compiled, plain, run = True, False, RUN
    bits: int
    _SHARE: ClassVar = {16: 0.91, 32: 0.95, 64: 0.98, 128: 0.99}

    def __init__(self, name: str, bits: int, group: int | None) -> None:
        super().__init__(name)
        code = _CODES[bits]
        self.bits, self.scale_group, self.levels = bits, group, code.levels
        self.deviation = code.deviation
        self.rounding_error = code.error * (1.0 if group is None else self._SHARE[group])
        self.history = tuple(
            tuple(_combined(code.masks[first : first + bits], field) for field in range(1 << bits))
            for first in range(0, len(code.masks), bits)
        )
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def parse(cls, name: str) -> Self | None:
        found = re.fullmatch(rf"tc([2-4])(?:g({'|'.join(map(str, SCALE_GROUPS))}))?", name)
        return None if found is None else cls(name, int(found[1]), int(found[2]) if found[2] else None)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def nearest(self, steps: Tensor) -> Tensor:
        raise NotImplementedError(f"numbers of {self.name} are rounded together, by `search`")

    def best_steps(self, matrix: Tensor, dim: int) -> Tensor:
        """Steps of lines along ``dim`` for which they look like the numbers that the levels are for."""
        return matrix.square().mean(dim).sqrt() / self.deviation

    def fitted_scales(self, matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.stored_scales(self.best_steps(self.in_groups(matrix), 2), dtype)

    def quantize(self, matrix: Tensor, scales: Tensor, group_scales: Tensor | None = None) -> Tensor:
        """Codes of the way with the least squared error; entries whose scale is 0 do not count."""
        steps = self.steps(scales.to(matrix.dtype), group_scales, matrix.shape[1]).expand_as(matrix)
        wanted = torch.where(steps == 0, torch.zeros_like(matrix), matrix / steps)
        return self.search(wanted.T, steps.T.square()).T.contiguous()

    def decode(self, codes: Tensor) -> Tensor:
        above = [torch.nn.functional.pad(codes, (0, 0, back, 0))[: len(codes)] for back in range(self.memory + 1)]
        return self.numbers_of(above, torch.arange(len(codes), device=codes.device))

    def numbers_of(self, above: Sequence[Tensor], rows: Tensor) -> Tensor:
        mask = (1 << self.bits) - 1
        codes_NK = above[0].int() & mask
        for back in range(1, self.memory + 1):
            known_N1 = (rows % RUN >= back).int().unsqueeze(1) * mask
            codes_NK |= (above[back].int() & known_N1) << self.bits * back
        return self._on(rows.device).index_select(0, codes_NK.flatten()).view(codes_NK.shape)

    def _on(self, device: torch.device) -> Tensor:
        """The number of every code together with those above it, the code itself in the lowest bits."""
        return kept(self._tables, device, lambda: self._made_on(device))

    def _made_on(self, device: torch.device) -> Tensor:
        mask, codes = (1 << self.bits) - 1, torch.arange(1 << self.bits * (self.memory + 1))
        places = codes & mask
        for back, added in enumerate(self.history, start=1):
            places ^= torch.tensor(added)[codes >> self.bits * back & mask]
        return torch.tensor(self.levels, dtype=torch.float32)[places].to(device)

    def encode(self, numbers: Tensor) -> Tensor:
        raise NotImplementedError(f"codes of {self.name} are found together, by `search`")

    def search(self, wanted_JN: Tensor, weight_JN: Tensor) -> Tensor:
        """Codes (J, N), int8, of the numbers next to wanted ones in units of the steps, in weighted squared error.

        What defines the result; ``fips.solve.coded`` does the same in compiled code. Runs of rows are taken side by
        side, step by step: of every state, the codes of as many rows as the memory is long, the cheapest way into it.
        """
        bits, memory = self.bits, self.memory
        codes, rest = 1 << bits, 1 << bits * (memory - 1)
        wanted_BT, weight_BT, length_B = _runs(wanted_JN.float()), _runs(weight_JN.float()), len(wanted_JN)
        device = wanted_BT.device
        levels_P = torch.tensor(self.levels, dtype=torch.float32, device=device)
        state_S = torch.arange(codes * rest, device=device)
        above_S = torch.zeros_like(state_S)
        for back, added in enumerate(self.history):
            above_S ^= torch.tensor(added, device=device)[state_S >> bits * back & (codes - 1)]
        place_SC = above_S.unsqueeze(1) ^ torch.arange(codes, device=device)
        cost_BS = torch.full((len(wanted_BT), len(state_S)), torch.inf, device=device)
        cost_BS[:, 0] = 0
        oldest: list[Tensor] = []
        for number_B, weight_B in zip(wanted_BT.T, weight_BT.T, strict=True):
            error_BP = (number_B.unsqueeze(1) - levels_P).square() * weight_B.unsqueeze(1)
            way_BSC = cost_BS.unsqueeze(2) + error_BP[:, place_SC]
            best_BRC, from_BRC = way_BSC.view(-1, codes, rest, codes).min(1)  # over the oldest code of a state
            cost_BS = best_BRC.flatten(1)
            cost_BS = cost_BS - cost_BS.min(1, keepdim=True).values
            oldest.append(from_BRC.flatten(1).to(torch.uint8))
        at_B1 = cost_BS.argmin(1, keepdim=True)
        found = []
        for from_BS in reversed(oldest):
            found.append(at_B1 & (codes - 1))
            at_B1 = (at_B1 >> bits) + rest * from_BS.gather(1, at_B1).long()
        fields_BT = torch.cat(found[::-1], dim=1)
        return signed(fields_BT.view(length_B, -1)[:, : wanted_JN.shape[1]], bits)


def _combined(masks: tuple[int, ...], field: int) -> int:
    found = 0
    for bit, mask in enumerate(masks):
        found ^= mask if field >> bit & 1 else 0
    return found


def _runs(numbers_JN: Tensor) -> Tensor:
    """Columns in runs of ``RUN`` rows, one behind the other, the last filled with zeros."""
    rows = numbers_JN.shape[1]
    return torch.nn.functional.pad(numbers_JN, (0, -rows % RUN)).reshape(-1, RUN)
