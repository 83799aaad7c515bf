"""A packed directory behaves as any other checkpoint of transformers."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from conftest import batches_for, quick_settings, tiny_model
from fresh import python
from safetensors.torch import load_file, save_file
from test_nn import mixed_llama
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

import fips
from fips.files.manifest import MANIFEST
from fips.layers.linear import factored_layers
from fips.storage import checkpoint
from fips.storage.quantizer import FipsHfQuantizer

IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(5))


def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Llama in two groups."""
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings(share_blocks=2))
    path = tmp_path_factory.mktemp("saved") / "llama"
    fips.save(model, path)
    return path


@pytest.fixture(scope="module")
def expected(saved: Path) -> Tensor:
    return logits_of(fips.load(saved))


@pytest.fixture
def loaded(saved: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved)


def test_from_pretrained_gives_the_saved_model_bit_for_bit(loaded: PreTrainedModel, expected: Tensor) -> None:
    assert len(factored_layers(loaded)) == 9
    assert torch.equal(logits_of(loaded), expected)
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.is_meta]
    assert isinstance(loaded.hf_quantizer, FipsHfQuantizer)


def test_loading_reports_nothing_missing_or_unexpected(saved: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}


def test_no_dense_matrix_is_ever_allocated(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    original = nn.Linear.__init__

    def record(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not self.weight.is_meta:
            shapes.append(self.weight.shape)

    monkeypatch.setattr(nn.Linear, "__init__", record)
    AutoModelForCausalLM.from_pretrained(saved)
    assert shapes == []


def test_the_base_model_loads_from_a_directory_with_a_head(saved: Path) -> None:
    base = AutoModel.from_pretrained(saved)
    whole = fips.load(saved)
    assert set(factored_layers(base)) == {name.removeprefix("model.") for name in factored_layers(whole)}
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_a_head_loads_from_a_directory_of_the_base_model(saved: Path, tmp_path: Path, expected: Tensor) -> None:
    base = AutoModel.from_pretrained(saved)
    base.save_pretrained(tmp_path / "base")
    assert all(not name.startswith("model.") for name in load_file(tmp_path / "base" / "model.safetensors"))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), expected)  # tied head


def test_image_models_load(tmp_path: Path) -> None:
    model = tiny_model("vit")
    batch = batches_for(model)[0]
    fips.compress(model, batches_for(model), quick_settings())
    fips.save(model, tmp_path / "vit")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("shard", ["1GB", 20_000])
def test_save_pretrained_writes_packed_tensors_again(
    loaded: PreTrainedModel, expected: Tensor, tmp_path: Path, shard: Any
) -> None:
    report = loaded.fips_report.to_dict()
    with torch.no_grad():
        for layer in factored_layers(loaded).values():
            layer.values.mul_(1.5)
    changed = logits_of(loaded)
    assert not torch.equal(changed, expected)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shard)
    files = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert ("model.safetensors.index.json" in files) == (shard != "1GB")
    assert {"README.md", "fips_remote.py", "fips_report.json"} <= set(files)
    assert MANIFEST not in files
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "again"), fips.load(tmp_path / "again")):
        assert torch.equal(logits_of(model), changed)
        assert model.fips_report.to_dict() == report


def test_save_pretrained_works_right_after_compression(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings())
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits_of(model))


def test_save_pretrained_over_a_fips_directory_removes_its_manifest(
    saved: Path, loaded: PreTrainedModel, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "copy"))
    with torch.no_grad():
        loaded.lm_head.weight.mul_(2)
    loaded.save_pretrained(target)
    assert torch.equal(logits_of(fips.load(target)), logits_of(loaded))


@pytest.mark.slow
def test_dequantize_gives_a_plain_model_that_saves_plain(
    loaded: PreTrainedModel, expected: Tensor, tmp_path: Path
) -> None:
    loaded.dequantize()
    assert factored_layers(loaded) == {}
    torch.testing.assert_close(logits_of(loaded), expected, atol=2e-6, rtol=2e-5)
    loaded.save_pretrained(tmp_path / "dense")
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(config)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "assert 'fips' not in sys.modules; m, i = A.from_pretrained(sys.argv[1], output_loading_info=True);"
        "assert not any(i.values()), i"
    )
    done = python(code, tmp_path / "dense")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_mixed_storage_loads_exactly(tmp_path: Path) -> None:
    model, _ = mixed_llama()
    fips.save(model, tmp_path / "mixed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert torch.equal(logits_of(again), logits_of(model))
    assert {t.dtype for n, t in again.state_dict().items() if n.endswith("values")} == {
        torch.int8,
        torch.uint8,
        torch.float32,
    }
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(fips.load(tmp_path / "again")), logits_of(model))


def test_narrow_factors_stay_narrow_and_a_narrower_dtype_casts_all(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings(factor_dtype="bfloat16"))
    fips.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32
    assert {layer.values.dtype for layer in factored_layers(again).values()} == {torch.bfloat16}
    assert torch.equal(logits_of(again), logits_of(model))

    fips.save(fips.load(Path(__file__).parent / "fixtures" / "format-1-nm"), tmp_path / "nm")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "nm", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = IDS % 32
    error = (logits_of(half, ids).float() - logits_of(fips.load(tmp_path / "nm"), ids)).norm()
    assert error / logits_of(fips.load(tmp_path / "nm"), ids).norm() < 5e-2


