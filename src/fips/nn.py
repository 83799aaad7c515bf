"""The modules a compressed model runs: one shared basis per group, one packed factor per matrix.

Shape legend: D width of the residual stream, F columns of one matrix, R rank of the basis.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fips.storage.packing import BITMASK, DENSE, pack, parse_nm, pattern_bytes, unpack, unpack_mask
from fips.structure.locate import Role

__all__ = ["BASES", "FactoredLinear", "SharedBasis", "basis_owner", "factored_layers"]

BASES = "fips_bases"
"""Name under which the owner of the bases registers them."""


class SharedBasis(nn.Module):
    r"""Dense basis :math:`B` of shape (D, R), owned once by the model and called by all layers of a group."""

    def __init__(self, width: int, rank: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, rank, dtype=dtype))

    def forward(self, x: Tensor, *, expand: bool = False) -> Tensor:
        r"""Coordinates :math:`x B` of (..., D) inputs, or with ``expand`` the vectors :math:`x B^\top` of (..., R)."""
        weight_DR = self.weight.to(x.dtype)
        return linear(x, weight_DR) if expand else linear(x, weight_DR.T)

    def extra_repr(self) -> str:
        return f"width={self.weight.shape[0]}, rank={self.weight.shape[1]}"


class FactoredLinear(nn.Module):
    r"""A linear layer :math:`W = B F` whose basis is shared and whose factor is sparse and packed.

    ``up`` layers compute :math:`y = F^\top (B^\top x) + b`, ``down`` layers :math:`y = B (F x) + b`. The basis is
    borrowed: the model owns it, so that it is saved, moved and trained once. ``values`` is a parameter, so training
    changes the kept entries and never the support. See ``fips.storage.packing`` for the formats.
    """

    pattern: Tensor

    def __init__(
        self,
        basis: SharedBasis,
        *,
        role: Role,
        columns: int,
        nonzeros: int,
        fmt: str = BITMASK,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._borrowed = (basis,)
        width, rank = basis.weight.shape
        self.role: Role = role
        self.fmt = fmt
        self.conv1d = False
        self.in_features, self.out_features = (width, columns) if role == "up" else (columns, width)
        self.factor_shape = (columns, rank) if role == "up" else (rank, columns)
        self.values = nn.Parameter(torch.empty(nonzeros, dtype=dtype))
        if fmt != DENSE:
            size = pattern_bytes(size=columns * rank, fmt=fmt)
            self.register_buffer("pattern", torch.empty(size, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if bias else None

    @classmethod
    def from_factor(
        cls,
        basis: SharedBasis,
        factor_RF: Tensor,
        mask_RF: Tensor,
        *,
        role: Role,
        fmt: str,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Pack a dense factor on its support; the bias is set by the caller."""
        matrix, mask = (factor_RF.T, mask_RF.T) if role == "up" else (factor_RF, mask_RF)
        values, pattern = pack(matrix.detach().contiguous(), mask.contiguous(), fmt=fmt)
        layer = cls(basis, role=role, columns=factor_RF.shape[1], nonzeros=values.numel(), fmt=fmt)
        layer.values = nn.Parameter(values.to(dtype or values.dtype))
        if fmt != DENSE:
            layer.pattern = pattern
        return layer

    @property
    def basis(self) -> SharedBasis:
        return self._borrowed[0]

    def factor(self) -> Tensor:
        """The factor as a dense matrix of shape (F, R) for ``up`` and (R, F) for ``down`` layers."""
        pattern = self.values.new_empty(0, dtype=torch.uint8) if self.fmt == DENSE else self.pattern
        return unpack(self.values, pattern, shape=self.factor_shape, fmt=self.fmt)

    def num_kept(self) -> int:
        """Entries the pattern keeps; equals the number of values unless the layer was damaged."""
        if self.fmt == DENSE:
            return self.factor_shape[0] * self.factor_shape[1]
        return int(unpack_mask(self.pattern, shape=self.factor_shape, fmt=self.fmt).sum())

    def dense_weight(self) -> Tensor:
        r"""The product :math:`B F` as the (out, in) weight of a plain linear layer, computed in float32."""
        basis_DR, factor = self.basis.weight.float(), self.factor().float()
        return factor @ basis_DR.T if self.role == "up" else basis_DR @ factor

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor().to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.role == "up":
            return linear(self.basis(x), factor, bias)
        y: Tensor = self.basis(linear(x, factor), expand=True)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        kept = self.values.numel() / (self.factor_shape[0] * self.factor_shape[1])
        nm = parse_nm(self.fmt)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.basis.weight.shape[1]}, "
            f"role={self.role}, kept={kept:.3f}, pattern={'N:M ' + self.fmt if nm else self.fmt}, "
            f"bias={self.bias is not None}"
        )


def basis_owner(model: nn.Module) -> nn.Module:
    """The module that registers the bases: the base model of a transformers model, else the model itself."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """All factored layers by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
