"""Every architecture, tiny: all of its matrices compressed, saved, loaded both ways, used, dense again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import DECODER, SMALL
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import fips
from fips.layers.embedding import packed_places
from fips.layers.linear import factored_layers

TWO = {**DECODER, "num_hidden_layers": 2}
TEXT = {**SMALL, "num_hidden_layers": 2, "vocab_size": 64}
IMAGE = {**SMALL, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SEQUENCES = {"d_model": 32, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
T5 = {**SEQUENCES, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 4}
SPEECH = {**SEQUENCES, "num_mel_bins": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "encoder_ffn_dim": 80, "decoder_attention_heads": 4, "decoder_ffn_dim": 80, "max_source_positions": 20,
          "max_target_positions": 32, "bos_token_id": 1, "suppress_tokens": None,
          "begin_suppress_tokens": None}  # fmt: skip
TOWER = {**IMAGE, "projection_dim": 16}
SIGLIP = {**IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False}

Inputs = dict[str, Tensor]


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ids(*shape: int, seed: int) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def texts(seed: int) -> Inputs:
    return {"input_ids": _ids(2, 12, seed=seed)}


def images(seed: int) -> Inputs:
    return {"pixel_values": _numbers(2, 3, 32, 32, seed=seed)}


def large_images(seed: int) -> Inputs:
    return {"pixel_values": _numbers(2, 3, 64, 64, seed=seed)}


def pairs(seed: int) -> Inputs:
    return {**texts(seed), "decoder_input_ids": _ids(2, 6, seed=seed + 1)}


def speech(seed: int) -> Inputs:
    return {"input_features": _numbers(2, 8, 40, seed=seed), "decoder_input_ids": _ids(2, 6, seed=seed + 1)}


def both(seed: int) -> Inputs:
    return {**texts(seed), **images(seed)}


def seen(patches: int, token: int = 61) -> Callable[[int], Inputs]:
    """Texts that begin with an image."""

    def made(seed: int) -> Inputs:
        places = torch.full((2, patches), token)
        return {"input_ids": torch.cat([places, _ids(2, 8, seed=seed)], 1), **images(seed)}

    return made


def seen_by_gemma(seed: int) -> Inputs:
    inputs = seen(4)(seed)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == 61).long()}


def seen_by_qwen(seed: int) -> Inputs:
    """One image of 4 x 4 patches, which are merged 2 x 2."""
    ids = torch.cat([torch.tensor([[62, 61, 61, 61, 61, 63]]), _ids(1, 6, seed=seed)], 1)
    grid = torch.tensor([[1, 4, 4]])
    found = {"input_ids": ids, "pixel_values": _numbers(16, 3 * 2 * 4 * 4, seed=seed), "image_grid_thw": grid}
    return {**found, "mm_token_type_ids": (ids == 61).long()}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, a small configuration of it, and what it reads."""

    kind: str
    auto: str
    model_type: str
    fields: dict[str, Any]
    inputs: Callable[[int], Inputs] = texts
    ends: tuple[str, ...] = ()
    """Endings of the names of embedding and head where they are packed."""
    quick: bool = False
    dense: tuple[str, ...] = ()
    """Parts of the names of linear layers inside of blocks that stay dense."""
    method: str = "gptq"


