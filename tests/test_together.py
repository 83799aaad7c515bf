"""Layers that read the same input are multiplied in one call: with the same results, and only while that is right."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from fips.errors import BackendError
from fips.formats.values import values_named
from fips.kernels import cpu, together
from fips.layers.linear import FactoredLinear

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "library present")

WIDTH = 128


def layer(
    rows: int, values: str = "nl4g64", *, width: int = WIDTH, seed: int = 0, fmt: str = "full", bias: bool = False
) -> FactoredLinear:
    """A layer of random codes."""
    generator = torch.Generator().manual_seed(seed + rows)
    numbers = values_named(values)
    if fmt != "full" or not numbers.scaled:
        factor = torch.randn(width, rows, generator=generator)
        mask = torch.rand(width, rows, generator=generator) < (1.0 if fmt == "full" else 0.4)
        return FactoredLinear.from_factor(None, factor, mask, role="up", fmt=fmt, values=values, dtype=torch.bfloat16)
    found = FactoredLinear(
        None, role="up", hidden=rows, kept=rows * width, fmt=fmt, width=width, values=values, dtype=torch.bfloat16,
        rotation=64 if width % 64 == 0 and seed % 2 == 0 else 1, bias=bias,
    )  # fmt: skip

    def random(like: Tensor, low: int, high: int) -> Tensor:
        return torch.randint(low, high, like.shape, generator=generator, dtype=torch.uint8)

    found.values = random(found.values, 0, 256).view(found.values.dtype)
    found.scales = torch.rand(found.scales.shape, generator=generator).to(found.scales.dtype)
    if numbers.scale_group:
        found.group_scales = random(found.group_scales, 8, 24)
    if bias:
        found.bias = nn.Parameter(torch.randn(rows, generator=generator).bfloat16(), requires_grad=False)
    return found


def tokens(count: int = 1, *, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone(one: FactoredLinear, x: Tensor) -> Tensor:
    """The product with one matrix, of its own."""
    bits = 8 if x.dtype != torch.float32 else None
    bias = None if one.bias is None else one.bias.detach()
    return cpu.multiply(x, cpu.prepare(one.packed()), bias, activation_bits=bits)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the library was asked for."""
    asked: list[str] = []
    one, several = cpu.Repeat.alone, together.Company._with_followers

    def alone_too(self: cpu.Repeat, x: Tensor) -> Tensor:
        asked.append("alone")
        return one(self, x)

    def several_too(self: together.Company, x: Tensor, group: together._Group) -> Tensor | None:
        found = several(self, x, group)
        asked.append("nothing" if found is None else f"together {1 + len(group.followers)}")
        return found

    monkeypatch.setattr(cpu.Repeat, "alone", alone_too)
    monkeypatch.setattr(together.Company, "_with_followers", several_too)
    together._last.call = None
    with torch.no_grad():
        yield asked


def learnt(*layers: FactoredLinear, count: int = 1) -> None:
    """Layers that have been called one after the other with one input: to be prepared, to be watched."""
    for seed in (90, 91):
        x = tokens(count, seed=seed)
        for one in layers:
            one(x)


