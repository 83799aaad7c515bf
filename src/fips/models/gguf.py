"""GGUF files of llama.cpp as models: transformers reads them, and what it leaves out is put right or refused.

A source is the path of such a file, ``DIR/NAME.gguf``, or ``OWNER/REPOSITORY/NAME.gguf`` of the hub. All weights become
floating numbers. transformers takes no notice of scaled positions, of some fields and of tensors that it has no place
for; each would give another model without a word.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.hub import cached_file

from fips.errors import ModelError
from fips.files.hub import hub_where_reached
from fips.models.names import listed
from fips.optional import require

__all__ = ["GgufSource", "as_plain", "check_tensors", "gguf_fields", "gguf_source", "is_gguf_source", "join_gguf"]

SUFFIX = ".gguf"
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+)")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_ROPE_FACTORS = "rope_freqs.weight"
_SPOKEN = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Fields of the file and what transformers calls them; a configuration without that name has no such thing."""
_LARGE = {"gemma2": 46, "gemma3": 62}
"""Layers of the models of Gemma whose attention is scaled by the width of a head as if all heads filled the stream."""


@dataclass(frozen=True, slots=True)
class GgufSource:
    """The header of a GGUF file on this machine."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    """Numbers and words; lists are left out."""
    types: Mapping[str, str]
    """Type of every tensor by its name in the file."""
    factors: tuple[float, ...] | None
    """What the frequencies of the positions are divided by; None where nothing is said."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers: the narrowest floating one of a file of such, float32 of one with few bits."""
        found = {_FLOATS.get(name) for name in self.types.values()}
        if None in found:
            return torch.float32
        return next((kind for kind in (torch.bfloat16, torch.float16) if kind in found), torch.float32)

    def field(self, name: str) -> Any:
        """A field of the architecture, None if it is absent."""
        return self.fields.get(f"{self.architecture}.{name}")

    @property
    def options(self) -> tuple[str, dict[str, str]]:
        """What ``from_pretrained`` takes; the whole path, since a file of that name in the current directory wins."""
        return str(self.path.parent), {"gguf_file": str(self.path)}


def is_gguf_source(source: str) -> bool:
    """Whether a source names a GGUF file."""
    return str(source).lower().endswith(SUFFIX) and not Path(source).is_dir()


def join_gguf(model: str, name: str) -> str:
    """The source of file ``name`` of a directory or repository; raises ``ModelError`` if a directory lacks it."""
    if not name.lower().endswith(SUFFIX):
        raise ModelError(f"`--gguf-file` names a file that ends in {SUFFIX}, got {name!r}")
    place = Path(model)
    if place.is_file():
        raise ModelError(f"`{model}` is a file: give it alone, or its directory with --gguf-file")
    if place.is_dir() and not (place / name).is_file():
        found = sorted(path.name for path in place.glob(f"*{SUFFIX}"))
        raise ModelError(f"`{model}` has no `{name}`; it holds {', '.join(found) or f'no {SUFFIX} file'}")
    return f"{model.rstrip('/')}/{name}"


def gguf_source(source: str) -> GgufSource:
    """The header of a file, from the hub if it is there; raises ``ModelError`` if it cannot be read.

    ``MissingPackageError`` without gguf.
    """
    require("gguf", extra="gguf", purpose="reading a GGUF file")
    path = Path(source) if Path(source).is_file() else _fetched(source)
    state = path.stat()
    return _header(path.absolute(), state.st_mtime_ns, state.st_size)


def _fetched(source: str) -> Path:
    found = _HUB_FILE.fullmatch(source)
    if found is None or found[1].startswith("."):
        raise ModelError(f"unknown model `{source}`: no such file; give a GGUF file, or OWNER/REPOSITORY/NAME.gguf")
    try:
        with hub_where_reached():
            return Path(str(cached_file(found[1], found[2])))
    except Exception as error:  # whatever the client of the hub may raise
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
        raise ModelError(
            f"cannot load model `{source}`: {reason} (there is no file of this name; give one, or a hub id and file "
            "while online)"
        ) from None


