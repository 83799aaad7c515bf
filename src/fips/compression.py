"""The main job: replace the MLPs of a model by shared bases and sparse factors, in place."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fips.bars import progress_bars
from fips.calibration.inputs import CalibrationData
from fips.calibration.precision import autocast_for, in_native_types, resolve_precision
from fips.calibration.preserve import in_place_of, neutral_torch, plain_forward, preserved, take_over
from fips.config import CompressionConfig
from fips.errors import ConfigError, DataError, ModelError
from fips.layers.linear import BASES, Bases, FactoredLinear, basis_owner, homes_of
from fips.methods.registry import Method, method_of
from fips.methods.workbench import CompressedGroup, MomentCache, Progress, ProgressEvent, Workbench, measured
from fips.models import Site
from fips.models.experts import experts_apart
from fips.models.wrappers import check_layers, check_model, unwrap
from fips.plan.finite import require_finite_layers, require_finite_weights, require_storable
from fips.plan.plan import CompressionPlan, leave_dense, plan_compression, settle_size, size_note, uses_size
from fips.plan.rest import cast_rest
from fips.ranks import Ranks, joined
from fips.record import CompressionReport, GroupResult, environment, peak_memory_bytes
from fips.storage.layout import replace_embedding, replace_linear
from fips.storage.quantizer import attach
from fips.storage.reload import check_reloadable
from fips.storage.work import WorkDirectory
from fips.training.factors import swapped
from fips.version import __version__

__all__ = ["Progress", "ProgressEvent", "circumstances", "compress"]

SIZES = ("bits", "size", "budget")
EARLIER = "earlier runs"
"""Stage of the time that a run took which ended before, and whose finished work this one went on from."""


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig,
    *,
    progress: Progress | bool | None = None,
    moments: MomentCache | None = None,
    work: str | Path | None = None,
) -> CompressionReport:
    r"""Compress the matrices of ``model`` in place and report what was done.

    Every matrix becomes :math:`W \approx B C` with a sparse factor and a basis shared by its group, or, where that is
    better for the bytes, a sparse matrix alone. How is up to ``config.method`` (``fips.methods``). The model is changed
    only after all groups are done: an error or an interrupt leaves it as it was. Layers that the batches never run or,
    for methods that take gradients, that have no influence on the model's output there are left dense; the size asked
    for is that of the others, and the report lists both.

    ``batches`` is iterated a few times; its items are dicts for ``model(**batch)`` (``labels`` are ignored) or
    tensors for ``model(batch)``. Peak memory is the model, the moments of the groups at work (``metric.memory``), one
    group's factors with optimizer state, and recorded activations up to ``activation_memory``;
    distillation holds the factors of all groups.

    ``progress=True`` draws bars on stderr or in a notebook; a function is called with a ``ProgressEvent`` at every
    step. Nothing is printed otherwise; what there is to say goes to the logger ``fips``.

    ``moments``, a dict that is filled and read, saves measuring anew where one model is compressed several times on
    the same batches.

    ``work`` is a directory where what is finished is kept, blocks or groups: a run that was ended goes on with the same
    call, and the processes of ``torchrun``, which all make it, share the work of methods that go block by block. It is
    left there. Another call is refused, naming what differs.

    Raises ``ConfigError``, ``BudgetError``, ``NoMatchError``, ``ModelError`` before any work, ``DataError`` for
    unusable batches. Reference: arXiv 2411.09816.
    """
    started = time.perf_counter()
    _require_settings(config)
    model = unwrap(model)
    check_model(model)
    device = next(model.parameters()).device
    with (
        joined() as ranks, neutral_torch(device), plain_forward(model), experts_apart(model), _shown(progress) as shown
    ):  # fmt: skip
        plan = plan_compression(model, config)
        asked, config = config, settle_size(plan, model, config)
        method = method_of(config)
        _check_ranks(method, ranks, work)
        sites = [site for group in plan.groups for site in group.group.sites]
        _refuse_model(model, plan, sites, config.precision)
        data = CalibrationData(model, batches, seed=config.seed)
        data.check()
        bench = Workbench(
            model, config, data, device, method.needs, method.temperature, shown, cache=moments,
            influence_examples=method.influence_examples, ranks=ranks, moment_memory=method.moment_memory,
        )  # fmt: skip
        _keep_in(bench, work, asked)
        for item in plan.skipped:
            if item.end:
                bench.note(f"`{item.name}` is left dense: {item.reason}")
        groups, plan = _solved(bench, plan, asked, sites)
        ranks.wait()  # until all have read what the others have made
        for group in groups:
            require_finite_layers(group.layers, group.bases, method=config.method)
        _install(model, groups, activation_bits=config.activation_bits)
        cast_rest(model, config)
        bench.say_tokens()
        taken = [group.plan for group in groups]
        if asked.size is not None or not uses_size(bench.config, taken):
            bench.notes.append(size_note(asked, bench.config, taken))
        report = _report(bench, plan, groups, started)
        report.asked = {name: value for name in SIZES if (value := getattr(asked, name)) is not None}
    model.fips_report = report  # type: ignore[assignment]
    return report


def _require_settings(config: object) -> None:
    if not isinstance(config, CompressionConfig):
        hint = "use its `.compression`" if hasattr(config, "compression") else "write `CompressionConfig(...)`"
        raise ConfigError(f"`config` must be a `CompressionConfig`, got `{type(config).__name__}`; {hint}")


def _keep_in(bench: Workbench, work: str | Path | None, asked: CompressionConfig) -> None:
    """Keep what is finished in a directory, and count the time of what is there."""
    if work is not None:
        bench.store = kept = WorkDirectory(work, _fingerprint(bench.model, asked, bench.batches))
        if kept.earlier_seconds:
            bench.phases[EARLIER] = kept.earlier_seconds


def _refuse_model(model: nn.Module, plan: CompressionPlan, sites: Sequence[Site], precision: str) -> None:
    """Raise for a model that could not be compressed, stored or read again, before any work."""
    require_finite_weights(model)
    resolve_precision(precision, model, next(model.parameters()).device)
    check_layers(model, sites)
    require_storable(model, plan)
    check_reloadable(model, [name for site in sites for name in (site.name, *site.tied)])


def _solved(
    bench: Workbench, plan: CompressionPlan, asked: CompressionConfig, sites: Sequence[Site]
) -> tuple[list[CompressedGroup], CompressionPlan]:
    """Groups as the method makes them, with the plan that was left once the model was measured.

    What no example reaches stays dense; a size of the whole file that was ``asked`` for is settled anew then, in the
    settings of ``bench``.
    """
    model, config = bench.model, bench.config
    method = method_of(config)
    blocks = list(dict.fromkeys(block for group in plan.groups for block in group.group.blocks))
    with preserved(model), in_native_types(model, blocks if method.by_block else ()):
        bench.try_batch()
        _require_called(bench, sites)
        with autocast_for(config.precision, model, bench.device):
            left = bench.survey([group.group for group in plan.groups])
            if left and asked.size is not None:
                config = bench.config = settle_size(plan, model, asked, left)
                method, plan = method_of(config), plan_compression(model, config)
            plan = leave_dense(plan, model, config, left)
            return method.compress(bench, plan), plan


def _shown(progress: Progress | bool | None) -> AbstractContextManager[Progress | None]:
    """What is called at every step."""
    if isinstance(progress, bool):
        return _drawn() if progress else nullcontext()
    return nullcontext(progress)


@contextmanager
def _drawn() -> Iterator[Progress]:
    with progress_bars() as bars:
        yield bars.event


def _report(
    bench: Workbench, plan: CompressionPlan, groups: Sequence[CompressedGroup], started: float
) -> CompressionReport:
    """What was done, and on what; the time of earlier runs from which this one went on counts too."""
    device = bench.device
    return CompressionReport(
        config=bench.config,
        plan=replace(plan, groups=tuple(group.plan for group in groups)).to_dict(),
        groups=[_result(group).to_dict() for group in groups],
        seconds=bench.phases.get(EARLIER, 0.0) + time.perf_counter() - started,
        peak_memory_bytes=measured("peak memory", lambda: peak_memory_bytes(device)),
        activation_file_bytes=bench.file_bytes,
        data=measured("the description of the data", lambda: _description(bench.batches)) or {},
        notes=bench.notes,
        overfit=bench.overfit,
        distilled=bench.distilled,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        phases=bench.phases,
        environment={
            **(measured("hardware and versions", lambda: environment(device)) or {}),
            "precision": resolve_precision(bench.config.precision, bench.model, device),
        },
    )


class _Called(nn.Module):
    """A module that computes as another does, and whose weight cannot be read."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self._dense = (dense,)
        self.weight = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._dense[0](*args, **kwargs)


