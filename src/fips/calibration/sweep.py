r"""One pass over the calibration data in steps of a few blocks, with the second moments of what their layers read.

.. math:: E\left[(x - \mu)(x - \mu)^\top\right]

All tokens alike, padding left out; :math:`\mu = 0` where no bias can absorb the mean error. What a step returns is
handed to the next one (``fips.calibration.relay``), so every block runs once, and only the moments of the blocks at
work are in memory. Where all of them fit there is one step, which is a plain pass. A model whose blocks are no chain is
run from its start in every step.

The batches are split into ``CHUNKS`` parts of the same order whatever the number of steps, and sums are those of the
parts, added in their order: moments do not depend on how many steps there are.

Shape legend: T tokens of a batch, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fips.calibration.experts import complete_moments
from fips.calibration.inputs import Wanted, few_examples
from fips.calibration.moments import LayerMoments, real_device
from fips.calibration.preserve import replaced_forward
from fips.calibration.record import ActivationSpool, BlockCall, BlockRecorder, Stored, map_leaves
from fips.calibration.relay import NotAChain, Relay
from fips.calibration.tokens import TokenTracker
from fips.errors import DataError
from fips.models import Site
from fips.plan.finite import overflow_error
from fips.ranks import ALONE, Ranks

__all__ = ["CHUNKS", "Step", "Sweep"]

CHUNKS = 8
"""Parts of the batches that are summed by themselves."""


@dataclass(slots=True)
class Step:
    """What a step has seen."""

    moments: dict[str, LayerMoments]
    records: list[dict[str, BlockCall]] = field(default_factory=list)
    """What its blocks were given and returned in the first passes."""

    def release(self, spool: ActivationSpool) -> None:
        """Give up the records."""
        places: dict[int, Stored] = {}

        def note(leaf: Any) -> None:
            if isinstance(leaf, Stored):
                places[id(leaf)] = leaf

        for record in self.records:
            map_leaves([(call.args, call.kwargs, call.output) for call in record.values()], note)
        for stored in places.values():
            spool.forget(stored)
        self.records = []


class Sweep(AbstractContextManager["Sweep"]):
    """``blocks`` of a model in the order in which they run; ``batches`` are counted and the same on every pass.

    ``batches(wanted)`` are those whose numbers are wanted. ``run(model, batch)`` makes a forward pass. ``spool`` keeps
    what is handed from step to step, and what the first ``recorded`` batches do to blocks, for ``Step.records``. With
    ``hold`` moments say what every other of the parts says alone, too. Of ``heads`` only the inputs are of interest:
    they answer with zeros that take no memory.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Callable[[Wanted], Iterator[tuple[int, Any]]],
        count: int,
        run: Callable[[nn.Module, Any], Any],
        spool: ActivationSpool,
        device: torch.device,
        *,
        recorded: int = 0,
        ranks: Ranks = ALONE,
        hold: bool = False,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        self.hold, self._heads = hold, heads or {}
        self.ranks = ranks
        self.model, self.blocks, self.run, self.spool, self.device = model, list(blocks), run, spool, device
        self._batches, self._count, self._recorded = batches, count, recorded
        self.at = 0
        """Blocks that have been passed."""
        self._relay: Relay | None = None
        self._probed = False

    def __exit__(self, *_: object) -> None:
        self._relay = None

    def skip(self, count: int) -> None:
        """Pass over the next blocks, of which nothing is wanted."""
        self.at += count

    @torch.no_grad()
    def step(self, count: int, sites: Sequence[Site], owners: Mapping[str, int] | None = None) -> Step:
        """Moments of what layers of the next ``count`` blocks read, layers that read the same sharing one.

        With several ranks each runs its part of the batches, and a layer's moments come together at the rank that
        ``owners`` names. Records are those of the first rank. Raises ``DataError`` if a layer never runs,
        ``ModelError`` or ``DataError`` if what it reads is not finite. Experts that few or no tokens reached get what
        is missing from the others of their mixture (``fips.calibration.experts``).
        """
        self._probe()
        names = self.blocks[self.at : self.at + count]
        self.at += count
        while True:
            taps = _Taps(self.model, sites, self.device, self.ranks, owners or {}, self.hold)
            try:
                with ExitStack() as stack:
                    recorder = self._recorder(names)
                    if recorder is not None:
                        stack.enter_context(recorder)
                    for name, outputs in self._heads.items():
                        stack.enter_context(replaced_forward(self.model.get_submodule(name), _zeros(outputs)))
                    stack.enter_context(taps)
                    self._pass(self._watched(taps, recorder))
            except NotAChain:
                self._keep_more()
                continue
            taps.finish(sites, self._overflow)
            complete_moments([site for site in sites if taps.owned(site)], taps.total)
            return Step(taps.total, [] if recorder is None else recorder.records)

    def _probe(self) -> None:
        """See by an example whether the blocks are a chain."""
        if self._probed:
            return
        self._probed = True
        relay = Relay(self.model, self.blocks, self.run, self.spool, self.device)
        with suppress(NotAChain):
            relay.probe(next(few_examples(self._first(), 1)))
            self._relay = relay

    def _recorder(self, names: Sequence[str]) -> BlockRecorder | None:
        blocks = {name: self.model.get_submodule(name) for name in names}
        wanted = self._recorded and blocks and self.ranks.first
        return BlockRecorder(self.model, blocks, self.spool) if wanted else None

    def _watched(self, taps: _Taps, recorder: BlockRecorder | None) -> Iterator[Any]:
        """The batches of this rank, closed one by one."""
        for index, batch in self._batches(lambda index: self.ranks.owner(self._chunk(index)) == self.ranks.index):
            taps.begin(self._chunk(index))
            if recorder is not None:
                recorder.wants = index < self._recorded or recorder.missing
            yield batch
            if recorder is not None:
                recorder.end_pass()

    def _chunk(self, index: int) -> int:
        """The part that the batch with a number belongs to."""
        return index * CHUNKS // max(self._count, 1)

    def _first(self) -> Iterator[Any]:
        return (batch for _, batch in self._batches(lambda index: index == 0))

    def _pass(self, batches: Iterator[Any]) -> None:
        """Run the model up to where the sweep is now."""
        relay = self._relay
        if relay is None:
            for batch in batches:
                self.run(self.model, batch)
        elif self.at == len(self.blocks) and relay.done == 0:
            relay.whole(batches)
        else:
            relay.advance(self.at - relay.done, batches)

    def _keep_more(self) -> None:
        """The blocks are no simple chain: keep what all of them return, or do without handing on."""
        keep = self._relay is not None and not self._relay.keep_all
        self._relay = Relay(self.model, self.blocks, self.run, self.spool, self.device, keep_all=True) if keep else None

    def _overflow(self, name: str) -> Exception:
        batch = next(self._first())
        where = f"activations of `{name}`, or their squares, are not finite"
        return overflow_error(self.model, batch, self.run, where=where)


