r"""Joint block-wise reconstruction of a group: basis and all its factors trained together.

Minimises :math:`\sum_l \mathrm{MSE}(\tilde f_l(x_l), f_l(x_l))` over the blocks l of a group, where :math:`x_l` are
the ORIGINAL activations, :math:`f_l` the original block and :math:`\tilde f_l` the block with factored layers.
Reference: arXiv 2411.09816, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fips.activations import ActivationSpool, BlockCall, first_tensor
from fips.config import CompressionConfig
from fips.solve.patterns import nm_mask, prune_and_regrow, unstructured_masks
from fips.solve.rounding import nearest_integers
from fips.solve.schedules import gmp_sparsity, rigl_fraction, update_steps
from fips.statistics import RunningVariance
from fips.structure import LinearSite

__all__ = ["BlockError", "TrainableGroup", "autocast_for", "block_errors", "calibrate_", "resolve_precision", "swapped"]

Records = Sequence[Mapping[str, BlockCall]]


class _TrainableLinear(nn.Module):
    """A factored layer during calibration: dense factor, mask, and the product B F formed once per step."""

    def __init__(
        self, basis_DR: nn.Parameter | None, factor_RF: Tensor, site: LinearSite, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self._borrowed = (basis_DR, bias)
        self.factor_RF = nn.Parameter(factor_RF)
        self.mask_RF = torch.ones_like(factor_RF, dtype=torch.bool)
        self.grid: tuple[Tensor, int] | None = None
        """Steps that broadcast over the factor, and the bits of an integer."""
        self.up = site.role == "up"
        self.weight = torch.empty(0, dtype=torch.int8)  # T5 asks for it, and casts its input to any other type
        self.want_dense_gradient = False
        self.dense_gradient_RF: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        basis_DR, bias = self._borrowed
        factor_RF = self.factor_RF * self.mask_RF
        if self.want_dense_gradient and factor_RF.requires_grad:
            factor_RF.register_hook(self._keep_gradient)
        if self.grid is not None:
            steps, bits = self.grid
            free_RF = factor_RF.detach()
            factor_RF = factor_RF + (nearest_integers(free_RF, steps, bits=bits) * steps - free_RF)
        weight_DF = (factor_RF if basis_DR is None else basis_DR @ factor_RF).to(x.dtype)
        return linear(x, weight_DF.T if self.up else weight_DF, None if bias is None else bias.to(x.dtype))

    def _keep_gradient(self, gradient_RF: Tensor) -> None:
        self.dense_gradient_RF = gradient_RF.detach()


def choose_masks(
    scores_RF: Sequence[Tensor], sites: Sequence[LinearSite], config: CompressionConfig, sparsity: float
) -> list[Tensor]:
    """Supports of the largest scores at a sparsity, in the pattern and scope of the settings.

    N:M runs along the reduction: the rank for ``up`` layers, the columns for ``down`` layers.
    """
    if config.nm is None:
        return unstructured_masks(scores_RF, sparsity=sparsity, scope=config.threshold)
    n, m = config.nm
    kept = max(n, round((1 - sparsity) * m))
    return [
        nm_mask(score, n=kept, m=m, dim=0 if site.role == "up" else 1)
        for score, site in zip(scores_RF, sites, strict=True)
    ]


class TrainableGroup:
    """Basis (None: the identity), factors and masks of one group while they are being found.

    ``sparsity`` is where pruning by magnitude ends; with None the supports are those set by ``set_masks``.
    """

    def __init__(
        self,
        basis_DR: Tensor | None,
        factors_RF: Sequence[Tensor],
        sites: Sequence[LinearSite],
        biases: Sequence[nn.Parameter | None],
        config: CompressionConfig,
        sparsity: float | None,
    ) -> None:
        self.config = config
        self.sparsity = sparsity
        self.sites = tuple(sites)
        self.biases = tuple(biases)
        self.basis_DR = None if basis_DR is None else nn.Parameter(basis_DR.clone())
        self.layers = [
            _TrainableLinear(self.basis_DR, factor_RF.clone(), site, bias)
            for factor_RF, site, bias in zip(factors_RF, sites, biases, strict=True)
        ]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The layer that stands in for each linear layer, by name."""
        return {site.name: layer for site, layer in zip(self.sites, self.layers, strict=True)}

    @property
    def parameters(self) -> list[nn.Parameter]:
        biases = [bias for bias in self.biases if bias is not None and bias.requires_grad]
        bases = [] if self.basis_DR is None else [self.basis_DR]
        return [*bases, *(layer.factor_RF for layer in self.layers), *biases]

    @property
    def masks(self) -> list[Tensor]:
        return [layer.mask_RF for layer in self.layers]

    @torch.no_grad()
    def choose_masks(self, sparsity: float) -> list[Tensor]:
        """Supports of the largest magnitudes at a sparsity, in the pattern and scope of the settings."""
        scores = [(layer.factor_RF * layer.mask_RF).abs() for layer in self.layers]
        return choose_masks(scores, self.sites, self.config, sparsity)

    def set_masks(self, masks: Sequence[Tensor]) -> None:
        """Use other supports; entries outside them keep their value, unused."""
        for layer, mask_RF in zip(self.layers, masks, strict=True):
            layer.mask_RF = mask_RF

    def set_steps(self, steps: Sequence[Tensor], bits: Sequence[int]) -> None:
        """Train integers of some bits times the step of their stored row; gradients pass the rounding as it were not.

        Reference: Bengio et al., arXiv 1308.3432 (straight-through estimator).
        """
        for layer, steps_N, width in zip(self.layers, steps, bits, strict=True):
            layer.grid = (steps_N.float().unsqueeze(0 if layer.up else 1), width)

    def prune(self, sparsity: float) -> None:
        """Keep the largest magnitudes at a sparsity and zero the rest for good."""
        self.set_masks(self.choose_masks(sparsity))
        for layer in self.layers:
            layer.factor_RF.data.mul_(layer.mask_RF)

    @torch.no_grad()
    def regrow(self, fraction: float, optimizer: torch.optim.Optimizer) -> None:
        """RigL: exchange a fraction of the support; exchanged entries are zeroed, their optimizer state too."""
        gradients = [layer.dense_gradient_RF for layer in self.layers]
        old = self.masks
        masks = prune_and_regrow(
            old,
            magnitudes=[layer.factor_RF for layer in self.layers],
            gradients=[gradient for gradient in gradients if gradient is not None],
            fraction=fraction,
            scope=self.config.threshold if self.sparsity is not None else "layer",
        )
        for layer, before, after in zip(self.layers, old, masks, strict=True):
            state = optimizer.state.get(layer.factor_RF, {})
            for tensor in (layer.factor_RF, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)):
                tensor.masked_fill_(before != after, 0.0)
        self.set_masks(masks)

    def want_dense_gradients(self, wanted: bool) -> None:
        for layer in self.layers:
            layer.want_dense_gradient = wanted


