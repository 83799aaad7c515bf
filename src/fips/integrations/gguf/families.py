"""What llama.cpp has to be told of each family: its name there, hyper-parameters, positions, what differs in tensors.

Names of keys and tensors are those of the ``gguf`` package. What llama.cpp computes otherwise than transformers is
refused, or said where it only matters for long texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fips.errors import ModelError
from fips.integrations.gguf.tokens import NEXT_STEP

__all__ = ["FAMILIES", "Family", "add_parameters", "require_family", "rope_factors", "tensors_of"]

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of llama.cpp."""

    arch: str
    """Its name in the file."""
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    """Layers that may have a bias there."""
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of scaled positions."""
    permuted: bool = False
    """Rows of queries and keys lie pair by pair: transformers turns the halves of a head, llama.cpp neighbours."""
    norm_offset: float = 0.0
    """Added to the weights of norms, which transformers adds when it computes."""
    tied: bool = False
    """The head is always the embedding."""
    period: int = 0
    """Of the layers with a sliding window all but every so manieth have it; 0: llama.cpp knows no window here."""
    large: int = 0
    """Layers of the model whose attention is scaled by the width of a head as if all heads filled the stream."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        arch="llama", biases=_ATTENTION + _MLP, permuted=True, scalings=("default", "linear", "yarn", "llama3")
    ),
    "MistralForCausalLM": Family(arch="llama", permuted=True),
    "Qwen2ForCausalLM": Family(arch="qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "Qwen3ForCausalLM": Family(arch="qwen3"),
    "Gemma2ForCausalLM": Family(
        arch="gemma2", activation="gelu_pytorch_tanh", scalings=("default",), norm_offset=1.0, tied=True, period=2,
        large=46,
    ),
    "Gemma3ForCausalLM": Family(
        arch="gemma3", activation="gelu_pytorch_tanh", scalings=("default", "linear"), norm_offset=1.0, period=6,
        large=62,
    ),
}  # fmt: skip
"""By the class of transformers."""


def require_family(model: nn.Module) -> Family:
    """The family of a model, with or without weights; raises ``ModelError`` if llama.cpp would compute another one."""
    name = type(model).__name__
    family = FAMILIES.get(name)
    if (
        family is None
        or not isinstance(model, PreTrainedModel)
        or not type(model).__module__.startswith("transformers")
    ):
        known = ", ".join(key.removesuffix("ForCausalLM") for key in FAMILIES)
        raise ModelError(f"`{name}` cannot be written as GGUF; language models of {known} can. {NEXT_STEP}")
    for wrong in _differences(model.config, family):
        raise ModelError(f"llama.cpp computes `{family.arch}` otherwise than this model: {wrong}. {NEXT_STEP}")
    return family


def _differences(config: Any, family: Family) -> list[str]:
    """What the model has that the architecture of llama.cpp lacks, in words."""
    found = []
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != family.activation:
        found.append(f"its activation is {activation}, not {family.activation}")
    heads, width = config.num_attention_heads, _head_width(config)
    if family.arch == "qwen2" and heads * width != config.hidden_size:
        found.append(f"{heads} heads of {width} are not as wide as the stream, {config.hidden_size}")
    if getattr(config, "attention_bias", False) and "o_proj" not in family.biases:
        found.append("its attention has biases (`attention_bias`)")
    if family.tied and not config.tie_word_embeddings:
        found.append("its head is not its embedding (`tie_word_embeddings: false`)")
    for positions in _positions(config).values():
        scaling = positions.get("rope_type", "default")
        if scaling not in family.scalings:
            found.append(f"positions are scaled by `{scaling}`, known are {', '.join(family.scalings)}")
        if positions.get("partial_rotary_factor") not in (None, 1.0):
            found.append("only part of a head is turned (`partial_rotary_factor`)")
        extra = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if positions.get(key) is not None]
        if scaling == "yarn" and (extra or positions.get("truncate") is False):
            found.append(f"its `yarn` has {', '.join(extra) or 'truncate: false'}")
    return found + (_differences_of_gemma(config, family) if family.period else [])


def _differences_of_gemma(config: Any, family: Family) -> list[str]:
    found = []
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, _head_width(config)
    scale = config.hidden_size // heads if layers == family.large else width
    if config.query_pre_attn_scalar != scale:
        found.append(f"`query_pre_attn_scalar` is {config.query_pre_attn_scalar}, not {scale}")
    full = [kind != "sliding_attention" for kind in config.layer_types]
    if full != [(index + 1) % family.period == 0 for index in range(layers)]:
        found.append(f"the layers without a sliding window are not every {family.period}th")
    if getattr(config, "use_bidirectional_attention", None):
        found.append("tokens see those that follow (`use_bidirectional_attention`)")
    capped = family.arch == "gemma2"
    if (config.attn_logit_softcapping is not None) != capped or (capped and config.final_logit_softcapping is None):
        found.append(f"logits are {'not ' if capped else ''}capped (`attn_logit_softcapping`)")
    if not capped:
        local = _positions(config)["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            found.append("positions in layers with a sliding window are scaled")
    return found


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _positions(config: Any) -> dict[str, dict[str, Any]]:
    """Settings of the positions, by kind of layer where they differ."""
    found = config.rope_parameters
    return dict(found) if "full_attention" in found else {"full_attention": found}


def add_parameters(writer: Any, family: Family, config: Any, package: Any) -> list[str]:
    """Write the hyper-parameters; returns what llama.cpp does otherwise with long texts, in words.

    ``package`` is ``gguf``.
    """
    width = _head_width(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    positions = _positions(config)
    _add_positions(writer, positions["full_attention"], package)
    if "sliding_attention" in positions:
        writer.add_rope_freq_base_swa(float(positions["sliding_attention"]["rope_theta"]))
    if family.period:
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        return []
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return []
    return [f"llama.cpp has no sliding window for {family.arch}: beyond {window} tokens it sees more than the model"]


def _add_positions(writer: Any, positions: Mapping[str, Any], package: Any) -> None:
    writer.add_rope_freq_base(float(positions["rope_theta"]))
    scaling = positions.get("rope_type", "default")
    if scaling not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(package.RopeScalingType(scaling))
    writer.add_rope_scaling_factor(float(positions["factor"]))
    for key, add in (
        ("original_max_position_embeddings", writer.add_rope_scaling_orig_ctx_len),
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if scaling == "yarn" and positions.get(key) is not None:
            add(positions[key])


def rope_factors(config: Any) -> Tensor | None:
    """What every frequency of the positions is divided by, (head width / 2,), where that is not one number."""
    positions = _positions(config)["full_attention"]
    if positions.get("rope_type", "default") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_width(config)
    powers = torch.arange(0, width, 2, dtype=torch.float32) / width
    factors: Tensor = positions["rope_theta"] ** -powers / scaled
    return factors


def tensors_of(family: Family, config: Any) -> Callable[[str, Tensor], Tensor]:
    """What is done with the rows, or all, of a tensor of this name: (name, tensor) to tensor.

    Rows are those of the first dimension, so that it serves weights, biases, integers and their scales alike.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def arrange(name: str, tensor: Tensor) -> Tensor:
        layer = name.split(".")[-2]
        if family.permuted and layer in heads:
            pairs: Tensor = tensor.unflatten(0, (heads[layer], 2, -1))
            return pairs.transpose(1, 2).flatten(0, 2)
        if family.norm_offset and layer.endswith("norm"):
            return tensor.float() + family.norm_offset
        return tensor

    return arrange
