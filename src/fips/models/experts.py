"""Experts that a router chooses among and that a model keeps in 3-D tensors, taken apart into linear layers, and back.

transformers has one form for all families: a module whose class is under ``use_experts_implementation``, with
``gate_up_proj`` (E, 2F, D), or ``up_proj`` (E, F, D) where nothing is gated, and ``down_proj`` (E, D, F), each
transposed in some families, biases (E, 2F) and (E, D) in some, called with the tokens (T, D), the experts chosen for
each (T, K) and their weights (T, K). ``ExpertList`` is such a module with a linear layer for every matrix,
``experts.gate_up_proj.3`` and ``experts.down_proj.3`` of expert 3, so that each can be measured, compressed, packed and
left dense as any other linear layer. The setting that chooses how fused experts are multiplied (``eager``,
``grouped_mm``, ``batched_mm``) says nothing there.

Shape legend: E experts, T tokens, K experts of a token, D width of the residual stream, F hidden features, N tokens of
one expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ExpertList", "expert_lists", "experts_apart", "fuse_experts", "split_experts", "why_whole"]

_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What the decorator of transformers gives a module of experts, and what its ways to multiply ask of it."""


class ExpertList(nn.Module):
    """The experts of a fused module as linear layers, which it shares all other modules with.

    The weights are views of those of ``fused``, which loses them. ``fused`` stays out of the tree of modules: it says
    how its experts gate, and takes the place of this module again (``fuse_experts``).
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self._fused = (fused,)
        self._arguments = tuple(inspect.signature(fused.forward).parameters)
        self.first, self.last = _matrices(fused)
        """Names of the matrices that read and write the residual stream."""
        self.num_experts = len(fused._parameters[self.first])  # type: ignore[arg-type]
        self.rows_N: Tensor | None = None
        """While an expert is at work, which of the tokens given it works on."""
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name in (self.first, self.last):
            weight, bias = fused._parameters.pop(name), fused._parameters.pop(f"{name}_bias", None)
            assert weight is not None
            self.add_module(name, nn.ModuleList(_linears(weight, bias, transposed=fused.is_transposed)))
        for key, value in vars(fused).items():
            if "_hooks" in key and "state_dict" not in key:  # the dictionaries, so that handles still remove hooks
                vars(self)[key] = value
        self.train(fused.training)

    @property
    def fused(self) -> nn.Module:
        return self._fused[0]

    @property
    def parts(self) -> int:
        """Spaces side by side that the first matrix of an expert writes, one neuron of each at the same place."""
        fused = self.fused
        return 2 if fused.has_gate and getattr(fused, "is_concatenated", True) else 1

    def layers(self, expert: int) -> tuple[nn.Module, nn.Module]:
        """The two layers of an expert."""
        first, last = self._modules[self.first], self._modules[self.last]
        assert isinstance(first, nn.ModuleList)
        assert isinstance(last, nn.ModuleList)
        return first[expert], last[expert]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The sum of what the experts of every token write, weighted: (T, D) of tokens (T, D).

        The other arguments are the experts of every token (T, K) and their weights (T, K), in this order or by the
        names that the fused module gives them. The number of an expert that is not there adds nothing.
        """
        named = [kwargs[name] for name in self._arguments[len(args) :] if name in kwargs]
        x_TD, experts_TK, weights_TK = (*args, *named)[:3]
        if torch.compiler.is_exporting():
            return self._by_all(x_TD, experts_TK, weights_TK)
        chosen = experts_TK.flatten().clamp(max=self.num_experts)
        order = chosen.argsort(stable=True)
        counts = _counts(chosen, self.num_experts + 1)
        rows = order // experts_TK.shape[-1]
        written: list[Tensor] = []
        try:
            for expert, rows_N in enumerate(rows.split(counts)[: self.num_experts]):
                if len(rows_N):
                    self.rows_N = rows_N
                    written.append(self._expert(expert, x_TD[rows_N]))
        finally:
            self.rows_N = None
        missing = counts[self.num_experts]
        if missing or not written:
            written.append(x_TD.new_zeros(missing, x_TD.shape[-1]))
        scaled = torch.cat(written) * weights_TK.flatten()[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return scaled[back].view(*experts_TK.shape, x_TD.shape[-1]).sum(1).to(x_TD.dtype)

    def _by_all(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same in a graph whose shapes do not depend on who was chosen: every expert works on every token."""
        sums = [
            self._expert(expert, x_TD) * ((experts_TK == expert) * weights_TK).sum(-1, keepdim=True)
            for expert in range(self.num_experts)
        ]
        return torch.stack(sums).sum(0).to(x_TD.dtype)

    def _expert(self, expert: int, x_ND: Tensor) -> Tensor:
        fused, (first, last) = self.fused, self.layers(expert)
        hidden = first(x_ND)
        y_ND: Tensor = last(fused._apply_gate(hidden) if fused.has_gate else fused.act_fn(hidden))  # type: ignore[operator]
        return fused.post_expert_norm(y_ND) if getattr(fused, "has_post_expert_norm", False) else y_ND  # type: ignore[operator]


def _counts(chosen: Tensor, kinds: int) -> list[int]:
    """How often each of so many numbers is there; on the meta device, where that is unknown, all alike but the last."""
    if chosen.is_meta:
        each, more = divmod(len(chosen), kinds - 1)
        return [each + (number < more) for number in range(kinds - 1)] + [0]
    found: list[int] = chosen.bincount(minlength=kinds).tolist()
    return found


def why_whole(module: nn.Module) -> str | None:
    """Why a module with 3-D parameters cannot be taken apart; None if it can."""
    if not all(hasattr(module, mark) for mark in _MARKS) or not (module.has_gate or hasattr(module, "act_fn")):
        return "whose code does not say how they are run (`use_experts_implementation` of transformers)"
    first, last = _matrices(module)
    known = {first, last, f"{first}_bias", f"{last}_bias"}
    odd = next((name for name in [*module._parameters, *module._buffers] if name not in known), None)
    if odd is not None or "forward" in vars(module):
        return f"which have `{odd}` beside their matrices" if odd else "whose `forward` was set after they were made"
    shapes = [tuple(getattr(module._parameters.get(name), "shape", ())) for name in (first, last)]
    if module.is_transposed:
        shapes = [(*shape[:1], *shape[:0:-1]) for shape in shapes]
    up, down = shapes
    if len(up) != 3 or len(down) != 3 or up != (down[0], (2 if module.has_gate else 1) * down[2], down[1]):
        return "that do not read what they write"
    return None


def expert_lists(model: nn.Module) -> dict[str, ExpertList]:
    """Experts that are taken apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertList)}


