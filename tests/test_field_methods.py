"""The baselines of the benchmarks: what they store is read as they meant it, whole and in slices of rows."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import batches_for, tiny_model

import fips
from fips.config import SETTINGS
from fips.formats.packed import dense_slices, to_dense
from fips.formats.values import VALUES
from fips.layers.linear import factored_layers
from fips.plan.planner import PLANNERS

FILE = Path(__file__).parents[1] / "benchmarks" / "field_methods.py"


@pytest.fixture(scope="module", autouse=True)
def field_methods() -> Iterator[None]:
    values, methods = list(VALUES.classes), set(SETTINGS)
    spec = importlib.util.spec_from_file_location("field_methods", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["field_methods"] = importlib.util.module_from_spec(spec)  # where pydantic looks names up
    spec.loader.exec_module(module)
    yield
    for cls in [one for one in VALUES.classes if one not in values]:
        VALUES.forget(cls)
    for name in set(SETTINGS) - methods:
        SETTINGS.pop(name)
        PLANNERS.pop(name)


@pytest.mark.parametrize(("method", "bits", "most"), [("rtn", 8.5, 0.02), ("field-gptq", 4.5, 0.6), ("awq", 3.5, 0.4)])
def test_what_a_field_method_stores_is_near_the_original(method: str, bits: float, most: float) -> None:
    original = tiny_model("llama").bfloat16()
    packed = tiny_model("llama").bfloat16()
    fips.compress(packed, batches_for(packed), fips.CompressionConfig(method=method, bits=bits))
    layers = factored_layers(packed)
    assert len(layers) == 21
    for name, layer in layers.items():
        weight, found = original.get_submodule(name).weight.detach().float(), layer.dense_weight()
        assert float((found - weight).norm() / weight.norm()) < most, name
        stored = layer.packed()
        parts = torch.cat([part for _, part in dense_slices(stored, 1)])
        assert torch.equal(parts, to_dense(stored))
