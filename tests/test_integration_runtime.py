"""Packed models under device maps, offload, compilation, export and generation: the outputs of the plain load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from conftest import batches_for, quick_settings, tiny_model
from test_nn import mixed_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fips
from fips.formats import rotation
from fips.formats.values import values_named
from fips.layers.linear import factored_layers

IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(5))
SOURCES = ["shared", "mixed"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in two groups, and one whose matrices use every format, int8 and no basis."""
    model = tiny_model("llama")
    fips.compress(model, batches_for(model), quick_settings(share_blocks=2))
    root = tmp_path_factory.mktemp("runtime")
    fips.save(model, root / "shared")
    mixed, _ = mixed_llama()
    fips.save(mixed, root / "mixed")
    return {name: root / name for name in SOURCES}


def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


LAYERS = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
REST = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
DEVICE_MAPS: dict[str, Any] = {
    "auto": "auto",
    "cpu": {"": "cpu"},
    "one layer on disk": {**REST, **LAYERS, "model.fips_bases": "cpu"},
    "bases on disk": {**REST, **dict.fromkeys(LAYERS, "cpu"), "model.fips_bases": "disk"},
    "all on disk": {"": "disk"},
}


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("device_map", DEVICE_MAPS)
@pytest.mark.parametrize("source", SOURCES)
def test_device_maps_and_disk_offload_change_no_bit(
    directories: dict[str, Path], tmp_path: Path, source: str, device_map: str, offload_buffers: bool
) -> None:
    plain = fips.load(directories[source])
    model = AutoModelForCausalLM.from_pretrained(
        directories[source],
        device_map=DEVICE_MAPS[device_map],
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=offload_buffers,
    )
    on_disk = [name for name, p in model.named_parameters() if p.is_meta]
    assert bool(on_disk) == ("disk" in device_map)
    if device_map == "bases on disk" and source == "shared":
        assert on_disk == ["model.fips_bases.g0.weight", "model.fips_bases.g1.weight"]
    assert torch.equal(logits_of(model), logits_of(plain))
    assert torch.equal(logits_of(model), logits_of(plain))  # hooks put everything back


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_with_parts_on_disk_is_saved_whole(directories: dict[str, Path], tmp_path: Path, source: str) -> None:
    device_map = DEVICE_MAPS["one layer on disk"]
    model = AutoModelForCausalLM.from_pretrained(
        directories[source], device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(fips.load(tmp_path / "again")), logits_of(fips.load(directories[source])))


@pytest.mark.parametrize("source", SOURCES)
def test_accelerate_offloads_to_memory_and_to_disk(directories: dict[str, Path], tmp_path: Path, source: str) -> None:
    expected = logits_of(fips.load(directories[source]))
    in_memory = accelerate.cpu_offload(fips.load(directories[source]), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in in_memory.model.fips_bases.parameters())
    assert torch.equal(logits_of(in_memory), expected)
    on_disk = accelerate.disk_offload(fips.load(directories[source]), str(tmp_path), execution_device="cpu")
    assert torch.equal(logits_of(on_disk), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_generation_with_cache_and_batches_equals_generation_without(directories: dict[str, Path], source: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories[source])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 63, "pad_token_id": 0}
    together = model.generate(IDS, use_cache=True, **options)
    assert together.shape == (2, 24)
    assert torch.equal(together, model.generate(IDS, use_cache=False, **options))
    for row in range(2):
        assert torch.equal(together[row : row + 1], model.generate(IDS[row : row + 1], **options))
    plain = fips.load(directories[source])
    assert torch.equal(together, plain.generate(IDS, **options))
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1, :12]], dim=1)  # left padding
    mask = (ids != 0).long()
    padded = model.generate(ids, attention_mask=mask, **options)[:, 4:]
    assert torch.equal(padded, model.generate(IDS[:1, :12], **options))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.slow
def test_export_gives_the_same_outputs(directories: dict[str, Path], source: str, strict: bool) -> None:
    model = fips.load(directories[source])
    model.config.use_cache = False
    program = torch.export.export(model, (IDS,), strict=strict)
    assert torch.equal(program.module()(IDS).logits, logits_of(model))
    owned = [name for name in program.state_dict if "fips_bases" in name]
    assert len(owned) == len(model.model.fips_bases)


@pytest.mark.slow
def test_compile_captures_the_whole_graph() -> None:
    """One block; gradients too. What is captured matters here, not the code that torch makes of it."""
    model = tiny_model("llama", num_hidden_layers=1)
    fips.compress(model, batches_for(model), quick_settings())
    model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(IDS).logits
    actual = compiled(IDS).logits
    assert (actual - expected).norm() / expected.norm() < 1e-5
    gradients = []
    for logits in (expected, actual):
        model.zero_grad()
        logits.square().mean().backward()
        layer = next(iter(factored_layers(model).values()))
        gradients.append((layer.values.grad.clone(), model.model.fips_bases["g0"].weight.grad.clone()))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() / a.norm() < 1e-4


@pytest.mark.parametrize("values", ["nl3g16", "tc3", "nl4"])
def test_what_a_tracer_made_first_serves_nothing_outside_its_graph(values: str) -> None:
    """Tables of the numbers are made where they are first asked for, here while a backward pass is traced."""
    numbers = values_named(values)
    model = tiny_model("llama", num_hidden_layers=1)
    fips.compress(model, batches_for(model), fips.CompressionConfig(bits=5, values=values))
    model.config.use_cache = False
    expected = model(IDS).logits
    for store in (numbers._tables, rotation._matrices):
        store.clear()
    copied = copy.deepcopy(model)
    traced = torch.compile(copied, fullgraph=True, backend="aot_eager")(IDS).logits
    assert (traced - expected).norm() / expected.norm() < 1e-5
    for logits in (traced, model(IDS).logits):
        logits.square().mean().backward()
    for one, other in zip(copied.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)
    dense = fips.merge(copy.deepcopy(model))(IDS).logits
    assert (dense - expected).norm() / expected.norm() < 1e-2


def test_a_thin_model_serves_half_precision_inputs() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    reconstruction = {"steps": 2}
    fips.compress(
        model,
        batches_for(model),
        fips.CompressionConfig(method="fips-paper", budget=0.5, reconstruction=reconstruction, precision="float32"),
    )
    assert logits_of(model).dtype == torch.bfloat16
    assert {layer.weight.dtype for layer in factored_layers(model).values()} == {torch.bfloat16}
