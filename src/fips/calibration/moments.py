r"""What the layers of a model read and how much what they write matters, in one pass over the calibration batches.

For every layer with inputs :math:`x` and outputs :math:`z`, with :math:`\delta = \partial \ell / \partial z`:

.. math:: E\left[s\,(x - \mu)(x - \mu)^\top\right], \qquad E\left[\delta \delta^\top\right], \qquad
          s = (1 - \alpha) \frac{|\delta|^2}{E |\delta|^2} + \alpha,

so that tokens which move the model's output count (the class token of a vision transformer is one of 197). Without a
bias that can absorb the mean error, :math:`\mu = 0`.

:math:`\ell = \langle v, \mathrm{logits} \rangle` for one random v per example or token with covariance
:math:`\mathrm{diag}(q) - q q^\top`, q the model's softmax at a temperature: then :math:`E[\delta\delta^\top]` is
the Gauss-Newton matrix of the KL divergence from the original's outputs. Outputs that are no softmax have the
covariance of what they are instead (``fips.calibration.heads``). Methods that need no gradients get the first of the
moments only, with s = 1, from forward passes (``fips.calibration.sweep``). No labels are used. Padding counts nowhere:
the moments of padded examples are those of the same examples one by one, without padding. Memory: the moments of the
layers asked for, not the tokens. All sums are float32: products rounded to bfloat16 would not be positive
semidefinite.

Shape legend: T tokens of a batch, I inputs of a layer, O outputs.

Reference: Martens & Grosse, arXiv 1503.05671.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fips.calibration.heads import ScoredHead, draw_direction
from fips.calibration.tokens import TokenTracker
from fips.errors import DataError
from fips.models import Site
from fips.plan.finite import overflow_error
from fips.ranks import Ranks

__all__ = ["HeldOut", "LayerMoments", "RunningVariance", "collect_moments", "moment_bytes", "real_device"]

STRIP = 512
"""Columns of a moment that are summed at a time, from the diagonal down: of a large one, little more than half."""
CONSTANT = 1e-6
"""Variance of inputs, relative to their mean square, below which they are constants with rounding errors."""


@dataclass(slots=True)
class LayerMoments:
    """Running sums of one layer over tokens."""

    inputs_II: Tensor
    mean_I: Tensor
    """Weighted sum of the inputs until ``finish``, then their mean."""
    gradients_OO: Tensor
    """Empty where no gradients are measured."""
    weight: float = 0.0
    examples: int = 0
    power: float = 0.0
    """Sum of the squared lengths of the gradients."""
    power_squares: float = 0.0
    """Sum of the squares of those."""
    centered: bool = False
    """Whether ``inputs_II`` is about the mean, after ``finish``."""
    held: HeldOut | None = None
    """What a part of the data says alone, where it is wanted."""
    parts: int = 0
    """Parts of the data, see ``note_part``."""
    squares: float = 0.0
    """Sum of the squared Frobenius norms of their moments, weighted, until ``finish``."""
    centered_squares: float = 0.0
    """The same of their moments about their own means."""
    noise: float | None = None
    """Share of the moment that is noise, after ``finish``; None where fewer than two parts cannot tell."""

    @classmethod
    def empty(cls, site: Site, device: torch.device, *, gradients: bool = True) -> LayerMoments:
        outputs = site.outputs * gradients
        return cls(
            torch.zeros(site.inputs, site.inputs, device=device),
            torch.zeros(site.inputs, device=device),
            torch.zeros(outputs, outputs, device=device),
        )

    def add_inputs(self, x_TI: Tensor, valid_T: Tensor | None) -> None:
        """One batch, all tokens alike; sums are complete after ``note_part`` or ``mirror``."""
        x_TI = x_TI if valid_T is None else x_TI[valid_T]
        for start in range(0, x_TI.shape[1], STRIP):  # the rest is the same, see ``mirror``
            strip = slice(start, start + STRIP)
            self.inputs_II[start:, strip].addmm_(x_TI[:, start:].T, x_TI[:, strip])
        self.mean_I += x_TI.sum(0)
        self.weight += len(x_TI)

    def add(self, x_TI: Tensor, gradient_TO: Tensor, valid_T: Tensor | None, *, floor: float) -> None:
        """One batch; ``floor`` is the share of the weight that all tokens get alike."""
        if valid_T is not None:
            x_TI, gradient_TO = x_TI[valid_T], gradient_TO[valid_T]
        power_T = gradient_TO.square().sum(1)
        weight_T = (1 - floor) * power_T / power_T.mean().clamp_min(torch.finfo(torch.float32).tiny) + floor
        weighted_TI = x_TI * weight_T.unsqueeze(1)
        self.inputs_II += weighted_TI.T @ x_TI
        self.gradients_OO += gradient_TO.T @ gradient_TO
        self.mean_I += weighted_TI.sum(0)
        self.weight += float(weight_T.sum())
        self.power += float(power_T.sum(dtype=torch.float64))
        self.power_squares += float(power_T.double().square().sum())

    def about_zero(self) -> Tensor:
        """E[x x^T], whether or not ``inputs_II`` is about the mean."""
        return self.inputs_II + torch.outer(self.mean_I, self.mean_I) if self.centered else self.inputs_II

    def mirror(self) -> None:
        """Above the diagonal what ``add_inputs`` has summed below it."""
        for start in range(STRIP, len(self.inputs_II), STRIP):
            strip = slice(start - STRIP, start)
            self.inputs_II[strip, start:] = self.inputs_II[start:, strip].T

    def note_part(self) -> None:
        """These are the sums of one part of the data: its norms are kept, as ``finish`` compares parts."""
        if self.weight == 0:
            return
        self.mirror()
        mean_I = self.mean_I.double() / self.weight
        square = _square(self.inputs_II) / self.weight**2
        across = float((self.inputs_II @ self.mean_I).double() @ mean_I) / self.weight**2
        self.parts = 1
        self.squares = self.weight * square
        self.centered_squares = self.weight * max(square - 2 * across + float(mean_I @ mean_I) ** 2, 0.0)

    def absorb(self, part: LayerMoments, *, hold: bool = False) -> None:
        """Add the sums of other batches; with ``hold`` they count among those held out."""
        self.parts += part.parts
        self.squares += part.squares
        self.centered_squares += part.centered_squares
        self.inputs_II += part.inputs_II
        self.mean_I += part.mean_I
        self.weight += part.weight
        if hold:
            held = self.held or HeldOut(torch.zeros_like(self.inputs_II), torch.zeros_like(self.mean_I), 0.0)
            self.held = HeldOut(
                held.inputs_II.add_(part.inputs_II), held.mean_I + part.mean_I, held.weight + part.weight
            )

    @property
    def fitted_II(self) -> Tensor:
        """As ``inputs_II`` of the data that is not held out."""
        if self.held is None:
            return self.inputs_II
        share = self.held.weight / self.weight
        return (self.inputs_II - share * self.held.inputs_II) / (1 - share)

    @property
    def nbytes(self) -> int:
        """Memory of the matrices."""
        held = 0 if self.held is None else self.held.inputs_II.nbytes
        return self.inputs_II.nbytes + self.gradients_OO.nbytes + held

    def collect(self, ranks: Ranks, source: int, target: int) -> None:
        """Bring the sums of one rank to another."""
        self.inputs_II = ranks.collect(self.inputs_II, source, target)
        self.mean_I = ranks.collect(self.mean_I, source, target)
        weight = torch.tensor([self.weight], dtype=torch.float64, device=self.mean_I.device)
        self.weight = float(ranks.collect(weight, source, target))

    @property
    def is_finite(self) -> bool:
        return bool(self.inputs_II.isfinite().all() and self.gradients_OO.isfinite().all())

    @property
    def samples(self) -> float:
        """How many gradients of equal length would tell as much as those seen, of which a few may outweigh the rest."""
        return self.power**2 / self.power_squares if self.power_squares > 0 else 0.0

    @property
    def fitted_noise(self) -> float | None:
        """As ``noise`` of the data that is not held out, of which there is less."""
        if self.noise is None or self.held is None:
            return self.noise
        return min(self.noise / (1 - self.held.weight / self.weight), 1.0)

    def finish(self, *, centered: bool, examples: int) -> None:
        r"""From sums to means; moments about the mean where ``centered``, unless the inputs were constant.

        ``noise`` is the intensity of shrinkage of Ledoit & Wolf (2004): with the moment S the mean of those
        :math:`S_c` of n parts, and :math:`\mu I` the nearest multiple of the identity,

        .. math:: \frac{\mathrm{mean}_c |S_c|^2 - |S|^2}{(n - 1)\, |S - \mu I|^2} .
        """
        self.inputs_II /= self.weight
        self.mean_I /= self.weight
        self.gradients_OO /= examples
        power = float(self.inputs_II.diagonal().sum())
        spread = power - float(self.mean_I.square().sum())
        self.centered = centered and spread > CONSTANT * power
        if self.centered:
            self.inputs_II -= torch.outer(self.mean_I, self.mean_I)
        if self.parts > 1:
            mean_square = (self.centered_squares if self.centered else self.squares) / self.weight
            square, size = _square(self.inputs_II), len(self.inputs_II)
            apart = square - float(self.inputs_II.diagonal().sum()) ** 2 / size
            spread = max(mean_square - square, 0.0) / (self.parts - 1)
            self.noise = min(spread / apart, 1.0) if apart > 0 else 1.0
        if self.held is not None:
            self.held = None if self.held.weight in (0, self.weight) else self.held.about(self.mean_I * self.centered)


def _square(matrix: Tensor) -> float:
    """Of the Frobenius norm, in float64, which squares of float32 do not leave; without a copy of the whole matrix."""
    return sum(float(rows.double().square().sum()) for rows in matrix.split(256))


class HeldOut(NamedTuple):
    """Sums of a part of the data, or its moment about the mean of all."""

    inputs_II: Tensor
    mean_I: Tensor
    weight: float

    def about(self, mean_I: Tensor) -> HeldOut:
        """From sums to a moment about a mean, in their place."""
        own_I = self.mean_I / self.weight
        inputs_II = self.inputs_II.div_(self.weight)
        for left_I, right_I, sign in ((mean_I, own_I, -1), (own_I, mean_I, -1), (mean_I, mean_I, 1)):
            inputs_II.addr_(left_I, right_I, alpha=sign)
        return HeldOut(inputs_II, own_I, self.weight)


def moment_bytes(sites: Iterable[Site], *, gradients: bool = True) -> int:
    """Memory that the moments of some layers take."""
    return sum(4 * (site.inputs**2 + gradients * site.outputs**2) for site in sites)


def collect_moments(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    temperature: float,
    floor: float,
    seed: int,
) -> dict[str, LayerMoments]:
    """Moments of the layers named by ``sites``; ``run(model, batch)`` returns the model's output.

    Experts that no token reached are left out, unless none of their mixture was reached.

    The model's parameters must not require gradients. Raises ``DataError`` if there is no batch or if a layer never
    runs or reaches the output, ``ModelError`` if what it saw is not finite.
    """
    device = next(model.parameters()).device
    moments = {site.name: LayerMoments.empty(site, device) for site in sites}
    generator = torch.Generator(real_device(device)).manual_seed(seed)
    examples = 0
    with _Taps(model, sites, moments, floor) as taps, torch.enable_grad():
        for batch in batches:
            heads = taps.tokens.heads(run(model, batch))
            loss = _random_loss(heads, temperature, generator)
            if not loss.is_meta and bool(loss.isnan()) and any(bool(head.scores.isnan().any()) for head in heads):
                raise overflow_error(model, batch, run, where="the model's output is not finite")
            if loss.requires_grad:  # nothing reaches the output of a batch that does without these layers
                loss.backward()
            examples += heads[0].scores.shape[0]
    reached = {site.mixture for site in sites if site.mixture and moments[site.name].weight > 0}
    for site in sites:
        found = moments[site.name]
        if found.weight == 0 and site.mixture in reached:
            del moments[site.name]
            continue
        if found.weight == 0:
            raise DataError(
                f"layer `{site.name}` never ran on the {examples} calibration examples"
                ", or did not reach the model's output; leave it out with `ignore`"
            )
        if not found.is_finite:
            where = f"activations or gradients of `{site.name}`, or their squares, are not finite"
            raise overflow_error(model, batch, run, where=where)
        found.finish(centered=site.has_bias, examples=examples)
    return moments


def _random_loss(heads: Sequence[ScoredHead], temperature: float, generator: torch.Generator) -> Tensor:
    directions = [draw_direction(head, temperature, generator) for head in heads]
    return torch.stack([(head.scores.float() * way).sum() for head, way in zip(heads, directions, strict=True)]).sum()


def real_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for the meta device, which has neither random numbers nor autocast."""
    return torch.device("cpu") if device.type == "meta" else device


