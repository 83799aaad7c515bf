"""The batches that calibration reads: what may be given, checked before any work, and the same on every pass.

A batch is a mapping of names to tensors for ``model(**batch)`` (a dict, the ``BatchEncoding`` of a tokenizer, ...), or
a tensor for ``model(batch)``. Batches come in anything that can be iterated several times: a list, a ``DataLoader``.

A ``DataLoader`` over a ``TensorDataset`` or a data set of (input, label) pairs, or a ``TensorDataset`` itself, is taken
where the model reads one tensor: the first of every tuple. Further elements must not be able to be anything the model
reads, such as a mask: its ``forward`` has one argument, or they hold one number per example. Tuples from elsewhere are
refused, since nothing says what they are.

Labels are left out, and so is what is None. Where a sequence-to-sequence model gets labels and no decoder inputs, those
are made of them.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from fips.calibration.preserve import RandomState
from fips.errors import DataError

__all__ = [
    "CalibrationData",
    "Wanted",
    "decoder_inputs",
    "digest",
    "few_examples",
    "first_examples",
    "numbered",
    "place",
]

log = logging.getLogger(__name__)

ROWS = 16
"""Examples of one batch where a ``TensorDataset`` is given without a loader."""
SHORT = 512
"""Tokens of a small batch."""
START = 128
"""Tokens of a text that tell as much as all of it where a few examples are asked."""
WANTED = "wanted an iterable of batches, each a dict of tensors or a tensor"
_LABELS = ("labels", "label", "label_ids")
_CACHED = ("past_key_values", "cache_params")
_CALL_OPTIONS = ("use_cache", "return_dict", "return_loss")
"""Arguments that say what a call does besides; they are ours to choose."""
_INPUTS = ("input_ids", "input_values", "input_features", "pixel_values", "inputs_embeds", "attention_mask")


Wanted = Callable[[int], bool]
"""Whether the batch with a number is wanted."""


@runtime_checkable
class Selectable(Protocol):
    """Batches of which some can be made without the others."""

    def only(self, numbers: Sequence[int]) -> Iterable[Any]:
        """Those with these numbers, in this order."""


def numbered(batches: Sequence[Any]) -> Callable[[Wanted], Iterator[tuple[int, Any]]]:
    """A list of batches as a pass over those that are wanted, with their numbers."""
    return lambda wanted: ((number, batch) for number, batch in enumerate(batches) if wanted(number))


class CalibrationData:
    """Batches ready for a model: a sized iterable of dicts for ``model(**batch)`` and tensors for ``model(batch)``.

    The loader's random numbers, for an order or for augmentation, are the same on every pass, and the caller's are not
    touched. ``check`` reads everything once.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], *, seed: int) -> None:
        _check_iterable(batches)
        self._reader = _Reader.of(model, from_loader=_is_loader(batches) or isinstance(batches, TensorDataset))
        self._source: Iterable[Any] = _slices(batches) if isinstance(batches, TensorDataset) else batches
        self._same_every_pass = bool(getattr(batches, "same_every_pass", False))
        self._seed = seed
        self._digests: list[str] = []
        self._count = len(batches) if isinstance(batches, Sized) else 0
        found = getattr(batches, "description", None)  # data of other libraries may describe themselves in prose
        self.description: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {}

    def check(self) -> None:
        """Read all batches, or only the first of data that are known to be sound and the same every time.

        Raises ``DataError`` naming the batch that cannot be used, or if a second pass gives other batches.
        """
        self._digests = [
            digest(batch) for _, batch in islice(self._passed(check=True), 1 if self._same_every_pass else None)
        ]
        if not self._digests:
            raise DataError("the calibration data has no batch; give at least one")
        if self._same_every_pass:
            return
        self._count = len(self._digests)
        again = next((batch for _, batch in self._passed(check=False)), None)
        if again is None:
            raise DataError("the batches were used up by the first pass, several are needed; give a list of them")
        if digest(again) != self._digests[0]:
            raise DataError(
                "the batches are other ones on every pass; seed what draws them, or give a list: `list(batches)`"
            )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.part())

    def part(self, wanted: Wanted = lambda _: True) -> Iterator[tuple[int, Any]]:
        """Those batches whose numbers are wanted, with their numbers; others are made only where the source can make
        none but all in turn."""
        chosen = [number for number in range(self._count) if wanted(number)]
        expected, seen = len(chosen) if isinstance(self._source, Selectable) else self._count, 0
        for number, batch in self._passed(check=self._same_every_pass, chosen=chosen):
            if number < len(self._digests) and digest(batch) != self._digests[number]:
                log.warning("calibration batch %d is another one than on the first pass", number)
            seen += 1
            if wanted(number):
                yield number, batch
        if seen != expected:
            log.warning("this pass over the calibration data had %d batches, the first %d", seen, expected)

    def only(self, wanted: Wanted) -> Iterable[Any]:
        """Those batches whose numbers are wanted, as often as they are iterated."""
        return _Part(self, wanted)

    def key(self) -> str:
        """A digest of the data: equal for equal batches."""
        if self._same_every_pass and len(self._digests) < self._count:
            self._digests = [digest(batch) for _, batch in self._passed(check=True)]
        return hashlib.sha256("".join(self._digests).encode()).hexdigest()

    def _passed(self, *, check: bool, chosen: Sequence[int] | None = None) -> Iterator[tuple[int, Any]]:
        """One pass, or its ``chosen`` batches if the source selects, with their numbers.

        The loader draws its random numbers from a seed of its own.
        """
        source: Iterable[Any] = self._source
        numbers: Iterator[int] = counting()
        if chosen is not None and isinstance(source, Selectable):
            source, numbers = source.only(chosen), iter(chosen)
        with _own_generators(self._source):
            randomness = _Randomness(self._seed)
            iterator = randomness.run(lambda: iter(source))
            while True:
                found = randomness.run(lambda: next(iterator, _END))
                if found is _END:
                    return
                number = next(numbers)
                batch = self._reader.read(found, where=f"batch {number}")
                if check:
                    self._reader.check(batch, where=f"batch {number}")
                yield number, batch


