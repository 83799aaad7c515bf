"""Single tokens on a CPU: the same attention as transformers', by fewer and faster calls of torch's kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from transformers import StaticCache
from transformers.integrations import sdpa_attention

import fips
from fips.layers import decoding
from fips.layers.blocks import forget_blocks


def packed(family: str, **changes: Any) -> Any:
    model = tiny_model(family, **changes).bfloat16()
    fips.compress(model, batches_for(model), fips.CompressionConfig(method="gptq", bits=8.5))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    attend = decoding.attend

    def counted(*args: Any) -> torch.Tensor:
        found.append(args[0].shape[1] // args[1].shape[1])
        return attend(*args)

    monkeypatch.setattr(decoding, "attend", counted)
    return found


@pytest.mark.parametrize(("family", "groups"), [("llama", 2), ("gemma3_text", 2), ("gpt2", 1), ("opt", 1)])
def test_generated_tokens_are_those_of_the_whole_text(family: str, groups: int, calls: list[int]) -> None:
    model = packed(family)
    forget_blocks(model)  # which would take the place of the modules
    text = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(text)
    mask[1, :3] = 0  # padded on the left
    with torch.no_grad():
        found = model.generate(
            text, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True, eos_token_id=None,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        assert calls == [groups] * (5 * 3)
        mask = torch.nn.functional.pad(mask, (0, 6), value=1)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        options = {} if family == "opt" else {"position_ids": places}
        whole = model(found.sequences, attention_mask=mask, **options).logits[:, 6:-1]
    assert len(calls) == 15
    step = torch.stack(found.logits, dim=1)
    assert float((step.float() - whole.float()).norm() / whole.float().norm()) < 0.02


def test_a_static_cache_gives_the_same(calls: list[int]) -> None:
    model = packed("llama")
    text = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(text[:, :8], cache=cache)
        one = model(text[:, 8:], cache=cache, position_ids=torch.tensor([[8]])).logits[:, -1]
        assert calls == [2, 2, 2]
        whole = model(text).logits[:, -1]
    assert float((one.float() - whole.float()).norm() / whole.float().norm()) < 0.02


def test_dense_models_and_other_calls_go_on_to_transformers(calls: list[int]) -> None:
    model, dense = packed("llama"), tiny_model("llama").bfloat16()
    text = torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        dense.generate(text, **options)
        model.float().generate(text, **options)
        assert calls == []
        other = copy.deepcopy(model).bfloat16()
        forget_blocks(other)  # which would take the place of the modules
        other.generate(text, **options)
    assert len(calls) == 2 * 3


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (6, 6)])
@pytest.mark.parametrize("masked", ["none", "truth", "added"])
def test_it_is_the_attention_of_transformers(heads: int, groups: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    query = torch.randn(2, heads, 1, 16, generator=generator).bfloat16()
    key, value = (torch.randn(2, heads // groups, 11, 16, generator=generator).bfloat16() for _ in range(2))
    mask = None if masked == "none" else torch.rand(2, 1, 1, 11, generator=generator) < 0.6
    if masked == "added" and mask is not None:
        mask = torch.where(mask, 0.0, -torch.inf).bfloat16()
    expected, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found = decoding.attend(query, key, value, mask, 0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