def _zeros(outputs: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(()).expand(*x.shape[:-1], outputs)


class _Taps(AbstractContextManager["_Taps"]):
    """Hooks that add up what layers read, chunk by chunk."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        device: torch.device,
        ranks: Ranks,
        owners: Mapping[str, int],
        hold: bool,
    ) -> None:
        self.total: dict[str, LayerMoments] = {}
        """Of the layers of this rank."""
        self._ranks, self._owners, self._hold = ranks, owners, hold
        self._parts: dict[int, dict[str, LayerMoments]] = {}
        """Sums of finished chunks that wait for those before them."""
        self._chunk: dict[str, LayerMoments] = {}
        self._number: int | None = None
        self._leader: dict[str, str] = {}
        """Layers that read the very tensor that another one has read before."""
        self._last: tuple[Tensor, str] | None = None
        self._sites, self._device = {site.name: site for site in sites}, device
        self._stack = ExitStack()
        modules = {site.name: site.multiplied_by or site.name for site in sites}
        for name, module in modules.items():
            hook = model.get_submodule(module).register_forward_hook(self._hook(name))
            self._stack.callback(hook.remove)
        self._tokens = TokenTracker(model, list(modules.values()))

    def __exit__(self, *error: object) -> None:
        self._tokens.__exit__(*error)
        self._stack.close()

    def begin(self, chunk: int) -> None:
        """The next batch is of this chunk."""
        self._last = None
        if chunk != self._number:
            self._end_chunk()
            self._number = chunk

    def _end_chunk(self) -> None:
        if self._number is None:
            return
        if self._ranks.count == 1:
            self._absorb(self._chunk)
        else:
            self._parts[self._number] = self._chunk
        self._chunk = {}

    def _absorb(self, parts: Mapping[str, LayerMoments]) -> None:
        for name, part in parts.items():
            part.note_part()
            whole = self.total.get(name)
            if whole is None:
                self.total[name] = part  # the first part is never held out
            else:
                whole.absorb(part, hold=self._hold and whole.parts % 2 == 1)

    def _exchange(self) -> None:
        """Bring the parts of every layer together at its owner, in the order of the chunks."""
        ranks = self._ranks
        found = ranks.gather({number: sorted(parts) for number, parts in self._parts.items()})
        leaders = ranks.gather(self._leader)
        self._leader = {name: leader for one in leaders for name, leader in one.items()}
        alone = {name for one in found for parts in one.values() for name in parts}
        other = [name for one in leaders for name, leader in one.items() if self._leader[name] != leader]
        if other or alone & set(self._leader):
            raise DataError(
                "layers read one tensor in some batches and several in others; leave them out with `ignore`"
            )
        names = {number: set(parts) for one in found for number, parts in one.items()}
        for number in sorted(names):
            source = ranks.owner(number)
            for name, site in self._sites.items():
                if name not in names[number]:
                    continue
                target = self._owners.get(name, 0)
                own = self._parts.get(number, {}).pop(name, None)
                if ranks.index not in (source, target):
                    continue
                part = LayerMoments.empty(site, self._device, gradients=False) if own is None else own
                part.collect(ranks, source, target)
                if ranks.index == target:
                    self._absorb({name: part})

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            x = args[0]
            if self._shares(name, x):
                return
            part = self._chunk.get(name)
            if part is None:
                part = self._chunk[name] = LayerMoments.empty(self._sites[name], self._device, gradients=False)
            with torch.autocast(real_device(self._device).type, enabled=False):
                part.add_inputs(x.detach().reshape(-1, x.shape[-1]).float(), self._tokens.counted(x))

        return hook

    def _shares(self, name: str, x: Tensor) -> bool:
        """Whether another layer has counted the tensor; that is so in all passes or in none."""
        last, self._last = self._last, (x, name)
        leader = None
        if last is not None and last[0] is x:
            leader = self._leader.get(last[1], last[1])
        if name not in self._leader and name not in self._chunk and name not in self.total and leader is not None:
            self._leader[name] = leader
        if self._leader.get(name) not in (None, leader):
            raise DataError(
                f"`{name}` reads what `{self._leader[name]}` reads in some batches and something else in others; leave "
                "it out with `ignore`"
            )
        return name in self._leader

    def owned(self, site: Site) -> bool:
        """Whether the moment of a layer comes together at this rank."""
        return self._owners.get(site.name, 0) == self._ranks.index

    def finish(self, sites: Sequence[Site], overflow: Callable[[str], Exception]) -> None:
        """From sums to means, of the layers of this rank."""
        self._end_chunk()
        if self._ranks.count > 1:
            self._exchange()
        done: set[int] = set()
        own = {site: self.total.get(self._leader.get(site.name, site.name)) for site in sites if self.owned(site)}
        reached = {site.mixture for site, found in own.items() if site.mixture and found is not None and found.weight}
        for site, found in own.items():
            leader = self._leader.get(site.name, site.name)
            if (found is None or found.weight == 0) and site.mixture in reached:
                self.total.pop(site.name, None)
                continue
            if found is None or found.weight == 0:
                raise DataError(f"layer `{site.name}` never ran on the calibration data; leave it out with `ignore`")
            self.total[site.name] = found
            if id(found) in done:
                continue
            done.add(id(found))
            if not found.is_finite:
                raise overflow(site.name)
            found.finish(centered=self._centered(leader), examples=1)

    def _centered(self, leader: str) -> bool:
        """About the mean, if every layer that shares the moment has a bias to absorb it."""
        members = [name for name in self._sites if self._leader.get(name, name) == leader]
        return all(self._sites[name].has_bias for name in members)
