"""GGUF files as models: their numbers as they are, their positions, their tokenizer, and refusals of one line.

Files are those that ``fips export --format gguf`` writes, and what the package ``gguf`` reads in them is compared with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import (
    IDS,
    LLAMA3,
    TEXT,
    bytes_and_merges,
    fields_in,
    logits_of,
    model_of,
    pack,
    pieces,
    tensors_in,
    write,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import fips
import fips.integrations.gguf.write
from fips.app.tables import format_bytes
from fips.cli import main
from fips.errors import ModelError
from fips.layers.linear import factored_layers
from fips.models.gguf import gguf_source, join_gguf
from fips.models.transformers import config_fields, load_config, load_dense, load_processor

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """With every number that a GGUF file holds in 16 bits rounded to them, so that the file holds the model exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().to(parameter.dtype))
        for layer in factored_layers(model).values():
            layer.scales.copy_(layer.scales.half())
    return model


def written(directory: Path, family: str, values: str | None = "int4", **changes: Any) -> tuple[str, PreTrainedModel]:
    """A file, and the dense model that it holds."""
    model = model_of(family, **changes)
    model = halved(model if values is None else pack(model, values))
    write(model, directory / "model.gguf", bytes_and_merges() if "qwen" in family else pieces())
    return str(directory / "model.gguf"), fips.merge(model, dtype=torch.float32) if values else model