def _require_called(bench: Workbench, sites: Sequence[Site]) -> None:
    """Raise ``ModelError`` if the model reads the matrix of an embedding past the module that has it."""
    names = {name: site.name for site in sites if site.looked_up for name in site.modules}
    stand_ins = {name: _Called(bench.model.get_submodule(name)) for name in names}
    if not stand_ins:
        return
    try:
        with swapped(bench.model, stand_ins):
            bench.try_batch()
    except DataError as error:
        name = next(iter(names.values()))
        raise ModelError(
            f"`{type(bench.model).__name__}` does not only call its embedding `{name}` but reads its weight, which a "
            f"packed one has not ({error.__cause__}); leave it out: `ignore` (`--ignore {name}`)"
        ) from error


def _check_ranks(method: Method[Any], ranks: Ranks, work: str | Path | None) -> None:
    """Raise ``ConfigError`` where several processes cannot share the work."""
    if ranks.count == 1:
        return
    if not method.by_block:
        raise ConfigError(
            f"`method: {method.config.method}` with these settings runs in one process, got {ranks.count}; several "
            "share `fips` without training and sharing, `gptq` and pruning"
        )
    if work is None:
        raise ConfigError(f"{ranks.count} processes share their work through a directory: give `work`")


def _fingerprint(model: nn.Module, config: CompressionConfig, data: CalibrationData) -> dict[str, Any]:
    """Everything that the result depends on."""
    settings = {"settings": config.model_dump(mode="json", exclude_unset=True)}
    return settings | circumstances(model, data.key(), precision=config.precision)