def split_experts(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Take experts apart, all that can be or those of the modules named; returns the modules as they were, emptied."""
    places = dict(model.named_modules()) if names is None else {name: model.get_submodule(name) for name in names}
    fused = {name: module for name, module in places.items() if _is_fused(module)}
    _put(model, {id(module): ExpertList(module) for module in fused.values()})
    return fused


@torch.no_grad()
def fuse_experts(model: nn.Module) -> None:
    """Put experts into 3-D tensors again wherever all matrices of a module are plain linear layers."""
    back: dict[int, nn.Module] = {}
    for experts in expert_lists(model).values():
        if not _is_plain(experts):
            continue
        fused = experts.fused
        for name in (experts.first, experts.last):
            layers = [layer for layer in experts.get_submodule(name).children() if isinstance(layer, nn.Linear)]
            weights = torch.stack([layer.weight.T if fused.is_transposed else layer.weight for layer in layers])
            trains = layers[0].weight.requires_grad
            fused.register_parameter(name, nn.Parameter(weights, requires_grad=trains))
            if fused.has_bias:
                biases = torch.stack([layer.bias for layer in layers])
                fused.register_parameter(f"{name}_bias", nn.Parameter(biases, requires_grad=trains))
        back[id(experts)] = fused.train(experts.training)
    _put(model, back)


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """A model whose experts are taken apart; afterwards those are fused as before, parameters and all, of which none
    was replaced. What is left of the others has memory of its own."""
    before = {name: (module, dict(module._parameters)) for name, module in model.named_modules() if _is_fused(module)}
    split_experts(model, before)
    try:
        yield
    finally:
        back: dict[int, nn.Module] = {}
        for name, (fused, parameters) in before.items():
            experts = model.get_submodule(name)
            if not isinstance(experts, ExpertList):
                continue
            if _is_plain(experts):
                fused._parameters.update(parameters)
                back[id(experts)] = fused.train(experts.training)
            else:
                _own_memory(experts)
        _put(model, back)


def _matrices(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _is_fused(module: nn.Module) -> bool:
    return any(p is not None and p.ndim == 3 for p in module._parameters.values()) and why_whole(module) is None


def _is_plain(experts: ExpertList) -> bool:
    return all(type(layer) is nn.Linear for expert in range(experts.num_experts) for layer in experts.layers(expert))


def _linears(weight: Tensor, bias: Tensor | None, *, transposed: Any) -> Iterator[nn.Linear]:
    for expert, matrix in enumerate(weight.detach()):
        matrix_OI = matrix.T if transposed else matrix
        with torch.device("meta"):
            layer = nn.Linear(1, 1, bias=False)  # what fills it is at hand
        layer.out_features, layer.in_features = matrix_OI.shape
        layer.weight = nn.Parameter(matrix_OI, requires_grad=weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[expert], requires_grad=bias.requires_grad)
        yield layer


def _own_memory(experts: ExpertList) -> None:
    """Dense layers beside packed ones no longer hold on to the tensor of all experts."""
    for parameter in experts.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put modules in the places of others, by their ``id``, wherever those are registered."""
    for module in list(model.modules()) if new else ():
        for child, registered in module._modules.items():
            if id(registered) in new:
                module._modules[child] = new[id(registered)]