_END = object()


class _Randomness:
    """Global random numbers of a pass: they go on from call to call, the caller's stay where they are."""

    def __init__(self, seed: int) -> None:
        with RandomState.seeded(seed):
            self._state = RandomState.now()

    def run(self, function: Callable[[], Any]) -> Any:
        before = RandomState.now()
        self._state.use()
        try:
            return function()
        finally:
            self._state = RandomState.now()
            before.use()


class _own_generators:
    """Generators that a loader or its sampler holds start every pass where they are now, and are put back after it."""

    def __init__(self, source: Any) -> None:
        batch_sampler = getattr(source, "batch_sampler", None)
        holders = (source, getattr(source, "sampler", None), getattr(batch_sampler, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        self._states = [(one, one.get_state()) for one in found if isinstance(one, torch.Generator)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for generator, state in self._states:
            generator.set_state(state)


@dataclass(frozen=True, slots=True)
class _Part:
    """The batches of ``data`` whose numbers are wanted, in every pass."""

    data: CalibrationData
    wanted: Wanted

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.data.part(self.wanted))


@dataclass(frozen=True, slots=True)
class _Reader:
    """What a model's ``forward`` takes, and the way from something given to a batch for it."""

    name: str
    parameters: tuple[str, ...]
    required: frozenset[str]
    """Arguments without a default."""
    open: bool
    """Whether it takes arguments of any name."""
    labels: frozenset[str]
    from_loader: bool
    reads_text_only: bool
    num_embeddings: int | None
    """Token ids there are, where that is the number of rows of the embedding."""
    prepare_decoder: Callable[[Tensor], Tensor] | None
    """Decoder inputs from labels."""
    pad_token: int | None

    @classmethod
    def of(cls, model: nn.Module, *, from_loader: bool) -> _Reader:
        parameters = inspect.signature(model.forward).parameters.values()
        named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        names = tuple(one.name for one in named)
        required = frozenset(one.name for one in named if one.default is one.empty)
        hub = isinstance(model, PreTrainedModel)
        text_only = hub and model.main_input_name == "input_ids" and not {"pixel_values", "input_features"} & set(names)
        embedding = _embedding(model) if text_only else None
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        return cls(
            name=type(model).__name__,
            parameters=names,
            required=required,
            open=any(one.kind == one.VAR_KEYWORD for one in parameters),
            labels=frozenset([*_LABELS, *(find_labels(type(model)) if hub else ())]) - required,
            from_loader=from_loader,
            reads_text_only=text_only,
            num_embeddings=None if embedding is None else embedding.num_embeddings,
            prepare_decoder=decoder_inputs(model),
            pad_token=pad if isinstance(pad, int) else None,
        )

    def read(self, item: Any, *, where: str) -> Any:
        """A batch as a dict or a tensor; raises ``DataError`` if it is neither."""
        if isinstance(item, Mapping):
            return self._named(item)
        if isinstance(item, Tensor):
            return item
        if isinstance(item, (tuple, list)) and item and isinstance(item[0], Tensor):
            return self._first(item, where)
        hint = "tokenize first: `tokenizer(texts, return_tensors='pt')`" if _holds_text(item) else WANTED
        raise DataError(f"a batch must be a dict of tensors or a tensor, got {type(item).__name__} ({where}); {hint}")

    def _named(self, item: Mapping[str, Any]) -> dict[str, Any]:
        left_out = (*self.labels, *_CALL_OPTIONS)
        there = {key: value for key, value in item.items() if value is not None or key in self.required}
        batch = {key: value for key, value in there.items() if key not in left_out}
        labels = item.get("labels")
        if self.prepare_decoder is not None and isinstance(labels, Tensor) and labels.dim() == 2:
            if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
                batch["decoder_input_ids"] = self.prepare_decoder(labels)
            inputs = batch.get("decoder_input_ids")
            fits = isinstance(inputs, Tensor) and inputs.shape == labels.shape
            masked = "decoder_attention_mask" in batch or labels.is_meta
            if fits and not masked and bool((labels < 0).any()):
                # a decoder input is the label before it, the first one a start token
                batch["decoder_attention_mask"] = nn.functional.pad((labels >= 0).long(), (1, -1), value=1)
        return batch

    def _first(self, item: Sequence[Any], where: str) -> Tensor:
        x, *others = item
        if not self.from_loader:
            raise DataError(
                f"a batch must be a dict of tensors or a tensor, got {type(item).__name__} of {len(item)} ({where}); "
                "give the inputs alone, `[x for x, *_ in batches]`, or the `DataLoader` that makes the tuples"
            )
        per_example = all(isinstance(one, Tensor) and one.shape == x.shape[:1] for one in others)
        alone = len(self.parameters) == 1 and not self.open
        images = "attention_mask" not in self.parameters and "pixel_values" in self.parameters
        if len(self.required) > 1 or (others and not (alone or images or per_example)):
            raise DataError(
                f"the loader gives {len(item)} values per batch ({where}), and `{self.name}.forward` takes "
                f"{', '.join(self.parameters[:4])}; give dicts that name them (`collate_fn`)"
            )
        return x  # type: ignore[no-any-return]

    def check(self, batch: Any, *, where: str) -> None:
        """Raise ``DataError`` for what would fail, or be wrong without a word, when the model reads it."""
        tensors = {self.parameters[0] if self.parameters else "input": batch} if isinstance(batch, Tensor) else batch
        for name, value in tensors.items():
            self._check_name(name, value, where)
            if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in _leaves(value)):
                raise DataError(f"`{name}` of {where} lies on the meta device, without numbers; give it on the CPU")
            if isinstance(value, Tensor):
                self._check_tensor(name, value, where, named=not isinstance(batch, Tensor))
        if not any(isinstance(value, Tensor) for value in _leaves(tensors)):
            raise DataError(f"{where} holds no tensor but {sorted(map(str, tensors)) or 'nothing'}; {WANTED}")
        ids = tensors.get("input_ids")
        if isinstance(ids, Tensor):
            self._check_mask(ids, tensors, where)

    def _check_name(self, name: Any, value: Any, where: str) -> None:
        if name in _CACHED and value is not None:
            raise DataError(f"{where} holds `{name}`, which every pass would change; leave it out")
        if not self.open and name not in self.parameters:
            raise DataError(
                f"{where} holds `{name}`, and `{self.name}.forward` has no such argument; leave it out (it takes "
                f"{', '.join(self.parameters[:4])})"
            )
        if _holds_text(value):
            raise DataError(f"`{name}` of {where} is text, not a tensor; tokenize it or leave it out")
        numbers = not isinstance(value, Tensor) and name in _INPUTS and value is not None
        if type(value).__module__ == "numpy" or (numbers and not any(isinstance(x, Tensor) for x in _leaves(value))):
            raise DataError(
                f"`{name}` of {where} is a {type(value).__name__}, not a tensor; use `return_tensors='pt'` with the "
                "processor, or `torch.as_tensor`"
            )

    def _check_tensor(self, name: str, value: Tensor, where: str, *, named: bool) -> None:
        shape = tuple(value.shape)
        if not value.numel():
            raise DataError(f"`{name}` of {where} is empty (shape {shape}); leave the batch out")
        if (value.dim() < 2 and (name in _INPUTS or not named)) or value.dim() == 0:
            raise DataError(
                f"`{name}` of {where} has shape {shape} and no batch axis; give several examples at a time, or "
                "`x.unsqueeze(0)` for one"
            )
        if name == "input_ids" and (value.is_floating_point() or value.is_complex()):
            raise DataError(f"`input_ids` of {where} are {value.dtype}; token ids are integers: `.long()`")
        if value.is_floating_point() and "mask" not in name and not bool(value.isfinite().all()):
            raise DataError(f"`{name}` of {where} holds NaN or Inf; clean the data")
        if name == "input_ids" and self.num_embeddings is not None:
            worst = int(value.min()) if int(value.min()) < 0 else int(value.max())
            if not 0 <= worst < self.num_embeddings:
                raise DataError(
                    f"`input_ids` of {where} hold token {worst}, and the model knows {self.num_embeddings} tokens; use "
                    "the tokenizer that belongs to the model"
                )

    def _check_mask(self, ids: Tensor, batch: Mapping[str, Any], where: str) -> None:
        mask = batch.get("attention_mask")
        if mask is None and self.reads_text_only and self.pad_token is not None and ids.shape[-1] > 1:
            ends = torch.cat([ids[..., :2].reshape(-1, 2), ids[..., -2:].reshape(-1, 2)])
            if bool((ends == self.pad_token).all(-1).any()):
                log.warning("%s seems to be padded and has no `attention_mask`: padding counts like any token", where)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or ids.dim() != 2:
            return
        if mask.shape != ids.shape:
            raise DataError(
                f"`attention_mask` of {where} has shape {tuple(mask.shape)}, `input_ids` have {tuple(ids.shape)}; they "
                "must be alike"
            )
        empty = (~mask.bool()).all(1).nonzero()
        if empty.numel() and not bool((mask < 0).any()):
            raise DataError(f"`attention_mask` of {where} hides every token of example {int(empty[0])}; leave it out")


def few_examples(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """The first ``count`` examples a few at a time, then whole batches from where they end.

    A few are 8, or fewer where those would be more than ``SHORT`` tokens; texts without padding are cut to ``START``. A
    batch that cannot be cut is given whole.
    """
    for batch in batches:
        tensors = [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)]
        size = len(tensors[0]) if tensors and tensors[0].dim() else 0
        alike = size > 0 and all(tensor.dim() and len(tensor) == size for tensor in tensors)
        if not alike or count <= 0:
            yield batch
        else:
            wanted = min(count, size)
            start = _first_tokens(_cut(batch, slice(0, wanted)))
            step = max(1, min(8, SHORT // _tokens(start)))
            yield from (_cut(start, slice(at, min(at + step, wanted))) for at in range(0, wanted, step))
            if size > wanted:
                yield _cut(batch, slice(wanted, size))
        count -= max(size, 1)


def first_examples(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """The first of ``few_examples``, ``count`` examples and no more than the last of their pieces has."""
    for batch in few_examples(batches, count):
        yield batch
        count -= max((len(leaf) for leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), default=1)
        if count <= 0:
            return


def _tokens(batch: Any) -> int:
    """Of one example, at most."""
    tensors = [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)]
    return max((tensor[0].numel() for tensor in tensors if not tensor.is_floating_point()), default=1) or 1


def _first_tokens(batch: Any) -> Any:
    """Texts of ``START`` tokens at most, if all that the batch holds are token ids and a mask that hides nothing."""
    if not isinstance(batch, Mapping) or not {*batch} <= {"input_ids", "attention_mask"}:
        return batch
    mask = batch.get("attention_mask")
    if mask is not None and not (mask.is_meta or bool(mask.all())):
        return batch
    return {name: value[:, :START] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _cut(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part]
    return {name: value[part] if isinstance(value, Tensor) else value for name, value in batch.items()}


def place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors of a batch, however deep, on a device, floating ones in a type, none with a history of gradients."""
    if isinstance(value, Tensor):
        moved = value.detach().to(device, dtype if value.is_floating_point() else None)
        return moved.clone() if moved.is_inference() else moved
    if isinstance(value, Mapping):
        return {key: place(one, device, dtype) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(place(one, device, dtype) for one in value)
    return value


def _check_iterable(batches: Any) -> None:
    """Raise ``DataError`` for what is one batch, no batch, or can be read only once."""
    kind = type(batches).__name__
    if isinstance(batches, (str, bytes, Path)):
        raise DataError(f"{WANTED}, got the {kind} {str(batches)[:60]!r}; load the data first (`fips.load_data`)")
    if isinstance(batches, (Mapping, Tensor)):
        raise DataError(f"{WANTED}, got one {kind}; put it into a list: `[batch]`")
    if isinstance(batches, Dataset) and not isinstance(batches, TensorDataset):
        raise DataError(f"{WANTED}, got the data set `{kind}`, which gives single examples; give a `DataLoader` of it")
    if not isinstance(batches, (Iterable, TensorDataset)):
        raise DataError(f"{WANTED}, got `{kind}`; give a list or a `DataLoader`")
    if isinstance(batches, Iterator):
        raise DataError(
            f"{WANTED}, to be read several times, got a `{kind}`, which is used up after one pass; give a list: "
            "`list(batches)`"
        )
    if isinstance(batches, Sized) and not len(batches):
        raise DataError("the calibration data has no batch; give at least one")


def _is_loader(batches: Any) -> bool:
    return isinstance(batches, DataLoader)


def _slices(dataset: TensorDataset) -> list[tuple[Tensor, ...]]:
    starts = range(0, len(dataset), ROWS)
    return [tuple(tensor[start : start + ROWS] for tensor in dataset.tensors) for start in starts]


def _embedding(model: nn.Module) -> nn.Embedding | None:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def decoder_inputs(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How a sequence-to-sequence model makes decoder inputs of labels; None if it does not."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None or not type(model).__name__.endswith("ForConditionalGeneration"):
        return prepare
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    config: Any = model.config
    return None if shift is None else partial(_shifted, shift, config)


def _shifted(shift: Callable[[Tensor, int, int], Tensor], config: Any, labels: Tensor) -> Tensor:
    return shift(labels, config.pad_token_id, config.decoder_start_token_id)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _leaves(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _holds_text(value: Any) -> bool:
    return any(isinstance(leaf, (str, bytes)) for leaf in _leaves(value))


def digest(batch: Any) -> str:
    """A digest of all that a batch holds."""
    found = hashlib.blake2b(digest_size=16)
    items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
    for name, value in items:
        for leaf in _leaves(value):
            if isinstance(leaf, Tensor):
                local = leaf.detach().cpu().contiguous()
                found.update(f"{name}{local.dtype}{tuple(local.shape)}".encode())
                found.update(local.reshape(-1).view(torch.uint8).numpy().data)
            else:
                found.update(f"{name}{leaf!r}".encode())
    return found.hexdigest()
