"""The state that compressing changes for its own use, put back afterwards whatever happens.

Of the model: training modes, ``requires_grad``, caching of keys and values, wrapped forwards. Of torch:
gradient and inference mode, autocast, default type and device, precision of products, random states.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = [
    "RandomState", "caching_configs", "in_place_of", "neutral_torch", "plain_forward", "preserved", "replaced_forward",
    "take_over",
]  # fmt: skip


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value cache and no gradients for the model's parameters; all as before afterwards."""
    with ExitStack() as stack:
        for change in (_evaluation, _frozen, _without_cache):
            stack.enter_context(change(model))
        yield


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache in any part of the model: a block replayed with a live cache would append to it."""
    configs = caching_configs(model)
    before = [(config, dict(vars(config))) for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config, fields in before:
            if "use_cache" in fields:
                config.use_cache = fields["use_cache"]
            else:
                del config.use_cache


def caching_configs(model: nn.Module) -> list[Any]:
    """The configurations of all parts of a model that have a setting ``use_cache``."""
    found: list[Any] = []
    for module in model.modules():
        _collect_configs(vars(module).get("config"), found)
    return found


def _collect_configs(config: Any, found: list[Any]) -> None:
    """A configuration and those nested in it, as far as they have a setting ``use_cache``."""
    if not hasattr(config, "__dict__") or any(known is config for known in found):
        return
    if hasattr(config, "use_cache"):
        found.append(config)
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _collect_configs(value, found)


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """The ``forward`` of the model's class, without what ``Accelerator.prepare`` or ``torch.compile`` put over it."""
    before = vars(model).get("forward")
    compiled = getattr(before, "_torchdynamo_orig_callable", None)
    covered = "_original_forward" in vars(model) or getattr(compiled, "__func__", None) is type(model).forward
    if before is None or not covered:
        yield
        return
    del model.forward
    try:
        yield
    finally:
        model.forward = before


@contextmanager
def neutral_torch(device: torch.device) -> Iterator[None]:
    """Torch as a fresh process has it, whatever the caller set; the caller's settings and random states come back.

    Compiled parts run uncompiled: they would compile our hooks.
    """
    states = RandomState.now()
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(states.use)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in sorted({"cpu", device.type}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(_full_precision())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32, as sums of moments need them."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller used torch's other way to set it, and mixing them is an error
        before = "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class RandomState:
    """States of the global random generators of torch, numpy and Python at one moment."""

    def __init__(self, torch_cpu: torch.Tensor, cuda: list[torch.Tensor], numpy: Any, python: Any) -> None:
        self._torch, self._cuda, self._numpy, self._python = torch_cpu, cuda, numpy, python

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def use(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    @classmethod
    @contextmanager
    def seeded(cls, seed: int) -> Iterator[None]:
        """The same random numbers every time within the context, the caller's go on as before after it."""
        before = cls.now()
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            before.use()


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def take_over(layer: nn.Module, dense: nn.Module) -> None:
    """Give a layer the mode, the type of bias, the hooks and what requires gradients of the one whose place it takes.

    The dictionaries of hooks move as they are, so that the handles a caller holds still remove them.
    """
    layer.train(dense.training)
    if isinstance(layer.bias, nn.Parameter) and isinstance(dense.bias, nn.Parameter):
        layer.bias.data = layer.bias.data.to(dense.bias.dtype)
    for name in _HOOKS:
        vars(layer)[name] = vars(dense)[name]
    vars(layer)["_is_full_backward_hook"] = vars(dense).get("_is_full_backward_hook")
    trained = {name: parameter.requires_grad for name, parameter in dense.named_parameters(recurse=False)}
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.requires_grad_(trained[name] if name in trained else trained["weight"])


@contextmanager
def in_place_of(model: nn.Module, names: list[str], owner: nn.Module, added: str) -> Iterator[None]:
    """A block that replaces submodules and adds one to ``owner``; if it does not reach its end, neither happened."""
    before = {name: model.get_submodule(name) for name in names}
    tied = vars(model).get("all_tied_weights_keys")  # of transformers, replaced where tied matrices are packed
    try:
        yield
    except BaseException:
        if tied is not None:
            vars(model)["all_tied_weights_keys"] = tied
        for name, module in before.items():
            model.set_submodule(name, module)
        if hasattr(owner, added):
            delattr(owner, added)
        raise


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module whose call is another function for a while; its own hooks still run."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