@functools.lru_cache(maxsize=4)
def _header(path: Path, _time: int, _size: int) -> GgufSource:
    package = require("gguf", extra="gguf", purpose="reading a GGUF file")
    try:
        reader = package.GGUFReader(path)
        plain = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != package.GGUFValueType.ARRAY
        }
        architecture = str(plain["general.architecture"])
        types = {tensor.name: str(tensor.tensor_type.name) for tensor in reader.tensors}
        factors = next((tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS), None)
    except Exception as error:  # files are anyone's, and the reader fails in its own ways
        raise ModelError(
            f"`{path}` is not a GGUF file that can be read: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]} (copy or download it again)"
        ) from None
    parts = int(plain.get("split.count", 0) or 0)
    if parts > 1:
        raise ModelError(
            f"`{path.name}` is one of {parts} parts of a model; join them with llama.cpp: `llama-gguf-split --merge "
            "FIRST-PART WHOLE.gguf`"
        )
    numbers = None if factors is None else tuple(float(number) for number in factors.reshape(-1))
    return GgufSource(path, architecture, plain, types, numbers)


def gguf_fields(source: GgufSource) -> dict[str, Any]:
    """The fields that ``config.json`` of the model would have.

    Raises ``ModelError`` if transformers cannot read the architecture, if it is no language model, or if positions are
    scaled in a way that transformers has no name for.
    """
    place, options = source.options
    try:
        fields, _ = PretrainedConfig.get_config_dict(place, **options)
        config = transformers.AutoConfig.for_model(**fields)
    except Exception as error:  # each architecture fails in its own way
        raise ModelError(_unknown(source, error)) from None
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in classes:
        raise ModelError(
            f"`{source.path.name}` holds a `{source.architecture}`, which is no language model that writes text"
        )
    _correct(config, source)
    found: dict[str, Any] = config.to_dict()
    found.pop("_model_name_or_path", None)
    return {
        **found,
        "architectures": found.get("architectures") or [classes[type(config)].__name__],
        "dtype": str(source.dtype).removeprefix("torch."),
    }


def _unknown(source: GgufSource, error: Exception) -> str:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as KNOWN

    if source.architecture in KNOWN:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"`{source.path.name}` describes no model of `{source.architecture}`: {reason}"
    names = ", ".join(sorted(name for name in KNOWN if name != "general"))
    return (
        f"`{source.path.name}` holds a `{source.architecture}`, which transformers {transformers.__version__} cannot "
        f"read from GGUF; it reads {names}. Give the original model instead"
    )


def _correct(config: PretrainedConfig, source: GgufSource) -> None:
    """What the file says and transformers leaves out."""
    for name, attribute in _SPOKEN.items():
        value = source.field(name)
        if value is not None and getattr(config, attribute, None) is not None:
            setattr(config, attribute, value)
    if hasattr(config, "attention_bias"):
        config.attention_bias = any(name.endswith(("attn_q.bias", "attn_output.bias")) for name in source.types)
    if hasattr(config, "mlp_bias"):
        config.mlp_bias = any(name.endswith("ffn_up.bias") for name in source.types)
    if hasattr(config, "query_pre_attn_scalar"):
        large = config.num_hidden_layers == _LARGE.get(source.architecture)
        width = config.hidden_size // config.num_attention_heads if large else config.head_dim
        config.query_pre_attn_scalar = width
    _correct_positions(config, source)


