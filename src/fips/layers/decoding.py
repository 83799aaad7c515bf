"""Attention of one token to those before it, on a CPU: what generating takes beside the matrices.

torch's attention kernel (2.13) takes one query in 16 bits 3 to 13 times as long as several, and does it for every query
head. So the compiled library does it where nothing is masked, and without it the queries that share keys and values are
given to torch together, as if they were several tokens; where every head has its own keys, the query is given twice.

``quicken`` marks the attention modules of a model and puts a function before transformers' ``sdpa`` that knows them.
All others, and calls of any other kind, go on to transformers.

Shape legend: B examples, H query heads, K heads of keys and values, L keys, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fips.kernels import attention

__all__ = ["attend", "quicken", "shows_all"]

MARK = "fips_one_token"


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
    if attention.suits(query, key, value) and shows_all(mask):
        return attention.attend(query, key, value, size**-0.5 if scale is None else scale)
    groups = heads // key.shape[1]
    if groups == 1:
        return scaled_dot_product_attention(query.expand(-1, -1, 2, -1), key, value, mask, scale=scale)[:, :, :1]
    together = query.reshape(batch, key.shape[1], groups, size)
    return scaled_dot_product_attention(together, key, value, mask, scale=scale).reshape(batch, heads, 1, -1)


def shows_all(mask: Tensor | None) -> bool:
    """Whether a mask hides nothing, as that of a full window: True everywhere or, of numbers to be added, 0."""
    if mask is None:
        return True
    return bool(mask.all()) if mask.dtype is torch.bool else not bool(mask.any())


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