@dataclass(frozen=True, slots=True)
class BlockError:
    """Reconstruction error of one block over the recorded batches."""

    block: str
    mse: float
    relative: float
    """``mse`` divided by the variance of the original block's output."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is ``bfloat16`` where the hardware multiplies it natively, else ``float32``."""
    if precision == "auto":
        return "bfloat16" if _native_bfloat16(device) else "float32"
    return precision


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context in which matrix products run in the precision asked for."""
    if resolve_precision(precision, device) == "bfloat16":
        # No weight cache: it would hand out the basis of the first step for as long as the context lasts.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


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


@torch.no_grad()
def block_errors(
    blocks: Mapping[str, nn.Module], records: Records, spool: ActivationSpool, device: torch.device
) -> list[BlockError]:
    """Error of every block on the recorded batches, each batch weighted by its number of entries."""
    results = []
    for name, block in blocks.items():
        squared, variance = 0.0, RunningVariance()
        for record in records:
            target = spool.get(record[name].output).to(device).double()
            args, kwargs = record[name].arguments(spool, device)
            squared += (first_tensor(block(*args, **kwargs)).double() - target).square().sum().item()
            variance.add(target)
        mse = squared / variance.count
        results.append(BlockError(name, mse, mse / variance.value))
    return results


def calibrate_(
    group: TrainableGroup,
    blocks: Mapping[str, nn.Module],
    records: Records,
    spool: ActivationSpool,
    device: torch.device,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a group whose layers are already swapped into ``blocks``; returns the loss of every step.

    One step takes one recorded batch; batches come in a seeded random order, reshuffled every pass. The support
    follows ``config.support_schedule`` and has its final sparsity from ``update_end`` of the steps on.
    """
    settings, steps = group.config.calibration, group.config.calibration_steps
    optimizer = torch.optim.AdamW(group.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(1, steps), eta_min=min(settings.min_learning_rate, settings.learning_rate)
    )
    support = _Support(group, optimizer)
    losses: list[float] = []
    for step, index in zip(range(steps), _draw(len(records), group.config.seed), strict=False):
        support.before(step)
        loss = torch.zeros((), device=device)
        for name, block in blocks.items():
            args, kwargs = records[index][name].arguments(spool, device)
            output = first_tensor(block(*args, **kwargs)).float()
            part = torch.nn.functional.mse_loss(output, spool.get(records[index][name].output).to(device).float())
            part.backward()
            loss += part.detach()
        support.after(step)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def _draw(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


class _Support:
    """Applies the sparsity schedule: pruning before a step, RigL after its backward pass."""

    def __init__(self, group: TrainableGroup, optimizer: torch.optim.Optimizer) -> None:
        settings = group.config.calibration
        self.group, self.optimizer = group, optimizer
        self.schedule = group.config.support_schedule
        self.final = group.sparsity
        steps = group.config.calibration_steps
        self.updates = update_steps(steps=steps, every=settings.update_every, end=settings.update_end)
        self.initial = min(settings.initial_sparsity, self.final or 0.0)
        self.fraction = settings.regrow_fraction

    def before(self, step: int) -> None:
        if self.final is None:
            pass  # the solver has found the support
        elif self.schedule == "gmp" and step in self.updates:
            sparsity = gmp_sparsity(step, initial=self.initial, final=self.final, begin=0, end=self.updates[-1])
            self.group.prune(sparsity)
        elif step == 0:
            self.group.prune(self.final)
        self.group.want_dense_gradients(self._regrows(step))

    def after(self, step: int) -> None:
        if self._regrows(step):
            self.group.regrow(rigl_fraction(step, initial=self.fraction, end=self.updates[-1]), self.optimizer)

    def _regrows(self, step: int) -> bool:
        return self.schedule == "rigl" and step in self.updates[1:-1]
