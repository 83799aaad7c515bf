"""The compiled attention of one token beside that of float64, and what it refuses."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from fips.errors import BackendError
from fips.kernels import attention, cpu
from fips.layers import decoding

pytestmark = pytest.mark.skipif(not cpu.vectors(), reason="no compiled library, or no kernel for this machine")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float = 0.0) -> Tensor:
    key, value = (t.double().repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = scale * query.double() @ key.mT
    return (cap * (scores / cap).tanh() if cap else scores).softmax(-1) @ value


def step_by_step(query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float) -> Tensor:
    """As transformers' ``eager`` computes it."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * scale
    if cap:
        scores = (scores / cap).tanh() * cap
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("examples", "heads", "shared"), [(1, 8, 1), (2, 3, 3), (1, 2, 4), (3, 2, 7), (1, 1, 9)])
@pytest.mark.parametrize("size", [8, 24, 64, 512])
def test_it_is_the_attention_of_float64(size: int, examples: int, heads: int, shared: int, dtype: torch.dtype) -> None:
    for length in (1, 7, 128, 129, 700):
        query = normal(examples, heads * shared, 1, size, dtype=dtype)
        key, value = (normal(examples, heads, length, size, dtype=dtype) + i for i in (0, 1))
        assert attention.suits(query, key, value)
        expected = exact(query, key, value, 0.2)
        found = attention.attend(query, key, value, 0.2)
        assert found.shape == query.shape
        assert found.dtype is dtype
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < (3e-3 if dtype is torch.bfloat16 else 5e-4), (length, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.0, 2.0, 50.0])
@pytest.mark.parametrize(("examples", "heads", "shared", "size"), [(1, 4, 2, 256), (2, 3, 3, 64), (3, 2, 7, 8)])
def test_capped_and_rounded_scores(
    examples: int, heads: int, shared: int, size: int, cap: float, dtype: torch.dtype
) -> None:
    for length in (1, 7, 128, 131, 700):
        query = 3 * normal(examples, heads * shared, 1, size, dtype=dtype)
        key, value = (normal(examples, heads, length, size, dtype=dtype) + i for i in (0, 1))
        expected = exact(query, key, value, 0.2, cap)
        error = attention.attend(query, key, value, 0.2, cap=cap).double() - expected
        assert float(error.norm() / expected.norm()) < (3e-3 if dtype is torch.bfloat16 else 5e-4), length
        theirs = step_by_step(query, key, value, 0.2, cap)
        found = attention.attend(query, key, value, 0.2, cap=cap, rounded=True)
        assert float((found == theirs).float().mean()) > 0.95, length
        assert float((found - theirs).norm() / theirs.norm()) < 3e-3, length


@pytest.mark.parametrize("hidden", [(0, 0, 0), (5, 0, 1), (127, 128, 129), (199, 150, 3)])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_keys_in_front_are_left_out(cap: float, hidden: tuple[int, ...]) -> None:
    query, key, value = normal(3, 6, 1, 24), normal(3, 2, 200, 24), normal(3, 2, 200, 24) + 1
    found = attention.attend(query, key, value, 0.2, cap=cap, hidden=hidden)
    stepwise = attention.attend(query, key, value, 0.2, cap=cap, hidden=hidden, rounded=True)
    key[0, 0, 3] = torch.nan  # of a key that is left out nothing is to be seen
    again = attention.attend(query, key, value, 0.2, cap=cap, hidden=hidden)
    for e, count in enumerate(hidden):
        parts = query[e : e + 1], key[e : e + 1, :, count:], value[e : e + 1, :, count:]
        expected = exact(*parts, 0.2, cap)[0]
        if not (e == 0 and count < 4):
            assert float((found[e].double() - expected).norm() / expected.norm()) < 3e-3
            theirs = step_by_step(*parts, 0.2, cap)[0]
            assert float((stepwise[e] - theirs).norm() / theirs.norm()) < 3e-3
            assert torch.equal(found[e], again[e])