LM, MLM = "AutoModelForCausalLM", "AutoModelForMaskedLM"
PICTURES, SEEING = "AutoModelForImageClassification", "AutoModelForImageTextToText"
ENDS = ("embed_tokens", "lm_head")
ZOO = {
    "llama": Architecture("LlamaForCausalLM", LM, "llama", {**TWO, "tie_word_embeddings": True}, ends=ENDS),
    "mistral": Architecture("MistralForCausalLM", LM, "mistral", TWO, ends=ENDS),
    "gemma2": Architecture("Gemma2ForCausalLM", LM, "gemma2", {**TWO, "head_dim": 8}, ends=ENDS),
    "gemma3": Architecture("Gemma3ForCausalLM", LM, "gemma3_text", {**TWO, "head_dim": 8}, ends=ENDS),
    "qwen2": Architecture("Qwen2ForCausalLM", LM, "qwen2", TWO, ends=ENDS),
    "qwen3": Architecture("Qwen3ForCausalLM", LM, "qwen3", {**TWO, "head_dim": 16}, ends=ENDS),
    "phi3": Architecture("Phi3ForCausalLM", LM, "phi3", TWO, ends=ENDS),
    "gpt2": Architecture("GPT2LMHeadModel", LM, "gpt2", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2,
    }, ends=("wte", "lm_head")),
    "opt": Architecture("OPTForCausalLM", LM, "opt", {
        "hidden_size": 32, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "word_embed_proj_dim": 32,
    }, ends=ENDS),
    "neox": Architecture("GPTNeoXForCausalLM", LM, "gpt_neox", TEXT, ends=("embed_in", "lm_head")),
    "falcon": Architecture("FalconForCausalLM", LM, "falcon", {
        **TEXT, "bos_token_id": 1, "eos_token_id": 2,
    }, ends=("word_embeddings", "lm_head"), quick=True),
    "mixtral": Architecture("MixtralForCausalLM", LM, "mixtral", {
        **TWO, "num_local_experts": 4,
    }, ends=ENDS, quick=True, method="fips"),
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", LM, "qwen2_moe", {
        **TWO, **EXPERTS, "shared_expert_intermediate_size": 24,
    }, ends=ENDS, dense=("shared_expert_gate",)),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", LM, "qwen3_moe", {**TWO, **EXPERTS, "head_dim": 8}, ends=ENDS),
    "gpt_oss": Architecture("GptOssForCausalLM", LM, "gpt_oss", {
        **TWO, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    }, ends=ENDS, quick=True),
    "nemotron_h": Architecture("NemotronHForCausalLM", LM, "nemotron_h", {
        **TWO, "layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "head_dim": 8, "n_group": 1,
        "topk_group": 1, "use_mamba_kernels": False,
    }, ends=("embeddings", "lm_head")),
    "switch": Architecture("SwitchTransformersForConditionalGeneration", "AutoModelForSeq2SeqLM",
                           "switch_transformers", {
        **T5, "num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "expert_capacity": 64,
    }, pairs, ends=("shared", "embed_tokens", "lm_head"), dense=("router",)),
    "bert": Architecture("BertForMaskedLM", MLM, "bert", TEXT, ends=("word_embeddings", "decoder")),
    "bert_classifier": Architecture("BertForSequenceClassification", "AutoModelForSequenceClassification", "bert",
                                    TEXT, ends=("word_embeddings",)),
    "bert_base": Architecture("BertModel", "AutoModel", "bert", TEXT, ends=("word_embeddings",)),
    "distilbert": Architecture("DistilBertForMaskedLM", MLM, "distilbert", {
        "dim": 32, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "vocab_size": 64,
    }, ends=("word_embeddings", "vocab_projector")),
    "modernbert": Architecture("ModernBertForMaskedLM", MLM, "modernbert", {
        **TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    }, ends=("tok_embeddings", "decoder")),
    "t5": Architecture("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "t5", T5, pairs,
                       ends=("shared", "embed_tokens", "lm_head")),
    "gated_t5": Architecture("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "t5", {
        **T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }, pairs, ends=("shared", "embed_tokens", "lm_head")),
    "whisper": Architecture("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq", "whisper", SPEECH, speech,
                            ends=("embed_tokens", "proj_out")),
    "vit": Architecture("ViTForImageClassification", PICTURES, "vit", IMAGE, images),
    "deit": Architecture("DeiTForImageClassification", PICTURES, "deit", IMAGE, images),
    "deit_with_teacher": Architecture("DeiTForImageClassificationWithTeacher", "DeiTForImageClassificationWithTeacher",
                                      "deit", IMAGE, images),
    "swin": Architecture("SwinForImageClassification", PICTURES, "swin", {
        "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 4, "window_size": 2,
    }, images, dense=("downsample",)),
    "dinov2": Architecture("Dinov2ForImageClassification", PICTURES, "dinov2", {**IMAGE, "mlp_ratio": 4}, images),
    "dinov2_swiglu": Architecture("Dinov2ForImageClassification", PICTURES, "dinov2", {
        **IMAGE, "mlp_ratio": 4, "use_swiglu_ffn": True,
    }, images),
    "siglip": Architecture("SiglipModel", "AutoModel", "siglip", {
        "vision_config": IMAGE, "text_config": {**TEXT, "projection_size": 32, "max_position_embeddings": 16},
    }, both, ends=("token_embedding",)),
    "clip": Architecture("CLIPModel", "AutoModel", "clip", {
        "vision_config": TOWER, "projection_dim": 16,
        "text_config": {**TEXT, "projection_dim": 16, "max_position_embeddings": 16, "eos_token_id": 2},
    }, both, ends=("token_embedding",)),
    "convnext": Architecture("ConvNextForImageClassification", PICTURES, "convnext", {
        "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "image_size": 32, "patch_size": 2,
    }, images),
    "segformer": Architecture("SegformerForSemanticSegmentation", "AutoModelForSemanticSegmentation", "segformer", {
        "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16, "image_size": 64, "sr_ratios": [1, 1, 1, 1], "num_labels": 5,
    }, large_images, dense=("linear_projections",)),
    "llava": Architecture("LlavaForConditionalGeneration", SEEING, "llava", {
        "vision_config": {**TOWER, "model_type": "clip_vision_model"}, "text_config": {**TWO, "model_type": "llama"},
        "image_token_index": 61, "image_token_id": 61, "image_seq_length": 16,
        "vision_feature_layer": -1,
    }, seen(16), ends=ENDS),
    "qwen2_vl": Architecture("Qwen2VLForConditionalGeneration", SEEING, "qwen2_vl", {
        "text_config": {
            **TWO, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "mrope"},
        },
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
        "image_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63, "video_token_id": 60,
    }, seen_by_qwen, ends=ENDS, dense=("merger",)),
    "paligemma": Architecture("PaliGemmaForConditionalGeneration", SEEING, "paligemma", {
        "vision_config": {**SIGLIP, "projection_dim": 32, "num_image_tokens": 16}, "projection_dim": 32,
        "text_config": {**TWO, "model_type": "gemma", "head_dim": 8}, "image_token_index": 61, "image_token_id": 61,
    }, seen(16), ends=ENDS),
    "gemma3_seeing": Architecture("Gemma3ForConditionalGeneration", SEEING, "gemma3", {
        "vision_config": SIGLIP, "text_config": {**TWO, "model_type": "gemma3_text", "head_dim": 8},
        "mm_tokens_per_image": 4, "image_token_index": 61, "image_token_id": 61, "boi_token_index": 62,
        "eoi_token_index": 63,
    }, seen_by_gemma, ends=ENDS, quick=True),
}  # fmt: skip