def _correct_positions(config: PretrainedConfig, source: GgufSource) -> None:
    every = getattr(config, "rope_parameters", None)
    if not isinstance(every, dict):
        return
    full = every.get("full_attention", every)
    if "sliding_attention" in every and source.field("rope.freq_base_swa") is not None:
        every["sliding_attention"]["rope_theta"] = float(source.field("rope.freq_base_swa"))
    kind = source.field("rope.scaling.type")
    factor = source.field("rope.scaling.factor") or source.field("rope.scale_linear")
    if source.factors is not None:
        full.update(_llama3(config, source.factors, source))
    elif kind in ("linear", "yarn") or (kind is None and factor is not None and factor != 1):
        full.update(rope_type=kind or "linear", factor=float(factor))
        if kind == "yarn":
            full["original_max_position_embeddings"] = int(source.field("rope.scaling.original_context_length"))
            for name in ("beta_fast", "beta_slow"):
                value = source.field(f"rope.scaling.yarn_{name}")
                if value is not None:
                    full[name] = float(value)
    elif kind not in (None, "none") and full.get("rope_type", "default") == "default":
        raise ModelError(
            f"positions in `{source.path.name}` are scaled by `{kind}`, which cannot be read; give the original model"
        )


def _llama3(config: PretrainedConfig, factors: tuple[float, ...], source: GgufSource) -> dict[str, Any]:
    """The scaling of Llama 3 whose frequencies are divided by these factors.

    Short waves are kept and long ones stretched by the largest factor f. Of those between, of length w, a share
    s = (L / w - 1) / 3 is kept, 1 / factor = (1 - s) / f + s, which gives the length L of the contexts that the model
    was first made for. The result is compared with all factors.
    """
    largest = max(factors)
    theta = config.rope_parameters["rope_theta"]
    lengths = []
    for index, factor in enumerate(factors):
        if 1.001 < factor < 0.999 * largest:
            share = (1 / factor - 1 / largest) / (1 - 1 / largest)
            lengths.append((1 + 3 * share) * 2 * math.pi * theta ** (index / len(factors)))
    found = {
        "rope_type": "llama3", "factor": round(largest, 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": round(sum(lengths) / len(lengths)) if lengths else 8192,
    }  # fmt: skip
    if max(factors) - min(factors) < 1e-6 and abs(largest - 1) < 1e-6:
        return {}
    twin = type(config)(**{**config.to_dict(), "rope_parameters": {"rope_theta": theta, **found}})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](twin, torch.device("cpu"))
    powers = torch.arange(len(factors), dtype=torch.float32) / len(factors)
    if len(scaled) != len(factors) or not torch.allclose(
        theta**-powers / scaled, torch.tensor(factors), rtol=1e-3, atol=0
    ):
        raise ModelError(
            f"positions in `{source.path.name}` are scaled by factors (`{_ROPE_FACTORS}`) that are not those of Llama "
            "3; give the original model"
        )
    return found


def check_tensors(model: nn.Module, source: GgufSource) -> None:
    """Raise ``ModelError`` if the file holds tensors that the model has no place for: it would be another one.

    Experts are left out, several of which are one tensor of the model.
    """
    package = require("gguf", extra="gguf", purpose="reading a GGUF file")
    arch = next((key for key, name in package.MODEL_ARCH_NAMES.items() if name == source.architecture), None)
    if arch is None:
        return
    names = package.get_tensor_name_map(arch, max(int(source.field("block_count") or 0), 1))
    placed = {_ROPE_FACTORS}
    for key, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        placed |= {
            name for prefix in ("", "model.") if (name := names.get_name(f"{prefix}{key}", (".weight", ".bias")))
        }
    surplus = sorted(name for name in set(source.types) - placed if "_exps." not in name)
    if surplus:
        raise ModelError(_no_place(source, model, surplus))


def _no_place(source: GgufSource, model: nn.Module, names: Sequence[str]) -> str:
    return (
        f"`{source.path.name}` holds {listed(names)}, for which "
        f"`{type(model).__name__}` has no place: it would be another model. Give the original model instead"
    )


def as_plain(model: Any) -> None:
    """Forget that the weights came from a GGUF file: they are floating numbers, and can be saved as any others."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