def circumstances(model: nn.Module, data: Any, *, precision: str) -> dict[str, Any]:
    """What a result depends on beside the settings: a digest of the weights, those of the data, versions, hardware."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    device = next(model.parameters()).device
    return {
        "model": weights.hexdigest(),
        "data": data,
        "versions": f"fips {__version__}, torch {torch.__version__}",
        "device": device.type,
        "precision": resolve_precision(precision, model, device),
    }


def _result(group: CompressedGroup) -> GroupResult:
    place = group.plan.group
    return GroupResult(place.name, place.blocks, group.start, group.final, group.losses, group.seconds)


def _description(batches: Iterable[Any]) -> dict[str, Any]:
    """What batches say about themselves, as it will be in a JSON file; data of other libraries may say it in prose."""
    found = getattr(batches, "description", None)
    return json.loads(json.dumps(dict(found), default=str)) if isinstance(found, Mapping) else {}


def _install(model: nn.Module, groups: Sequence[CompressedGroup], *, activation_bits: int | None) -> None:
    """Put the new layers in place, all of them or, if that is interrupted, none."""
    layers = {name: layer for group in groups for name, layer in group.layers.items()}
    bases = {name: basis for group in groups for name, basis in group.bases.items()}
    tied = {site.name: site.tied for group in groups for site in group.plan.group.sites if site.looked_up}
    trained: set[int] = set()
    homes = homes_of(model)
    with in_place_of(model, [*layers, *(name for names in tied.values() for name in names)], basis_owner(model), BASES):
        setattr(basis_owner(model), BASES, Bases(bases))
        for name, layer in layers.items():
            if name in tied:
                _install_embedding(model, name, layer, tied[name], activation_bits=activation_bits)
                continue
            dense = model.get_submodule(name)
            take_over(layer, dense)
            if layer.basis is not None and dense.weight.requires_grad:
                trained.add(id(layer.basis))
            if activation_bits is not None and layer.bits is not None:
                layer.runtime.activation_bits = activation_bits
            replace_linear(model, name, layer, homes)
        for basis in bases.values():
            basis.train(model.training).requires_grad_(id(basis) in trained)
        attach(model)


def _install_embedding(
    model: nn.Module, name: str, layer: FactoredLinear, tied: Sequence[str], *, activation_bits: int | None
) -> None:
    """The same of an embedding and of the further places of its matrix."""
    dense = {place: model.get_submodule(place) for place in (name, *tied)}
    if activation_bits is not None:
        layer.runtime.activation_bits = activation_bits
    replace_embedding(model, name, layer, tied)
    for place, module in dense.items():
        take_over(model.get_submodule(place), module)
