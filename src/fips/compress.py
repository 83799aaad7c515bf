"""The main job: replace the MLPs of a model by shared bases and sparse factors, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fips.activations import ActivationSpool, record_blocks
from fips.calibrate import (
    BlockError,
    Records,
    TrainableGroup,
    autocast_for,
    block_errors,
    calibrate_,
    choose_masks,
    resolve_precision,
    swapped,
)
from fips.config import CompressionConfig
from fips.errors import DataError
from fips.integrations.quantizer import attach
from fips.nn import BASES, FactoredLinear, SharedBasis, basis_owner
from fips.plan import GroupPlan, plan_compression
from fips.report.record import CompressionReport, GroupResult, environment, peak_memory_bytes
from fips.solve.alternate import alternate, grow_basis
from fips.solve.problems import DownProblem, SiteProblem, UpProblem
from fips.solve.svd import grow_rank, shared_svd
from fips.statistics import SiteStatistics, collect_statistics
from fips.storage.layout import replace_linear
from fips.structure import LinearSite

__all__ = ["Progress", "ProgressEvent", "compress"]

MAX_ERROR_BATCHES = 16


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step of work: ``stage`` is ``record`` or ``calibrate``, ``done`` of ``total`` steps, the last loss."""

    stage: str
    group: str
    done: int
    total: int
    loss: float | None = None


Progress = Callable[[ProgressEvent], None]


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig,
    *,
    progress: Progress | None = None,
) -> CompressionReport:
    r"""Compress the MLPs of ``model`` in place and report what was done.

    Every group of blocks gets one dense basis and one sparse factor per matrix (:math:`W_i \approx B F_i`): SVD
    start, pruning to the sparsity of the settings, joint reconstruction of the block outputs on the model's original
    activations. The model is changed only after all groups are done: an error or an interrupt leaves it as it was.

    ``batches`` is iterated once per group; its items are dicts for ``model(**batch)`` (``labels`` are ignored) or
    tensors for ``model(batch)``. Peak memory is the model, one group's factors with optimizer state, and recorded
    activations up to ``config.calibration.activation_memory``.

    Raises ``ConfigError``, ``BudgetError``, ``NoMatchError``, ``ModelError`` before any work, ``DataError`` for
    unusable batches. Reference: arXiv 2411.09816.
    """
    started = time.perf_counter()
    plan = plan_compression(model, config)
    device = next(model.parameters()).device
    packed: dict[str, FactoredLinear] = {}
    bases: dict[str, SharedBasis] = {}
    results: list[GroupResult] = []
    file_bytes = 0
    with _frozen(model), autocast_for(config.calibration.precision, device):
        for group in plan.groups:
            with ActivationSpool(config.calibration.activation_memory) as spool:
                work = _GroupWork(model, group, config, spool, device, progress)
                result, basis, layers = work.solve(batches)
                file_bytes = max(file_bytes, spool.file_bytes)
            results.append(result)
            bases[group.group.name] = basis
            packed.update(layers)
    _install(model, bases, packed)
    report = CompressionReport(
        config=config,
        plan=plan.to_dict(),
        groups=[result.to_dict() for result in results],
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(device),
        activation_file_bytes=file_bytes,
        data=dict(getattr(batches, "description", {})),
        environment={**environment(device), "precision": resolve_precision(config.calibration.precision, device)},
    )
    model.fips_report = report  # type: ignore[assignment]
    return report


