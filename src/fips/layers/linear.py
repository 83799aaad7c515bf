"""The modules a compressed model runs: one shared basis per group, one packed factor per matrix.

Shape legend: D width of the residual stream, F hidden features of one matrix, R rank of the basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fips.errors import ConfigError
from fips.formats.packed import Packed, to_dense
from fips.formats.patterns import BITMASK, FULL, pattern_named
from fips.formats.rotation import rotate, rotation_fits
from fips.formats.values import FLOAT, Values, values_named
from fips.kernels import ops, registry
from fips.kernels.backend import RepeatedCall
from fips.kernels.basis import BasisRuntime
from fips.kernels.call import Product
from fips.kernels.runtime import LayerRuntime, Places
from fips.kernels.validity import without_autocast
from fips.models.sites import Role

__all__ = [
    "BASES",
    "Bases",
    "FactoredLinear",
    "Homes",
    "SharedBasis",
    "basis_owner",
    "factored_layers",
    "homes_of",
    "offloaded",
    "replace_everywhere",
]

BASES = "fips_bases"
"""Name under which the owner of the bases registers them."""


class SharedBasis(nn.Module):
    r"""Dense basis :math:`B` of shape (D, R), owned once by the model and called by all layers of a group."""

    def __init__(self, width: int, rank: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, rank, dtype=dtype))
        self._runtime = BasisRuntime()

    @classmethod
    def of(cls, weight_DR: Tensor, dtype: torch.dtype) -> Self:
        """The basis with these columns, laid out as in a file: other strides give other roundings."""
        basis = cls(*weight_DR.shape)
        basis.weight = nn.Parameter(weight_DR.detach().to(dtype).contiguous())
        return basis

    def forward(self, x: Tensor, *, expand: bool = False) -> Tensor:
        r"""Coordinates :math:`x B` of (..., D) inputs, or with ``expand`` the vectors :math:`x B^\top` of (..., R)."""
        return self._runtime.multiply(x, self.weight, expand=expand, offloaded=offloaded(self))

    def extra_repr(self) -> str:
        return f"width={self.weight.shape[0]}, rank={self.weight.shape[1]}"


class Bases(nn.ModuleDict):
    """The bases of a model by name; an outermost ``nn.Sequential`` calls it as its last layer."""

    def forward(self, x: Any) -> Any:
        """``x`` as it is."""
        return x


class FactoredLinear(nn.Module):
    r"""A linear layer :math:`W = B C` whose basis is shared and whose factor is sparse and packed.

    ``up`` layers compute :math:`y = C^\top (B^\top x) + b`, ``down`` layers :math:`y = B (C x) + b`. The basis is
    borrowed: the model owns it, so that it is saved, moved and trained once. ``basis=None`` is the identity, a plainly
    pruned layer; then ``width`` says what the basis would. See ``fips.formats.patterns`` for the formats.

    ``values`` is a parameter, so training changes the kept entries and never the support. With integer ``values``
    (``"int8"`` to ``"int2"``) it is a buffer and so are ``scales`` (one per stored row, in a floating type) and, of
    formats like ``"int4g32"``, ``group_scales``: training leaves them alone.

    With a ``rotation`` b the columns of the matrix are stored turned in blocks of b, see ``fips.formats.rotation``; it
    is for numbers on a grid without a basis.

    ``weight`` is an empty placeholder. Code that asks a linear layer for the device or type of its weight finds them,
    and a loader that does not know fips meets a weight of the wrong shape and refuses, where without it the layer
    would be missing from the file and be filled with random numbers.

    ``runtime`` chooses how the product is formed and says what that costs in memory; see ``fips.kernels.runtime``.

    Raises ``ConfigError`` if neither basis nor width is given, or the hidden features do not fill the blocks of
    the format or the rotation, or a rotation where there is a basis or no grid.
    """

    trains_numbers = False
    """Whether gradients reach integers and scales, see ``fips.training.qat``."""
    pattern: Tensor
    scales: Tensor
    group_scales: Tensor
    values: Tensor
    weight: Tensor

    def __init__(
        self,
        basis: SharedBasis | None,
        *,
        role: str,
        hidden: int,
        kept: int,
        fmt: str = BITMASK,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        width: int | None = None,
        values: str = FLOAT,
        rotation: int = 1,
    ) -> None:
        super().__init__()
        self._borrowed = (basis,)
        width, self.rank = _width_and_rank(basis, width)
        self.pattern_format, self.value_format = pattern_named(fmt), values_named(values)
        self.rotation = rotation
        block = self.pattern_format.block
        if hidden % block:
            raise ConfigError(f"format {fmt} needs a multiple of {block} hidden features, got {hidden}")
        if self.value_format.memory and fmt != FULL:
            raise ConfigError(f"values {values} leave no entry out: they are stored with format {FULL}, got {fmt}")
        self.role = Role(role)
        self.reads_stream, self.block_axis = self.role.reads_stream, self.role.hidden_axis  # asked in every call
        self.fmt = fmt
        self.kind = values
        self.bits = self.value_format.bits
        self.kept = kept
        self.conv1d = False
        self.dense_class: type[nn.Linear] = nn.Linear
        """Of the layer in whose place it stands, some of which are of a class of their own that computes the same."""
        self.width, self.hidden = width, hidden
        self.in_features, self.out_features = self.role.features(width, hidden)
        self.factor_shape = self.role.stored_shape(self.rank, hidden)
        alone = basis is None and self.value_format.scaled
        if rotation != 1 and not (alone and rotation_fits(self.in_features, rotation)):
            raise ConfigError(
                f"rotation {rotation} is for numbers on a grid, without a basis, whose {self.in_features} inputs fill "
                "its blocks"
            )
        if self.value_format.scaled:
            stored = torch.empty(self.value_format.length(kept), dtype=self.value_format.dtype)
            self.register_buffer("values", stored)
            scales, groups = self.value_format.num_scales_of(*self.factor_shape)
            self.register_buffer("scales", torch.empty(scales, dtype=dtype))
            if groups:
                self.register_buffer("group_scales", torch.empty(groups, dtype=torch.uint8))
        else:
            self.values = nn.Parameter(torch.empty(kept, dtype=dtype))
        if self.pattern_format.group_bits:
            size = self.pattern_format.nbytes(hidden * self.rank)
            self.register_buffer("pattern", torch.empty(size, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if bias else None
        self.register_buffer("weight", torch.empty(self.placeholder_shape, dtype=dtype))
        self._meaning = ops.meaning_of(self.packed(), None)
        self.runtime = LayerRuntime()

    @classmethod
    def from_factor(
        cls,
        basis: SharedBasis | None,
        factor_RF: Tensor,
        mask_RF: Tensor,
        *,
        role: str,
        fmt: str,
        dtype: torch.dtype | None = None,
        values: str = FLOAT,
        scales: Tensor | None = None,
        group_scales: Tensor | None = None,
        rotation: int = 1,
    ) -> Self:
        """Pack a dense factor on its support; the bias is set by the caller. Without a basis R is the width.

        ``dtype`` is that of the values, beside integers that of the scales. Integers are the nearest multiples of
        ``scales``, one for each of the F rows of a transposed ``up`` factor or of the R rows of a ``down`` factor;
        without them every row's (and group's) largest magnitude becomes the largest integer. With a ``rotation`` all
        of that is done, and the support meant, in turned columns.
        """
        numbers = values_named(values)
        to_linear, to_factor = Role(role).to_linear, Role(role).to_factor
        matrix_NK, mask_NK = rotate(to_linear(factor_RF).detach(), rotation), to_linear(mask_RF)
        if not numbers.scaled:
            layer, entries_Z = cls._packed_on(
                basis, factor_RF.detach(), mask_RF, role=role, fmt=fmt, values=values, rotation=rotation
            )
            layer.values = nn.Parameter(entries_Z.to(dtype or entries_Z.dtype))
            return layer
        dtype = dtype or matrix_NK.dtype
        if scales is None:
            scales, group_scales = numbers.fitted_scales(matrix_NK, mask_NK, dtype)
        scales = scales.detach().to(dtype)
        _check_scales(numbers, matrix_NK.shape, scales, group_scales)
        integers_RF = to_factor(numbers.quantize(matrix_NK, scales, group_scales))
        return cls.from_integers(
            basis,
            integers_RF,
            mask_RF,
            scales,
            role=role,
            fmt=fmt,
            values=values,
            group_scales=group_scales,
            rotation=rotation,
        )

    @classmethod
    def from_integers(
        cls,
        basis: SharedBasis | None,
        integers_RF: Tensor,
        mask_RF: Tensor,
        scales: Tensor,
        *,
        role: str,
        fmt: str,
        values: str,
        group_scales: Tensor | None = None,
        rotation: int = 1,
    ) -> Self:
        """Pack integers (int8, within the bits of ``values``), or the codes of another grid, on their support.

        ``scales``, in the type they are stored in, are what the integers of every stored row are multiplied by, as in
        ``from_factor``, and ``group_scales`` what those of every group are multiplied by before. With a ``rotation``
        they are those of the turned matrix. Raises ``ConfigError`` for another number of them, if ``values`` are
        floating, or if the rotation does not fit.
        """
        numbers = values_named(values)
        if not numbers.scaled:
            raise ConfigError(f"integers cannot be stored as `values: {values}`; use `from_factor`")
        layer, entries_Z = cls._packed_on(
            basis, integers_RF, mask_RF, role=role, fmt=fmt, values=values, rotation=rotation
        )
        _check_scales(numbers, layer.factor_shape, scales, group_scales)
        layer.values, layer.scales = numbers.pack(entries_Z), scales.detach()
        if group_scales is not None:
            layer.group_scales = group_scales.detach()
        return layer

    @classmethod
    def _packed_on(
        cls,
        basis: SharedBasis | None,
        matrix_RF: Tensor,
        mask_RF: Tensor,
        *,
        role: str,
        fmt: str,
        values: str,
        rotation: int = 1,
    ) -> tuple[Self, Tensor]:
        """A layer with its pattern, and the entries kept, in their order."""
        side = Role(role)
        matrix_NK, mask_NK = side.to_linear(matrix_RF).contiguous(), side.to_linear(mask_RF).contiguous()
        entries_Z, pattern = pattern_named(fmt).pack(matrix_NK, mask_NK, side.hidden_axis)
        rank, hidden = matrix_RF.shape
        width = None if basis else rank
        layer = cls(
            basis, role=role, hidden=hidden, kept=entries_Z.numel(), fmt=fmt, width=width, values=values,
            rotation=rotation,
        )  # fmt: skip
        if layer.pattern_format.group_bits:
            layer.pattern = pattern
        return layer, entries_Z

    def arguments(self) -> dict[str, Any]:
        """What makes a layer like this one, empty, beside its basis and type."""
        return {
            "role": self.role.value, "hidden": self.hidden, "kept": self.kept, "fmt": self.fmt, "values": self.kind,
            "bias": self.bias is not None, "width": self.width, "rotation": self.rotation,
        }  # fmt: skip

    @property
    def placeholder_shape(self) -> tuple[int, ...]:
        """Of ``weight``, which has no entries."""
        return (0,)

    @property
    def basis(self) -> SharedBasis | None:
        return self._borrowed[0]

    def factor(self) -> Tensor:
        """The factor as a dense matrix of shape (F, R) for ``up`` and (R, F) for ``down`` layers."""
        return to_dense(self.packed())

    def packed(self) -> Packed:
        """The stored tensors of the factor, with what they mean."""
        pattern = self.pattern if self.pattern_format.group_bits else self.values.new_empty(0, dtype=torch.uint8)
        scales = self.scales if self.value_format.scaled else None
        groups = self.group_scales if self.value_format.scale_group else None
        count = 0 if self.bits in (None, 8) else self.kept
        return Packed(
            self.values, pattern, scales, self.factor_shape, self.fmt, self.block_axis, self.kind, count, groups,
            self.rotation,
        )  # fmt: skip

    def mask(self) -> Tensor:
        """The support of ``factor()``."""
        return self.pattern_format.unpack_mask(self.packed().pattern, self.factor_shape, self.block_axis)

    def num_kept(self) -> int:
        """Entries the pattern keeps; equals the number of values unless the layer was damaged."""
        return self.pattern_format.count(self.packed().pattern, self.factor_shape, self.block_axis)

    def dense_weight(self) -> Tensor:
        r"""The product :math:`B C` as the (out, in) weight of a plain linear layer.

        Computed in float32 and not rounded to the type of values and scales; in float64 where they are that.
        """
        with without_autocast(self.weight.device):
            return self._weight()

    def _weight(self) -> Tensor:
        """``dense_weight``, which autocast may form in fewer bits."""
        factor = self.factor()
        factor = factor.to(torch.promote_types(factor.dtype, torch.float32))
        if self.basis is None:
            return factor
        basis_DR = self.basis.weight.to(factor.dtype)
        return factor @ basis_DR.T if self.reads_stream else basis_DR @ factor

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and torch.compiler.is_compiling():
            y = ops.product_in_graph(x, self._parts(), self.out_features, self._meaning)
            if y is not None:
                return y
        return self.runtime.forward(x, self._parts(), self.product)

    def _parts(self) -> tuple[object, ...]:
        """What a product is made of, without the search of ``getattr``, which takes longer than a small product."""
        parameters, buffers, basis = self._parameters, self._buffers, self._borrowed[0]
        values = parameters.get("values") if self.bits is None else buffers.get("values")
        weight = None if basis is None else basis._parameters.get("weight")
        pattern, scales, groups = buffers.get("pattern"), buffers.get("scales"), buffers.get("group_scales")
        return values, pattern, scales, groups, parameters.get("bias"), weight, offloaded(self)

    def repeated(self, shape: torch.Size) -> tuple[RepeatedCall, Places] | None:
        """The call that the layer has kept for inputs of a shape, and where it and what it is made of are found."""
        found = self.runtime.repeated(shape, self._parts())
        if found is None:
            return None
        call, places = found
        stored: Places = [(self._buffers, name) for name in ("values", "pattern", "scales", "group_scales")]
        return call, [*places, *stored, (self._parameters, "values"), (self._parameters, "bias")]

    def product(self) -> Product:
        """What the layer multiplies by, for ``runtime``."""
        basis = self.basis
        weight = None if basis is None else basis.weight
        return Product(
            self.packed(), up=self.reads_stream, features=(self.in_features, self.out_features), bias=self.bias,
            basis=basis, basis_DR=weight, offloaded=offloaded(self),
        )  # fmt: skip

    def backends(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        """Every backend by name: ``yes``, or why it does not multiply inputs of a type (its own) by the factor."""
        return registry.reasons(self.packed(), self.values.device, dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        density = self.kept / (self.factor_shape[0] * self.factor_shape[1])
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={'none' if self.basis is None else self.rank}, role={self.role}, density={density:.3f}, "
            f"pattern={'N:M ' + self.fmt if ':' in self.fmt else self.fmt}, values={self.kind}, "
            f"rotation={self.rotation}, "
            f"bias={self.bias is not None}"
        )


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the tensors of a module for one call and takes them away again."""
    hook = module.__dict__.get("_hf_hook")  # getattr would search parameters and raise inside: 1 us in every call
    return hook is not None and any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def _check_scales(values: Values, shape: Sequence[int], scales: Tensor, group_scales: Tensor | None) -> None:
    rows, groups = values.num_scales_of(*shape)
    if tuple(scales.shape) != (rows,):
        raise ConfigError(f"`scales` wants {rows} numbers, one per row, got {tuple(scales.shape)}")
    found = 0 if group_scales is None else group_scales.numel()
    if found != groups or (group_scales is not None and group_scales.dtype != torch.uint8):
        raise ConfigError(f"`group_scales` of {values.name} wants {groups} bytes, got {found} numbers")


def _width_and_rank(basis: SharedBasis | None, width: int | None) -> tuple[int, int]:
    """``(D, R)``; without a basis R is D."""
    if basis is not None:
        return basis.weight.shape[0], basis.weight.shape[1]
    if width is None:
        raise ConfigError("a layer without a basis needs its `width`")
    return width, width


def basis_owner(model: nn.Module) -> nn.Module:
    """The module that registers the bases: the base model of a transformers model, else the model itself."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """All factored layers by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


Homes = Mapping[int, Sequence[tuple[nn.Module, str]]]
"""Where modules, by their ``id``, are registered: in which modules, under which names."""


def homes_of(model: nn.Module) -> Homes:
    """Where all modules of a model are registered."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((module, name))
    return found


def replace_everywhere(model: nn.Module, name: str, new: nn.Module, homes: Homes | None = None) -> None:
    """Put a module in the place of the one called ``name``, and wherever else that one is registered.

    Where many are replaced one after the other, ``homes_of`` the model before the first saves a search for each.
    """
    old = model.get_submodule(name)
    for module, child in (homes_of(model) if homes is None else homes)[id(old)]:
        module._modules[child] = new