MIXED = [
    ("tc4g64", "nl5g64", "nl5g64"), ("int4", "int8", "tc3"), ("nl3", "tc2g64", "float"), ("int5g32", "int6g64", "tc4"),
    ("int4g64", "tc3g64", "nl2"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", cpu.isa_names())
@pytest.mark.parametrize("kinds", MIXED, ids=str)
def test_every_format_and_share_gives_what_it_gives_alone(kinds: tuple[str, ...], isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in (64, 320, 2048):
            sizes = (576, 100, 33)
            layers = [layer(n, kind, width=width, seed=i) for i, (n, kind) in enumerate(zip(sizes, kinds, strict=True))]
            for dtype, bits in ((torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float32, 24)):
                for count in (1, 3, 4, 7):
                    x = tokens(count, width=width, dtype=dtype)[0]
                    if count == 3:
                        x[1, 5], x[2, 7] = float("nan"), float("inf")
                    matrices = [cpu.prepare(one.packed()) for one in layers]
                    wanted = [cpu.multiply(x, one, isa=isa, activation_bits=bits) for one in matrices]
                    repeats = [cpu.Repeat(x, one, None, bits) for one in matrices]
                    for one in repeats:
                        one.call.isa = cpu.ISAS.index(isa)
                    for found, right in zip(cpu.Repeat.joined(repeats)(x), wanted, strict=True):
                        assert torch.equal(found.nan_to_num(1, 2, 3), right.nan_to_num(1, 2, 3))
    finally:
        torch.set_num_threads(before)


def test_what_follows_with_the_same_input_is_made_in_one_call(calls: list[str]) -> None:
    q, k, v = (layer(rows, kind) for rows, kind in ((96, "tc4g64"), (32, "nl5g64"), (48, "int4")))
    learnt(q, k, v)
    assert calls == ["alone"] * 3  # the first time they are prepared
    calls.clear()
    for seed in range(3):
        x = tokens(seed=seed)
        for one in (q, k, v):
            assert torch.equal(one(x), alone(one, x))
    assert calls == ["together 3"] * 3


def test_other_inputs_are_not_taken_for_the_same(calls: list[str]) -> None:
    q, k = layer(96, bias=True), layer(32, bias=True)
    learnt(q, k)
    x, y = tokens(seed=1), tokens(seed=2)
    q(x)
    assert torch.equal(k(y), alone(k, y))  # another tensor
    q(x)
    assert torch.equal(k(x.clone()), alone(k, x))  # an equal one
    q(x)
    x.add_(1)  # the same, changed
    assert torch.equal(k(x), alone(k, x))


def test_one_that_is_not_asked_for_is_made_alone_after_that(calls: list[str]) -> None:
    q, k, v = layer(96), layer(32), layer(48)
    learnt(q, k, v)
    calls.clear()
    for seed in range(6):  # as where keys of another input are kept
        x = tokens(seed=seed)
        q(x), v(x)
    assert calls[:2] == ["together 3", "nothing"]
    assert calls[-1] == "together 2"
    for _ in range(2 * together.MISSES):  # and again, until it is left out for good
        learnt(q, k, v)
        q(tokens(seed=3)), q(tokens(seed=4))
    calls.clear()
    learnt(q, k, v)
    assert "together 3" not in calls
    x = tokens(seed=9)
    assert torch.equal(k(x), alone(k, x))


def change_values(one: FactoredLinear) -> None:
    one.values = one.values.flip(0).clone()


def change_scales(one: FactoredLinear) -> None:
    one.scales.mul_(2)


def change_place(one: FactoredLinear) -> None:
    one.values.data = one.values.flip(0).clone()


@pytest.mark.parametrize("change", [change_values, change_scales, change_place])
@pytest.mark.parametrize("which", [0, 1])
def test_changed_weights_count_at_once(change: Callable[[FactoredLinear], None], which: int, calls: list[str]) -> None:
    pair = layer(96), layer(32)
    learnt(*pair)
    change(pair[which])
    for seed in range(3):
        x = tokens(seed=seed)
        for one in pair:
            assert torch.equal(one(x), alone(one, x))


def test_one_that_is_gone_is_let_go(calls: list[str]) -> None:
    q, k, v = layer(96), layer(32), layer(48)
    learnt(q, k, v)
    del k
    gc.collect()
    calls.clear()
    for seed in range(2):
        x = tokens(seed=seed)
        assert torch.equal(q(x), alone(q, x))
        assert torch.equal(v(x), alone(v, x))
    assert calls == ["nothing", "alone", "alone", "together 2"]


def test_nothing_is_made_beforehand_where_gradients_or_inference_mode_may_differ(calls: list[str]) -> None:
    q, k = layer(96, bias=True), layer(32, bias=True)
    assert k.bias is not None
    k.bias.requires_grad_(True)
    for _ in range(3):
        with torch.enable_grad():
            x = tokens()
            q(x)
            assert k(x).requires_grad
        with torch.inference_mode():
            x = tokens()
            q(x)
            x.add_(1)  # which nobody counts
            assert torch.equal(k(x), alone(k, x))
    assert not [call for call in calls if call.startswith("together")]
    k.bias.requires_grad_(False)
    learnt(q, k)
    x = tokens()
    q(x)
    k.bias.requires_grad_(True)
    with torch.enable_grad():
        assert k(x).requires_grad


def test_a_call_that_fails_leaves_every_product_to_itself(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = layer(96), layer(32)
    monkeypatch.setattr(cpu.Repeat, "joined", staticmethod(lambda members: refuse))
    learnt(q, k)
    calls.clear()
    for seed in range(3):
        x = tokens(seed=seed)
        assert torch.equal(q(x), alone(q, x))
        assert torch.equal(k(x), alone(k, x))
    assert calls == ["nothing", *["alone"] * 6]


def refuse(_: Tensor) -> list[Tensor]:
    raise BackendError("no")


def test_patterns_and_many_tokens_come_through_the_same_call(calls: list[str]) -> None:
    pair = layer(96, "int6", fmt="bitmask"), layer(64, "float", fmt="bitmask")
    learnt(*pair, count=9)
    calls.clear()
    x = tokens(9)
    for one in pair:
        assert torch.equal(one(x), alone(one, x))
    assert calls == ["together 2"]


@pytest.mark.slow
def test_threads_share_layers(calls: list[str]) -> None:
    layers = [layer(96), layer(32), layer(48)]
    learnt(*layers)
    same = tokens(seed=77)
    begin = threading.Barrier(4)

    def work(seed: int) -> bool:
        right = True
        begin.wait()
        with torch.no_grad():
            for turn in range(200):
                x = same if turn % 3 == 0 else tokens(seed=1000 * seed + turn)
                wanted = [alone(one, x) for one in layers]
                found = [one(x) for one in layers]
                right &= all(map(torch.equal, found, wanted)) and len({y.data_ptr() for y in found}) == 3
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
