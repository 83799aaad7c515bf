"""The main job: replace the MLPs of a model by shared bases and sparse factors, in place."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from fips.calibrate import autocast_for, resolve_precision
from fips.config import CompressionConfig
from fips.finite import require_finite_layers, require_finite_weights, require_storable
from fips.integrations.quantizer import attach
from fips.methods.baseline import compress_by_baseline
from fips.methods.paper import compress_by_paper
from fips.methods.solver import compress_by_solver
from fips.methods.workbench import CompressedGroup, MomentCache, Progress, ProgressEvent, Workbench
from fips.nn import BASES, basis_owner
from fips.plan import leave_dense, plan_compression
from fips.report.record import CompressionReport, GroupResult, environment, peak_memory_bytes
from fips.storage.layout import replace_linear

__all__ = ["Progress", "ProgressEvent", "compress"]

METHODS = {"fips": compress_by_solver, "fips-paper": compress_by_paper}


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig,
    *,
    progress: Progress | None = None,
    moments: MomentCache | None = None,
) -> CompressionReport:
    r"""Compress the MLPs of ``model`` in place and report what was done.

    Every matrix becomes :math:`W \approx B F` with a sparse factor and a basis shared by its group, or, where that is
    better for the bytes, a sparse matrix alone. ``fips`` solves for both in the metric of the model's output and
    chooses structure and size of every group by measured error; ``fips-paper`` starts from an SVD, prunes by magnitude
    and trains block by block. The model is changed only after all groups are done: an error or an interrupt leaves it
    as it was. Layers that the batches never run, or that have no influence on the model's output there, are left dense;
    the size asked for is that of the others, and the report lists both.

    ``batches`` is iterated a few times; its items are dicts for ``model(**batch)`` (``labels`` are ignored) or
    tensors for ``model(batch)``. Peak memory is the model, the moments of the groups at work (``metric.memory``), one
    group's factors with optimizer state, and recorded activations up to ``calibration.activation_memory``;
    distillation holds the factors of all groups.

    ``moments``, a dict that is filled and read, saves measuring anew where one model is compressed several times on
    the same batches.

    Raises ``ConfigError``, ``BudgetError``, ``NoMatchError``, ``ModelError`` before any work, ``DataError`` for
    unusable batches. Reference: arXiv 2411.09816.
    """
    started = time.perf_counter()
    plan = plan_compression(model, config)
    require_finite_weights(model)
    require_storable(model, plan)
    device = next(model.parameters()).device
    bench = Workbench(model, config, batches, device, progress, moments)
    with _frozen(model), autocast_for(config.calibration.precision, device):
        sites = [site for group in plan.groups for site in group.group.sites]
        plan = leave_dense(plan, model, config, bench.survey(sites))
        groups = METHODS.get(config.method, compress_by_baseline)(bench, plan)
    for group in groups:
        require_finite_layers(group.layers, group.bases, method=config.method)
    _install(model, groups, activation_bits=config.activation_bits)
    report = CompressionReport(
        config=config,
        plan=replace(plan, groups=tuple(group.plan for group in groups)).to_dict(),
        groups=[_result(group).to_dict() for group in groups],
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(device),
        activation_file_bytes=bench.file_bytes,
        data=dict(getattr(batches, "description", {})),
        notes=bench.notes,
        environment={**environment(device), "precision": resolve_precision(config.calibration.precision, device)},
    )
    model.fips_report = report  # type: ignore[assignment]
    return report


def _result(group: CompressedGroup) -> GroupResult:
    return GroupResult(group.plan.group.name, group.start, group.final, group.losses, group.seconds)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value cache and no gradients for the model's own parameters, restored afterwards."""
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        if use_cache is not None:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]
        model.train(was_training)


def _install(model: nn.Module, groups: Sequence[CompressedGroup], *, activation_bits: int | None) -> None:
    bases = {name: basis for group in groups for name, basis in group.bases.items()}
    setattr(basis_owner(model), BASES, nn.ModuleDict(bases))
    for group in groups:
        for name, layer in group.layers.items():
            layer.train(model.training)
            if activation_bits is not None and layer.bits is not None:
                layer.runtime.activation_bits = activation_bits
            replace_linear(model, name, layer)
    attach(model)
