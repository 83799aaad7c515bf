r"""Joint block-wise reconstruction of a group: basis and all its factors trained together.

Minimises :math:`\sum_l \mathrm{MSE}(\tilde f_l(x_l), f_l(x_l))` over the blocks l of a group, where :math:`x_l` are
the ORIGINAL activations, :math:`f_l` the original block and :math:`\tilde f_l` the block with factored layers.
Reference: arXiv 2411.09816, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fips.calibration.heads import first_tensor
from fips.calibration.moments import RunningVariance
from fips.calibration.record import ActivationSpool, BlockCall
from fips.training.factors import TrainableGroup
from fips.training.schedules import cosine, gmp_sparsity, rigl_fraction, update_steps

__all__ = ["BlockError", "block_errors", "reconstruct_"]

Records = Sequence[Mapping[str, BlockCall]]


@dataclass(frozen=True, slots=True)
class BlockError:
    """Reconstruction error of one block over the recorded batches."""

    block: str
    mse: float
    relative: float
    """``mse`` divided by the variance of the original block's output; of a constant, by its square."""


@torch.no_grad()
def block_errors(
    blocks: Mapping[str, nn.Module],
    records: Records,
    spool: ActivationSpool,
    device: torch.device,
    *,
    limit: int | None = None,
) -> list[BlockError]:
    """Error of every block on the recorded batches that run it, each weighted by its number of entries.

    Padding has no error. At most the first ``limit`` of the batches are taken.
    """
    results = []
    for name, block in blocks.items():
        squared, variance = 0.0, RunningVariance()
        for record in [record for record in records if name in record][:limit]:
            call = record[name]
            target_TD = call.rows(spool.get(call.output).to(device).double())
            args, kwargs = call.arguments(spool, device)
            output_TD = call.rows(first_tensor(block(*args, **kwargs)).double())
            squared += (output_TD - target_TD).square().sum().item()
            variance.add(target_TD)
        if variance.count:
            mse = squared / variance.count
            results.append(BlockError(name, mse, mse / variance.scale))
    return results


def reconstruct_(
    group: TrainableGroup,
    blocks: Mapping[str, nn.Module],
    records: Records,
    spool: ActivationSpool,
    device: torch.device,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a group whose layers are already swapped into ``blocks``; returns the loss of every step.

    One step takes one recorded batch; batches come in a seeded random order, reshuffled every pass. The support
    follows ``config.schedule`` and has its final sparsity from ``update_end`` of the steps on.
    """
    settings = group.config.reconstruction
    steps, rate = settings.steps, settings.learning_rate
    optimizer = torch.optim.AdamW(group.learning_rates(rate, weight_decay=settings.weight_decay))
    last = min(settings.min_learning_rate / rate, 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: last + (1 - last) * cosine(step, max(1, steps))
    )
    support = _Support(group, optimizer)
    losses: list[float] = []
    for step, index in zip(range(steps), _draw(len(records), group.config.seed), strict=False):
        support.before(step)
        loss = torch.zeros((), device=device)
        for name, block in blocks.items():
            if name not in records[index]:
                continue
            call = records[index][name]
            args, kwargs = call.arguments(spool, device)
            output_TD = call.rows(first_tensor(block(*args, **kwargs)).float())
            part = torch.nn.functional.mse_loss(output_TD, call.rows(spool.get(call.output).to(device).float()))
            part.backward()
            loss += part.detach()
        support.after(step)
        optimizer.step()
        schedule.step()
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
        settings = group.config.reconstruction
        self.group, self.optimizer = group, optimizer
        self.schedule = group.config.schedule
        self.final = group.sparsity
        self.updates = update_steps(steps=settings.steps, every=settings.update_every, end=settings.update_end)
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
