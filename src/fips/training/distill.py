r"""End-to-end training of compressed layers with the original model as teacher; needs no labels and no second copy.

.. math:: \mathrm{KL}\left(\mathrm{softmax}(t / \tau) \,\|\, \mathrm{softmax}(y / \tau)\right) \tau^2
          + \lambda \frac{1}{L} \sum_l \frac{|h_l - g_l|^2}{\mathrm{Var}(g_l)}

with the logits t and block outputs g of the original and y, h of the compressed model. Models without logits are
trained on their block outputs alone. Some batches are held out: what is kept is the state whose loss on these was the
least, the one before training among them. Reference: Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import kl_div

from fips.calibration.heads import ScoredHead, first_tensor
from fips.calibration.tokens import TokenTracker
from fips.config import Settings
from fips.errors import DataError
from fips.training.factors import TrainableGroup, TrainableState, swapped
from fips.training.schedules import cosine

__all__ = ["DistillConfig", "Distilled", "distill_", "held_out_batches"]


class DistillConfig(Settings):
    """End-to-end training of the compressed layers with the original model as teacher; no labels."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps; 0 leaves it out."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW, linear warm-up over a tenth of the steps, then cosine to 0."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both softmaxes in the KL divergence."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean relative squared error of the block outputs, beside 1 for the logits."""
    held_out: float = Field(default=0.125, ge=0, le=0.5)
    """Share of the batches, at least one of several, that is not trained on. The loss on them is measured before
    training, every ``check_every`` steps and at the end, and the state with the least is kept. 0: the last is."""
    check_every: int = Field(default=10, ge=1)
    """Steps between two measurements of the loss on held-out batches."""
    patience: int = Field(default=3, ge=1)
    """Measurements in a row without a smaller loss after which training ends early."""


@dataclass(frozen=True, slots=True)
class Distilled:
    """What training did."""

    losses: list[float]
    """Of every step, on its batch."""
    checks: list[tuple[int, float]]
    """Steps done and the mean loss on held-out batches then, 0 steps first; empty where none are held out."""

    @property
    def kept(self) -> int:
        """Steps after which the model was what it is now."""
        return min(self.checks, key=lambda check: check[1])[0] if self.checks else len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {"steps": len(self.losses), "kept": self.kept, "held_out": [list(check) for check in self.checks]}


def held_out_batches(count: int, share: float) -> frozenset[int]:
    """Numbers of the batches that are not trained on, spread over all; none of a single batch."""
    wanted = min(max(round(share * count), 1), count - 1) if share else 0
    return frozenset((2 * index + 1) * count // (2 * wanted) for index in range(wanted))


WARMUP = 0.1
NEVER = -1e9
"""A logit whose probability is 0; with infinity the divergence would be 0 times infinity."""


def distill_(
    model: nn.Module,
    groups: Sequence[TrainableGroup],
    blocks: Sequence[nn.Module],
    batches: Iterable[Any],
    settings: DistillConfig,
    run: Callable[[nn.Module, Any], Any],
    on_step: Callable[[int, float], None] | None = None,
    *,
    held_out: Iterable[Any] = (),
) -> Distilled:
    """Train bases, factors on their supports and biases of all groups.

    One step takes one batch; ``batches`` is iterated again and again, ``held_out`` at every measurement. The teacher is
    ``model`` itself with its own layers in place, the student the same model with those of the groups. ``blocks`` are
    those whose outputs count with ``hidden_weight``.
    """
    rates = [part for group in groups for part in group.learning_rates(settings.learning_rate)]
    optimizer = torch.optim.AdamW(rates)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    layers: dict[str, nn.Module] = {}
    for group in groups:
        layers |= group.modules

    def loss_on(batch: Any, *, train: bool) -> float:
        weight = settings.hidden_weight
        with torch.no_grad(), _Outputs(model, blocks, weight) as teacher:
            target = teacher.tokens.heads(run(model, batch))
        with swapped(model, layers), torch.set_grad_enabled(train), _Outputs(model, blocks, weight) as student:
            loss = _loss(student.tokens.heads(run(model, batch)), target, student, teacher, settings)
            if train:
                loss.backward()  # here: what checkpoints recompute wants the student's layers in place
        return loss.item()

    best = _Best(groups, lambda: [loss_on(batch, train=False) for batch in held_out], settings.patience)
    best.check(0)
    losses: list[float] = []
    for step, batch in zip(range(settings.steps), _forever(batches), strict=False):
        losses.append(loss_on(batch, train=True))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step, losses[-1])
        done = step + 1
        if (done % settings.check_every == 0 or done == settings.steps) and best.check(done):
            break
    best.restore()
    return Distilled(losses, best.checks)


class _Best:
    """The state of groups with the least loss on held-out batches; without such batches whatever it is at last."""

    def __init__(self, groups: Sequence[TrainableGroup], measure: Callable[[], list[float]], patience: int) -> None:
        self.checks: list[tuple[int, float]] = []
        self._groups, self._measure, self._patience = groups, measure, patience
        self._states: list[TrainableState] = []
        self._since = 0

    def check(self, done: int) -> bool:
        """Measure after so many steps; whether it is time to end, since nothing has improved for long."""
        losses = self._measure()
        if not losses:
            return False
        loss = sum(losses) / len(losses)
        better = not self.checks or loss < min(one for _, one in self.checks)
        self.checks.append((done, loss))
        if better:
            self._states.clear()  # before there are others
            self._states = [group.state() for group in self._groups]
        self._since = 0 if better else self._since + 1
        return self._since >= self._patience

    def restore(self) -> None:
        """Put the best state back."""
        if self._since:
            for group, state in zip(self._groups, self._states, strict=True):
                group.restore(state)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, 1.0) * cosine(step, steps)


def _forever(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise DataError("there is no calibration batch to distill on")


class _Outputs(AbstractContextManager["_Outputs"]):
    """The outputs of some blocks in one forward pass, as rows that count; nothing where they do not count at all."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], weight: float) -> None:
        self.seen: dict[int, Tensor] = {}
        chosen = blocks if weight else ()
        self._handles = [block.register_forward_hook(self._hook(index)) for index, block in enumerate(chosen)]
        members = {id(block) for block in chosen}
        self.tokens = TokenTracker(model, [name for name, module in model.named_modules() if id(module) in members])

    def __exit__(self, *error: object) -> None:
        self.tokens.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            hidden = first_tensor(output)
            counted_T = self.tokens.counted(hidden)
            rows_TD = hidden.reshape(-1, hidden.shape[-1])
            self.seen[index] = rows_TD if counted_T is None else rows_TD[counted_T]

        return hook


