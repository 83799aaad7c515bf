r"""Quantization-aware training of a packed model: its numbers and scales train in place, and stay few bits.

A packed layer holds :math:`W = B C`, with C numbers q of its value format times steps s. While it trains they are

.. math:: q = Q(q_0 + \rho\, a), \qquad s = s_0 (1 + \sigma\, g)

with the nearest number of the format Q, and parameters a, one per kept entry, and g, one per stored row, that begin at
0. Gradients pass Q as if it were not there. The factors :math:`\rho` and :math:`\sigma` make the learning rate of one
optimizer fit numbers of the size of weights, numbers in units of their step, and relative changes of a step; decay of
a and g pulls towards what compression found.

References: Bengio et al., arXiv 1308.3432 (straight-through estimator); Esser et al., arXiv 1902.08153 (trained
steps).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fips.errors import ModelError
from fips.formats.packed import in_place
from fips.formats.rotation import rotate
from fips.layers.embedding import PackedEmbedding
from fips.layers.linear import FactoredLinear, factored_layers, homes_of, replace_everywhere
from fips.training.rounded import INTEGER_RATE, STEP_RATE, rounded_numbers, rounded_steps

__all__ = ["TrainedLinear", "finish_qat", "prepare_qat"]


class TrainedLinear(FactoredLinear):
    """A packed layer in training; what it saves is the packed layer that it is by then.

    ``change`` and ``growth`` are the parameters a and g, in the shapes (N, K) of the stored factor and (N,).
    """

    trains_numbers = True
    change: nn.Parameter | None
    """None where numbers are coded together: a change of one would change others."""
    start_NK: Tensor
    mask_NK: Tensor
    start_N: Tensor

    @classmethod
    def of(cls, layer: FactoredLinear) -> Self:
        """In training from what a packed layer holds, with its bias and its basis."""
        new = cls(layer.basis, **layer.arguments(), dtype=layer.weight.dtype)
        _take_over(new, layer)
        new.begin()
        return new

    def begin(self) -> None:
        """Start from the packed numbers and scales."""
        numbers = self.value_format
        self.register_buffer("start_NK", numbers.decode(in_place(self.packed())).float(), persistent=False)
        self.register_buffer("mask_NK", self.mask(), persistent=False)
        self.register_buffer("start_N", self.scales.float(), persistent=False)
        self.growth = nn.Parameter(torch.zeros_like(self.start_N))
        self.change = None if numbers.memory else nn.Parameter(torch.zeros_like(self.start_NK))

    def numbers(self) -> Tensor:
        """The stored factor in units of its steps, numbers of the format, 0 outside the support."""
        if self.change is None:
            return self.start_NK
        wanted_NK = (self.start_NK + INTEGER_RATE * self.value_format.spacing * self.change) * self.mask_NK
        return rounded_numbers(wanted_NK, self.value_format)

    def steps(self) -> Tensor:
        """Of the stored rows, as the type they are stored in has them."""
        return rounded_steps(self.start_N * (1 + STEP_RATE * self.growth), self.scales.dtype)

    def factor(self) -> Tensor:
        """As it is stored; the gradient passes."""
        groups = self.group_scales if self.value_format.scale_group else None
        steps = self.value_format.steps(self.steps(), groups, self.factor_shape[1])
        return rotate(self.numbers() * steps, self.rotation)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self._weight().to(x.dtype), bias)

    @torch.no_grad()
    def store(self) -> None:
        """Round what training has made into the packed tensors."""
        scales = self.steps().to(self.scales.dtype)
        if self.change is not None:
            codes_NK = self.value_format.encode(self.numbers())
            entries_Z, _ = self.pattern_format.pack(codes_NK, self.mask_NK, self.block_axis)
            self.values = self.value_format.pack(entries_Z)
        self.scales = scales

    def finished(self) -> FactoredLinear:
        """The packed layer."""
        self.store()
        packed = FactoredLinear(self.basis, **self.arguments(), dtype=self.weight.dtype)
        _take_over(packed, self)
        return packed

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.store()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in PARAMETERS:
            destination.pop(f"{prefix}{name}", None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        for name in PARAMETERS:
            if f"{prefix}{name}" in missing:
                missing.remove(f"{prefix}{name}")
        with torch.no_grad():  # the parameters that an optimizer holds stay
            self.start_NK.copy_(self.value_format.decode(in_place(self.packed())))
            self.start_N.copy_(self.scales)
            for name in PARAMETERS:
                parameter = getattr(self, name)
                if parameter is not None:
                    parameter.zero_()


PARAMETERS = ("change", "growth")


def _take_over(new: FactoredLinear, old: FactoredLinear) -> None:
    new.values, new.scales, new.bias, new.weight = old.values, old.scales, old.bias, old.weight
    if old.value_format.scale_group:
        new.group_scales = old.group_scales
    if old.pattern_format.group_bits:
        new.pattern = old.pattern
    new.conv1d, new.dense_class = old.conv1d, old.dense_class
    new.train(old.training)


def prepare_qat(model: nn.Module) -> nn.Module:
    """Let the numbers and scales of packed layers train, in place, with any optimizer or trainer; returns the model.

    Bases, biases, layers of floating values and all that is dense train as they did. Packed embeddings and heads stay
    as they are, and so do numbers that are coded together (``tc2`` to ``tc4``), whose scales train; compressed with
    ``--values nl3g64``, for example, all numbers do. With gradients and the state of Adam a layer in training takes
    about 25 bytes a weight. It saves itself packed at any time; ``finish_qat`` packs it again.

    Raises ``ModelError`` if the model has no packed layer with scales.
    """
    layers = {name: layer for name, layer in factored_layers(model).items() if _can_train(layer)}
    if not layers:
        raise ModelError(
            "the model has no packed layer whose numbers could train; load what `fips compress` wrote, and what is in "
            "training already, finish by `fips.finish_qat(model)`"
        )
    homes = homes_of(model)
    for name, layer in layers.items():
        replace_everywhere(model, name, TrainedLinear.of(layer), homes)
    return model


def finish_qat(model: nn.Module) -> nn.Module:
    """Pack the layers that ``prepare_qat`` has opened: the same formats and as many bytes as before; returns the model.

    Raises ``ModelError`` if no layer is in training.
    """
    layers = {name: layer for name, layer in factored_layers(model).items() if isinstance(layer, TrainedLinear)}
    if not layers:
        raise ModelError("no layer of the model is in training; `fips.prepare_qat(model)` comes before")
    homes = homes_of(model)
    for name, layer in layers.items():
        replace_everywhere(model, name, layer.finished(), homes)
    return model


def _can_train(layer: FactoredLinear) -> bool:
    return layer.value_format.scaled and not isinstance(layer, (PackedEmbedding, TrainedLinear))
