"""Attention of one token to those before it, on a CPU: what generating takes beside the matrices.

torch's attention kernel (2.13) takes one query in 16 bits 3 to 13 times as long as several, and does it for every query
head. So the compiled library does it where a mask hides nothing but padding in front, and without it the queries that
share keys and values are given to torch together, as if they were several tokens; where every head has its own keys,
the query is given twice.

``quicken`` marks the attention modules of a model and puts a function before transformers' ``sdpa`` that knows them.
All others, and calls of any other kind, go on to transformers.

Shape legend: B examples, H query heads, K heads of keys and values, L keys, D size of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fips.kernels import attention

__all__ = ["attend", "hidden_by", "quicken"]

MARK = "fips_one_token"
KINDS = 2
"""Masks of a model at a time: of layers with a window and of those without."""
_looked_at: tuple[tuple[weakref.ref[Tensor], tuple[int, int, int], tuple[int, ...] | None], ...] = ()
"""The last masks, what was asked of each, and what it hides."""


def quicken(model: nn.Module) -> None:
    """Let the attention modules of a model that use transformers' ``sdpa`` take single tokens faster on a CPU."""
    for module in model.modules():
        if "is_causal" in vars(module) or "num_key_value_groups" in vars(module):
            setattr(module, MARK, True)
    others = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not hasattr(others, MARK):
        AttentionInterface.register("sdpa", _before(others))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention (B, H, 1, D) of one query of every head (B, H, 1, D) to keys and values (B, K, L, D).

    ``mask``, added or of truth values, is (B or 1, 1, 1, L). H is a multiple of K.
    """
    batch, heads, _, size = query.shape
    if attention.suits(query, key, value) and (hidden := hidden_by(mask, batch, key.shape[2])) is not None:
        return attention.attend(query, key, value, size**-0.5 if scale is None else scale, hidden=hidden)
    groups = heads // key.shape[1]
    if groups == 1:
        return scaled_dot_product_attention(query.expand(-1, -1, 2, -1), key, value, mask, scale=scale)[:, :, :1]
    together = query.reshape(batch, key.shape[1], groups, size)
    return scaled_dot_product_attention(together, key, value, mask, scale=scale).reshape(batch, heads, 1, -1)


def hidden_by(mask: Tensor | None, examples: int, length: int) -> tuple[int, ...] | None:
    """Of every example how many keys, the first of ``length``, a mask hides, as it hides padding in front of a text.

    Empty where it hides nothing, as that of a full window; None where it hides others. A mask is True or, of numbers
    to be added, 0 where it shows a key. All layers of a model are given the same one, which is looked at once.
    """
    global _looked_at
    if mask is None:
        return ()
    if mask.is_inference():  # nothing says whether it was written to
        return _hidden_by(mask, examples, length)
    asked = mask._version, examples, length
    for known, question, answer in _looked_at:
        if known() is mask and question == asked:
            return answer
    answer = _hidden_by(mask, examples, length)
    _looked_at = (weakref.ref(mask), asked, answer), *_looked_at[: KINDS - 1]
    return answer


def _hidden_by(mask: Tensor, examples: int, length: int) -> tuple[int, ...] | None:
    shown = mask if mask.dtype is torch.bool else mask == 0
    if bool(shown.all()):
        return ()
    if shown.dim() != 4 or shown.shape[1:] != (1, 1, length) or shown.shape[0] not in (1, examples):
        return None
    rows = shown[:, 0, 0]
    hidden = length - rows.sum(1)
    if not torch.equal(rows, torch.arange(length) >= hidden[:, None]) or int(hidden.max()) == length:
        return None
    if mask.dtype is not torch.bool and bool((mask[~shown] > torch.finfo(mask.dtype).min / 2).any()):
        return None  # it is weighed less, not hidden
    counts = tuple(hidden.tolist())
    return counts if len(counts) == examples else counts * examples


def _before(others: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    def sdpa(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if hasattr(module, MARK) and not dropout and _is_one_token(query, key, attention_mask, options):
            return attend(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
        return others(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)

    setattr(sdpa, MARK, True)
    return sdpa


def _is_one_token(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    if torch._C._get_tracing_state() or torch.compiler.is_exporting():  # any number of tokens may come later
        return False
    return (
        query.shape[2] == 1
        and query.shape[0] == key.shape[0]
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == 1))
        and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    )
