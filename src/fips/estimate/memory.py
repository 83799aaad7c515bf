"""How much memory calibration takes, known before the weights are read, and how much there is.

One and two examples go through the model on the meta device, forward and backward, with every tensor counted while it
lives: exact for the tensors of torch, whatever the architecture, and so the least that a run takes. The heap keeps
freed pieces of up to 32 MB, of which real runs had up to half as much again: see ``ROOM``.
"""

from __future__ import annotations

import copy
import logging
import resource
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fips.calibration.inputs import CalibrationData
from fips.calibration.moments import moment_bytes
from fips.calibration.precision import has_bfloat16, resolve_precision
from fips.calibration.preserve import caching_configs
from fips.config import CompressionConfig
from fips.methods.registry import Method, method_of
from fips.methods.sweep import blocks_of, bytes_beside, steps_of
from fips.methods.workbench import Needs, Workbench
from fips.models import LayerGroup, Site
from fips.models.experts import experts_apart
from fips.plan.plan import CompressionPlan

__all__ = ["Answers", "MemoryNeed", "available_memory", "calibration_memory", "on_meta"]

log = logging.getLogger(__name__)

ROOM = 1.5
"""What real runs on a CPU took at most, relative to the estimate: 1.4 to 1.5 of it where all tensors are of less than
32 MB, 1.1 to 1.2 with larger ones, 1.02 where the heap gives every piece back."""
TRAINED_BYTES = 36
"""Bytes that distillation holds for every entry of an MLP: entry, gradient, two means of Adam, what rounds it, and the
best entry so far."""
Examples = Callable[[int], Any]
"""So many made-up examples, on the meta device."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The fewest bytes that calibration takes: model and sums, what every example of a batch adds, and the least."""

    fixed: int
    per_example: int
    least: int = 0
    """Whatever the batch: what some batches do not reach, since it is needed when they are gone."""
    mapped: int = 0
    """Of the model, not in the others: what stays in its files, of which memory holds what there is room for."""

    def total(self, batch_size: int) -> int:
        return max(self.fixed + batch_size * self.per_example, self.least)

    def fits(self, batch_size: int, available: int) -> bool:
        """Whether it can fit at all."""
        return self.total(batch_size) <= available

    def largest(self, available: int) -> int:
        """The most examples in a batch that leave room, 1 where one can fit at all, 0 where not even that."""
        roomy = int((available / ROOM - self.fixed) // max(1, self.per_example))
        return max(roomy, int(self.fits(1, available)))


def calibration_memory(
    model: nn.Module,
    plan: CompressionPlan,
    config: CompressionConfig,
    examples: Examples,
    *,
    device: torch.device,
    mapped: int = 0,
) -> MemoryNeed | None:
    """What calibrating a model, given on the meta device, takes on ``device``; None where it cannot be told.

    That is where the code of the model looks at numbers, which there are none of. ``mapped`` bytes of the weights stay
    in their files; what those layers become is counted instead.
    """
    twin = copy.deepcopy(model)
    stored = sum(parameter.numel() * parameter.element_size() for parameter in twin.parameters())
    mapped = min(mapped, stored)
    stored -= mapped - min(mapped, plan.factored.bytes)
    if resolve_precision(config.precision, twin, device) == "bfloat16" and _dtype(twin) == torch.float32:
        twin.to(torch.bfloat16)  # activations are, and so are copies of the weights that the backward pass keeps
        stored += sum(parameter.nbytes for parameter in twin.parameters())
    elif _dtype(twin) == torch.bfloat16 and not has_bfloat16(device):
        blocks = [block for group in plan.groups for block in group.group.blocks] if method_of(config).by_block else []
        inside = [sum(p.numel() for p in twin.get_submodule(name).parameters()) for name in dict.fromkeys(blocks)]
        wide = sum(p.numel() for p in twin.parameters()) - sum(inside) + max(inside, default=0)
        twin.to(torch.float32)
        stored += 4 * wide
    twin = on_meta(twin)
    try:
        with experts_apart(twin):
            one, some, more = (_peak(twin, plan, config, examples(count)) for count in (1, 4, 8))
            few = _influence_peak(twin, plan, config, examples(8))
    except Exception as error:
        log.debug("no estimate of memory for %s: %s", type(model).__name__, error)
        return None
    method = method_of(config)
    trained = TRAINED_BYTES * plan.dense.parameters if method.trains_model else 0
    kept = (bytes_beside(blocks_of(plan), method.moment_memory) or 0) if method.holds_out else 0
    if Needs.GRADIENTS in method.needs:
        at_work = [site for group in _at_work(plan, method) for site in group.sites]
        kept += (method.moment_copies - 1) * moment_bytes(at_work)
    always, each = stored + trained + kept, max(0, more - some) // 4
    return MemoryNeed(always + max(0, more - 8 * each), each, always + max(one, few), mapped)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without numbers, as it is while it is measured."""
    twin = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    for config in caching_configs(twin):
        config.use_cache = False
    return twin


def available_memory(device: torch.device, *, mapped: int = 0) -> int | None:
    """Bytes that can be had now: of the GPU, or of machine, control group and ``ulimit -v``; None if unknown.

    ``mapped`` bytes of files will take addresses, but no memory that others want.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    addresses = _address_space_bytes()
    limits = [_host_bytes(), _control_group_bytes(), None if addresses is None else max(0, addresses - mapped)]
    return min((limit for limit in limits if limit is not None), default=None)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _peak(model: nn.Module, plan: CompressionPlan, config: CompressionConfig, batch: Any) -> int:
    """Most bytes of tensors at a time, but for the parameters, while one batch is measured."""
    data = CalibrationData(model, [batch, batch], seed=config.seed)
    method = method_of(config)
    bench = Workbench(model, config, data, torch.device("meta"), method.needs)
    sites = [site for group in plan.groups for site in group.group.sites]
    known = [*model.parameters(), *model.buffers(), *tree_leaves(batch)]
    with _fused_attention(), _Counted(known) as counted:
        if Needs.GRADIENTS in method.needs:
            bench.moments("memory", [site for group in _at_work(plan, method) for site in group.sites])
            return int(counted.peak)
        if Needs.INPUTS in method.needs:
            bench.input_moments("memory", _at_work(plan, method), hold=method.holds_out)
            return int(counted.peak)
        base = getattr(model, "base_model", model)  # recording stops before the head
        with torch.no_grad():
            for one in bench.batches:
                bench.run(base, one)
        if not method.trains_blocks:
            return int(counted.peak)
        blocks = len({site.name.rpartition(".")[0] for site in sites})
        return int(counted.peak) + _graph_bytes(bench, base, sites, batch) // blocks  # blocks are trained one by one


def _influence_peak(model: nn.Module, plan: CompressionPlan, config: CompressionConfig, batch: Any) -> int:
    """The same while the influence of layers is measured, a few examples at a time whatever the batches; 0 without."""
    method = method_of(config)
    if Needs.INFLUENCE not in method.needs:
        return 0
    data = CalibrationData(model, [batch, batch], seed=config.seed)
    bench = Workbench(model, config, data, torch.device("meta"), method.needs, influence_examples=1)
    known = [*model.parameters(), *model.buffers(), *tree_leaves(batch)]
    with _fused_attention(), _Counted(known) as counted:
        bench.shared_influence([group.group for group in plan.groups])
    return int(counted.peak)


def _at_work(plan: CompressionPlan, method: Method[Any]) -> list[LayerGroup]:
    """The groups whose moments are held at a time: all that the bound allows, at least one, or one block of it."""
    groups = [group.group for group in plan.groups]
    gradients = Needs.GRADIENTS in method.needs

    def need(group: LayerGroup) -> int:
        return moment_bytes(group.sites, gradients=gradients)

    if method.by_block:
        steps = steps_of(blocks_of(plan), method.moment_memory)
        largest = max(steps, key=lambda step: sum(block.moment_bytes for block in step))
        return [LayerGroup(block.name, tuple(sublayer for _, sublayer in block.parts)) for block in largest]
    if method.moment_copies * sum(map(need, groups)) <= method.moment_memory:
        return groups
    return [max(groups, key=need)]


def _graph_bytes(bench: Workbench, base: nn.Module, sites: Sequence[Site], batch: Any) -> int:
    """What the backward pass through all blocks keeps."""

    def follow(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_(True)

    handles = [bench.model.get_submodule(site.name).register_forward_hook(follow) for site in sites]
    try:
        known = [*bench.model.parameters(), *bench.model.buffers(), *tree_leaves(batch)]
        with _Counted(known) as counted, torch.enable_grad():
            _kept = bench.run(base, batch)
            return int(counted.now)
    finally:
        for handle in handles:
            handle.remove()


class Answers(TorchDispatchMode):
    """Answers tests of values on the meta device, as most turn out for ordinary inputs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))


class _Counted(Answers):
    """Counts the bytes of all tensors that operations make, for as long as they live."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._own: set[int] = set()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name in self._known or name in self._own:
            return
        self._own.add(name)
        weakref.finalize(storage, self._forget, name, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, name: int, size: int) -> None:
        self._own.discard(name)
        self.now -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Fused attention, which on real devices never holds the scores; the meta device would form them.

    A function mode would not reach what a backward pass computes again.
    """
    own = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        found: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return found

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


class _FusedAttention(torch.autograd.Function):
    """The memory of fused attention: inputs and outputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _host_bytes() -> int | None:
    """What the system says can be taken without swapping, and the swap."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * (fields["MemAvailable"] + fields.get("SwapFree", 0))
    return None


def _control_group_bytes() -> int | None:
    """What the control groups of this process leave, of either version; files they cache can be given back."""
    found = []
    for folder in _control_groups():
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError, StopIteration):
                most = int((folder / limit).read_text())  # "max" is no number: no limit
                lines = (folder / "memory.stat").read_text().splitlines()
                files = next(int(line.split()[1]) for line in lines if line.startswith(f"{cached} "))
                found.append(most - int((folder / usage).read_text()) + files)
    return max(0, min(found)) if found else None


def _control_groups(root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """The folders of the groups this process is in, with all above them."""
    folders = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory"):
                top = root / controllers
                place = top / name.lstrip("/")
                folders += [top, *(folder for folder in (place, *place.parents) if top in folder.parents)]
    return folders


def _address_space_bytes() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return max(0, limit - pages * resource.getpagesize())
    return None
