"""Formats are objects that everybody asks: a further one is a class, and the compiled table agrees with Python's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import Tensor

import fips
from fips.errors import BackendError, ConfigError
from fips.formats.patterns import PATTERNS, Pattern, pattern_for, pattern_named
from fips.formats.values import VALUES, Values, automatic_values, values_named
from fips.kernels import attention, block, cpu, norm
from fips.kernels.backend import unsupported_format
from fips.layers.linear import factored_layers
from fips.solve.rounding import grid_steps

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason())


class Alternate(Pattern):
    """A toy: of every 8 neighbours the 3 largest, as a byte each group."""

    known = ("toy3of8",)
    group, group_bits, group_kept = 8, 8, 3

    def choose_fixed(self, score_RF: Tensor, *, axis: int, density: float = 0.0) -> Tensor:
        moved = score_RF.movedim(axis, -1)
        groups = moved.reshape(-1, 8)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(3, dim=1).indices, True)
        return mask.view(moved.shape).movedim(-1, axis)


class Powers(Values):
    """A toy: 0 and signed powers of two of a scale, a code of 8 bits each."""

    known = ("toypow2",)
    bits, largest, plain, rounding_error = 8, 64.0, False, 0.02

    def nearest(self, steps: Tensor) -> Tensor:
        powers = torch.exp2(steps.abs().clamp(0.5, self.largest).log2().round())
        return torch.where(steps.abs() < 0.5, 0.0, powers) * steps.sign()

    def encode(self, numbers: Tensor) -> Tensor:
        return ((numbers.abs().clamp(min=0.5).log2() + 1).round() * numbers.sign()).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.where(codes == 0, 0.0, torch.exp2(codes.abs().float() - 1)) * codes.sign()


@pytest.fixture
def toys() -> Iterator[None]:
    PATTERNS.register(Alternate)
    VALUES.register(Powers)
    yield
    PATTERNS.forget(Alternate)
    VALUES.forget(Powers)


@pytest.mark.parametrize(
    ("settings", "fmt", "values"),
    [
        ({"method": "magnitude", "values": "toypow2"}, "bitmask", "toypow2"),
        ({"pattern": "toy3of8", "values": "float"}, "toy3of8", "float"),
        ({"pattern": "toy3of8", "values": "toypow2"}, "toy3of8", "toypow2"),
        ({"pattern": "unstructured", "sharing": "never", "values": "toypow2"}, "bitmask", "toypow2"),
    ],
)
@pytest.mark.usefixtures("toys")
def test_a_toy_format_is_one_class(settings: dict[str, str], fmt: str, values: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    batches = batches_for(model)
    fips.compress(model, batches, fips.CompressionConfig(bits=7.52, **settings))
    fips.save(model, tmp_path / "out")
    loaded = fips.load(tmp_path / "out")
    layers = factored_layers(loaded)
    assert {layer.kind for layer in layers.values()} == {values}
    assert fmt in {layer.fmt for layer in layers.values()} <= {fmt, "full"}  # what is full needs no pattern
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batches[0]).logits, model(**batches[0]).logits)
        for name, layer in layers.items():
            assert torch.equal(layer.factor(), model.get_submodule(name).factor()), name
            x = torch.randn(3, layer.in_features)
            wanted = torch.nn.functional.linear(x, layer.dense_weight().float(), layer.bias)
            torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-3)
    toy = fmt if fmt.startswith("toy") else values
    for layer in layers.values():
        packed = layer.packed()
        assert toy in (unsupported_format(packed) or "")
        assert {name for name, reason in layer.backends().items() if reason == "yes"} == {"reference"}
        if cpu.available():
            with pytest.raises(BackendError, match=toy):
                cpu.prepare(packed)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown value format 'int44'; did you mean 'int4'\? known: float, int8"):
        fips.CompressionConfig(bits=8.0, values="int44")
    with pytest.raises(ConfigError, match=r"unknown packed format 'block5'; did you mean 'block[48]'\?"):
        fips.CompressionConfig(bits=8.0, pattern="block5")
    with pytest.raises(ConfigError, match="ask for 'unstructured'"):
        fips.CompressionConfig(bits=8.0, pattern="bitmask")


@pytest.mark.parametrize("name", ["nl2", "nl3", "nl4", "nl5", "nl4g32"])
def test_levels_are_the_nearest_and_lose_less_than_integers(name: str) -> None:
    levels, evenly = values_named(name), values_named(name.replace("nl", "int"))
    assert len(levels.levels) == 1 << (levels.bits or 0)
    numbers = torch.tensor(levels.levels).float()
    codes = levels.encode(numbers)
    assert codes.tolist() == list(range(-(len(numbers) // 2), len(numbers) // 2))
    assert torch.equal(levels.decode(codes), numbers)
    assert levels.decode(torch.zeros(3, dtype=torch.int8)).tolist() == [0, 0, 0]
    assert torch.equal(levels.unpack(levels.pack(codes), len(codes)), codes)
    some = torch.linspace(-140, 140, 281).view(-1, 1)
    assert torch.equal((levels.nearest(some) - some).abs(), (numbers - some).abs().amin(1, keepdim=True))
    matrix, errors = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), []
    for values in (levels, evenly):
        steps, group_steps = grid_steps(matrix, torch.ones(256), values=values, dtype=torch.float32)
        found = values.dequantize(values.quantize(matrix, steps, group_steps), steps, group_steps)
        errors.append(float((found - matrix).square().mean()))
    assert errors[0] < 0.85 * errors[1]
    assert errors[0] == pytest.approx(levels.rounding_error, rel=0.12)


def test_what_is_measured_by_default() -> None:
    names = ["nl2g64", "nl3", "nl3g64", "nl4", "nl4g64", "nl5", "nl5g64", "int6", "int6g64", "int7", "int8"]
    assert [one.name for one in automatic_values(coded=False)] == names
    errors = [values_named(f"int{bits}").rounding_error for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert pattern_for("unstructured") is pattern_named("bitmask")


def table() -> ctypes.CDLL:
    return cpu._require()


@needs_library
@pytest.mark.parametrize("name", ["full", "bitmask", "1:2", "2:4", "3:8", "4:16", "15:16", "block4", "block8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_compiled_table_has_pythons_patterns(name: str, axis: int) -> None:
    pattern = pattern_named(name)
    row = (ctypes.c_int32 * 3)()
    code = pattern.code(0 if axis == 0 else 1)
    assert code is not None
    assert table().fips_pattern(code, pattern.group_kept or 0, pattern.group, row) == 0
    assert list(row) == [pattern.group, pattern.group_bits, -1 if pattern.group_kept is None else pattern.group_kept]


@needs_library
def test_the_compiled_table_has_pythons_types_and_nothing_else() -> None:
    for dtype, number in cpu.TYPES.items():
        assert table().fips_value_bits(number) == 8 * dtype.itemsize
    assert table().fips_value_bits(len(set(cpu.TYPES.values()))) < 0
    assert table().fips_pattern(5, 1, 4, (ctypes.c_int32 * 3)()) < 0


@needs_library
def test_the_structures_have_the_same_layout_on_both_sides() -> None:
    wanted = []
    for struct in (cpu._Matrix, cpu._Call, cpu._Search, attention._Attention, norm._Norm, block._Block):
        wanted += [ctypes.sizeof(struct), *(getattr(struct, name).offset for name, _ in struct._fields_)]
    found = (ctypes.c_int64 * len(wanted))()
    count = table().fips_layout
    count.restype = ctypes.c_int64
    assert count(found, ctypes.c_int64(len(wanted))) == len(wanted)
    assert list(found) == wanted
