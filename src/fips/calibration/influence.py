r"""How much the outputs and inputs of layers count, told by the gradients of a few examples.

For every output o of a layer, with :math:`\delta = \partial \ell / \partial z` (see ``fips.calibration.moments``), and
for every input i, about its mean :math:`\mu` where a bias can absorb that:

.. math:: \frac{1}{E} \sum_t \delta_{to}^2, \qquad \frac{1}{T} \sum_t (x_{ti} - \mu_i)^2 .

An error of an output costs the first on average, whatever its tokens; both together tell beforehand, roughly, what
rounding a layer to so many bits does to the model. They are vectors and no matrices, so a few examples are enough.

An embedding is a layer whose inputs are 1 for the token at hand and 0 for all others: the mean square of input i is how
often token i occurs.

Shape legend: T tokens, E examples, I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fips.calibration.heads import draw_direction
from fips.calibration.moments import CONSTANT, real_device
from fips.calibration.preserve import replaced_forward
from fips.calibration.tokens import TokenTracker
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
    def empty(cls, site: Site, device: torch.device, *, looked_up: bool = False) -> Influence:
        inputs, outputs = (site.outputs, site.inputs) if looked_up else (site.inputs, site.outputs)
        inputs_I = torch.zeros(inputs, device=device)
        return cls(inputs_I, torch.zeros(outputs, device=device), torch.zeros_like(inputs_I))

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

    def add_inputs(self, x_TI: Tensor) -> None:
        self.inputs_I += x_TI.square().sum(0)
        self.sum_I += x_TI.sum(0)
        self.tokens += len(x_TI)

    def add_ids(self, ids_T: Tensor) -> None:
        """Of an embedding the tokens it looked up; on the meta device, where nothing tells them, all count alike."""
        if ids_T.is_meta:
            counts_I = torch.ones_like(self.inputs_I)
        else:
            counts_I = torch.bincount(ids_T, minlength=len(self.inputs_I)).to(self.inputs_I.dtype)
        self.inputs_I += counts_I
        self.sum_I += counts_I
        self.tokens += len(ids_T)

    def add_gradient(self, gradient: Tensor, valid_T: Tensor | None) -> None:
        self.reached = True
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        gradient_TO = gradient_TO if valid_T is None else gradient_TO[valid_T]
        self.outputs_O += gradient_TO.float().square().sum(0)

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
    blocks: Sequence[str],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    examples: int,
    temperature: float,
    seed: int,
) -> dict[str, Influence]:
    """What the first ``examples`` tell of the layers of ``sites``, and more where some have not counted yet.

    By the names of modules: a matrix that an embedding looks up and a head multiplies by has both.

    ``run(model, batch)`` returns the model's output, whose parameters must not require gradients. The graph of one of
    ``blocks`` at a time is in memory: what happens inside is computed again in the backward pass. Raises ``ModelError``
    or ``DataError`` if an output is NaN, ``DataError`` if there is no batch.
    """
    device = next(model.parameters()).device
    lookups = {name for site in sites if site.looked_up for name in site.lookups}
    found = {name: Influence.empty(site, device, looked_up=name in lookups) for site in sites for name in site.modules}
    generator = torch.Generator(real_device(device)).manual_seed(seed)
    seen = 0
    with _Probe(model, blocks, found, lookups) as probe, torch.enable_grad():
        for batch in batches:
            if seen >= examples and _all_count(sites, found):
                break
            with probe.forward():
                heads = probe.tokens.heads(run(model, batch))
            directions = [draw_direction(head, temperature, generator) for head in heads]
            for head, direction in zip(heads, directions, strict=True):
                finite = head.scores.is_meta or bool(direction.isfinite().all())
                if not finite or (not head.scores.is_meta and bool(head.scores.isnan().any())):
                    raise overflow_error(model, batch, run, where="the model's output is not finite")
            parts = [(head.scores.float() * way).sum() for head, way in zip(heads, directions, strict=True)]
            loss = torch.stack(parts).sum()
            seen += heads[0].scores.shape[0]
            del heads, directions, parts
            if loss.requires_grad:  # nothing reaches the output of a batch that does without these layers
                loss.backward()
    if not seen:
        raise DataError("the calibration data has no batch; give at least one")
    for site in sites:
        for name in site.modules:
            found[name].finish(centered=site.has_bias, examples=seen)
    return found


def _all_count(sites: Sequence[Site], found: Mapping[str, Influence]) -> bool:
    """Whether every layer has counted, of a mixture one of its experts."""
    counts = {site.name: any(found[name].counts for name in site.judges) for site in sites}
    reached = {site.mixture for site in sites if site.mixture and counts[site.name]}
    return all(counts[site.name] or site.mixture in reached for site in sites)


class _Probe(AbstractContextManager["_Probe"]):
    """Hooks on layers, and blocks that forget what they computed until their gradients are wanted."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], found: Mapping[str, Influence], lookups: Collection[str] = ()
    ) -> None:
        self._stack = ExitStack()
        self._found, self._forward, self._lookups = found, False, lookups
        for name in blocks:
            self._stack.enter_context(_checkpointed(model.get_submodule(name)))
        for name in found:
            hook = model.get_submodule(name).register_forward_hook(self._hook(name))
            self._stack.callback(hook.remove)
        self.tokens = TokenTracker(model, list(found))

    def __exit__(self, *error: object) -> None:
        self.tokens.__exit__(*error)
        self._stack.close()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass, whose inputs count; those met again on the way back do not."""
        self._forward = True
        try:
            yield
        finally:
            self._forward = False

    def _hook(self, name: str) -> Any:
        influence, looks_up = self._found[name], name in self._lookups

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            valid_T = self.tokens.counted(args[0]) if self._forward else None
            if self._forward and looks_up:
                ids_T = args[0].detach().flatten()
                influence.add_ids(ids_T if valid_T is None else ids_T[valid_T])
            elif self._forward:
                x_TI = args[0].detach().reshape(-1, args[0].shape[-1])
                influence.add_inputs((x_TI if valid_T is None else x_TI[valid_T]).float())
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            if self._forward:
                output.register_hook(lambda gradient: influence.add_gradient(gradient, valid_T))
            return output

        return hook


def _checkpointed(block: nn.Module) -> AbstractContextManager[None]:
    forward = block.forward
    return replaced_forward(block, lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs))
