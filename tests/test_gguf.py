"""GGUF files: the same integers, what llama.cpp is told, and models that compute the same when they are read again.

Files are read by the package ``gguf``, by transformers, which builds dense models from them, and by llama.cpp itself
where ``llama_cpp`` is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import fips
from fips.cli import main
from fips.errors import ModelError
from fips.formats.packed import in_place
from fips.integrations.gguf import GgufFile, export_gguf, require_family, vocabulary_of
from fips.integrations.gguf.families import rope_factors
from fips.layers.linear import FactoredLinear, SharedBasis, factored_layers, replace_everywhere
from fips.models.sites import Role

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the extra gguf is not installed")
needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed")

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "tie_word_embeddings": False},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True, "head_dim": 128},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 256, "sliding_window": 8},
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"], "head_dim": 256, "sliding_window": 8, "num_hidden_layers": 6,
    },
}  # fmt: skip
IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(1))


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    """Tiny, with norms and biases that are not all one or zero, as trained ones are."""
    fields = {**SIZES, **FAMILIES[family], **changes}
    torch.manual_seed(0)
    model = getattr(transformers, fields["architectures"][0])(AutoConfig.for_model(family, **fields)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and "gemma" not in family), std=0.2)
        else:
            nn.init.normal_(parameter, std=0.1)
    return model


def packed_of(
    linear: nn.Linear, name: str, values: str, *, mask: Tensor | None = None, fmt: str = "full", rotation: int = 1
) -> FactoredLinear:
    """A linear layer with its weights on a grid."""
    side = Role("down" if name.endswith(("o_proj", "down_proj")) else "up")
    weight = linear.weight.detach()
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    arguments: dict[str, Any] = {"role": side.value, "fmt": fmt, "values": values, "rotation": rotation}
    if values.startswith("tc"):
        codes = torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(3)).to(torch.int8)
        scales = (1 + torch.rand(len(weight))) / 500
        layer = FactoredLinear.from_integers(None, side.to_factor(codes), side.to_factor(mask), scales, **arguments)
    else:
        layer = FactoredLinear.from_factor(None, side.to_factor(weight), side.to_factor(mask), **arguments)
    layer.bias = linear.bias
    return layer


def pack(model: PreTrainedModel, values: str, **options: Any) -> PreTrainedModel:
    """All linear layers of the blocks, in place."""
    model.base_model.fips_bases = nn.ModuleDict()  # as compression leaves it, so that the model can be saved
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            replace_everywhere(model, name, packed_of(module, name, values, **options))
    return model


def pieces() -> PreTrainedTokenizerFast:
    """As of Llama: pieces of SentencePiece with bytes for what is unknown."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("n", "d"), ("▁a", "nd"), ("i", "n"), ("in", "g")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrst"]
    tokens += ["".join(pair) for pair in merges]
    inner = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>",
            fuse_unk=True,
        )
    )  # fmt: skip
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template="{{ messages }}"
    )