def test_old_directories_load_through_transformers() -> None:
    for name in ("format-1-bitmask", "format-1-nm", "format-1-mixed", "format-1-placeholders"):
        path = Path(__file__).parent / "fixtures" / name
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
        ids = load_file(f"{path}.safetensors")["input_ids"]
        assert torch.equal(logits_of(model, ids), logits_of(fips.load(path), ids))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.values", "model.fips_bases.g1.weight"])
def test_a_missing_packed_tensor_is_an_error_not_a_warning(saved: Path, tmp_path: Path, name: str) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "copy"))
    tensors = load_file(target / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fips.FipsError, match=f"lacks tensor `{name}`"):
        AutoModelForCausalLM.from_pretrained(target)


def test_a_damaged_pattern_is_an_error(saved: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "copy"))
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.pattern"].fill_(255)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fips.FipsError, match="its pattern keeps"):
        AutoModelForCausalLM.from_pretrained(target)


WITHOUT_FIPS = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
assert AutoConfig.from_pretrained(sys.argv[1], **eval(sys.argv[2])).model_type == "llama"
ids = torch.tensor(eval(sys.argv[3]))
torch.save(model(ids).logits.detach(), sys.argv[4])
if sys.argv[5:]:
    model.save_pretrained(sys.argv[5])
"""


@pytest.mark.slow
def test_remote_code_needs_no_import_of_fips(saved: Path, expected: Tensor, tmp_path: Path) -> None:
    output, again = tmp_path / "logits.pt", tmp_path / "again"
    assert "import fips" not in WITHOUT_FIPS
    done = python(WITHOUT_FIPS, saved, {"trust_remote_code": True}, IDS.tolist(), output, again)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(output), expected)
    done = python(WITHOUT_FIPS, again, {"trust_remote_code": True}, IDS.tolist(), output)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(output), expected)


@pytest.mark.slow
def test_without_fips_and_without_remote_code_loading_fails_loudly(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "logits.pt"
    done = python(WITHOUT_FIPS, saved, {}, IDS.tolist(), output)
    assert done.returncode != 0
    assert not output.exists()
    assert "Unknown quantization type, got fips" in done.stderr
    assert "ignore_mismatched_sizes" in done.stderr
    for name in factored_layers(fips.load(saved)):
        assert name.split(".")[-1] in done.stderr


@pytest.mark.slow
def test_without_fips_installed_remote_code_says_what_is_missing(saved: Path, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['fips'] = None\n"
    done = python(hide + WITHOUT_FIPS, saved, {"trust_remote_code": True}, IDS.tolist(), tmp_path / "x.pt")
    assert done.returncode != 0
    assert "packed by fips, which is not installed" in done.stderr


def test_the_model_card_says_first_how_to_load(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    body = card.split("---\n", 2)[2].strip()
    first = body.split("\n\n")[0]
    assert "import fips" in first
    assert "trust_remote_code=True" in first
    assert f'AutoModelForCausalLM.from_pretrained("{saved.name}")' in body
    report = json.loads((saved / "fips_report.json").read_text())
    assert f"{report['layers']['factored']['bytes']:,}" in card
    assert f"{report['results'][1]['relative_error_final']:.5f}" in card


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("existing", [None, "---\nlicense: mit\n---\n# My model\n"])
def test_a_push_uploads_card_and_remote_code(
    loaded: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str, existing: str | None
) -> None:
    uploaded: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})()

        def create_commit(self, *, operations: list[Any], **_: Any) -> str:
            for operation in operations:
                uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
            return "url"

    template = "# Model\nThis model card has been automatically generated.\n"
    card = huggingface_hub.ModelCard(existing or template, ignore_metadata_errors=True)
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", Hub)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: card)
    if way == "push_to_hub":
        loaded.push_to_hub("me/model")
    else:
        loaded.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/model")
    assert {"config.json", "model.safetensors", "README.md", "fips_remote.py", "fips_report.json"} <= set(uploaded)
    text = uploaded["README.md"].decode()
    assert "import fips" in text
    assert "automatically generated" not in text
    assert ("# My model" in text) == (existing is not None)
    assert text.startswith("---\n")


def test_deepcopy_is_independent_and_whole(loaded: PreTrainedModel, expected: Tensor, tmp_path: Path) -> None:
    twin = copy.deepcopy(loaded)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin), expected)
    for layer in factored_layers(twin).values():
        assert layer.basis is twin.model.fips_bases["g0"] or layer.basis is twin.model.fips_bases["g1"]
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits_of(fips.load(tmp_path / "twin")), expected)


def test_a_pickled_model_comes_back_whole(loaded: PreTrainedModel, expected: Tensor, tmp_path: Path) -> None:
    """As processes that are spawned for training receive it."""
    twin = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(logits_of(twin), expected)
    with torch.no_grad():
        loaded.model.norm.weight.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits_of(fips.load(tmp_path / "twin")), expected)


def test_a_hub_id_is_downloaded_and_loaded(
    saved: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def download(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        return str(saved)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert torch.equal(logits_of(fips.load("me/packed-llama")), expected)
    assert asked == ["me/packed-llama"]
    monkeypatch.undo()
    with pytest.raises(fips.FipsError, match="cannot download `me/packed-llama`"):
        fips.load("me/packed-llama")


def test_casting_works_as_in_any_model(loaded: PreTrainedModel, expected: Tensor) -> None:
    half = loaded.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    error = (logits_of(half).float() - expected).norm() / expected.norm()
    assert error < 5e-2
    assert logits_of(half.float()).dtype == torch.float32
