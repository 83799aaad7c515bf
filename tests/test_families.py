"""Every family from a tiny configuration: compress, save, load both ways, generate or classify, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from conftest import FAMILIES, SMALL, batches_for, quick_settings, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import fips
from fips.layers.linear import factored_layers

IMAGES: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 10}
ENCODER_DECODER = {"d_model": 32, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MORE: dict[str, dict[str, Any]] = {
    "deit": {"architectures": ["DeiTForImageClassification"], **IMAGES},
    "siglip": {"architectures": ["SiglipForImageClassification"], "vision_config": IMAGES, "num_labels": 10,
               "text_config": {**SMALL, "vocab_size": 64}},
    "whisper": {"architectures": ["WhisperForAudioClassification"], **ENCODER_DECODER, "num_mel_bins": 8,
                "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 80,
                "decoder_attention_heads": 4, "decoder_ffn_dim": 80, "max_source_positions": 20, "num_labels": 5},
    "t5": {"architectures": ["T5ForConditionalGeneration"], **ENCODER_DECODER, "d_ff": 80, "d_kv": 8, "num_layers": 2,
           "num_heads": 4, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip


class FamilyTests:
    """What must hold for every family; a subclass names the family and its number of compressed matrices."""

    family: ClassVar[str]
    matrices: ClassVar[int]

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path, int]:
        """The compressed model, its directory and the predicted bytes."""
        model = self.model()
        config = quick_settings(budget=0.6, share_blocks=2)
        report = fips.compress(model, [self.inputs(model, seed) for seed in range(2)], config)
        path = tmp_path_factory.mktemp(self.family) / "model"
        assert fips.save(model, path) == report.plan["compressed_model"]["bytes"]
        return model, path, report.plan["compressed_model"]["bytes"]

    def model(self) -> PreTrainedModel:
        if self.family in FAMILIES:
            return tiny_model(self.family)
        torch.manual_seed(0)
        fields = MORE[self.family]
        return getattr(transformers, fields["architectures"][0])(AutoConfig.for_model(self.family, **fields)).eval()

    def inputs(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        return batches_for(model, count=1, batch=2, seed=seed)[0]

    def outputs(self, model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return model(**self.inputs(model, 9)).logits

    def use(self, model: PreTrainedModel) -> Tensor:
        """What the family is for: the class, or generated tokens."""
        if not model.can_generate():
            return self.outputs(model).argmax(-1)
        inputs = self.inputs(model, 9)
        ids = model.generate(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False, eos_token_id=63)
        assert ids.shape[1] > 5
        return ids

    def test_every_matrix_is_packed(self, run: tuple[PreTrainedModel, Path, int]) -> None:
        assert len(factored_layers(run[0])) == self.matrices

    def test_fips_load_gives_the_same_bits(self, run: tuple[PreTrainedModel, Path, int]) -> None:
        model, path, _ = run
        loaded = fips.load(path)
        assert torch.equal(self.outputs(loaded), self.outputs(model))
        assert torch.equal(self.use(loaded), self.use(model))

    def test_from_pretrained_gives_the_same_bits(self, run: tuple[PreTrainedModel, Path, int], tmp_path: Path) -> None:
        model, path, _ = run
        loaded, info = type(model).from_pretrained(path, output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
        assert torch.equal(self.outputs(loaded), self.outputs(model))
        loaded.save_pretrained(tmp_path / "again")
        for again in (fips.load(tmp_path / "again"), type(model).from_pretrained(tmp_path / "again")):
            assert torch.equal(self.outputs(again), self.outputs(model))

    def test_the_merged_model_is_the_original_architecture(
        self, run: tuple[PreTrainedModel, Path, int], tmp_path: Path
    ) -> None:
        model, path, _ = run
        merged = fips.merge(fips.load(path))
        shapes = {name: tuple(t.shape) for name, t in merged.state_dict().items()}
        assert shapes == {name: tuple(t.shape) for name, t in self.model().state_dict().items()}
        expected = self.outputs(model)
        assert (self.outputs(merged) - expected).norm() / expected.norm() < 1e-5
        merged.save_pretrained(tmp_path / "dense")
        plain, info = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
        assert torch.equal(self.outputs(plain), self.outputs(merged))

    def test_a_checkpoint_keeps_its_names_through_packing_and_back(self, tmp_path: Path) -> None:
        """Some families are saved under older names than their modules have; packed ones under those of the modules."""
        original = self.model()
        original.save_pretrained(tmp_path / "original")
        model = type(original).from_pretrained(tmp_path / "original")
        reconstruction = {"steps": 0}
        config = fips.CompressionConfig(
            method="fips-paper", budget=0.6, reconstruction=reconstruction, precision="float32"
        )
        fips.compress(model, [self.inputs(model, 0)], config)
        expected = self.outputs(model)
        model.save_pretrained(tmp_path / "packed")
        assert torch.equal(self.outputs(fips.load(tmp_path / "packed")), expected)
        written = set(load_file(tmp_path / "packed" / "model.safetensors"))
        assert written <= set(model.state_dict())
        model.dequantize()
        model.save_pretrained(tmp_path / "dense")
        before, after = (set(load_file(tmp_path / name / "model.safetensors")) for name in ("original", "dense"))
        assert after == before

    @pytest.mark.slow
    def test_all_matrices_of_the_blocks_are_compressed_where_that_is_asked_for(self, tmp_path: Path) -> None:
        model = self.model()
        batch = self.inputs(model, 0)
        in_blocks = {
            name for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
        }  # fmt: skip
        fips.compress(model, [batch], fips.CompressionConfig(bits=5.0, layers="blocks"))
        assert set(factored_layers(model)) == {name for name in in_blocks if "downsample" not in name}
        assert len(factored_layers(model)) > self.matrices
        fips.save(model, tmp_path / "packed")
        assert torch.equal(self.outputs(fips.load(tmp_path / "packed")), self.outputs(model))


class AudioTests(FamilyTests):
    def inputs(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        return {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(seed))}


class EncoderDecoderTests(FamilyTests):
    def inputs(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "decoder_input_ids": ids[:, :6]}


# fmt: off
# ruff: noqa: E701
class TestLlama(FamilyTests): family, matrices = "llama", 9
class TestGemma2(FamilyTests): family, matrices = "gemma2", 9
class TestGemma3(FamilyTests): family, matrices = "gemma3_text", 9
class TestMistral(FamilyTests): family, matrices = "mistral", 9
class TestQwen3(FamilyTests): family, matrices = "qwen3", 9
class TestPhi3(FamilyTests): family, matrices = "phi3", 6
class TestGpt2(FamilyTests): family, matrices = "gpt2", 6
class TestOpt(FamilyTests): family, matrices = "opt", 6
class TestVit(FamilyTests): family, matrices = "vit", 6
class TestDeit(FamilyTests): family, matrices = "deit", 6
class TestSwin(FamilyTests): family, matrices = "swin", 8
class TestDinov2(FamilyTests): family, matrices = "dinov2", 6
class TestSiglip(FamilyTests): family, matrices = "siglip", 6
class TestBert(FamilyTests): family, matrices = "bert", 6
class TestWhisperEncoder(AudioTests): family, matrices = "whisper", 4
class TestT5(EncoderDecoderTests): family, matrices = "t5", 12
# fmt: on
