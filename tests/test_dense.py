"""Dense layers of a packed model in bfloat16: one token by the kernels, all else as torch does it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fips
from fips.kernels import cpu, registry
from fips.layers.dense import DenseLinear, quicken_dense

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")
FIELDS = {
    "vocab_size": 600, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def layer(features: int = 512, outputs: int = 640, *, bias: bool = True) -> DenseLinear:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(features, outputs, bias=bias).to(torch.bfloat16))
    quicken_dense(holder)
    made = holder[0]
    assert type(made) is DenseLinear
    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every product that the kernels were given."""
    calls: list[int] = []
    backend = next(backend for backend in registry.backends() if backend.name == "cpu")
    real = backend.multiply

    def multiply(x: Tensor, *args: object, **options: object) -> Tensor:
        calls.append(x.shape[:-1].numel())
        return real(x, *args, **options)

    monkeypatch.setattr(backend, "multiply", multiply)
    return calls


@needs_library
@pytest.mark.skipif(cpu.isa_names()[-1:] == ("portable",), reason="plain code is no faster than torch")
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_go_through_the_kernels_and_say_the_same(counted: list[int], bias: bool) -> None:
    dense = layer(bias=bias)
    exact = nn.Linear(512, 640, bias=bias).double()
    exact.load_state_dict(dense.state_dict())
    with torch.no_grad():
        for shape, by_kernel in (((512,), 1), ((1, 1, 512), 1), ((2, 512), 2), ((1, 3, 512), 0), ((0, 512), 0)):
            counted.clear()
            x = torch.randn(shape).to(torch.bfloat16)
            y, wanted = dense(x), exact(x.double())
            assert counted == ([by_kernel] if by_kernel else [])
            assert y.shape == wanted.shape
            assert y.dtype is torch.bfloat16
            assert torch.allclose(y.double(), wanted, rtol=2**-8, atol=1e-4)
        counted.clear()
        dense.weight.data = dense.weight.data * 2  # other memory
        x = torch.ones(1, 512, dtype=torch.bfloat16)
        assert torch.allclose(dense(x).double(), linear(x, dense.weight, dense.bias).double(), rtol=2**-7, atol=1e-3)
        dense.float()
        counted.clear()
        assert dense(x.float()).dtype is torch.float32
        assert not counted


def test_what_torch_refuses_it_still_refuses() -> None:
    dense = layer()
    for x in (torch.zeros(1, 511, dtype=torch.bfloat16), torch.zeros(1, 512), torch.zeros((), dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError):
            dense(x)


@needs_library
def test_gradients_are_those_of_torch(counted: list[int]) -> None:
    dense = layer()
    x = torch.randn(1, 512).to(torch.bfloat16)
    dense(x).float().square().sum().backward()
    found = [p.grad for p in dense.parameters()]
    dense.zero_grad()
    linear(x, dense.weight, dense.bias).float().square().sum().backward()
    for ours, wanted in zip(found, [p.grad for p in dense.parameters()], strict=True):
        assert ours is not None
        assert wanted is not None
        assert torch.equal(ours, wanted)
    assert not counted


def test_copies_and_pickles_compute_alone() -> None:
    dense = layer()
    x = torch.randn(1, 512).to(torch.bfloat16)
    with torch.no_grad():
        wanted = dense(x)
        for again in (copy.deepcopy(dense), pickle.loads(pickle.dumps(dense))):
            assert torch.equal(again(x), wanted)
            again.weight.zero_()
            assert torch.equal(dense(x), wanted)


@pytest.mark.slow
def test_a_packed_model_quickens_what_stays_dense_and_forgets_it_with_the_packing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FIELDS)).to(torch.bfloat16).eval()
    batches = [{"input_ids": torch.randint(0, 600, (4, 32))} for _ in range(2)]
    fips.compress(model, batches, fips.CompressionConfig(bits=4.25, layers="mlp", effort="fast"))
    dense = {name for name, module in model.named_modules() if type(module) is DenseLinear}
    assert "lm_head" in dense
    assert "model.layers.0.self_attn.q_proj" in dense
    fips.save(model, tmp_path / "small")
    for again in (fips.load(tmp_path / "small"), AutoModelForCausalLM.from_pretrained(tmp_path / "small")):
        assert {name for name, module in again.named_modules() if type(module) is DenseLinear} == dense
        ids = torch.arange(4)[None]
        with torch.no_grad():
            assert torch.equal(again.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
            assert torch.equal(again(ids[:, :1]).logits, model(ids[:, :1]).logits)
        fips.save(again, tmp_path / f"again-{type(again).__name__}-{len(list(tmp_path.iterdir()))}")
    fips.merge(model)
    assert all(type(module) is not DenseLinear for module in model.modules())