def bytes_and_merges(*, pre: Any = None) -> PreTrainedTokenizerFast:
    """As of GPT-2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
    tokens = ["<pad>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write(model: PreTrainedModel, path: Path, tokenizer: Any = None, **options: Any) -> GgufFile:
    vocabulary = vocabulary_of(tokenizer or pieces(), model.config, source="tiny")
    return export_gguf(model, path, vocabulary, name="tiny", **options)


def tensors_in(path: Path) -> dict[str, Any]:
    """Name to (type, numbers)."""
    import gguf

    return {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


def fields_in(path: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def scales_of(layer: FactoredLinear) -> np.ndarray:
    """The scale of every entry, in float64 as the file format says."""
    rows, cols = layer.factor_shape
    scales = layer.scales.double().unsqueeze(1).expand(rows, cols)
    group = layer.value_format.scale_group
    if group:
        places = torch.arange(cols) // group
        scales = scales * layer.group_scales.view(rows, -1).double()[:, places]
    return scales.numpy()


def pairs(rows: Any, heads: int) -> list[int]:
    """Rows of transformers in the order of llama.cpp: first and second half of every head take turns."""
    half = len(rows) // heads // 2
    return [2 * head * half + side * half + index for head in range(heads) for index in range(half) for side in (0, 1)]


@needs_gguf
class TestPackedLayers:
    @pytest.mark.parametrize(
        ("values", "type_"),
        [
            ("int2", "Q4_0"), ("int3g64", "Q4_0"), ("int4", "Q4_0"), ("int4g32", "Q4_0"), ("int4g128", "Q4_0"),
            ("int5", "Q5_0"), ("int5g32", "Q5_0"), ("int6", "Q8_0"), ("int7g32", "Q8_0"), ("int8", "Q8_0"),
            ("int8g64", "Q8_0"), ("nl3", "Q8_0"), ("nl4g32", "Q8_0"), ("tc4", "Q8_0"),
        ],
    )  # fmt: skip
    def test_integers_are_kept(self, tmp_path: Path, values: str, type_: str) -> None:
        model = pack(model_of("llama"), values)
        file = write(model, tmp_path / "model.gguf")
        found = tensors_in(file.path)
        for key, module, heads in (
            ("blk.1.attn_q", "self_attn.q_proj", 4), ("blk.1.attn_k", "self_attn.k_proj", 2),
            ("blk.1.ffn_down", "mlp.down_proj", 0), ("blk.0.ffn_gate", "mlp.gate_proj", 0),
        ):  # fmt: skip
            layer = model.get_submodule(f"model.layers.{key[4]}.{module}")
            assert isinstance(layer, FactoredLinear)
            numbers = layer.value_format.decode(in_place(layer.packed())).float().numpy()
            assert len(np.unique(numbers)) > 2
            expected = numbers * scales_of(layer).astype(np.float16).astype(np.float32)
            order = pairs(expected, heads) if heads else list(range(len(expected)))
            assert found[f"{key}.weight"][0] == type_
            assert np.array_equal(found[f"{key}.weight"][1], expected[order])
            scale = np.abs(layer.dense_weight().numpy()).max()
            assert np.abs(expected - layer.dense_weight().numpy()).max() <= 2**-11 * scale
        kind = next(kind for kind in file.kinds if kind.kind == values)
        assert (kind.type, kind.kept, kind.tensors) == (type_, True, 14)
        larger = values.startswith(("int2", "int3", "nl", "tc"))
        assert any("a smaller file" in note for note in file.notes) == larger
        assert any("rounded to float16, by at most 0.0" in note for note in file.notes)

    def test_the_largest_integers_fit(self, tmp_path: Path) -> None:
        for values, largest in (("int4", 7), ("int5", 15), ("int8", 127)):
            model = model_of("llama")
            model.model.layers[0].mlp.up_proj.weight.data[0, :2] = torch.tensor([9.0, -9.0])
            write(pack(model, values), tmp_path / values)
            row = tensors_in(tmp_path / values)["blk.0.ffn_up.weight"][1][0]
            scale = np.float32(np.float16(9.0 / largest))
            assert row[:2].tolist() == [largest * scale, -largest * scale]

    def test_pruned_entries_are_zeros(self, tmp_path: Path) -> None:
        model = model_of("llama")
        name = "model.layers.0.mlp.down_proj"
        linear = model.get_submodule(name)
        mask = torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(2)) < 0.4
        layer = packed_of(linear, name, "int4g32", mask=mask, fmt="bitmask")
        replace_everywhere(model, name, layer)
        type_, found = tensors_in(write(model, tmp_path / "model.gguf").path)["blk.0.ffn_down.weight"]
        assert type_ == "Q4_0"
        assert not found[~mask.numpy()].any()
        np.testing.assert_allclose(found, layer.dense_weight(), rtol=2**-10, atol=1e-7)

    @pytest.mark.parametrize(("values", "rotation"), [("int4", 16), ("int4g16", 1), ("nl4", 4), ("tc4", 4)])
    @pytest.mark.parametrize("packed_type", ["q8_0", "f16"])
    def test_what_llama_cpp_lacks_is_decoded(
        self, tmp_path: Path, values: str, rotation: int, packed_type: Any
    ) -> None:
        model = pack(model_of("qwen3"), values, rotation=rotation)
        file = write(model, tmp_path / "model.gguf", packed_type=packed_type)
        type_, found = tensors_in(file.path)["blk.0.attn_q.weight"]
        expected = model.get_submodule("model.layers.0.self_attn.q_proj").dense_weight().numpy()
        assert type_ == packed_type.upper()
        if packed_type == "f16":
            assert np.array_equal(found, expected.astype(np.float16))
        else:
            blocks = np.abs(expected).reshape(len(expected), -1, 32).max(2).repeat(32, 1)
            assert (np.abs(found - expected) <= (0.5 + 127 * 2**-11) * blocks / 127 + 1e-8).all()
        (kind,) = (kind for kind in file.kinds if kind.kind.startswith(values))
        assert ("turned" in kind.kind, kind.kept) == (rotation > 1, False)
        assert any("--values int4g32 --pattern unstructured" in note for note in file.notes)

    def test_rows_that_fill_no_blocks_are_f16(self, tmp_path: Path) -> None:
        model = pack(model_of("llama", intermediate_size=80), "int4")
        file = write(model, tmp_path / "model.gguf")
        found = tensors_in(file.path)
        expected = model.get_submodule("model.layers.1.mlp.down_proj").dense_weight().numpy()
        assert found["blk.1.ffn_down.weight"][0] == "F16"
        assert np.array_equal(found["blk.1.ffn_down.weight"][1], expected.astype(np.float16))
        assert found["blk.1.ffn_up.weight"][0] == "Q4_0"
        assert any("rows of 80 do not fill blocks of 32" in note for note in file.notes)
        assert not any("a smaller file" in note for note in file.notes)

    @pytest.mark.parametrize(("dtype", "type_"), [(torch.float32, "F16"), (torch.bfloat16, "BF16")])
    def test_floating_values_and_dense_tensors_keep_their_type(
        self, tmp_path: Path, dtype: torch.dtype, type_: str
    ) -> None:
        model = model_of("qwen2").to(dtype)
        name = "model.layers.0.mlp.up_proj"
        replace_everywhere(model, name, packed_of(model.get_submodule(name), name, "float"))
        found = tensors_in(write(model, tmp_path / "model.gguf").path)
        half = torch.float16 if type_ == "F16" else torch.bfloat16
        for key, tensor in (
            ("blk.0.ffn_up.weight", model.get_submodule(name).dense_weight()),
            ("token_embd.weight", model.model.embed_tokens.weight), ("output.weight", model.lm_head.weight),
        ):  # fmt: skip
            assert found[key][0] == type_
            assert np.array_equal(found[key][1], tensor.detach().to(half).float().numpy())
        assert found["blk.1.attn_q.bias"][0] == "F32"
        assert np.array_equal(
            found["blk.1.attn_q.bias"][1], model.model.layers[1].self_attn.q_proj.bias.detach().float()
        )

    def test_numbers_too_large_for_half_precision_are_float32(self, tmp_path: Path) -> None:
        model = model_of("qwen3")
        model.model.embed_tokens.weight.data[5, 5] = 1e5
        model.model.layers[0].mlp.up_proj.weight.data[3] *= 1e8
        found = tensors_in(write(pack(model, "int4"), tmp_path / "model.gguf").path)
        for key in ("token_embd.weight", "blk.0.ffn_up.weight"):
            assert found[key][0] == "F32"
            assert np.isfinite(found[key][1]).all()
        assert found["token_embd.weight"][1][5, 5] == 1e5
        assert found["blk.1.ffn_up.weight"][0] == "Q4_0"

    def test_a_shared_basis_is_multiplied_out(self, tmp_path: Path) -> None:
        model = tiny_model("llama", hidden_size=32, intermediate_size=96, vocab_size=320)
        basis = SharedBasis.of(torch.randn(32, 16, generator=torch.Generator().manual_seed(4)), torch.float32)
        model.base_model.fips_bases = nn.ModuleDict({"g0": basis})
        factor = torch.randn(16, 96, generator=torch.Generator().manual_seed(5))
        layer = FactoredLinear.from_factor(
            basis, factor, torch.ones_like(factor, dtype=torch.bool), role="up", fmt="full", values="int8"
        )
        replace_everywhere(model, "model.layers.0.mlp.up_proj", layer)
        file = write(model, tmp_path / "model.gguf")
        type_, found = tensors_in(file.path)["blk.0.ffn_up.weight"]
        assert type_ == "Q8_0"
        expected = layer.dense_weight().detach().numpy()
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.006
        assert "int8, with a shared basis" in {kind.kind for kind in file.kinds}


COUNTS = {"llama": 9, "mistral": 9, "qwen2": 12, "qwen3": 11, "gemma2": 11, "gemma3_text": 13}
"""Tensors of a block."""


@needs_gguf
@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_transformers_reads_the_same_model(self, tmp_path: Path, family: str) -> None:
        model = pack(model_of(family), "int8g32")
        file = write(model, tmp_path / "model.gguf")
        again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
        with torch.no_grad():
            expected, found = model(IDS).logits, again(IDS).logits
        assert float((found - expected).norm() / expected.norm()) < 2e-3
        for key in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings"):
            assert getattr(again.config, key) == pytest.approx(getattr(model.config, key)), key
        assert file.bytes == file.path.stat().st_size

    def test_tensors_and_fields(self, tmp_path: Path, family: str) -> None:
        model = pack(model_of(family), "int4")
        path = write(model, tmp_path / "model.gguf").path
        found, fields = tensors_in(path), fields_in(path)
        tied, layers = model.config.tie_word_embeddings, model.config.num_hidden_layers
        assert ("output.weight" in found) != tied
        assert len(found) == 2 + (not tied) + COUNTS[family] * layers
        norm = model.model.norm.weight.detach().float().numpy() + ("gemma" in family)
        np.testing.assert_array_equal(found["output_norm.weight"][1], norm)
        arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(family, family)
        assert fields["general.architecture"] == arch
        assert fields[f"{arch}.attention.key_length"] == model.config.head_dim
        assert fields["general.file_type"] == 2  # MOSTLY_Q4_0
        assert len(fields["tokenizer.ggml.tokens"]) == 320
        if "gemma" in family:
            assert fields[f"{arch}.attention.sliding_window"] == 8
        if family == "gemma2":
            assert fields["gemma2.attn_logit_softcapping"] == 50
            assert fields["gemma2.final_logit_softcapping"] == 30
        if family == "gemma3_text":
            assert fields["gemma3.rope.freq_base"] == 1e6
            assert fields["gemma3.rope.freq_base_swa"] == 1e4

    @needs_llama
    @pytest.mark.parametrize("values", ["int4g32", "int5", "float"])
    def test_llama_cpp_computes_the_same(self, tmp_path: Path, family: str, values: str) -> None:
        model = pack(model_of(family), values)
        expected = logits_of(model)
        found = llama_logits(write(model, tmp_path / "model.gguf").path)
        error = float((found - expected).norm() / expected.norm())
        assert error < (2e-3 if values == "float" else 5e-2)  # of integers it rounds the inputs to 8 bits


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits[0].float()
    return logits


def llama_logits(path: Path) -> Tensor:
    from llama_cpp import Llama

    loaded = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    loaded.eval(IDS[0].tolist())
    return torch.from_numpy(loaded.scores[: IDS.shape[1]].copy())


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@needs_gguf
class TestPositions:
    def test_llama3_scaling_is_a_tensor(self, tmp_path: Path) -> None:
        model = model_of("llama", rope_parameters=LLAMA3)
        factors = tensors_in(write(model, tmp_path / "model.gguf").path)["rope_freqs.weight"][1]
        plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
        np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5)
        assert len(np.unique(factors)) > 2
        assert rope_factors(model_of("llama").config) is None

    @pytest.mark.parametrize("scaling", ["linear", "yarn"])
    def test_scaling_is_in_the_fields(self, tmp_path: Path, scaling: str) -> None:
        positions = {"rope_type": scaling, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
        fields = fields_in(write(model_of("llama", rope_parameters=positions), tmp_path / "model.gguf").path)
        assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == (scaling, 4.0)
        assert fields.get("llama.rope.scaling.original_context_length") == (32 if scaling == "yarn" else None)

    @needs_llama
    @pytest.mark.parametrize("scaling", ["llama3", "linear", "yarn"])
    def test_llama_cpp_scales_alike(self, tmp_path: Path, scaling: str) -> None:
        model = model_of("llama", rope_parameters={**LLAMA3, "rope_type": scaling})
        expected = logits_of(model)
        found = llama_logits(write(model, tmp_path / "model.gguf").path)
        assert float((found - expected).norm() / expected.norm()) < 2e-3

    def test_a_window_that_llama_cpp_lacks_is_said(self, tmp_path: Path) -> None:
        file = write(model_of("mistral", sliding_window=16), tmp_path / "model.gguf")
        assert any("beyond 16 tokens" in note for note in file.notes)
        assert not any("beyond" in note for note in write(model_of("llama"), tmp_path / "other.gguf").notes)


TEXT = "the king and then in  7 rings, Ünd\n"


@needs_gguf
class TestTokenizers:
    @pytest.mark.parametrize("make", [pieces, bytes_and_merges])
    def test_transformers_cuts_text_alike(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        family = "llama" if make is pieces else "qwen2"
        write(model_of(family), tmp_path / "model.gguf", make())
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        expected = make()(TEXT, add_special_tokens=False)["input_ids"]
        assert again(TEXT, add_special_tokens=False)["input_ids"] == expected

    @needs_llama
    @pytest.mark.parametrize("make", [pieces, bytes_and_merges])
    def test_llama_cpp_cuts_text_alike(self, tmp_path: Path, make: Callable[[], Any]) -> None:
        from llama_cpp import Llama

        write(model_of("llama"), tmp_path / "model.gguf", make())
        loaded = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
        assert loaded.tokenize(TEXT.encode(), add_bos=True, special=True) == make()(TEXT)["input_ids"]

    def test_pieces(self) -> None:
        found = vocabulary_of(pieces(), model_of("llama").config, source="tiny")
        place = {token: number for number, token in enumerate(found.tokens)}
        assert (found.model, found.pre) == ("llama", "default")
        assert [found.types[place[token]] for token in ("<unk>", "</s>", "the"[:1], "<0x0A>", "[PAD319]")] == [
            2, 3, 1, 6, 5,
        ]  # fmt: skip
        assert [found.scores[place[token]] for token in ("▁t", "he", "▁the", "ing")] == [0, -1, -2, -7]
        assert found.special == {"bos": 1, "eos": 2, "unk": 0}
        assert found.adds == {"bos": True, "eos": False, "space": True}
        assert found.template == "{{ messages }}"
        assert found.ambiguous == 0

    def test_bytes_and_merges(self, tmp_path: Path) -> None:
        found = vocabulary_of(bytes_and_merges(), model_of("llama").config, source="tiny")
        assert (found.model, found.pre) == ("gpt2", "gpt-2")
        assert found.merges == ["Ġ t", "h e", "Ġt he", "i n"]
        assert found.adds == {"bos": False, "eos": False}
        assert found.types[found.tokens.index("<tool>")] == 4
        assert found.special == {"bos": 1, "eos": 2, "pad": 0}
        write(model_of("llama"), tmp_path / "model.gguf", bytes_and_merges())
        fields = fields_in(tmp_path / "model.gguf")
        assert fields["tokenizer.ggml.merges"] == found.merges
        assert fields["tokenizer.ggml.add_bos_token"] is False

    def test_pieces_that_llama_cpp_joins_otherwise_are_said(self, tmp_path: Path) -> None:
        tokenizer = pieces()
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described["model"]["vocab"]["ngi"] = 290  # no merge makes it, though ``n`` and ``gi`` might
        described["model"]["vocab"]["gi"] = 291
        changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>")
        file = write(model_of("llama"), tmp_path / "model.gguf", changed)
        assert any("2 of 320 tokens" in note for note in file.notes)

    @pytest.mark.parametrize(
        ("name", "kind"), [("Qwen2Tokenizer", ("gpt2", "qwen2")), ("GemmaTokenizer", ("llama", "default"))]
    )
    def test_classes_of_transformers(self, name: str, kind: tuple[str, str]) -> None:
        """The way they cut text is that of the published vocabularies."""
        base = bytes_and_merges() if name == "Qwen2Tokenizer" else pieces()
        described = json.loads(base.backend_tokenizer.to_str())["model"]
        vocab = {**described["vocab"], "<eos>": 310, "<bos>": 311, "<pad>": 312, "<mask>": 313, "<|endoftext|>": 314}
        tokenizer = getattr(transformers, name)(vocab=vocab, merges=[tuple(pair) for pair in described["merges"]])
        found = vocabulary_of(tokenizer, model_of("llama").config, source="tiny")
        assert (found.model, found.pre) == kind
        assert found.adds.get("space", False) is False

    def test_words_of_llama3(self) -> None:
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        steps = [
            pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
        ]  # fmt: skip
        tokenizer = bytes_and_merges(pre=pre_tokenizers.Sequence(steps))
        assert vocabulary_of(tokenizer, model_of("llama").config, source="tiny").pre == "smaug-bpe"
        tokenizer.backend_tokenizer.model.ignore_merges = True
        assert vocabulary_of(tokenizer, model_of("llama").config, source="tiny").pre == "llama-bpe"

    def test_what_llama_cpp_does_not_know_is_refused(self) -> None:
        config = model_of("llama").config
        lower, other = pieces(), Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        lower.backend_tokenizer.normalizer = normalizers.Lowercase()
        for tokenizer, message in (
            (None, r"`tiny` has no tokenizer.*save_pretrained"),
            (lower, "changes text by `Lowercase`"),
            (PreTrainedTokenizerFast(tokenizer_object=other), "of type WordLevel"),
            (bytes_and_merges(pre=pre_tokenizers.Whitespace()), "may cut text otherwise.*Whitespace"),
            (bytes_and_merges(pre=pre_tokenizers.ByteLevel(add_prefix_space=True)), "may cut text otherwise"),
            (object(), "has no `tokenizer.json`"),
        ):
            with pytest.raises(ModelError, match=message):
                vocabulary_of(tokenizer, config, source="tiny")
        config.vocab_size = 100
        with pytest.raises(ModelError, match=r"has 288 tokens, the model 100"):
            vocabulary_of(pieces(), config, source="tiny")


class TestRefusals:
    @pytest.mark.parametrize(
        ("family", "changes", "message"),
        [
            ("llama", {"hidden_act": "gelu"}, "activation is gelu, not silu"),
            ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "`dynamic`"),
            ("qwen3", {"attention_bias": True}, "attention has biases"),
            ("qwen2", {"head_dim": 32}, "4 heads of 32"),
            ("gemma2", {"query_pre_attn_scalar": 32}, "is 32, not 256"),
            ("gemma2", {"attn_logit_softcapping": None}, "not capped"),
            ("gemma2", {"tie_word_embeddings": False}, "not its embedding"),
            ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "not every 6th"),
            ("gemma3_text", {"use_bidirectional_attention": True}, "those that follow"),
        ],
    )
    def test_what_llama_cpp_computes_otherwise(self, family: str, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=f"{message}.*dense"):
            require_family(model_of(family, **changes))

    @pytest.mark.parametrize("family", ["phi3", "gpt2", "opt", "vit"])
    def test_other_architectures(self, family: str) -> None:
        with pytest.raises(ModelError, match=r"Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 can.*--format dense"):
            require_family(tiny_model(family))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed") / "tiny"
    fips.save(pack(model_of("llama"), "int4g32"), place, processor=pieces())
    return place


class TestCommand:
    @needs_gguf
    def test_says_what_became_of_every_kind(
        self, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["export", str(directory), "--format", "gguf", "--output", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        size = (tmp_path / "out" / "model.gguf").stat().st_size
        assert "int4g32 -> Q4_0, kept: 14 tensors" in printed
        assert "matrices in float32 -> F16, rounded: 1 tensors, 40,960 bytes" in printed
        assert f"written to {tmp_path / 'out'}: {size:,} bytes" in printed
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
        assert fields_in(tmp_path / "out" / "model.gguf")["general.name"] == "tiny"
        layer = factored_layers(fips.load(directory))["model.layers.0.mlp.up_proj"]
        found = tensors_in(tmp_path / "out" / "model.gguf")["blk.0.ffn_up.weight"][1]
        np.testing.assert_allclose(found, layer.dense_weight(), rtol=2**-10, atol=1e-7)

    @needs_gguf
    def test_json_and_the_type(self, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fips.save(pack(model_of("llama"), "int4", rotation=16), tmp_path / "turned", processor=pieces())
        command = ["export", str(tmp_path / "turned"), "--format", "gguf", "--gguf-type", "f16", "--json"]
        assert main([*command, "--output", str(tmp_path / "out")]) == 0
        result = json.loads(capsys.readouterr().out)
        assert {(kind["kind"], kind["type"]) for kind in result["kinds"]} >= {("int4, turned in blocks of 16", "F16")}
        assert result["file_bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--format", "gguf", "--gguf-type", "q2_k"], 2, "must be q8_0 or f16"),
            (["--format", "dense", "--gguf-type", "f16"], 2, "goes with `--format gguf`"),
        ],
    )
    def test_wrong_use_is_one_line(
        self, directory: Path, tmp_path: Path, arguments: list[str], code: int, message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        assert main(["export", str(directory), "--output", str(tmp_path / "out"), *arguments]) == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @needs_gguf
    def test_a_missing_tokenizer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fips.save(pack(model_of("llama"), "int4"), tmp_path / "bare")
        assert main(["export", str(tmp_path / "bare"), "--format", "gguf", "--output", str(tmp_path / "out")]) == 1
        assert "has no tokenizer" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_missing_package(
        self, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "gguf", None)
        assert main(["export", str(directory), "--format", "gguf", "--output", str(tmp_path / "out")]) == 1
        assert "pip install 'fips[gguf]'" in capsys.readouterr().err
