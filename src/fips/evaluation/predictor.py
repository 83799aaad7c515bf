"""A model as evaluations call it: on its device, in its type, without gradients, back in the mode it had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fips.errors import DataError, ModelError
from fips.models.devices import usable_device

__all__ = [
    "NOT_FINITE",
    "Predictor",
    "Progress",
    "check_vocabulary",
    "counted",
    "evaluation_mode",
    "require_comparable",
    "vocabulary_size",
]

Progress = Callable[[int, int], None]
"""Called with the number of finished batches and of all batches."""
T = TypeVar("T")

NOT_FINITE = "the model returned numbers that are not finite; try `dtype=float32`, or check its weights"


@dataclass(frozen=True, slots=True)
class Predictor:
    """A model with the place where it expects its inputs, and their floating type."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def placed(cls, module: nn.Module, device: torch.device | str | None) -> Predictor:
        first = next((value for value in module.parameters() if value.is_floating_point()), torch.empty(0))
        return cls(module, usable_device(device) if device is not None else first.device, first.dtype)

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def output(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.module(*map(self._here, args), **{key: self._here(value) for key, value in kwargs.items()})

    def logits(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Logits of a ``transformers`` output, or of a module that returns them."""
        output = self.output(*args, **kwargs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"the model returned `{type(output).__name__}` without logits; load the data for this model, with "
                "`fips.load_data(source, model, purpose='evaluation')`"
            )
        return logits

    def _here(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def counted(batches: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    for done, batch in enumerate(batches, start=1):
        yield batch
        if progress is not None:
            progress(done, total)


def vocabulary_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    size: int | None = getattr(config.get_text_config() if config is not None else None, "vocab_size", None)
    return size


def require_comparable(model: nn.Module, against: nn.Module) -> None:
    """Raise ``ModelError`` for two models that cannot be asked the same; they may be without weights."""
    both = (against, model)
    said = [f"a `{type(one).__name__}`" for one in both]
    known = all(hasattr(one, "config") for one in both)
    tokens = [vocabulary_size(one) for one in both]
    classes = [getattr(getattr(one, "config", None), "num_labels", None) for one in both]
    for what, sizes in (("tokens", tokens), ("classes", classes)):
        if sizes[0] == sizes[1] or (None in sizes and (what == "classes" or not known)):
            continue
        if None not in sizes:
            said = [f"{name} of {size} {what}" for name, size in zip(said, sizes, strict=True)]
        raise ModelError(f"`against` is {said[0]}, the model {said[1]}: give the original that it was made from")


def check_vocabulary(model: nn.Module, input_ids_ET: Tensor) -> None:
    size, largest = vocabulary_size(model), int(input_ids_ET.max())
    if size is not None and largest >= size:
        raise DataError(
            f"got token {largest}, the model knows {size} tokens; use the tokenizer that belongs to the model"
        )