class _Taps(AbstractContextManager["_Taps"]):
    """Hooks that add inputs and output gradients of layers to their moments as the backward pass reaches them."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], moments: dict[str, LayerMoments], floor: float) -> None:
        self.moments, self.floor = moments, floor
        self._handles = [model.get_submodule(site.name).register_forward_hook(self._hook(site.name)) for site in sites]
        self.tokens = TokenTracker(model, [site.name for site in sites])

    def __exit__(self, *error: object) -> None:
        self.tokens.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        floor = self.floor

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].detach()
            valid_T = self.tokens.counted(args[0])
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)

            def add(gradient: Tensor) -> None:
                with torch.no_grad(), torch.autocast(real_device(x.device).type, enabled=False):
                    x_TI = x.reshape(-1, x.shape[-1]).float()
                    gradient_TO = gradient.reshape(-1, gradient.shape[-1]).float()
                    self.moments[name].add(x_TI, gradient_TO, valid_T, floor=floor)

            output.register_hook(add)
            return output

        return hook


class RunningVariance:
    """Variance over all entries of a stream of tensors."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, tensor: Tensor) -> None:
        self.count += tensor.numel()
        self.sum += tensor.sum(dtype=torch.float64).item()
        self.squares += tensor.double().square().sum().item()

    @property
    def value(self) -> float:
        return self.squares / self.count - (self.sum / self.count) ** 2

    @property
    def scale(self) -> float:
        """The variance; of a constant its square, and 1 if that is 0 too, so that errors can be divided by it."""
        square = self.squares / self.count
        return next((size for size in (self.value, square) if size > CONSTANT * square), 1.0)
