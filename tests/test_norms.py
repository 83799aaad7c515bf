"""Root mean square norms of few tokens: the same as the modules they stand for, and everything else left to those."""

from __future__ import annotations

import copy
import ctypes
import pickle
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import fips
from fips.errors import BackendError
from fips.kernels import cpu, norm
from fips.layers.norms import MARK, forget_norms, quicken_norms

pytestmark = pytest.mark.skipif(not cpu.vectors(), reason="no compiled library, or no kernel for this machine")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of every norm that the library was given."""
    found: list[str] = []
    real = norm.normalise

    def counted(x: Tensor, weight: Tensor, eps: float, kind: str) -> Tensor:
        found.append(kind)
        return real(x, weight, eps, kind)

    monkeypatch.setattr(norm, "normalise", counted)
    return found


def quick(made: nn.Module, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    """A norm with random weights, and the same quickened."""
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(normal(*weight.shape))
    plain = made.to(dtype)
    quickened = copy.deepcopy(plain)
    quicken_norms(quickened)
    return plain, quickened


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("made", "kind"), [(LlamaRMSNorm, "rounded"), (Olmo2RMSNorm, "whole"), (Gemma3RMSNorm, "one more")]
)
@pytest.mark.parametrize("size", [8, 136, 2048])
def test_every_kind_is_told_apart_and_gives_the_same(
    made: Any, kind: str, size: int, dtype: torch.dtype, calls: list[str]
) -> None:
    plain, quickened = quick(made(size, eps=1e-5), dtype)
    assert not calls or set(calls) == set(norm.KINDS)
    calls.clear()
    with torch.no_grad():
        for shape in ((1, 1, size), (2, 3, size), (size,)):
            for scale in (1, 1e-3, 100):
                x = (normal(*shape) * scale).to(dtype)
                expected, found = plain(x), quickened(x)
                assert found.dtype is dtype
                assert float((found == expected).float().mean()) > 0.98
                torch.testing.assert_close(found, expected)
    assert set(calls) == {kind}


def test_what_is_no_number_stays_with_its_token(calls: list[str]) -> None:
    plain, quickened = quick(LlamaRMSNorm(64))
    x = normal(1, 4, 64).bfloat16()
    x[0, 1, 5], x[0, 2, 7] = torch.nan, torch.inf
    with torch.no_grad():
        expected, found = plain(x), quickened(x)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0, 0].isfinite().all()
    assert found[0, 1].isnan().all()


def test_other_calls_go_to_the_module(calls: list[str]) -> None:
    plain, quickened = quick(LlamaRMSNorm(64))
    calls.clear()
    many, few = normal(1, norm.MOST + 1, 64).bfloat16(), normal(1, 2, 64).bfloat16()
    with torch.no_grad():
        for x in (many, few.float(), few.repeat(1, 1, 2)[..., ::2]):
            assert quickened(x).dtype is plain(x).dtype
        with torch.autocast("cpu", torch.bfloat16):
            quickened(few)
    x = few.clone().requires_grad_()
    quickened(x).sum().backward()
    assert x.grad is not None
    assert quickened.weight.grad is not None
    assert torch.equal(torch.compile(quickened, backend="eager")(few), plain(few))
    assert calls == []


def test_what_torch_records_is_torchs_own(calls: list[str]) -> None:
    plain, quickened = quick(LlamaRMSNorm(64))
    quickened.requires_grad_(False)
    x, along = normal(1, 2, 64).bfloat16(), normal(1, 2, 64).bfloat16() + 1
    calls.clear()
    graph = make_fx(quickened)(x)
    assert torch.equal(graph(2 * x), plain(2 * x))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(quickened(forward_ad.make_dual(x, along))).tangent
        assert torch.equal(found, forward_ad.unpack_dual(plain(forward_ad.make_dual(x, along))).tangent)
    assert calls == []


def test_what_is_changed_later_counts(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quickened = quick(LlamaRMSNorm(64))
    x = normal(1, 2, 64).bfloat16()
    with torch.no_grad():
        plain.variance_epsilon = quickened.variance_epsilon = 2.0
        calls.clear()
        torch.testing.assert_close(quickened(x), plain(x))
        assert len(calls) == 1
        monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden: hidden)
        assert torch.equal(quickened(x), x)


class TwiceTheRoot(nn.Module):
    """Looks like a norm of a known kind and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return (
            2 * self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        )


@pytest.mark.parametrize(
    "made", [TwiceTheRoot, lambda: nn.LayerNorm(64), lambda: LlamaRMSNorm(60), lambda: nn.Linear(64, 8)]
)
def test_modules_of_no_known_kind_are_left_alone(made: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Sequential(made()).to(dtype)
        quicken_norms(model)
        assert MARK not in vars(model[0])


class OneOfTwoKinds(nn.Module):
    """A flag says whether one is added to the weights."""

    def __init__(self, *, more: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.more = nn.Parameter(torch.ones(64)), 1e-6, more

    def forward(self, x: Tensor) -> Tensor:
        root = (x.float().pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return ((self.weight.float() + float(self.more)) * (x.float() / root)).to(x.dtype)


def test_two_modules_of_a_class_may_be_of_two_kinds(calls: list[str]) -> None:
    model = nn.ModuleList([OneOfTwoKinds(more=more) for more in (False, True, False)]).bfloat16()
    quicken_norms(model)
    calls.clear()
    with torch.no_grad():
        for one in model:
            one(normal(1, 64).bfloat16())
    assert calls == ["whole", "one more", "whole"]


def test_a_copy_has_weights_of_its_own(calls: list[str]) -> None:
    _, quickened = quick(LlamaRMSNorm(64))
    x = normal(1, 64).bfloat16()
    with torch.no_grad():
        before = quickened(x)
        shallow = quickened._replicate_for_data_parallel()
        shallow.weight = nn.Parameter(quickened.weight.clone())
        for made in (copy.deepcopy(quickened), pickle.loads(pickle.dumps(quickened)), shallow):
            calls.clear()
            made.weight.mul_(2)
            torch.testing.assert_close(made(x), 2 * before)
            torch.testing.assert_close(quickened(x), before)
            assert len(calls) == 2
    assert list(quickened.state_dict()) == ["weight"]
    forget_norms(quickened)
    assert MARK not in vars(quickened)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packed_models_have_quick_norms_and_plain_ones_none(family: str, calls: list[str]) -> None:
    model = tiny_model(family).bfloat16()
    text = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(text)
        assert calls == []
        fips.compress(model, batches_for(model), fips.CompressionConfig(method="gptq", bits=8.5))
        calls.clear()
        found = model(text).logits
        assert len(calls) > len(model.model.layers)
        forget_norms(model)
        calls.clear()
        expected = model(text).logits
    assert calls == []
    assert float((found - expected).float().norm() / expected.float().norm()) < 0.01


@pytest.mark.parametrize(
    ("field", "value"),
    [("length", 100), ("length", 0), ("size", 0), ("size", 63), ("size", 128), ("weight_length", 63), ("kind", 3),
     ("kind", -1), ("type", 0), ("type", 9), ("isa", 77), ("x", None), ("weight", None), ("y", None)],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, field: str, value: Any) -> None:
    call = cpu.call

    def changed(function: str, arguments: ctypes.Structure, what: str) -> None:
        setattr(arguments, field, value)
        call(function, arguments, what)

    monkeypatch.setattr(cpu, "call", changed)
    with pytest.raises(BackendError, match="refuses a norm"):
        norm.normalise(normal(2, 64).bfloat16(), normal(64).bfloat16(), 1e-6, "whole")