def made(one: Architecture) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(one.model_type, **one.fields)
    model: PreTrainedModel = getattr(transformers, one.kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or not bool(parameter.any()):
                parameter.normal_(std=0.02)  # zeros could be lost, and hide what is behind them
    return model


def outputs(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return next(found[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in found)


def used(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Generated tokens, or classes."""
    if not model.can_generate():
        return outputs(model, inputs).argmax(-1)
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    tokens: Tensor = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return tokens


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if one.quick else pytest.mark.slow) for name, one in ZOO.items()]
)
def test_all_matrices_are_packed_saved_loaded_used_and_dense_again(name: str, tmp_path: Path) -> None:
    one = ZOO[name]
    model, batches = made(one), [one.inputs(seed) for seed in (1, 2)]
    report = fips.compress(model, batches, fips.CompressionConfig(method=one.method, bits=5.5, layers="all"))
    assert report.plan["left_dense"]["layers"] == []
    _require_packed(model, one)
    inputs = one.inputs(9)
    expected, use = outputs(model, inputs), used(model, inputs)
    assert bool(expected.isfinite().all())
    assert fips.save(model, tmp_path / "packed") == report.plan["compressed_model"]["bytes"]

    auto = getattr(transformers, one.auto)
    loaded, info = auto.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert type(loaded) is type(model)
    assert {key: value for key, value in info.items() if value} == {}
    for again in (loaded, fips.load(tmp_path / "packed")):
        assert torch.equal(outputs(again, inputs), expected)
        assert torch.equal(used(again, inputs), use)

    merged = fips.merge(loaded)
    shapes = {key: tuple(tensor.shape) for key, tensor in merged.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in made(one).state_dict().items()}
    dense = outputs(merged, inputs)
    assert (dense - expected).norm() / expected.norm() < 1e-5
    merged.save_pretrained(tmp_path / "dense")
    plain, info = auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    weights = plain.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in merged.state_dict().items())
    if any(".expert" in key for key in weights):  # sums of an expert with one token vary with where its weights lie
        torch.testing.assert_close(outputs(plain, inputs), dense, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(outputs(plain, inputs), dense)


def _require_packed(model: PreTrainedModel, one: Architecture) -> None:
    """Every linear layer inside of blocks, embedding and head."""
    blocks = (name for name, _ in model.named_modules() if any(part.isdigit() for part in name.split(".")))
    dense = [name for name in blocks if type(model.get_submodule(name)) in (torch.nn.Linear, transformers.Conv1D)]
    assert [name for name in dense if not any(part in name for part in one.dense)] == []
    assert not [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]
    ends = [place for place in packed_places(model) if not any(part.isdigit() for part in place.split("."))]
    assert {place.rpartition(".")[2] for place in ends} == {*one.ends}
    assert factored_layers(model)
