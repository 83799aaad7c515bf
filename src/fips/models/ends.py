"""Find the two ends of a language model: the embedding of its tokens and the output head, which may be one matrix.

Both are asked of the model (``get_input_embeddings``, ``get_output_embeddings``); where it has no answer, the embedding
of the one model inside that has some, such as the text tower of CLIP. A matrix that several modules have, a tied one,
is one layer, under the name of its first embedding. Positions are no tokens and stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fips.models.sites import Linear, Site
from fips.models.sublayers import Skipped, Sublayer, oddity

__all__ = ["embedding_scale", "find_ends"]


def find_ends(model: nn.Module, skipped: list[Skipped]) -> list[Sublayer]:
    """Embedding and head, or the one matrix of both; ``skipped`` is told what stays as it is, and why."""
    embedding, head = _input_embedding(model), _asked(model, "get_output_embeddings")
    found: list[Sublayer] = []
    places: dict[str, nn.Module] = {}
    if isinstance(embedding, nn.Embedding):
        places = _places(model, embedding.weight)
        found = _embedding(model, places, skipped)
    else:
        skipped.append(
            Skipped("(embedding)", "the model has none of tokens; `layers: all` takes its blocks alone", end=True)
        )
    name = _name_of(model, head)
    if head is None or name is None or name in places:
        return found
    reason = _head_reason(model, name, head)
    if reason is not None or not isinstance(head, nn.Linear):
        skipped.append(Skipped(name, reason or "it is no linear layer", end=True))
        return found
    linear = Linear(name, head, head.in_features, head.out_features)
    return [*found, Sublayer(name, name, "", "head", (Site.reader(linear, "vocabulary", absorbs=False),))]


def _embedding(model: nn.Module, places: dict[str, nn.Module], skipped: list[Skipped]) -> list[Sublayer]:
    names = [name for name, module in places.items() if isinstance(module, nn.Embedding)]
    others = tuple(name for name in places if name != names[0])
    reason = next((f"`{name}` {why}" for name, one in places.items() if (why := _reason(one)) is not None), None)
    weight = places[names[0]].weight
    assert isinstance(weight, Tensor)
    inside = {id(module) for module in places.values()}
    stray = [name for name in _parameter_names(model, weight) if id(_holder(model, name)) not in inside]
    if reason is None and stray:
        reason = f"its matrix is `{stray[0]}` too"
    if reason is not None:
        skipped.append(Skipped(names[0], reason, end=True))
        return []
    heads = tuple(name for name, module in places.items() if isinstance(module, nn.Linear))
    site = Site.embedding(names[0], (weight.shape[0], weight.shape[1]), tied=others, heads=heads)
    return [Sublayer(names[0], site.judges[0], "", "tied" if heads else "embedding", (site,))]


def _reason(module: nn.Module) -> str | None:
    """Why a module with the matrix of an embedding cannot be packed; None if it can."""
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "changes its rows when they are read (`max_norm`)"
        if "forward" in vars(module) or "weight" not in module._parameters:
            return "is no plain embedding"
        if embedding_scale(module) is None:
            return f"is a `{type(module).__name__}`, whose rows are not known to be those of its matrix times a number"
        return None
    odd = oddity(module)
    return None if odd is None else f"is {odd}, not a plain linear layer"


def _head_reason(model: nn.Module, name: str, head: nn.Module) -> str | None:
    odd = oddity(head) if isinstance(head, nn.Linear) else f"`{type(head).__name__}`"
    if odd is not None:
        return f"it is {odd}, not a plain linear layer"
    others = [place for place in _places(model, head.weight) if place != name]
    return f"its matrix is that of `{others[0]}` too" if others else None


def embedding_scale(embedding: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by, 1 for a plain one; None where its class does something else.

    A subclass with a number ``embed_scale`` is believed if a small embedding made by it does that.
    """
    kind: Any = type(embedding)
    if kind is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if not isinstance(scale, int | float):
        return None
    try:
        with torch.device("cpu"), torch.no_grad():
            small, ids = kind(3, 2, 0, embed_scale=3.0), torch.tensor([[2, 1], [0, 1]])
            weight = torch.arange(6.0).view(3, 2)  # its own may be on the meta device, whatever the context
            found = functional_call(small, {"weight": weight}, (ids,))
            return float(scale) if torch.equal(found, 3 * weight[ids]) else None
    except Exception:
        return None


def _input_embedding(model: nn.Module) -> nn.Module | None:
    own = _asked(model, "get_input_embeddings")
    if own is not None:
        return own
    inside = [_asked(module, "get_input_embeddings") for module in model.modules() if hasattr(module, "config")]
    found = {id(one): one for one in inside if isinstance(one, nn.Embedding)}
    return next(iter(found.values())) if len(found) == 1 else None


def _asked(model: nn.Module, question: str) -> nn.Module | None:
    try:
        found = getattr(model, question)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, other in model.named_modules() if other is module), None)


def _places(model: nn.Module, weight: Any) -> dict[str, nn.Module]:
    """The modules whose weight is a parameter, by name."""
    return {name: module for name, module in model.named_modules() if module._parameters.get("weight") is weight}


def _holder(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _parameter_names(model: nn.Module, weight: Any) -> Sequence[str]:
    return [name for name, one in model.named_parameters(remove_duplicate=False) if one is weight]
