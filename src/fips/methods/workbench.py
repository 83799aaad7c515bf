"""What every method needs around its maths: forward passes, recorded activations, progress, packing."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Flag, auto
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fips.calibration.experts import complete_influence, complete_moments
from fips.calibration.heads import first_tensor
from fips.calibration.influence import Influence, collect_influence
from fips.calibration.inputs import CalibrationData, Wanted, few_examples, first_examples, numbered, place
from fips.calibration.moments import LayerMoments, collect_moments
from fips.calibration.precision import resolve_precision
from fips.calibration.preserve import RandomState
from fips.calibration.record import ActivationSpool, record_blocks
from fips.calibration.survey import NO_GRADIENT, survey_influence, survey_layers
from fips.calibration.sweep import Sweep
from fips.config import CompressionConfig
from fips.errors import DataError, FipsError
from fips.formats.patterns import FULL
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.models import LayerGroup, Site
from fips.plan.footprint import LayerStorage
from fips.plan.groups import GroupPlan
from fips.ranks import ALONE, Ranks
from fips.solve.alternate import Factorization
from fips.training.factors import swapped
from fips.training.reconstruct import BlockError, Records, block_errors

__all__ = [
    "MAX_ERROR_BATCHES",
    "CompressedGroup",
    "MemoryStore",
    "MomentCache",
    "Needs",
    "Progress",
    "ProgressEvent",
    "Store",
    "Workbench",
    "dense_matrix",
    "heads_of",
    "measured",
    "pack_group",
]

log = logging.getLogger("fips.methods")
T = TypeVar("T")

MAX_ERROR_BATCHES = 16
FEW = 8
"""Examples that are looked at a few at a time before whole batches are, to see that every layer runs."""


class Needs(Flag):
    """What a method wants to know of the model at work. Only that is measured."""

    NOTHING = 0
    INPUTS = auto()
    """Second moments of what layers read: forward passes."""
    GRADIENTS = auto()
    """Those of the gradients of what they write too: a backward pass for every forward pass."""
    INFLUENCE = auto()
    """How much each output and input counts: backward passes of a few examples."""
    ACTIVATIONS = auto()
    """What blocks read and return on all batches; on a few, for the errors in the report, they are always recorded."""


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step of work: ``done`` of ``total`` steps of a stage, the last loss.

    Stages: ``measure``, ``allot``, ``try``, ``solve``, ``record``, ``reconstruct``, ``distill``.
    """

    stage: str
    group: str
    done: int
    total: int
    loss: float | None = None


Progress = Callable[[ProgressEvent], None]
MomentCache = dict[tuple[Any, ...], dict[str, LayerMoments]]
"""Moments by layers, how they are measured and a digest of the data, for several compressions of one model. The oldest
go where they would take more than the ``metric.memory`` of the compression at work."""


@dataclass(slots=True)
class CompressedGroup:
    """A finished group: what it became, its packed layers, and its errors."""

    plan: GroupPlan
    bases: dict[str, SharedBasis]
    """By the name they are registered under."""
    layers: dict[str, FactoredLinear]
    start: tuple[BlockError, ...] = ()
    final: tuple[BlockError, ...] = ()
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


