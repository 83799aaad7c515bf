"""What the linear layers of an attention module read and write; for ``layers: blocks`` and ``targets``.

Query, key and value read the residual stream, the output projection writes it. Where all are square their shapes do
not tell them apart, and neither does their order: Phi-3 registers the output projection first. So the rule is

1. the name, of those that the field uses (``WRITES``, ``READS``);
2. under any other name, the last linear layer of the module writes, the others read;
3. a layer that by 1 or 2 writes, but whose outputs are not as wide as the stream, reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fips.models.sites import Linear, Part, Site, Space

__all__ = ["attention_around", "attention_site", "is_attention"]

HEAD_COUNTS = ("num_heads", "num_attention_heads", "head_dim", "n_heads", "num_key_value_groups")
WRITES = {"o_proj", "out_proj", "c_proj", "proj", "dense", "output", "o", "wo", "out_lin", "to_out", "linear_out"}
FUSED = {"qkv_proj", "qkv", "Wqkv", "c_attn", "in_proj"}
"""Queries, keys and values side by side. Layers that mix them head by head (``query_key_value``) are not among them."""
READS: dict[str, Space] = {
    **dict.fromkeys(("q_proj", "query", "query_proj", "q_lin", "q", "wq", "to_q", "linear_q"), "queries"),
    **dict.fromkeys(("k_proj", "key", "key_proj", "k_lin", "k", "wk", "to_k", "linear_k"), "keys"),
    **dict.fromkeys(("v_proj", "value", "value_proj", "v_lin", "v", "wv", "to_v", "linear_v"), "values"),
    **dict.fromkeys((*FUSED, "query_key_value"), "heads"),
}


def is_attention(module: nn.Module, name: str) -> bool:
    """Whether a container carries head counts; whole blocks (elements of a list) may do so too and are none."""
    if name.rpartition(".")[2].isdigit():
        return False
    return any(hasattr(module, mark) for mark in HEAD_COUNTS)


def attention_around(model: nn.Module, block: str, name: str) -> str | None:
    """The outermost attention module inside a block that holds the layer ``name``: by head counts or its own name."""
    parents = name.removeprefix(f"{block}.").split(".")[:-1]
    for end in range(1, len(parents) + 1):
        path = ".".join([block, *parents[:end]])
        if any(word in parents[end - 1].lower() for word in ("attn", "attention")):
            return path
        if is_attention(model.get_submodule(path), path):
            return path
    return None


def attention_site(linear: Linear, members: Sequence[Linear], width: int) -> Site | None:
    """A linear layer of an attention module with these ``members``, in order, in a block of this width.

    None if it neither reads nor writes the residual stream (the inner matrices of a low-rank projection).
    """
    writers = [member for member in members if _writes(member, members, width)]
    if linear in writers:
        return Site.writer(linear, "heads")
    if linear.inputs != width:
        return None
    name = _last_name(linear)
    keys = (linear.outputs - writers[-1].inputs) // 2 if writers and name in FUSED else 0
    if keys > 0:
        sizes: dict[Space, int] = {"queries": linear.outputs - 2 * keys, "keys": keys, "values": keys}
        written = tuple(Part(space, size) for space, size in sizes.items())
        return Site.of(linear, reads=(Part("residual", width),), writes=written)
    return Site.reader(linear, READS.get(name, "heads"))


def _writes(linear: Linear, members: Sequence[Linear], width: int) -> bool:
    name = _last_name(linear)
    named = name in WRITES or (name not in READS and linear is members[-1])
    return named and linear.outputs == width


def _last_name(linear: Linear) -> str:
    """The last part of a name that is no number: ``to_out`` of ``attn.to_out.0``."""
    return next(part for part in reversed(linear.name.split(".")) if not part.isdigit())
