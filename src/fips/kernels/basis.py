"""Products with a dense basis: few tokens go through a backend that reads it at memory speed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fips.formats.packed import Packed
from fips.formats.patterns import FULL
from fips.kernels import ops, registry
from fips.kernels.backend import Backend, PreparedMatrix, say_once
from fips.kernels.reference import check_inputs
from fips.kernels.validity import without_autocast

__all__ = ["BasisRuntime"]


class _Kernel(NamedTuple):
    """What multiplies by one basis and inputs of one type, up to a number of tokens; 0 where nothing does."""

    few: int
    backend: Backend
    prepared: PreparedMatrix
    dtypes: tuple[torch.dtype, torch.dtype]
    backends: tuple[Backend, ...]

    @classmethod
    def of(cls, x: Tensor, weight_DR: Tensor) -> _Kernel:
        packed = Packed(weight_DR, weight_DR.new_empty(0), None, (weight_DR.shape[0], weight_DR.shape[1]), FULL)
        dtypes, backends = (x.dtype, weight_DR.dtype), registry.backends()
        for backend in backends if weight_DR.is_contiguous() else ():
            few = backend.few_tokens(packed)
            if few and backend.supports(packed, x.device, x.dtype) is None:
                return cls(few, backend, backend.prepare(packed), dtypes, backends)
        return cls(0, registry.REFERENCE, PreparedMatrix(packed), dtypes, backends)

    def is_for(self, x: Tensor, weight_DR: Tensor) -> bool:
        return (
            self.prepared.packed.values_Z is weight_DR
            and self.dtypes == (x.dtype, weight_DR.dtype)
            and self.backends is registry.backends()
            and self.prepared.holds()
        )


class BasisRuntime:
    """Products with a dense basis, whichever way is the faster for the number of tokens."""

    FEW = 4
    """Tokens beyond which no backend is asked."""

    def __init__(self) -> None:
        self._kernel: _Kernel | None = None
        self._failed = False

    def __reduce__(self) -> tuple[type[BasisRuntime], tuple[()]]:
        return BasisRuntime, ()

    def multiply(
        self, x: Tensor, weight_DR: Tensor, *, expand: bool, bias: Tensor | None = None, offloaded: bool = False
    ) -> Tensor:
        """``x B`` of (..., D) inputs, or with ``expand`` the vectors ``x B^T`` of (..., R), to which a bias is added.

        Nothing is kept of an ``offloaded`` weight, which is there for this call only.
        """
        check_inputs(x, weight_DR.shape[1] if expand else weight_DR.shape[0])
        if self._may_ask(x, weight_DR, bias):
            try:
                y = self._multiply(x, weight_DR, expand, bias, offloaded)
            except Exception as error:
                self._failed = True
                y = self.multiply(x, weight_DR, expand=expand, bias=bias)
                say_once(f"a kernel failed, its basis is multiplied by plain torch: {type(error).__name__}: {error}")
            if y is not None:
                return y
        weight = weight_DR.to(x.dtype)
        with without_autocast(x.device):
            return linear(x, weight, bias) if expand else linear(x, weight.T)

    def _multiply(
        self, x: Tensor, weight_DR: Tensor, expand: bool, bias: Tensor | None, offloaded: bool
    ) -> Tensor | None:
        kernel = self._kernel  # read once: another thread may put its own there
        if offloaded or kernel is None or not kernel.is_for(x, weight_DR):
            kernel = _Kernel.of(x, weight_DR)
            self._kernel = None if offloaded else kernel
        if x.shape[:-1].numel() > kernel.few:
            return None
        backend = kernel.backend
        return backend.multiply(x, kernel.prepared, bias) if expand else backend.multiply_columns(x, kernel.prepared)

    def _may_ask(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        return (
            not torch.compiler.is_compiling()
            and not self._failed
            and x.shape[:-1].numel() in range(1, self.FEW + 1)
            and ops.is_plain(x, weight)
            and not ops.needs_grad(x, weight, bias)
        )