def _loss(
    ours: Sequence[ScoredHead],
    theirs: Sequence[ScoredHead],
    student: _Outputs,
    teacher: _Outputs,
    config: DistillConfig,
) -> Tensor:
    loss = torch.stack([_head_loss(a, b, config.temperature) for a, b in zip(ours, theirs, strict=True)]).sum()
    if student.seen:
        parts = [_relative(student.seen[index], teacher.seen[index]) for index in sorted(student.seen)]
        loss = loss + config.hidden_weight * torch.stack(parts).mean()
    return loss


def _head_loss(ours: ScoredHead, theirs: ScoredHead, temperature: float) -> Tensor:
    y_TV, t_TV = (_scored(head.scores.float(), ours) for head in (ours, theirs))
    if ours.kind == "number":
        return _relative(y_TV, t_TV)
    if ours.kind == "sigmoid":  # the softmax of a number beside 0
        y_TV, t_TV = (torch.stack([z, torch.zeros_like(z)], -1).reshape(-1, 2) for z in (y_TV, t_TV))
        return _divergence(y_TV, t_TV, temperature) * ours.scores.shape[-1]
    return _divergence(y_TV, t_TV, temperature)


def _scored(scores: Tensor, head: ScoredHead) -> Tensor:
    """The rows (T, V) that count, of tokens or of examples; what cannot be chosen never is."""
    if head.choices is not None:
        scores = scores.masked_fill(~head.choices, NEVER)
    rows_TV = scores.reshape(-1, scores.shape[-1])
    return rows_TV if head.counted is None else rows_TV[head.counted.flatten()]


def _divergence(logits_TV: Tensor, wanted_TV: Tensor, temperature: float) -> Tensor:
    ours_TV, theirs_TV = logits_TV / temperature, wanted_TV / temperature
    divergence = kl_div(ours_TV.log_softmax(-1), theirs_TV.log_softmax(-1), log_target=True, reduction="batchmean")
    return divergence * temperature**2


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.float() - theirs.float()).square().mean() / theirs.float().var().clamp_min(1e-12)