MASKS: dict[str, tuple[list[list[int]], tuple[int, ...] | None]] = {
    "nothing": ([[1, 1, 1, 1]], ()),
    "padding": ([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], (2, 0, 1)),
    "the same of all": ([[0, 1, 1, 1]], (1, 1, 1)),
    "a hole": ([[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]], None),
    "what comes": ([[1, 1, 1, 0]], None),
    "all": ([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], None),
    "of too few": ([[0, 1, 1, 1], [1, 1, 1, 1]], None),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("added", [None, torch.float32, torch.bfloat16])
def test_what_a_mask_hides(name: str, added: torch.dtype | None) -> None:
    rows, expected = MASKS[name]
    mask = torch.tensor(rows, dtype=torch.bool)[:, None, None]
    if added is not None:
        mask = torch.where(mask, 0.0, torch.finfo(added).min).to(added)
    for one in (mask, torch.where(mask == 0, mask, -torch.inf) if added else mask):
        for _ in range(2):
            assert decoding.hidden_by(one, 3, 4) == expected
    if expected:
        assert decoding.hidden_by(mask, 3, 5) is None
        if added is not None:
            assert decoding.hidden_by(mask / 1e30, 3, 4) is None  # weighed less, but there


def test_a_mask_that_was_written_to_is_looked_at_again() -> None:
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert decoding.hidden_by(mask, 2, 5) == ()
    mask[1, 0, 0, :2] = False
    assert decoding.hidden_by(mask, 2, 5) == (0, 2)
    with torch.inference_mode():
        other = mask.clone()
        assert decoding.hidden_by(other, 2, 5) == (0, 2)
        other[0, 0, 0, 0] = False
        assert decoding.hidden_by(other, 2, 5) == (1, 2)
    assert decoding.hidden_by(None, 2, 5) == ()


def test_a_score_that_is_no_number_is_none_when_capped() -> None:
    query, key, value = normal(1, 6, 1, 16), normal(1, 3, 150, 16), normal(1, 3, 150, 16)
    key[0, 1, 140, 3] = torch.nan
    for rounded in (False, True):
        found = attention.attend(query, key, value, 0.3, cap=3.0, rounded=rounded)
        assert found[0, 2:4].isnan().all()
        assert found[0, :2].isfinite().all()
        assert found[0, 4:].isfinite().all()


@pytest.mark.parametrize("laid_out", ["tokens first", "a longer cache", "from the second on"])
def test_keys_and_values_are_read_where_they_lie(laid_out: str) -> None:
    query = normal(2, 6, 1, 32)
    if laid_out == "tokens first":
        key, value = (normal(2, 200 + i, 3, 32).transpose(1, 2)[:, :, :200] for i in range(2))
    elif laid_out == "a longer cache":
        key, value = (normal(2, 3, 256 + i, 32)[:, :, :200] for i in range(2))
    else:
        key, value = (normal(3, 4, 201, 40)[1:, 1:, 1:, i : 32 + i] for i in range(2))
    assert attention.suits(query, key, value)
    expected = exact(query, key, value, 0.2)
    found = attention.attend(query, key, value, 0.2)
    assert float((found.double() - expected).norm() / expected.norm()) < 3e-3


def test_scores_of_any_size_have_an_exponential() -> None:
    query, key, value = torch.ones(1, 2, 1, 16).bfloat16(), normal(1, 1, 300, 16) * 3000, normal(1, 1, 300, 16)
    for q in (query, -query, query * 0):
        expected = exact(q, key, value, 1.0)
        torch.testing.assert_close(attention.attend(q, key, value, 1.0).double(), expected, atol=0.01, rtol=0.01)


def test_what_is_no_number_reaches_the_heads_that_read_it_alone() -> None:
    query, key, value = normal(1, 6, 1, 16), normal(1, 3, 150, 16), normal(1, 3, 150, 16)
    key[0, 1, 140, 3] = torch.nan
    value[0, 2, 0, 5] = torch.inf
    found = attention.attend(query, key, value, 0.3)
    assert found[0, :2].isfinite().all()
    assert found[0, 2:4].isnan().all()
    assert found[0, 4:, 0, 5].isinf().all()
    assert found[0, 4:, 0, :5].isfinite().all()


def test_threads_do_not_change_the_result() -> None:
    query, key, value = normal(1, 8, 1, 64), normal(1, 2, 900, 64), normal(1, 2, 900, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attention.attend(query, key, value, 0.125))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_calls_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = normal(1, 4, 1, 16), normal(1, 2, 9, 16), normal(1, 2, 9, 16)
    assert attention.suits(query, key, value)
    assert not attention.suits(query.float(), key.float(), value.float())
    assert not attention.suits(query, key.half(), value)
    assert not attention.suits(normal(1, 4, 1, 12), normal(1, 2, 9, 12), normal(1, 2, 9, 12))
    assert not attention.suits(query, key[:, :, :0], value[:, :, :0])
    assert not attention.suits(query, key, value[..., :8])
    assert not attention.suits(query, normal(1, 2, 16, 9).mT, value)
    assert not attention.suits(query.clone().requires_grad_(), key, value)
    assert not attention.suits(query.to("meta"), key, value)
    for examples, others in ((3, 1), (1, 3)):  # torch broadcasts them
        more, keys = query.expand(examples, -1, -1, -1), key.expand(others, -1, -1, -1)
        assert not attention.suits(more, keys, keys)
        assert not decoding._is_one_token(more, keys, None, {})
    assert not attention.suits(query.expand(-1, -1, 2, -1), key, value)
    assert not attention.suits(normal(1, 3, 1, 16), key, value)
    with torch.autograd.forward_ad.dual_level():
        assert not attention.suits(query, key, value)
    by_library = decoding.attend(query, key, value, None, 0.3)
    monkeypatch.setattr(cpu, "vectors", lambda: False)
    assert not attention.suits(query, key, value)
    torch.testing.assert_close(decoding.attend(query, key, value, None, 0.3), by_library, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("hidden", [(9,), (-1,), (0, 0), (1 << 40,)])
def test_more_keys_than_there_are_cannot_be_left_out(hidden: tuple[int, ...]) -> None:
    query, key = normal(1, 4, 1, 16), normal(1, 2, 9, 16)
    with pytest.raises(BackendError, match="refuses attention of one token"):
        attention.attend(query, key, key, 0.3, hidden=hidden)


@pytest.mark.parametrize(
    ("field", "value"),
    [("keys_length", 100), ("values_length", -1), ("queries_length", 63), ("y_length", 65), ("heads", 5),
     ("length", 10), ("length", 1 << 40), ("examples", 0), ("examples", 1 << 31), ("key_heads", 3), ("size", 12),
     ("size", 1024), ("type", 0), ("type", 9), ("threads", 0), ("isa", 77), ("keys", None), ("y", None),
     ("cap", -1.0), ("cap", float("nan")), ("rounded", 2), ("hidden_length", 1),
     ("key_strides", (144, 72, -8)), ("value_strides", (144, 1 << 62, 1 << 62))],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, field: str, value: Any) -> None:
    query, key = normal(1, 4, 1, 16), normal(1, 2, 9, 16)
    call = cpu.call

    def changed(function: str, arguments: ctypes.Structure, what: str) -> None:
        three = ctypes.c_int64 * 3
        setattr(arguments, field, three(*value) if isinstance(value, tuple) else value)
        call(function, arguments, what)

    monkeypatch.setattr(cpu, "call", changed)
    with pytest.raises(BackendError, match="refuses attention of one token"):
        attention.attend(query, key, key, 0.3)
