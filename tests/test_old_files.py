"""Directories written by earlier versions load for ever: same weights, same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fips
from fips.layers.linear import FactoredLinear, factored_layers
from fips.record import CompressionReport

FIXTURES = Path(__file__).parent / "fixtures"
DIRECTORIES = {"format-1-bitmask": 6, "format-1-nm": 4, "format-1-mixed": 9, "format-1-placeholders": 6,
               "format-1-narrow": 9, "format-2-groups": 6, "format-3-levels": 6,
               "format-4-coded": 6}  # fmt: skip
"""Directory -> number of factored layers; `<directory>.safetensors` holds an input, the logits and the product of
every layer's weight with `linspace(-1, 1)`."""


def weight_as_then(layer: FactoredLinear) -> Tensor:
    """Versions that wrote format 1 rounded integers times scales to the type of the scales."""
    factor = layer.factor()
    exact = layer.bits is None or layer.value_format.scale_group is not None
    factor = factor.float() if exact else factor.to(layer.scales.dtype).float()
    if layer.basis is None:
        return factor
    basis_DR = layer.basis.weight.float()
    return factor @ basis_DR.T if layer.role == "up" else basis_DR @ factor


@pytest.mark.parametrize("name", DIRECTORIES)
def test_old_directories_load(name: str) -> None:
    model = fips.load(FIXTURES / name)
    expected = load_file(FIXTURES / f"{name}.safetensors")
    layers = factored_layers(model)
    assert len(layers) == DIRECTORIES[name]
    for layer_name, layer in layers.items():
        probe = weight_as_then(layer) @ torch.linspace(-1, 1, layer.in_features)
        torch.testing.assert_close(probe, expected[f"{layer_name}.probe"], atol=1e-5, rtol=1e-4)
    for layer in layers.values():  # rounded only where the files say so, as by those who wrote them
        layer.runtime.activation_bits = layer.runtime.activation_bits or 16
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits.float()
    tolerance = 2e-2 if model.dtype == torch.bfloat16 else 1e-5
    assert (logits - expected["logits"]).norm() / expected["logits"].norm() < tolerance


@pytest.mark.parametrize("name", ["format-1-bitmask", "format-1-nm", "format-1-placeholders"])
def test_old_reports_are_read_under_the_names_of_now(name: str) -> None:
    report = fips.load(FIXTURES / name).fips_report
    written = json.loads((FIXTURES / name / "fips_report.json").read_text())
    assert report.plan["layers"] == written["mlp"]
    assert "mlp" not in report.to_dict()
    for group, then in zip(report.plan["groups"], written["groups"], strict=True):
        assert (group["hidden"], group["kept"]) == (then["columns"], then["nonzeros"])
        assert group["density"] == 1 - then["sparsity"]
        assert not {"columns", "nonzeros", "sparsity"} & group.keys()
    written["groups"][0]["format"] = "bitmask, dense"
    assert CompressionReport.from_dict(written).plan["groups"][0]["format"] == "bitmask, full"
