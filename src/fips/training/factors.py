r"""Compressed layers while their numbers are being found: dense factors on a support, in place of the packed ones.

A factor is free numbers, or integers on a grid: :math:`C_{rf} = s_n \lfloor u_{rf} \rceil` with one step
:math:`s_n` per stored row n. Then both u, in units of the step, and s are trained (``fips.training.rounded``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fips.config import SparseConfig
from fips.models import Site
from fips.solve.alternate import Factorization
from fips.solve.patterns import prune_and_regrow, unstructured_masks
from fips.solve.rounding import Grid
from fips.training.rounded import INTEGER_RATE, STEP_RATE, rounded_numbers, rounded_steps

__all__ = ["TrainableGroup", "TrainableState", "swapped"]

TrainableState = tuple[list[Tensor], list[Tensor]]
"""Values of all that is trained, and supports."""

EDGE = 0.49
"""Farthest from its integer that an entry starts, in steps."""


class _TrainableGrid(nn.Module):
    """Multiples of the steps of a grid, by numbers of its value format; steps of rows are trained, in the type they are
    stored in, group steps stay. So do numbers that are coded together: a change of one would change others."""

    def __init__(self, start: Grid) -> None:
        super().__init__()
        self.values, self.grid = start.values, start
        self.start = start.steps_N.float()
        self.fixed_RF = start.numbers().float() if start.values.memory else None
        self.growth = nn.Parameter(torch.zeros_like(self.start))
        self.dtype = start.steps_N.dtype

    def steps(self) -> Tensor:
        """The trained steps of the stored rows as they will be stored."""
        return rounded_steps(self.start * (1 + self.growth), self.dtype)

    def forward(self, entries: Tensor) -> Tensor:
        """The numbers that entries in units of the steps stand for."""
        if self.fixed_RF is not None:
            return self.grid.turned(self.fixed_RF * self.grid.spread(self.steps()))
        return self.grid.turned(rounded_numbers(entries, self.values) * self.grid.spread(self.steps()))

    def found(self, entries_RF: Tensor, mask_RF: Tensor) -> Grid:
        """The numbers of the grid next to the entries, 0 outside the mask, and the steps."""
        steps_N = self.steps().to(self.dtype)
        if self.fixed_RF is not None:
            return replace(self.grid, steps_N=steps_N, wanted_RF=None)
        codes_RF = self.values.encode(self.values.nearest(entries_RF) * mask_RF)
        return replace(self.grid, codes_RF=codes_RF, steps_N=steps_N, wanted_RF=None)


class _TrainableLinear(nn.Module):
    """A factored layer: entries, mask, and the product B C formed once per step."""

    def __init__(self, basis_DR: nn.Parameter | None, factor_RF: Tensor, site: Site, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._borrowed = (basis_DR, bias)
        self.entries_RF = nn.Parameter(factor_RF)
        """The factor, in units of its steps where it is on a grid; entries outside the mask mean nothing."""
        self.mask_RF = torch.ones_like(factor_RF, dtype=torch.bool)
        self.grid: _TrainableGrid | None = None
        self.role = site.role
        self.weight = torch.empty(0, dtype=torch.int8)  # T5 asks for it, and casts its input to any other type
        self.want_dense_gradient = False
        self.dense_gradient_RF: Tensor | None = None

    def set_grid(self, start: Grid) -> None:
        self.grid = _TrainableGrid(start)
        numbers_RF = start.numbers().float()
        rest_RF = 0.0 if start.wanted_RF is None else (start.wanted_RF - numbers_RF).clamp(-EDGE, EDGE)
        self.entries_RF.data = numbers_RF + rest_RF

    def factor(self) -> Tensor:
        """The factor as it would be stored, 0 outside the mask."""
        return (self.entries_RF if self.grid is None else self.grid(self.entries_RF)) * self.mask_RF

    def forward(self, x: Tensor) -> Tensor:
        basis_DR, bias = self._borrowed
        factor_RF = self.factor()
        if self.want_dense_gradient and factor_RF.requires_grad:
            factor_RF.register_hook(self._keep_gradient)
        weight_DF = (factor_RF if basis_DR is None else basis_DR @ factor_RF).to(x.dtype)
        return linear(x, self.role.to_linear(weight_DF), None if bias is None else bias.to(x.dtype))

    def _keep_gradient(self, gradient_RF: Tensor) -> None:
        known_RF, found_RF = self.dense_gradient_RF, gradient_RF.detach()
        self.dense_gradient_RF = found_RF if known_RF is None else known_RF + found_RF


class TrainableGroup:
    """Basis (None: the identity), factors, masks and biases of one group while they are being found.

    All train in 32 bits at least, whatever the model stores: steps of 1e-4 of a number of 16 bits round away, and the
    second moments of Adam are zero in them. ``biases`` are copied.

    ``sparsity`` is where pruning by magnitude ends; with None the supports are those set by ``set_masks``. ``scope``
    says whether one threshold holds for all factors of the group or one for each.
    """

    def __init__(
        self,
        basis_DR: Tensor | None,
        factors_RF: Sequence[Tensor],
        sites: Sequence[Site],
        biases: Sequence[nn.Parameter | None],
        config: SparseConfig,
        sparsity: float | None,
        scope: Literal["group", "layer"] = "layer",
    ) -> None:
        self.config = config
        self.scope = scope
        self.sparsity = sparsity
        self.sites = tuple(sites)
        self._given = tuple(biases)
        self.biases = tuple(None if bias is None else _wide(bias) for bias in biases)
        self.basis_DR = None if basis_DR is None else nn.Parameter(basis_DR.clone())
        self.layers = [
            _TrainableLinear(self.basis_DR, factor_RF.clone(), site, bias)
            for factor_RF, site, bias in zip(factors_RF, sites, self.biases, strict=True)
        ]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The layer that stands in for each linear layer, by name."""
        return {site.name: layer for site, layer in zip(self.sites, self.layers, strict=True)}

    def stored_biases(self) -> list[nn.Parameter | None]:
        """What training has made of the biases, in the types they came in."""
        return [
            None if bias is None or given is None
            else nn.Parameter(bias.detach().to(given.dtype), requires_grad=given.requires_grad)
            for bias, given in zip(self.biases, self._given, strict=True)
        ]  # fmt: skip

    def state(self) -> TrainableState:
        """Copies of all that is trained, and of the supports, for ``restore``."""
        return [one.detach().clone() for one in self._parameters()], [mask.clone() for mask in self.masks]

    @torch.no_grad()
    def restore(self, state: TrainableState) -> None:
        """Be what the group was when it gave its ``state``."""
        values, masks = state
        self.set_masks(masks)
        for parameter, value in zip(self._parameters(), values, strict=True):
            parameter.copy_(value)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.learning_rates(1.0) for parameter in part["params"]]

    def learning_rates(self, learning_rate: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer whose steps are of about the learning rate (Adam).

        Free numbers move by it, integers and steps by what amounts to the same relative to their size, undecayed.
        """
        biases = [bias for bias in self.biases if bias is not None and bias.requires_grad]
        free = [*([] if self.basis_DR is None else [self.basis_DR]), *biases]
        free += [layer.entries_RF for layer in self.layers if layer.grid is None]
        grids = [layer.grid.growth for layer in self.layers if layer.grid is not None]
        moving = [layer for layer in self.layers if layer.grid is not None and layer.grid.fixed_RF is None]
        spacings = {layer: layer.grid.values.spacing for layer in moving if layer.grid is not None}
        found = [
            {"params": free, "lr": learning_rate, "weight_decay": weight_decay},
            *(
                {
                    "params": [layer.entries_RF for layer in moving if spacings[layer] == spacing],
                    "lr": INTEGER_RATE * spacing * learning_rate, "weight_decay": 0.0,
                }
                for spacing in sorted(set(spacings.values()))
            ),
            {"params": grids, "lr": STEP_RATE * learning_rate, "weight_decay": 0.0},
        ]  # fmt: skip
        return [part for part in found if part["params"]]

    @property
    def masks(self) -> list[Tensor]:
        return [layer.mask_RF for layer in self.layers]

    @torch.no_grad()
    def choose_masks(self, sparsity: float) -> list[Tensor]:
        """Supports of the largest magnitudes at a sparsity, in the pattern and scope of the settings.

        N:M runs along the reduction: the rank for ``up`` layers, the hidden features for ``down`` layers.
        """
        scores = [layer.factor().abs() for layer in self.layers]
        pattern = self.config.format
        if pattern.density is None:
            return unstructured_masks(scores, sparsity=sparsity, scope=self.scope)
        return [
            pattern.choose_fixed(score, axis=layer.role.reduction, density=1 - sparsity)
            for score, layer in zip(scores, self.layers, strict=True)
        ]

    def set_masks(self, masks: Sequence[Tensor]) -> None:
        """Use other supports; entries outside them keep their value, unused."""
        for layer, mask_RF in zip(self.layers, masks, strict=True):
            layer.mask_RF = mask_RF

    def set_grids(self, grids: Sequence[Grid]) -> None:
        """Train numbers of a value format times the step of their stored row, and the steps in their type.

        Where a grid says what was rounded to its integers, they start that near to the next: those whose rounding was
        a close thing are the first to change.
        """
        for layer, start in zip(self.layers, grids, strict=True):
            layer.set_grid(start)

    @torch.no_grad()
    def found(self) -> Factorization:
        """What training has made of the group, as a solver would return it."""
        basis_DR = None if self.basis_DR is None else self.basis_DR.detach()
        grids = [layer.grid.found(layer.entries_RF, layer.mask_RF) for layer in self.layers if layer.grid is not None]
        return Factorization(basis_DR, [layer.factor() for layer in self.layers], self.masks, [], grids or None)

    def prune(self, sparsity: float) -> None:
        """Keep the largest magnitudes at a sparsity and zero the rest for good."""
        self.set_masks(self.choose_masks(sparsity))
        for layer in self.layers:
            layer.entries_RF.data.mul_(layer.mask_RF)

    @torch.no_grad()
    def regrow(self, fraction: float, optimizer: torch.optim.Optimizer) -> None:
        """RigL: exchange a fraction of the support; exchanged entries are zeroed, their optimizer state too.

        Layers that the batch did not reach, as experts may be, have no gradient and stay as they are.
        """
        reached = {layer: found for layer in self.layers if (found := layer.dense_gradient_RF) is not None}
        masks = prune_and_regrow(
            [layer.mask_RF for layer in reached],
            magnitudes=[layer.factor() for layer in reached],
            gradients=list(reached.values()),
            fraction=fraction,
            scope=self.scope,
        )
        for layer, after in zip(reached, masks, strict=True):
            state = optimizer.state.get(layer.entries_RF, {})
            for tensor in (layer.entries_RF, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)):
                tensor.masked_fill_(layer.mask_RF != after, 0.0)
            layer.mask_RF, layer.dense_gradient_RF = after, None

    def want_dense_gradients(self, wanted: bool) -> None:
        for layer in self.layers:
            layer.want_dense_gradient = wanted


def _wide(bias: nn.Parameter) -> nn.Parameter:
    """A copy to train, in 32 bits at least."""
    wide = bias.detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)
    return nn.Parameter(wide, requires_grad=bias.requires_grad)


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in place of others for a ``with`` block; the originals come back even after an error."""
    originals = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