class _GroupWork:
    """The steps of one group: record, factorize, calibrate, pack."""

    def __init__(
        self,
        model: nn.Module,
        plan: GroupPlan,
        config: CompressionConfig,
        spool: ActivationSpool,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.model, self.plan, self.config, self.spool, self.device = model, plan, config, spool, device
        self.blocks = {name: model.get_submodule(name) for name in plan.group.blocks}
        self.sites = plan.group.sites
        self._progress = progress

    def solve(self, batches: Iterable[Any]) -> tuple[GroupResult, SharedBasis, dict[str, FactoredLinear]]:
        started = time.perf_counter()
        records = record_blocks(self.model, self.blocks, self._counted(batches), self.spool, self._forward)
        group = self._factorize() if self.config.method == "fips-paper" else self._solve(records)
        with swapped(self.model, group.modules):
            start = self._errors_of_start(group, records)
            losses = calibrate_(group, self.blocks, records, self.spool, self.device, self._on_step)
            if not losses:
                group.prune(self.plan.sparsity)
            basis, layers = self._pack(group)
        with swapped(self.model, layers), torch.no_grad():
            final = self._errors(records)
        result = GroupResult(self.plan.group.name, start, final, tuple(losses), time.perf_counter() - started)
        return result, basis, layers

    def _factorize(self) -> TrainableGroup:
        """The paper's start: U and S V^T of all matrices side by side, grown beyond D where the budget allows."""
        weights_DF = [dense_matrix(self.model, site) for site in self.sites]
        basis_DR, factors_RF = shared_svd(weights_DF, rank=self.plan.rank)
        basis_DR, factors_RF = grow_rank(basis_DR, factors_RF, rank=self.plan.rank, tau=self.config.growth_tau)
        biases = [getattr(self.model.get_submodule(site.name), "bias", None) for site in self.sites]
        return TrainableGroup(basis_DR, factors_RF, self.sites, biases, self.config, self.plan.sparsity)

    def _solve(self, records: Records) -> TrainableGroup:
        """Activation-weighted alternating factorization; biases take up the mean error and are trained further."""
        statistics = collect_statistics(self.model, self.plan.group, self.blocks, records, self.spool, self.device)
        weights_DF = [dense_matrix(self.model, site).float() for site in self.sites]
        with torch.autocast(self.device.type, enabled=False):
            problems = [
                site_problem(weight, site, statistics[site.name])
                for weight, site in zip(weights_DF, self.sites, strict=True)
            ]
            basis_DR, _ = shared_svd(weights_DF, rank=self.plan.rank)
            basis_DR = grow_basis(basis_DR, weights_DF, rank=self.plan.rank, seed=self.config.seed)
            found = alternate(problems, basis_DR, self._supports)
            biases = [
                self._moved_bias(site, weight - found.basis_DR @ factor, statistics[site.name].mean_D)
                for site, weight, factor in zip(self.sites, weights_DF, found.factors_RF, strict=True)
            ]
        group = TrainableGroup(found.basis_DR, found.factors_RF, self.sites, biases, self.config, self.plan.sparsity)
        group.set_masks(found.masks_RF)
        return group

    def _moved_bias(self, site: LinearSite, error_DF: Tensor, mean: Tensor) -> nn.Parameter | None:
        """A layer's bias plus the mean of what its new matrix loses."""
        bias = getattr(self.model.get_submodule(site.name), "bias", None)
        if bias is None:
            return None
        lost = mean @ error_DF if site.role == "up" else error_DF @ mean
        return nn.Parameter(bias.detach() + lost.to(bias.dtype))

    def _supports(self, scores: Sequence[Tensor]) -> list[Tensor]:
        return choose_masks(scores, self.sites, self.config, self.plan.sparsity)

    def _errors_of_start(self, group: TrainableGroup, records: Records) -> tuple[BlockError, ...]:
        """The start pruned to the final sparsity at once; only masks change, and they are put back."""
        before = group.masks
        group.set_masks(group.choose_masks(self.plan.sparsity))
        errors = self._errors(records)
        group.set_masks(before)
        return errors

    def _errors(self, records: Records) -> tuple[BlockError, ...]:
        return tuple(block_errors(self.blocks, records[:MAX_ERROR_BATCHES], self.spool, self.device))

    def _pack(self, group: TrainableGroup) -> tuple[SharedBasis, dict[str, FactoredLinear]]:
        basis = SharedBasis(*group.basis_DR.shape)
        basis.weight = nn.Parameter(group.basis_DR.detach().to(self.plan.dtype))
        layers = {}
        for site, source, bias in zip(self.sites, group.layers, group.biases, strict=True):
            layer = FactoredLinear.from_factor(
                basis, source.factor_RF, source.mask_RF, role=site.role, fmt=self.plan.fmt, dtype=self.plan.dtype
            )
            layer.bias = bias
            layer.conv1d = site.conv1d
            layers[site.name] = layer
        return basis, layers

    def _counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        total = len(batches) if isinstance(batches, Sized) else 0
        for index, batch in enumerate(batches):
            self._report("record", index, total)
            yield batch
            self._report("record", index + 1, total)

    def _on_step(self, step: int, loss: float) -> None:
        self._report("calibrate", step + 1, self.config.calibration.steps, loss)

    def _report(self, stage: str, done: int, total: int, loss: float | None = None) -> None:
        if self._progress is not None:
            self._progress(ProgressEvent(stage, self.plan.group.name, done, total, loss))

    def _forward(self, model: nn.Module, batch: Any) -> None:
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, dtype if tensor.is_floating_point() else None)

        with torch.no_grad():
            if isinstance(batch, Mapping):
                model(**{key: place(value) for key, value in batch.items() if key != "labels"})
            elif isinstance(batch, Tensor):
                model(place(batch))
            else:
                raise DataError(f"a batch must be a dict of tensors or a tensor, got {type(batch).__name__}")


def site_problem(weight_DF: Tensor, site: LinearSite, statistics: SiteStatistics) -> SiteProblem:
    """The error of one layer in the metric of its activations, as a share of the variance of its block's output."""
    moment = statistics.moment(centered=site.has_bias)
    if site.role == "up":
        return UpProblem(weight_DF, moment, statistics.column_weights(site.columns))
    return DownProblem(weight_DF, moment, statistics.scale)


def dense_matrix(model: nn.Module, site: LinearSite) -> Tensor:
    """Weight of a dense layer as (D, F): the residual stream on axis 0."""
    weight = model.get_submodule(site.name).weight
    assert isinstance(weight, Tensor)
    return weight.detach() if _is_df(site) else weight.detach().T


def _is_df(site: LinearSite) -> bool:
    """Whether the stored weight already is (D, F): ``down`` linear layers and ``up`` Conv1D layers."""
    return (site.role == "down") != site.conv1d


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


def _install(model: nn.Module, bases: Mapping[str, SharedBasis], layers: Mapping[str, FactoredLinear]) -> None:
    setattr(basis_owner(model), BASES, nn.ModuleDict(bases))
    for name, layer in layers.items():
        layer.train(model.training)
        replace_linear(model, name, layer)
    attach(model)
