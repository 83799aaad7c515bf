r"""Second moments of what the layers of a group read, streamed over the recorded activations.

For a layer with inputs x: the mean, and :math:`E[(x - \mu)(x - \mu)^\top]` where the layer has a bias that can absorb
the mean error, else :math:`E[x x^\top]`. For an ``up`` layer also how much each of its outputs moves the MLP's output,
:math:`w_j = E\left[\sum_o (\partial y_o / \partial z_j)^2\right]`, one backward pass through the elementwise part
between the up and down layers, whatever the activation or gating. Memory: the moments, not the tokens.

Shape legend: N tokens of a batch, D inputs of a layer, F hidden columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fips.activations import ActivationSpool, BlockCall
from fips.structure import LayerGroup, LinearSite, Mlp

__all__ = ["RunningVariance", "SiteStatistics", "collect_statistics"]


@dataclass(slots=True)
class SiteStatistics:
    """Running sums for one layer."""

    moment_DD: Tensor
    sum_D: Tensor
    count: int = 0
    column_F: Tensor | None = None
    """Sum over tokens of the squared sensitivities (``up`` layers with a ``down`` partner)."""
    scale: float = 1.0
    """1 / variance of the block's output."""

    def add_inputs(self, x_ND: Tensor) -> None:
        self.moment_DD += x_ND.T @ x_ND
        self.sum_D += x_ND.sum(0)
        self.count += x_ND.shape[0]

    @property
    def mean_D(self) -> Tensor:
        return self.sum_D / self.count

    def moment(self, *, centered: bool) -> Tensor:
        """Covariance, or second moment about zero."""
        moment_DD = self.moment_DD / self.count
        return moment_DD - torch.outer(self.mean_D, self.mean_D) if centered else moment_DD

    def column_weights(self, size: int) -> Tensor:
        """Mean squared sensitivity of the block's output to each column, times the scale; equal if unknown."""
        if self.column_F is None:
            return torch.full((size,), self.scale, device=self.moment_DD.device)
        return self.scale * self.column_F / self.count


def collect_statistics(
    model: nn.Module,
    group: LayerGroup,
    blocks: Mapping[str, nn.Module],
    records: Sequence[Mapping[str, BlockCall]],
    spool: ActivationSpool,
    device: torch.device,
) -> dict[str, SiteStatistics]:
    """Statistics of every layer of a group by name: one forward pass of each block over all recorded batches."""
    statistics = {site.name: _empty(site, device) for site in group.sites}
    for name, block in blocks.items():
        mlps = [mlp for mlp in group.mlps if mlp.block == name]
        variance = RunningVariance()
        for record in records:
            variance.add(spool.get(record[name].output))
            args, kwargs = record[name].arguments(spool, device)
            with ExitStack() as stack, torch.enable_grad():
                taps = [stack.enter_context(_Tap(model, mlp)) for mlp in mlps]
                block(*args, **kwargs)
                with torch.autocast(device.type, enabled=False):
                    for tap in taps:
                        tap.collect(statistics)
        for mlp in mlps:
            for site in mlp.sites:
                statistics[site.name].scale = 1 / variance.value
    return statistics


def _empty(site: LinearSite, device: torch.device) -> SiteStatistics:
    inputs = site.width if site.role == "up" else site.columns
    return SiteStatistics(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, device=device))


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


class _Tap:
    """Hooks on the layers of one MLP for one forward pass."""

    def __init__(self, model: nn.Module, mlp: Mlp) -> None:
        self.sites = mlp.sites
        self.layers = [model.get_submodule(site.name) for site in mlp.sites]
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Tap:
        for site, layer in zip(self.sites, self.layers, strict=True):
            self._handles.append(layer.register_forward_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, site: LinearSite) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.inputs[site.name] = args[0]
            if site.role == "down":
                return output.detach()
            leaf = output.detach().requires_grad_(True)
            self.outputs[site.name] = leaf
            return leaf

        return hook

    def collect(self, statistics: Mapping[str, SiteStatistics]) -> None:
        for site in self.sites:
            x = self.inputs[site.name].detach().float()
            statistics[site.name].add_inputs(x.reshape(-1, x.shape[-1]))
        downs = [(site, layer) for site, layer in zip(self.sites, self.layers, strict=True) if site.role == "down"]
        if len(downs) != 1 or not self.outputs or not self.inputs[downs[0][0].name].requires_grad:
            return
        site, layer = downs[0]
        hidden = self.inputs[site.name]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        norms_F = weight.detach().float().norm(dim=1 if site.conv1d else 0)
        leaves = list(self.outputs.values())
        gradients = torch.autograd.grad(hidden, leaves, norms_F.to(hidden.dtype).expand_as(hidden), allow_unused=True)
        for name, gradient in zip(self.outputs, gradients, strict=True):
            if gradient is None:
                continue
            squared_F = gradient.float().square().reshape(-1, gradient.shape[-1]).sum(0)
            known = statistics[name].column_F
            statistics[name].column_F = squared_F if known is None else known + squared_F
