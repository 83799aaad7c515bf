"""Recording: what blocks saw and returned, within the memory bound, each tensor once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import nn
from transformers import PreTrainedModel

from fips.calibration.record import ActivationSpool, record_blocks
from fips.errors import DataError

CPU = torch.device("cpu")


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model(**batch, **({"use_cache": False} if "input_ids" in batch else {}))


def blocks_of(model: PreTrainedModel, prefix: str, indices: tuple[int, ...]) -> dict[str, nn.Module]:
    return {f"{prefix}.{index}": model.get_submodule(f"{prefix}.{index}") for index in indices}


@pytest.mark.parametrize("limit", [0, 5000, 1 << 30])
def test_spool_returns_what_was_put_within_its_limit(limit: int) -> None:
    tensors = [torch.randn(9, 30), torch.randn(4, 5).bfloat16(), torch.arange(7), torch.randn(50, 20).T]
    with ActivationSpool(limit) as spool:
        stored = [spool.put(tensor) for tensor in tensors]
        for tensor, place in zip(tensors, stored, strict=True):
            assert torch.equal(spool.get(place), tensor)
            assert spool.get(place).dtype == tensor.dtype
        size = sum(t.numel() * t.element_size() for t in tensors)
        assert spool.ram_bytes <= limit
        assert spool.ram_bytes + spool.file_bytes == size


@pytest.mark.parametrize("family", ["llama", "gemma2", "vit"])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_replaying_a_block_gives_its_recorded_output(family: str, limit: int) -> None:
    model = tiny_model(family)
    prefix = "vit.layers" if family == "vit" else "model.layers"
    blocks = blocks_of(model, prefix, (1, 2))
    with ActivationSpool(limit) as spool, torch.no_grad():
        records = record_blocks(model, blocks, batches_for(model), spool, run)
        assert len(records) == 4
        for record in records:
            assert list(record) == list(blocks)
            for name, block in blocks.items():
                args, kwargs = record[name].arguments(spool, CPU)
                output = block(*args, **kwargs)
                output = output if isinstance(output, torch.Tensor) else output[0]
                assert torch.equal(output, spool.get(record[name].output))


def test_shared_tensors_are_stored_once() -> None:
    model = tiny_model("llama")
    batches = batches_for(model, count=3)
    with ActivationSpool(1 << 30) as spool:
        record_blocks(model, blocks_of(model, "model.layers", (0, 1, 2)), batches, spool, run)
        hidden = 4 * 16 * 32 * 4
        streams = 4 * hidden * len(batches)  # one input and three outputs: an output is the next input
        assert streams <= spool.ram_bytes < streams + 2 * hidden  # masks and rotary embeddings once for all batches


def test_the_pass_stops_after_the_last_block() -> None:
    model = tiny_model("vit")
    reached: list[str] = []
    model.get_submodule("vit.layers.2").register_forward_hook(lambda *_: reached.append("block 2"))
    with ActivationSpool(1 << 30) as spool:
        record_blocks(model, blocks_of(model, "vit.layers", (0, 1)), batches_for(model), spool, run)
    assert reached == []


def test_hooks_are_removed_even_after_an_error() -> None:
    model = tiny_model("vit")

    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    with ActivationSpool(0) as spool, pytest.raises(RuntimeError, match="boom"):
        record_blocks(model, blocks_of(model, "vit.layers", (0,)), batches_for(model), spool, fail)
    assert not model.get_submodule("vit.layers.0")._forward_hooks
    assert not model.get_submodule("vit.layers.0")._forward_pre_hooks


def test_no_batch_and_a_block_that_never_runs_are_errors() -> None:
    model = tiny_model("vit")
    with ActivationSpool(0) as spool:
        with pytest.raises(DataError, match="no batch"):
            record_blocks(model, blocks_of(model, "vit.layers", (0,)), [], spool, run)
        model.idle = nn.Linear(2, 2)
        with pytest.raises(DataError, match="`idle` did not run"):
            record_blocks(model, {"idle": model.idle}, batches_for(model), spool, run)