class Store(Protocol):
    """Finished pieces of work by name, each some tensors and fields for JSON."""

    def has(self, name: str) -> bool: ...

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None: ...

    def put(self, name: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None: ...

    def log(self, line: str) -> None:
        """Say what was finished, for those who look into it."""


class MemoryStore:
    """A store that lasts as long as the process."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def has(self, name: str) -> bool:
        return name in self._held

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self._held.get(name)

    def put(self, name: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
        self._held[name] = dict(tensors), dict(fields)

    def log(self, line: str) -> None:
        pass


@dataclass(slots=True)
class Workbench:
    """One model, its calibration batches, and what one compression may measure on them."""

    model: nn.Module
    config: CompressionConfig
    batches: CalibrationData
    device: torch.device
    needs: Needs
    temperature: float = 1.0
    """Of the softmax whose change gradients are of."""
    progress: Progress | None = None
    influence_examples: int = 0
    """From which the influence of layers is measured, where it is needed."""
    influence: dict[str, Influence] = field(default_factory=dict)
    """By layer, after ``survey``."""
    cache: MomentCache | None = None
    owns_cache: bool = False
    """Whether what is kept there is of use to this compression alone, which has seen that there is room for it."""
    moment_memory: int = 0
    """Bytes that moments kept for other compressions may take."""
    store: Store = field(default_factory=MemoryStore)
    """What is finished."""
    ranks: Ranks = ALONE
    file_bytes: int = 0
    """Most bytes of activations that were in a temporary file at once."""
    overfit: dict[str, float] = field(default_factory=dict)
    """By layer the error on data held out over that on the data fitted, where it was measured."""
    distilled: dict[str, Any] = field(default_factory=dict)
    """What distillation did (``Distilled.to_dict``), if there was any."""
    tokens: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By layer of an expert how many tokens reached it, and its inputs."""
    notes: list[str] = field(default_factory=list)
    """What went otherwise than asked for, for the report."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds that passed before each report of a stage, after the report before it."""
    _reported_at: float = field(default_factory=time.perf_counter)

    def note(self, text: str) -> None:
        """Say something in the report and, as a warning, in the log."""
        self.notes.append(text)
        log.warning("%s", text)

    def note_once(self, text: str) -> None:
        """As ``note``, of what more than one group may say."""
        if text not in self.notes:
            self.note(text)

    @contextmanager
    def noted(self) -> Iterator[list[str]]:
        """What is noted in a ``with`` block, to be kept with what is made there; complete at its end."""
        found: list[str] = []
        before = len(self.notes)
        yield found
        found += self.notes[before:]

    def note_kept(self, fields: Mapping[str, Any]) -> None:
        """Say again what was noted while a piece was made; pieces of earlier versions have no notes."""
        for text in fields.get("notes", ()):
            self.note_once(text)

    def survey(self, groups: Sequence[LayerGroup]) -> dict[str, str]:
        """Layers that the calibration data says nothing about, to be left dense, with the reason.

        At most one forward pass a batch, and a backward pass where gradients are needed.
        """
        sites = [site for group in groups for site in group.sites]
        if Needs.INFLUENCE in self.needs:
            self.influence = self.shared_influence(groups)
            found = survey_influence(sites, self.influence)
            complete_influence(sites, self.influence)
        else:
            found = survey_layers(
                self.model, sites, few_examples(self.batches, FEW), self.run, gradients=Needs.GRADIENTS in self.needs,
                temperature=self.temperature, seed=self.config.seed,
            )  # fmt: skip
        for name, reason in found.left.items():
            log.warning("`%s` is left dense: %s", name, reason)
        if found.blind and len(found.left) < len(sites):
            self.note(NO_GRADIENT)
        return found.left

    def shared_influence(self, groups: Sequence[LayerGroup]) -> dict[str, Influence]:
        """Measured by the first rank, once."""
        sites = [site for group in groups for site in group.sites]
        blocks = list(dict.fromkeys(block for group in groups for block in group.blocks))
        if self.ranks.first and not self.store.has("influence"):
            found = collect_influence(
                self.model, sites, blocks, few_examples(self.batches, self.influence_examples), self.run,
                examples=self.influence_examples, temperature=self.temperature, seed=self.config.seed,
            )  # fmt: skip
            held = {f"{name}.{key}": tensor for name, one in found.items() for key, tensor in one.tensors().items()}
            self.store.put("influence", held, {name: one.facts() for name, one in found.items()})
        self.ranks.wait()
        kept = self.store.get("influence")
        assert kept is not None
        tensors, facts = kept
        names = [name for site in sites for name in site.modules]
        return {name: Influence.of(name, tensors, facts[name], self.device) for name in names}

    def moments(
        self, name: str, sites: Sequence[Site], *, floor: float = 1.0, changed: bool = False
    ) -> dict[str, LayerMoments]:
        """What the layers read and how much what they write matters, in the model as it is.

        ``floor`` is the share of the weight that all tokens get alike. ``changed`` says that some layers are compressed
        already, so that nothing kept from before is of use.
        """
        assert Needs.GRADIENTS in self.needs, "a method that asks for gradients must declare that it needs them"
        how = (self.temperature, floor, self.config.seed)  # the seed is that of the random directions

        def measure() -> dict[str, LayerMoments]:
            return self.moments_of_part(name, sites, lambda _: True, floor=floor)

        return self.count_tokens(sites, self.cached([site.name for site in sites], how, measure, changed=changed))

    def moments_of_part(
        self, name: str, sites: Sequence[Site], wanted: Wanted, *, floor: float
    ) -> dict[str, LayerMoments]:
        """As ``moments``, of the batches whose numbers are wanted alone; not kept."""
        batches = (batch for _, batch in self.counted_part("measure", name, wanted))
        found = collect_moments(
            self.model, sites, batches, self.run, temperature=self.temperature, floor=floor, seed=self.config.seed
        )
        complete_moments(sites, found)
        return found

    def cached(
        self,
        names: Sequence[str],
        how: tuple[Any, ...],
        measure: Callable[[], dict[str, LayerMoments]],
        *,
        changed: bool = False,
        hold: bool = False,
    ) -> dict[str, LayerMoments]:
        """Moments that were kept from another compression of the model on the same data, or those measured now.

        With ``hold`` those kept will do only if they say what a part of the data says alone.
        """
        cache = None if changed else self.cache
        if cache is None:
            return measure()
        precision = resolve_precision(self.config.precision, self.model, self.device)
        key = (tuple(names), *how, precision, "" if self.owns_cache else self.batches.key())
        known = cache.get(key)
        if known is None or (hold and not all(one.held or one.parts < 2 for one in known.values())):
            known = measure()
            self._keep(cache, key, known)
        return known

    def _keep(self, cache: MomentCache, key: tuple[Any, ...], found: dict[str, LayerMoments]) -> None:
        """Make room in a cache and keep moments there, where all of them fit."""
        cache.pop(key, None)
        if not self.owns_cache and self.ranks.count == 1:  # of several ranks all must keep the same
            while cache and _nbytes(found, *cache.values()) > self.moment_memory:
                del cache[next(iter(cache))]
            if _nbytes(found) > self.moment_memory:
                return
        cache[key] = found

    def input_moments(self, name: str, groups: Sequence[LayerGroup], *, hold: bool = False) -> dict[str, LayerMoments]:
        """Second moments of what the layers of some groups read, all tokens alike."""
        assert Needs.INPUTS in self.needs, "a method that asks for moments must declare that it needs them"

        sites = [site for group in groups for site in group.sites if site.multiplied_by is not None]
        blocks = list(dict.fromkeys(block for group in groups for block in group.blocks))
        heads = heads_of(groups)

        def measure() -> dict[str, LayerMoments]:
            with self.sweep([*blocks, *heads], name, hold=hold, heads=heads) as sweep:
                return sweep.step(len(blocks) + len(heads), sites).moments

        return self.count_tokens(sites, self.cached([site.name for site in sites], ("inputs",), measure, hold=hold))

    def count_tokens(self, sites: Sequence[Site], moments: Mapping[str, LayerMoments]) -> dict[str, LayerMoments]:
        """Remember how many tokens reached experts; returns the moments."""
        self.tokens |= {
            site.name: (moments[site.name].weight, site.inputs)
            for site in sites
            if site.mixture and site.name in moments
        }
        return dict(moments)

    def say_tokens(self) -> None:
        """A note where experts had few tokens or none."""
        few = [weight for weight, inputs in self.tokens.values() if weight < inputs]
        if few:
            self.note(
                f"{len(few)} of {len(self.tokens)} matrices of experts were reached by fewer tokens of the calibration "
                f"data than they have inputs, {sum(weight == 0 for weight in few)} of them by none; what they lack was "
                "taken from the other experts of their mixtures: more examples would tell"
            )

    def keep_moments(self) -> None:
        """Keep what ``cached`` measures from now on, at least as long as this compression lasts."""
        if self.cache is None:
            self.cache, self.owns_cache = {}, True

    @contextmanager
    def recording(self, blocks: Sequence[str], count: int) -> Iterator[Sweep]:
        """A pass over the first ``count`` examples by this process alone, which records what blocks do to them."""
        batches = list(first_examples(self.batches, count))
        with (
            ActivationSpool(self.config.activation_memory) as spool,
            Sweep(
                self.model, blocks, numbered(batches), len(batches), self.run_body, spool, self.device,
                recorded=len(batches),
            ) as found,
        ):  # fmt: skip
            yield found

    @contextmanager
    def sweep(
        self, blocks: Sequence[str], name: str = "all", *, hold: bool = False, heads: Mapping[str, int] | None = None
    ) -> Iterator[Sweep]:
        """A pass over the data, a few of the blocks, in the order in which they run, at a time.

        ``heads`` are those of them that are output heads, with their outputs.
        """
        with (
            ActivationSpool(self.config.activation_memory) as spool,
            Sweep(
                self.model, blocks, partial(self.counted_part, "measure", name), len(self.batches),
                self.run if heads else self.run_body, spool, self.device, ranks=self.ranks, hold=hold, heads=heads,
            ) as found,
        ):  # fmt: skip
            yield found
            self.file_bytes = max(self.file_bytes, spool.file_bytes)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for one batch, on its device and in its type.

        A model that draws random numbers in evaluation, as masked autoencoders do, draws the same every time.
        """
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        inputs = place(batch, self.device, dtype)
        with RandomState.seeded(self.config.seed):
            return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)

    def run_body(self, model: nn.Module, batch: Any) -> Any:
        """As ``run`` where the output is not looked at: without the logits of all tokens but the last."""
        if isinstance(batch, Mapping) and "logits_to_keep" in inspect.signature(model.forward).parameters:
            batch = {**batch, "logits_to_keep": 1}
        return self.run(model, batch)

    def try_batch(self) -> None:
        """One forward pass of an example: ``DataError`` for inputs that the model cannot read, before the work."""
        batch = next(few_examples(self.batches, 1))
        try:
            with torch.no_grad():
                first_tensor(self.run(self.model, batch))
        except (FipsError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            names = "a tensor" if isinstance(batch, Tensor) else ", ".join(f"`{name}`" for name in batch)
            first = next(iter(str(error).strip().splitlines()), "")[:200]
            raise DataError(
                f"`{type(self.model).__name__}` cannot read the first batch ({names}): {type(error).__name__}: {first}"
                "; a batch is what `model(**batch)` or, for a tensor, `model(batch)` takes"
            ) from error

    @contextmanager
    def recorded(self, group: LayerGroup, *, limit: int | None = None) -> Iterator[tuple[Records, ActivationSpool]]:
        """Inputs and outputs of the group's blocks in the model as it is, for the first ``limit`` batches that run
        them."""
        assert limit is not None or Needs.ACTIVATIONS in self.needs, "a method must declare that it needs activations"
        with self.recorded_blocks(self.blocks(group), group.name, limit=limit) as found:
            yield found

    @contextmanager
    def recorded_blocks(
        self, blocks: Mapping[str, nn.Module], name: str, *, limit: int | None
    ) -> Iterator[tuple[Records, ActivationSpool]]:
        with ActivationSpool(self.config.activation_memory) as spool:
            batches = self.counted("record", name, limit=limit)
            with torch.no_grad():
                records = record_blocks(self.model, blocks, batches, spool, self.run, limit=limit)
            if limit is not None:
                self.report("record", name, len(records), len(records))
            yield records, spool
            self.file_bytes = max(self.file_bytes, spool.file_bytes)

    def blocks(self, group: LayerGroup) -> dict[str, nn.Module]:
        return {name: self.model.get_submodule(name) for name in group.blocks}

    def errors(self, group: LayerGroup, records: Records, spool: ActivationSpool) -> tuple[BlockError, ...]:
        """Block errors of the model as it is, on at most ``MAX_ERROR_BATCHES`` of the records."""
        return tuple(block_errors(self.blocks(group), records, spool, self.device, limit=MAX_ERROR_BATCHES))

    def errors_with(
        self, group: LayerGroup, layers: Mapping[str, nn.Module], records: Records, spool: ActivationSpool
    ) -> tuple[BlockError, ...]:
        with swapped(self.model, layers), torch.no_grad():
            return self.errors(group, records, spool)

    def final_errors(self, group: LayerGroup, layers: Mapping[str, nn.Module]) -> tuple[BlockError, ...]:
        """Block errors of finished layers on the first batches; none, with a warning, where measuring them fails."""

        def measure() -> tuple[BlockError, ...]:
            with self.recorded(group, limit=MAX_ERROR_BATCHES) as (records, spool):
                return self.errors_with(group, layers, records, spool)

        return measured(f"the block errors of group {group.name}", measure) or ()

    def counted(self, stage: str, group: str, *, limit: int | None = None) -> Iterator[Any]:
        """The batches, reported one by one; ``limit`` says how many will be asked for, more are not counted."""
        total = len(self.batches)
        total = min(total, limit) if limit is not None else total
        yield from (batch for _, batch in self._reported(stage, group, self.batches.part(), total))

    def counted_part(self, stage: str, group: str, wanted: Wanted) -> Iterator[tuple[int, Any]]:
        """The batches whose numbers are wanted, with their numbers, reported one by one."""
        return self._reported(stage, group, self.batches.part(wanted), len(self.batches))

    def _reported(
        self, stage: str, group: str, batches: Iterator[tuple[int, Any]], total: int
    ) -> Iterator[tuple[int, Any]]:
        for index, batch in batches:
            self.report(stage, group, min(index, total or index), total)
            yield index, batch
            self.report(stage, group, min(index + 1, total or index + 1), total)

    def report(self, stage: str, group: str, done: int, total: int, loss: float | None = None) -> None:
        now = time.perf_counter()
        self.phases[stage] = self.phases.get(stage, 0.0) + now - self._reported_at
        self._reported_at = now
        if self.progress is not None:
            self.progress(ProgressEvent(stage, group, done, total, loss))

    def weights(self, sites: Sequence[Site]) -> list[Tensor]:
        return [dense_matrix(self.model, site) for site in sites]

    def bias(self, site: Site) -> nn.Parameter | None:
        found = getattr(self.model.get_submodule(site.name), "bias", None)
        assert found is None or isinstance(found, nn.Parameter)
        return found


def _nbytes(*many: Mapping[str, LayerMoments]) -> int:
    return sum(moment.nbytes for moments in many for moment in moments.values())


def heads_of(groups: Sequence[LayerGroup]) -> dict[str, int]:
    """The output heads among some groups, with their outputs."""
    sites = [site for group in groups if group.is_end for site in group.sites]
    return {site.multiplied_by: site.outputs for site in sites if site.multiplied_by is not None}


def measured(what: str, measure: Callable[[], T]) -> T | None:
    """What ``measure`` finds, or None and a warning: a measurement must not cost the work it is about."""
    try:
        return measure()
    except Exception as error:
        log.warning("%s could not be measured, the report lacks them: %s: %s", what, type(error).__name__, error)
        return None


def dense_matrix(model: nn.Module, site: Site) -> Tensor:
    """Weight of a dense layer as (D, F): the residual stream on axis 0."""
    weight = model.get_submodule(site.name).weight
    assert isinstance(weight, Tensor)
    return site.matrix(weight.detach())


def pack_group(
    found: Factorization,
    sites: Sequence[Site],
    biases: Sequence[nn.Parameter | None],
    plan: GroupPlan,
    storages: Sequence[LayerStorage],
) -> tuple[dict[str, SharedBasis], dict[str, FactoredLinear]]:
    """The basis, if there is one, and the modules that stand in for the dense layers, by name."""
    basis = None if found.basis_DR is None else SharedBasis.of(found.basis_DR, plan.dtype)
    layers = {}
    for index, (site, bias, storage) in enumerate(zip(sites, biases, storages, strict=True)):
        mask_RF = found.masks_RF[index]
        mask_RF = torch.ones_like(mask_RF) if storage.fmt == FULL else mask_RF
        if found.grids is None:
            layer = FactoredLinear.from_factor(
                basis, found.factors_RF[index], mask_RF, role=site.role, fmt=storage.fmt, dtype=plan.dtype
            )
        else:
            grid = found.grids[index]
            layer = FactoredLinear.from_integers(
                basis, grid.codes_RF, mask_RF, grid.steps_N, role=site.role, fmt=storage.fmt, values=storage.values,
                group_scales=grid.group_steps, rotation=grid.rotation,
            )  # fmt: skip
        layer.bias = bias
        layer.conv1d = site.conv1d
        layers[site.name] = layer
    return {} if basis is None else {plan.group.name: basis}, layers
