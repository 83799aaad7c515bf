r"""What experts are told by that few or no tokens of the calibration data reach.

The moment S of an expert that n tokens reached has a rank of n at most. With fewer tokens than inputs I the rest is
told by what is known of its mixture, of which the other experts have seen more:

.. math:: \frac{n}{I} S + \left(1 - \frac{n}{I}\right) P .

P is the mean moment of all tokens where experts read the residual stream, since any of them may be sent there. Hidden
neurons of two experts have nothing in common: there P is the identity times their mean power. An expert that no token
reached counts as much as if one had, with the mean gradient of all.

Shape legend: I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from fips.calibration.influence import Influence
from fips.calibration.moments import HeldOut, LayerMoments
from fips.models import Site

__all__ = ["complete_influence", "complete_moments"]


def complete_moments(sites: Sequence[Site], moments: MutableMapping[str, LayerMoments]) -> None:
    """Moments, finished, for experts that have none, and better ones for those that few tokens reached.

    Experts of a mixture that nothing is known of stay without.
    """
    done: set[int] = set()
    for alike in _mixtures(sites):
        seen = [moments[site.name] for site in alike if site.name in moments and moments[site.name].weight > 0]
        if not seen:
            continue
        like, weights = alike[0], [one.weight for one in seen]
        prior_II = _common([one.inputs_II for one in seen], weights, aligned=like.role.reads_stream)
        mean_I = _mean([one.mean_I for one in seen], weights) * like.role.reads_stream
        gradients_OO = _per_token([one.gradients_OO for one in seen], weights, aligned=not like.role.reads_stream)
        for site in alike:
            one = moments.get(site.name)
            if one is None or one.weight == 0:
                one = LayerMoments(prior_II, mean_I, gradients_OO, power=1.0, power_squares=1.0)
                one.centered = seen[0].centered and like.role.reads_stream
                moments[site.name] = one
            elif id(one) not in done and one.weight < site.inputs:
                share = one.weight / site.inputs
                one.inputs_II = share * one.inputs_II + (1 - share) * prior_II
                one.mean_I = share * one.mean_I + (1 - share) * mean_I
                if one.held is not None:
                    held_II = share * one.held.inputs_II + (1 - share) * prior_II
                    one.held = HeldOut(held_II, one.held.mean_I, one.held.weight)
            done.add(id(one))


def complete_influence(sites: Sequence[Site], found: Mapping[str, Influence]) -> None:
    """The influence of an average token for experts that no token reached, or none that counts."""
    for alike in _mixtures(sites):
        seen = [found[site.name] for site in alike if found[site.name].counts]
        for site in alike if seen else ():
            one = found[site.name]
            if one.counts:
                continue
            tokens = [other.tokens for other in seen]
            reads = site.role.reads_stream
            one.inputs_I = _diagonal(_mean([other.inputs_I for other in seen], tokens), aligned=reads)
            one.outputs_O = _diagonal(
                torch.stack([other.outputs_O / max(other.tokens, 1) for other in seen]).mean(0), aligned=not reads
            )


def _mixtures(sites: Sequence[Site]) -> list[list[Site]]:
    """Layers of experts that do the same in one mixture."""
    found: dict[tuple[str, str, bool, int, int], list[Site]] = {}
    for site in sites:
        if site.mixture:
            which = _which(site)
            found.setdefault((site.mixture, which, site.role.reads_stream, site.inputs, site.outputs), []).append(site)
    return list(found.values())


def _which(site: Site) -> str:
    """What a layer is called in every expert: its name below the mixture without the number of the expert."""
    parts = site.name.removeprefix(f"{site.mixture}.").split(".")
    return ".".join(part for part in parts if not part.rpartition("_")[2].isdigit())


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight / sum(weights))
    return total


def _common(moments: Sequence[Tensor], weights: Sequence[float], *, aligned: bool) -> Tensor:
    """What moments of one space have in common, or of several spaces only their mean power."""
    mean = _mean(moments, weights)
    return mean if aligned or not len(mean) else mean.diagonal().mean() * torch.eye(len(mean), device=mean.device)


def _per_token(moments: Sequence[Tensor], weights: Sequence[float], *, aligned: bool) -> Tensor:
    return _common([moment / weight for moment, weight in zip(moments, weights, strict=True)], weights, aligned=aligned)


def _diagonal(values_I: Tensor, *, aligned: bool) -> Tensor:
    return values_I if aligned else values_I.mean().expand_as(values_I).clone()
