r"""How much the outputs and inputs of layers count, told by the gradients of a few examples.

For every output o of a layer, with :math:`\delta = \partial \ell / \partial z` (see ``fips.calibration.moments``), and
for every input i, about its mean :math:`\mu` where a bias can absorb that:

.. math:: \frac{1}{E} \sum_t \delta_{to}^2, \qquad \frac{1}{T} \sum_t (x_{ti} - \mu_i)^2 .

An error of an output costs the first on average, whatever its tokens; both together tell beforehand, roughly, what
rounding a layer to so many bits does to the model. They are vectors and no matrices, so a few examples are enough.

Shape legend: T tokens, E examples, I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fips.calibration.heads import draw_direction, read_heads
from fips.calibration.moments import CONSTANT
from fips.errors import DataError
from fips.models import Site
from fips.plan.finite import overflow_error

__all__ = ["Influence", "collect_influence"]


@dataclass(slots=True)
class Influence:
    """Of one layer."""

    inputs_I: Tensor
    """Sum of the squared inputs until ``finish``, then their mean square or variance."""
    outputs_O: Tensor
    """Sum of the squared gradients, then its mean over examples."""
    sum_I: Tensor
    """Sum of the inputs, then their mean."""
    tokens: int = 0
    reached: bool = False
    """Whether any gradient has arrived, zero or not."""

    def tensors(self) -> dict[str, Tensor]:
        return {"inputs_I": self.inputs_I, "outputs_O": self.outputs_O, "sum_I": self.sum_I}

    def facts(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "reached": self.reached}

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> Influence:
        """What ``tensors``, under the name of the layer, and ``facts`` have kept."""
        inputs_I, outputs_O, sum_I = (tensors[f"{name}.{key}"].to(device) for key in ("inputs_I", "outputs_O", "sum_I"))
        return cls(inputs_I, outputs_O, sum_I, **facts)

    @classmethod
    def empty(cls, site: Site, device: torch.device) -> Influence:
        inputs_I = torch.zeros(site.inputs, device=device)
        return cls(inputs_I, torch.zeros(site.outputs, device=device), torch.zeros_like(inputs_I))

    @property
    def fed(self) -> bool:
        """Whether the layer has read something other than 0."""
        return bool(self.inputs_I.any())

    @property
    def moves(self) -> bool:
        """Whether a gradient other than 0 has arrived; squares of very small numbers are 0."""
        return bool(self.outputs_O.any())

    @property
    def counts(self) -> bool:
        return self.fed and self.moves

    def finish(self, *, centered: bool, examples: int) -> None:
        """From sums to means; about the mean where ``centered``, unless the inputs were constant."""
        self.inputs_I /= max(self.tokens, 1)
        self.sum_I /= max(self.tokens, 1)
        self.outputs_O /= max(examples, 1)
        variance_I = (self.inputs_I - self.sum_I.square()).clamp_min(0)
        if centered and float(variance_I.sum()) > CONSTANT * float(self.inputs_I.sum()):
            self.inputs_I = variance_I


def collect_influence(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    examples: int,
    temperature: float,
    seed: int,
) -> dict[str, Influence]:
    """What the first ``examples`` tell of the layers named by ``sites``, and more where some have not counted yet.

    ``run(model, batch)`` returns the model's output, whose parameters must not require gradients. Raises ``ModelError``
    or ``DataError`` if that is NaN, ``DataError`` if there is no batch.
    """
    device = next(model.parameters()).device
    found = {site.name: Influence.empty(site, device) for site in sites}
    generator = torch.Generator(device).manual_seed(seed)
    seen = 0
    with ExitStack() as stack, torch.enable_grad():
        for site in sites:
            stack.callback(model.get_submodule(site.name).register_forward_hook(_hook(found[site.name])).remove)
        for batch in batches:
            if seen >= examples and all(one.counts for one in found.values()):
                break
            seen += _backward(model, batch, run, temperature, generator)
    if not seen:
        raise DataError("the calibration data has no batch; give at least one")
    for site in sites:
        found[site.name].finish(centered=site.has_bias, examples=seen)
    return found


def _backward(
    model: nn.Module,
    batch: Any,
    run: Callable[[nn.Module, Any], Any],
    temperature: float,
    generator: torch.Generator,
) -> int:
    """One forward and backward pass; returns the number of examples."""
    heads = read_heads(run(model, batch), model)
    directions = [draw_direction(head, temperature, generator) for head in heads]
    for head, direction in zip(heads, directions, strict=True):
        if not bool(direction.isfinite().all()) or bool(head.scores.isnan().any()):
            raise overflow_error(model, batch, run, where="the model's output is not finite")
    loss = torch.stack([(head.scores.float() * way).sum() for head, way in zip(heads, directions, strict=True)]).sum()
    if loss.requires_grad:  # nothing reaches the output of a batch that does without these layers
        loss.backward()
    return heads[0].scores.shape[0]


def _hook(influence: Influence) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x_TI = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        influence.inputs_I += x_TI.square().sum(0)
        influence.sum_I += x_TI.sum(0)
        influence.tokens += len(x_TI)
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)

        def add(gradient: Tensor) -> None:
            influence.reached = True
            influence.outputs_O += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)

        output.register_hook(add)
        return output

    return hook
