"""Which layers the calibration data reaches at all, found before anything is measured.

One pass over the batches, cut short as soon as every layer has been seen to count: for most models after the first
batch. What a layer lacks is the reason to leave it as it is, dense:

* it never runs: the image tower of a model that is given text alone;
* where errors are measured by gradients, its output does not reach the model's: the last block of a tower whose last
  but one is read;
* there too, it only ever reads zeros, or no gradient but zeros reaches it: behind dead units or a projector of zeros.
  Nothing says what an error of it costs.

An expert is looked at with all others of its mixture: that no token was sent to it says little of those to come.

If NO layer gets a gradient, the reason is the model's output (a head of zeros, probabilities that are exactly 0 and
1): then all layers are kept and errors are measured at their own outputs instead. Methods that measure no gradients
compress whatever runs; their survey has no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fips.calibration.heads import draw_direction, read_heads
from fips.calibration.influence import Influence
from fips.errors import DataError
from fips.models import Site
from fips.plan.finite import overflow_error

__all__ = ["NO_GRADIENT", "Survey", "survey_influence", "survey_layers"]

NEVER = "it never ran on the calibration data"
UNREACHED = "its output does not reach the model's output on the calibration data"
ZEROS = "it reads nothing but zeros on the calibration data"
NO_INFLUENCE = "it has no influence on the model's output on the calibration data (its gradients are zero)"
NO_GRADIENT = (
    "no layer has a gradient: the model's output is the same whatever they do (a head of zeros, or probabilities of "
    "exactly 0 and 1); errors are measured at the outputs of the layers instead, as GPTQ does"
)


@dataclass(slots=True)
class _Seen:
    """What has been seen of one layer so far."""

    ran: bool = False
    fed: bool = False
    """Has read something other than 0."""
    reached: bool = False
    """Has been given a gradient."""
    moved: bool = False
    """Has been given a gradient other than 0."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the calibration data says about the layers before any measurement."""

    left: dict[str, str] = field(default_factory=dict)
    """Layers to leave dense, with the reason."""
    blind: bool = False
    """Whether no layer got a gradient other than 0, so that the output cannot be the measure."""


def survey_influence(sites: Sequence[Site], found: Mapping[str, Influence]) -> Survey:
    """The same of what the gradients of some examples have told of modules."""
    seen = {
        name: _Seen(ran=one.tokens > 0, fed=one.fed, reached=one.reached, moved=one.moves)
        for name, one in found.items()
    }
    return _result(sites, seen, gradients=True)


def _result(sites: Sequence[Site], seen: Mapping[str, _Seen], *, gradients: bool) -> Survey:
    blind = gradients and not any(one.moved for one in seen.values())
    return Survey(_reasons(sites, seen, gradients=gradients, blind=blind), blind)


def _reasons(sites: Sequence[Site], seen: Mapping[str, _Seen], *, gradients: bool, blind: bool) -> dict[str, str]:
    """Why layers are to be left dense, those that are."""
    reasons = {site.name: _reason_of(site, seen, gradients=gradients, blind=blind) for site in sites}
    reached = {site.mixture for site in sites if site.mixture and reasons[site.name] is None}
    return {
        site.name: reason
        for site in sites
        if (reason := reasons[site.name]) is not None and site.mixture not in reached
    }


def _reason_of(site: Site, seen: Mapping[str, _Seen], *, gradients: bool, blind: bool) -> str | None:
    """Why a matrix is to be left dense: what all modules lack that say what it does."""
    reasons = [_reason(seen[name], gradients=gradients, blind=blind) for name in site.judges]
    return None if None in reasons else reasons[-1]


def survey_layers(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    gradients: bool,
    temperature: float,
    seed: int,
) -> Survey:
    """Pass the batches through the model until every layer has been seen to count.

    ``gradients`` asks that gradients reach the layers, and that they and the inputs are not all zero; without, a layer
    counts that runs. The model's parameters must not require gradients. Raises ``ModelError`` or ``DataError`` if a
    batch gives an output of NaN, ``DataError`` if there is no batch.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    seen = {name: _Seen() for site in sites for name in site.modules}
    some = False
    with ExitStack() as stack:
        for name, one in seen.items():
            hook = _watch(one, gradients=gradients)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        for batch in batches:
            some = True
            _pass(model, batch, run, temperature, generator, gradients=gradients)
            if not _reasons(sites, seen, gradients=gradients, blind=False):
                return Survey()
    if not some:
        raise DataError("the calibration data has no batch; give at least one")
    return _result(sites, seen, gradients=gradients)


def _pass(
    model: nn.Module,
    batch: Any,
    run: Callable[[nn.Module, Any], Any],
    temperature: float,
    generator: torch.Generator,
    *,
    gradients: bool,
) -> None:
    with torch.enable_grad() if gradients else nullcontext():
        heads = read_heads(run(model, batch), model)
        directions = [draw_direction(head, temperature, generator) for head in heads]
        for head, direction in zip(heads, directions, strict=True):
            if not bool(direction.isfinite().all()) or bool(head.scores.isnan().any()):
                raise overflow_error(model, batch, run, where="the model's output is not finite")
        total = torch.stack(
            [(head.scores.float() * way).sum() for head, way in zip(heads, directions, strict=True)]
        ).sum()
        if gradients and total.requires_grad:
            total.backward()


def _reason(one: _Seen, *, gradients: bool, blind: bool) -> str | None:
    if not one.ran:
        return NEVER
    if not gradients:
        return None
    if not one.reached:
        return UNREACHED
    if not one.fed:
        return ZEROS
    return NO_INFLUENCE if not blind and not one.moved else None


def _watch(one: _Seen, *, gradients: bool) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        one.ran = True
        one.fed = one.fed or bool(args[0].detach().any())
        if not gradients:
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)

        def arrived(gradient: Tensor) -> None:
            one.reached = True
            # the squares are what counts, and those of very small numbers are 0
            one.moved = one.moved or bool(gradient.float().square().any())

        output.register_hook(arrived)
        return output

    return hook
