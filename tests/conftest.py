"""Tiny real models built from configurations, and batches for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the hub
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: their threads would wait for each other's cores
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import fips


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FIPS_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # the user's timings stay as they are


PINNED = ("test_integration_runtime",)
"""Modules that compare bits of models which may have chosen different ways to multiply."""


@pytest.fixture(autouse=True, scope="module")
def _one_way_of_multiplying(request: pytest.FixtureRequest) -> Iterator[None]:
    """Equal bits where tests compare bits: the measured choice may differ from run to run, as float sums may.

    For whole modules, so that the fixtures of a module, which are made before those of a test, multiply the same way.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ in PINNED:
            patch.setenv("FIPS_RUNTIME", "decode")
        yield


SMALL = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], **DECODER, "tie_word_embeddings": True},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], **DECODER, "head_dim": 8},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], **DECODER, "head_dim": 8},
    "mistral": {"architectures": ["MistralForCausalLM"], **DECODER},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], **DECODER, "head_dim": 16},
    "phi3": {"architectures": ["Phi3ForCausalLM"], **DECODER},
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt": {
        "architectures": ["OPTForCausalLM"], "hidden_size": 32, "ffn_dim": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 64, "word_embed_proj_dim": 32,
    },
    "bert": {"architectures": ["BertForMaskedLM"], **SMALL, "vocab_size": 64},
    "vit": {
        "architectures": ["ViTForImageClassification"], **SMALL, "image_size": 32, "patch_size": 8, "num_labels": 10,
    },
    "swin": {
        "architectures": ["SwinForImageClassification"], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
        "image_size": 32, "patch_size": 4, "window_size": 2, "num_labels": 10,
    },
    "dinov2": {
        "architectures": ["Dinov2ForImageClassification"], **SMALL, "mlp_ratio": 4, "image_size": 32, "patch_size": 8,
        "num_labels": 10,
    },
}  # fmt: skip


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A randomly initialized small model of a family, in evaluation mode."""
    fields = {**FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **fields)
    torch.manual_seed(seed)
    return getattr(transformers, fields["architectures"][0])(config).eval()


def batches_for(model: PreTrainedModel, *, count: int = 4, batch: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random batches of the model's kind."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        shape = (batch, 3, 32, 32)
        return [{"pixel_values": torch.randn(shape, generator=generator)} for _ in range(count)]
    return [{"input_ids": torch.randint(3, 64, (batch, 16), generator=generator)} for _ in range(count)]


def save_tiny_vit(path: Path) -> None:
    """A directory with a tiny image classifier of two classes and its image processor."""
    tiny_model("vit", num_labels=2).save_pretrained(path)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
        "rescale_factor": 1 / 255,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.fixture
def vit() -> PreTrainedModel:
    return tiny_model("vit")


def quick_settings(**changes: Any) -> fips.CompressionConfig:
    """The paper's recipe with two steps: the quickest way to a compressed model."""
    reconstruction = {"steps": 2}
    return fips.CompressionConfig(
        **{"method": "fips-paper", "budget": 0.5, "reconstruction": reconstruction, "precision": "float32", **changes}
    )


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes as long for a row as for many: programs of many rows, where there is no GPU."""
    if not torch.cuda.is_available():
        from fips.kernels import triton_words

        for name, value in {"ROWS": 256, "DECODED_ROWS": 256, "TILE_ROWS": 256, "TILE_EIGHTS": 64}.items():
            monkeypatch.setattr(triton_words, name, value)