class TestNumbers:
    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
    def test_the_model_of_the_file(self, tmp_path: Path, family: str) -> None:
        source, dense = written(tmp_path, family)
        found = load_dense(source)
        assert not hasattr(found.config, "quantization_config")
        for name, tensor in dense.state_dict().items():
            # the file holds the norms of Gemma plus one
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=1e-7 if "norm" in name else 0)
        torch.testing.assert_close(logits_of(found), logits_of(dense), rtol=1e-5, atol=1e-5)

    def test_weights_are_what_the_package_reads(self, tmp_path: Path) -> None:
        source, _ = written(tmp_path, "qwen2", "int8")
        found, read = load_dense(source), tensors_in(Path(source))
        kind, expected = read["blk.1.attn_q.weight"]
        assert kind == "Q8_0"
        assert torch.equal(found.model.layers[1].self_attn.q_proj.weight, torch.from_numpy(expected))
        assert torch.equal(found.model.layers[1].self_attn.k_proj.bias, torch.tensor(read["blk.1.attn_k.bias"][1]))

    @pytest.mark.slow
    def test_the_type_is_that_of_the_numbers(self, tmp_path: Path) -> None:
        source, _ = written(tmp_path, "llama", None)
        assert (config_fields(source)["dtype"], load_dense(source).dtype) == ("float16", torch.float16)
        write(model_of("llama").to(torch.bfloat16), tmp_path / "other.gguf", pieces())
        assert load_dense(str(tmp_path / "other.gguf")).dtype == torch.bfloat16
        packed, _ = written(tmp_path, "llama", "int4")
        assert load_dense(packed).dtype == torch.float32
        assert load_dense(packed, dtype="bfloat16").dtype == torch.bfloat16

    def test_biases_are_not_left_out(self, tmp_path: Path) -> None:
        source, dense = written(tmp_path, "llama", attention_bias=True, mlp_bias=True)
        found = load_dense(source)
        assert torch.equal(found.model.layers[0].mlp.down_proj.bias, dense.model.layers[0].mlp.down_proj.bias)
        torch.testing.assert_close(logits_of(found), logits_of(dense), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("positions", [LLAMA3, YARN, LINEAR], ids=lambda scaling: scaling["rope_type"])
    def test_positions_are_scaled_alike(self, tmp_path: Path, positions: dict[str, Any]) -> None:
        source, dense = written(tmp_path, "llama", rope_parameters=positions)
        config, _ = load_config(source)
        assert {key: config.rope_parameters[key] for key in positions} == pytest.approx(positions)
        torch.testing.assert_close(logits_of(load_dense(source)), logits_of(dense), rtol=1e-4, atol=1e-4)

    def test_the_file_of_the_directory_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not one of the same name in the current directory, which ``from_pretrained`` prefers."""
        for name, layers in (("here", 1), ("there", 2)):
            (tmp_path / name).mkdir()
            written(tmp_path / name, "llama", None, num_hidden_layers=layers)
        monkeypatch.chdir(tmp_path / "here")
        assert len(load_dense("../there/model.gguf").model.layers) == 2
        assert join_gguf("../there", "model.gguf") == "../there/model.gguf"

    @pytest.mark.parametrize(("family", "make"), [("llama", pieces), ("qwen2", bytes_and_merges)])
    def test_the_tokenizer_is_that_of_the_file(self, tmp_path: Path, family: str, make: Any) -> None:
        source, _ = written(tmp_path, family)
        assert load_processor(source, "text")(TEXT)["input_ids"] == make()(TEXT)["input_ids"]

    def test_a_tokenizer_of_single_bytes(self, tmp_path: Path) -> None:
        """As that of the demo: it has no merges, and lists without entries are not written."""
        tokenizer = bytes_and_merges()
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described["model"]["merges"] = []
        for token in ("Ġt", "he", "Ġthe", "in"):
            del described["model"]["vocab"][token]
        single = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>"
        )
        write(model_of("llama"), tmp_path / "model.gguf", single)
        found = load_processor(str(tmp_path / "model.gguf"), "text")
        assert found("the ring")["input_ids"] == single("the ring")["input_ids"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file beside nothing, and text."""
    place = tmp_path_factory.mktemp("gguf")
    written(place, "llama")
    (place / "text.txt").write_text("the king and then in rings and the thing, on the road\n" * 60)
    return place


class TestCommands:
    @pytest.mark.slow
    def test_compress_and_evaluate(self, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = ["--data", str(directory / "text.txt"), "--num-samples", "4", "--sequence-length", "16"]
        command = ["compress", str(directory), "--gguf-file", "model.gguf", "--bits", "6", "--layers", "mlp", *data]
        assert main([*command, "--output", str(tmp_path / "out")]) == 0
        own = f"the GGUF file itself takes {format_bytes((directory / 'model.gguf').stat().st_size)}"
        assert own in " ".join(capsys.readouterr().out.split())
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
        fields = json.loads((tmp_path / "out" / "config.json").read_text())
        assert fields["architectures"] == ["LlamaForCausalLM"]
        assert "_name_or_path" not in fields
        loaded, again = fips.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits_of(loaded), logits_of(again))
        expected = logits_of(load_dense(str(directory / "model.gguf")))
        assert float((logits_of(loaded) - expected).norm() / expected.norm()) < 0.1
        assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == pieces()(TEXT)["input_ids"]
        capsys.readouterr()
        against = ["--against", str(directory / "model.gguf"), "--json"]
        assert main(["evaluate", str(tmp_path / "out"), *data, *against]) == 0
        assert 0 < json.loads(capsys.readouterr().out)["against"]["kl"] < 0.1
        assert main(["evaluate", str(directory / "model.gguf"), *data, *against]) == 0
        assert json.loads(capsys.readouterr().out)["against"]["kl"] == pytest.approx(0, abs=1e-6)

    def test_plan_and_the_type_that_is_asked_for(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = []
        for options in ([], ["--dtype", "bfloat16"]):
            assert main(["plan", str(directory / "model.gguf"), "--json", *options]) == 0
            sizes.append(json.loads(capsys.readouterr().out)["model"]["bytes"])
        assert sizes[0] == 2 * sizes[1]
        assert main(["plan", str(directory / "model.gguf")]) == 0
        assert "the GGUF file itself takes" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["."],
                "it has no config.json; to read a GGUF file, give it: `model.gguf`, or add `--gguf-file model.gguf`",
            ),
            ([".", "--gguf-file", "other.gguf"], "`.` has no `other.gguf`; it holds model.gguf"),
            ([".", "--gguf-file", "text.txt"], "names a file that ends in .gguf, got 'text.txt'"),
            (["model.gguf", "--gguf-file", "model.gguf"], "`model.gguf` is a file: give it alone"),
            (["other.gguf"], "unknown model `other.gguf`: no such file"),
            (["--gguf-file", "model.gguf"], "`--gguf-file` without a model"),
        ],
    )
    def test_wrong_use_is_one_line(
        self, directory: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(directory)
        assert main(["plan", *arguments]) in (1, 2)
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1

    def test_a_missing_package(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "gguf", None)
        assert main(["plan", str(directory / "model.gguf")]) == 1
        assert "reading a GGUF file needs `gguf`" in (printed := capsys.readouterr().err)
        assert "pip install 'fips[gguf]'" in printed


class TestRefusals:
    def test_an_architecture_that_transformers_lacks(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "clip")
        writer.add_name("eyes")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert main(["plan", str(tmp_path / "model.gguf")]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("error: `model.gguf` holds a `clip`, which transformers ")
        assert "cannot read from GGUF; it reads " in printed
        assert printed.count("\n") == 1

    def test_tensors_that_the_model_has_no_place_for(self, tmp_path: Path) -> None:
        source, _ = written(tmp_path, "qwen3")
        renamed = tmp_path / "renamed.gguf"
        renamed.write_bytes(Path(source).read_bytes().replace(b"qwen3", b"qwen2"))
        with pytest.raises(ModelError, match=r"renamed.gguf` holds `blk.0.attn_k_norm.weight`.* and 1 more, for which"):
            load_dense(str(renamed))

    def test_positions_without_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fips.integrations.gguf.write, "rope_factors", lambda _: torch.linspace(1, 3, 8))
        source, _ = written(tmp_path, "llama")
        with pytest.raises(ModelError, match=r"that are not those of Llama 3; give the original"):
            load_config(source)

    @pytest.mark.parametrize("cut", [3, 200, -100])
    def test_a_damaged_file(self, tmp_path: Path, cut: int) -> None:
        source, _ = written(tmp_path, "llama")
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(Path(source).read_bytes()[:cut])
        with pytest.raises(ModelError, match=r"damaged.gguf` is not a GGUF file that can be read.*download it again"):
            load_dense(str(damaged))

    def test_one_part_of_several(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00003.gguf", "llama")
        writer.add_uint16("split.count", 3)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelError, match=r"one of 3 parts.*llama-gguf-split --merge"):
            gguf_source(str(tmp_path / "model-00001-of-00003.gguf"))


def test_what_transformers_loaded_is_compressed_and_saved(tmp_path: Path) -> None:
    """``from_pretrained`` leaves a mark for which ``save_pretrained`` refuses, though the weights are plain numbers."""
    source, _ = written(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    with pytest.raises(ValueError, match=r"gguf.*not serializable"):
        model.save_pretrained(tmp_path / "dense")
    fips.compress(model, [{"input_ids": IDS}], fips.CompressionConfig(bits=6, effort="fast"))
    expected = logits_of(model)
    fips.save(model, tmp_path / "saved")
    assert torch.equal(logits_of(fips.load(tmp_path / "saved")), expected)
    fips.merge(model)
    assert all(type(layer) is nn.Linear for name, layer in model.named_modules() if name.endswith("_proj"))
    model.save_pretrained(tmp_path / "dense")
    assert fields_in(Path(source))["general.architecture"] == "llama"
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits_of(model))
