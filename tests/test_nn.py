"""Factored layers against dense matrices in float64: every format, kind of value, role, with and without a basis."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn

import fips
from fips.errors import CheckpointError, ConfigError
from fips.formats.masks import nm_mask
from fips.formats.patterns import pattern_named
from fips.formats.rotation import rotate
from fips.layers.linear import BASES, FactoredLinear, SharedBasis, basis_owner, factored_layers
from fips.models import Site, group_layers, locate_layers
from fips.models.sites import Role
from fips.plan.footprint import LayerStorage, factored_footprint
from fips.storage.layout import Layout, describe_layout

WIDTH, HIDDEN, RANK = 12, 40, 16
FORMATS = ["full", "bitmask", "2:8", "block4", "block8"]
CASES = list(itertools.product(["up", "down"], FORMATS, ["float", "int8", "int5", "int2"], [True, False]))


def mask_for(fmt: str, role: Role, rank: int, hidden: int, seed: int = 0) -> Tensor:
    """A support in canonical (R, F) shape with an empty stored row where the format allows one."""
    generator = torch.Generator().manual_seed(seed)
    if fmt == "full":
        return torch.ones(rank, hidden, dtype=torch.bool)
    if ":" in fmt:
        n, m = (int(part) for part in fmt.split(":"))
        return nm_mask(torch.rand(rank, hidden, generator=generator), n=n, m=m, dim=0 if role == "up" else 1)
    size = pattern_named(fmt).block
    mask = (torch.rand(rank, hidden // size, generator=generator) < 0.4).repeat_interleave(size, dim=1)
    if role == "up":
        mask[:, :size] = False
    else:
        mask[0] = False
    return mask


def make_layer(
    role: Role, fmt: str, values: str, basis: SharedBasis | None, *, width: int = WIDTH, hidden: int = HIDDEN
) -> tuple[FactoredLinear, Tensor]:
    """A layer and its (R, F) factor."""
    rank = width if basis is None else basis.weight.shape[1]
    mask = mask_for(fmt, role, rank, hidden)
    factor = torch.randn(rank, hidden, generator=torch.Generator().manual_seed(1)) * mask
    return FactoredLinear.from_factor(basis, factor, mask, role=role, fmt=fmt, values=values), factor


def make_basis(width: int = WIDTH, rank: int = RANK) -> SharedBasis:
    basis = SharedBasis(width, rank)
    nn.init.normal_(basis.weight, generator=torch.Generator().manual_seed(2))
    return basis


@pytest.mark.parametrize(("role", "fmt", "values", "shared"), CASES)
def test_forward_equals_the_dense_product(role: Role, fmt: str, values: str, shared: bool) -> None:
    if fmt == "2:8" and role == "up" and not shared:
        pytest.skip("a width of 12 is no multiple of 8")
    basis = make_basis() if shared else None
    layer, factor_RF = make_layer(role, fmt, values, basis)
    layer.bias = nn.Parameter(torch.randn(layer.out_features))
    stored = layer.factor().detach().double()
    canonical = stored.T if role == "up" else stored
    if values != "float":
        bits = int(values[3:])
        assert layer.values.dtype == (torch.int8 if bits == 8 else torch.uint8)
        assert layer.values.numel() == -(-layer.kept * bits // 8)
        assert layer.scales.shape == (layer.factor_shape[0],)
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        row = stored.abs().amax(1, keepdim=True)
        assert (
            (stored - (factor_RF.T if role == "up" else factor_RF).double()).abs()
            <= row / (2 ** (bits - 1) - 1) * 0.501
        ).all()
    else:
        assert torch.equal(canonical, factor_RF.double())
    weight_DF = canonical if basis is None else basis.weight.detach().double() @ canonical
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(3))
    expected = x.double() @ (weight_DF if role == "up" else weight_DF.T) + layer.bias.double()
    actual = layer(x).double()
    assert (actual - expected).norm() / expected.norm() < 5e-6
    merged = weight_DF.T if role == "up" else weight_DF
    assert (layer.dense_weight().double() - merged).norm() / merged.norm() < 5e-6
    assert layer.num_kept() == layer.kept


def test_explicit_scales_are_kept_and_rounded_to_the_stored_type() -> None:
    factor = torch.tensor([[1.0, -0.26], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [False, False]])
    scales = torch.tensor([0.013, 0.0])
    layer = FactoredLinear.from_factor(
        None, factor, mask, role="down", fmt="bitmask", dtype=torch.bfloat16, values="int8", scales=scales
    )
    step = scales[0].bfloat16().float()
    assert layer.scales.dtype == torch.bfloat16
    assert layer.values.tolist() == [round(1 / step.item()), round(-0.26 / step.item())]
    assert layer.factor().isfinite().all()
    with pytest.raises(ConfigError, match="wants 2 numbers, one per row"):
        FactoredLinear.from_factor(None, factor, mask, role="down", fmt="bitmask", values="int8", scales=scales[:1])


@pytest.mark.parametrize("role", ["up", "down"])
def test_integers_are_packed_as_they_are(role: str) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-7, 8, (6, 10), generator=generator).to(torch.int8)
    mask = torch.rand(6, 10, generator=generator) < 0.5
    scales = torch.rand(10 if role == "up" else 6, generator=generator).bfloat16()
    layer = FactoredLinear.from_integers(None, integers, mask, scales, role=role, fmt="bitmask", values="int4")
    wanted = integers * mask * scales.float().unsqueeze(0 if role == "up" else 1)
    assert torch.equal(layer.factor(), wanted.T if role == "up" else wanted)
    assert torch.equal(layer.scales, scales)
    with pytest.raises(ConfigError, match="numbers, one per row, got"):
        FactoredLinear.from_integers(None, integers, mask, scales[:1], role=role, fmt="bitmask", values="int4")
    with pytest.raises(ConfigError, match="cannot be stored as `values: float`"):
        FactoredLinear.from_integers(None, integers, mask, scales, role=role, fmt="bitmask", values="float")


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("role", ["up", "down"])
def test_group_scales_follow_the_largest_of_every_group(role: Role, group: int) -> None:
    """Rows of 80 columns, the last group short: no group errs by more than half its own step, coarse as rows may be."""
    generator = torch.Generator().manual_seed(0)
    shape = (80, 24) if role == "up" else (24, 80)  # (width, hidden): the sum runs over 80
    sizes = torch.logspace(-2, 0, 80)
    factor = torch.randn(shape, generator=generator) * (sizes.unsqueeze(1) if role == "up" else sizes)
    mask = torch.rand(shape, generator=generator) < 0.7
    layer = FactoredLinear.from_factor(None, factor, mask, role=role, fmt="bitmask", values=f"int4g{group}")
    assert layer.group_scales.dtype == torch.uint8
    assert layer.group_scales.shape == (24 * -(-80 // group),)
    wanted_NK, found_NK = ((factor * mask).T if role == "up" else factor * mask), layer.factor().detach()
    for start in range(0, 80, group):
        part, got = wanted_NK[:, start : start + group], found_NK[:, start : start + group]
        step = part.abs().amax(1, keepdim=True) / 7
        coarse = layer.scales.unsqueeze(1) / 2  # of the group scale itself, times the largest integer
        assert ((part - got).abs() <= 0.5 * (step + coarse) + 7 * coarse).all()
    x = torch.randn(3, layer.in_features, generator=generator)
    assert torch.allclose(layer(x), x @ found_NK.T, atol=1e-5)
    with pytest.raises(ConfigError, match=r"`group_scales` of int4g\d+ wants \d+ bytes, got 0 numbers"):
        FactoredLinear.from_factor(
            None, factor, mask, role=role, fmt="bitmask", values=f"int4g{group}", scales=layer.scales
        )


def test_hidden_features_must_fill_the_blocks_and_a_width_must_be_known() -> None:
    with pytest.raises(ConfigError, match="block8 needs a multiple of 8 hidden features, got 20"):
        FactoredLinear(None, role="up", hidden=20, kept=0, fmt="block8", width=8)
    with pytest.raises(ConfigError, match="needs its `width`"):
        FactoredLinear(None, role="up", hidden=20, kept=0)


@pytest.mark.parametrize("values", ["nl4", "int4g16", "nl2g16"])
@pytest.mark.parametrize("role", ["up", "down"])
def test_turned_columns_are_turned_back(role: str, values: str) -> None:
    """The layer is that of the turned matrix behind the turn of its inputs, and made again from its arguments."""
    to_factor = Role(role).to_factor
    weight_NK, x = torch.randn(24, 80, generator=torch.Generator().manual_seed(0)), torch.randn(5, 80)
    turn = rotate(torch.eye(80), 16)
    ones = to_factor(torch.ones(24, 80, dtype=torch.bool))
    layer = FactoredLinear.from_factor(
        None, to_factor(weight_NK), ones, role=role, fmt="full", values=values, rotation=16
    )
    plain = FactoredLinear.from_factor(None, to_factor(weight_NK @ turn), ones, role=role, fmt="full", values=values)
    torch.testing.assert_close(layer.dense_weight(), plain.dense_weight() @ turn)
    torch.testing.assert_close(layer(x), plain(x @ turn), rtol=1e-4, atol=1e-4)
    again = FactoredLinear(None, **layer.arguments())
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)
    assert (again.rotation, again.kind) == (16, values)


def test_a_rotation_that_does_not_fit_is_refused() -> None:
    for change in ({"values": "float"}, {"rotation": 64}, {"rotation": 16, "hidden": 20, "role": "down"}):
        arguments = {
            "role": "up",
            "hidden": 16,
            "kept": 32 * 16,
            "fmt": "full",
            "width": 32,
            "values": "int4",
            "rotation": 16,
        }
        with pytest.raises(ConfigError, match="is for numbers on a grid, without a basis, whose"):
            FactoredLinear(None, **{**arguments, **change})
    with pytest.raises(ConfigError, match="rotation 4 is for numbers on a grid"):
        FactoredLinear(make_basis(32, 24), role="up", hidden=16, kept=9, values="int4", rotation=4)


STORAGE = [
    LayerStorage(0, "bitmask", "int8"),
    LayerStorage(0, "block4", "float", shared=False),
    LayerStorage(0, "4:16", "int4", shared=False),
    LayerStorage(0, "block8", "int6"),
    LayerStorage(0, "full", "int3"),
    LayerStorage(0, "bitmask", "float", shared=False),
    LayerStorage(0, "block8", "float"),
    LayerStorage(0, "full", "nl4g16", shared=False),
    LayerStorage(0, "2:4", "nl3", shared=False),
]  # fmt: skip


def mixed_llama(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, int]:
    """A Llama whose nine matrices are each stored in another way, and the predicted bytes of those matrices."""
    model = tiny_model("llama").to(dtype)
    (group,) = group_layers(locate_layers(model).sublayers)
    basis = make_basis(32, 24).to(dtype)
    storages = []
    for site, plan in zip(group.sites, STORAGE, strict=True):
        layer = replacement(site, plan, basis if plan.shared else None, dtype)
        storages.append(LayerStorage(layer.kept, plan.fmt, plan.values, plan.shared))
        model.set_submodule(site.name, layer)
    setattr(basis_owner(model), BASES, nn.ModuleDict({group.name: basis}))
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return model, factored_footprint(group, rank=24, itemsize=itemsize, layers=storages).bytes


def replacement(site: Site, plan: LayerStorage, basis: SharedBasis | None, dtype: torch.dtype) -> FactoredLinear:
    rank = site.width if basis is None else 24
    mask = mask_for(plan.fmt, site.role, rank, site.hidden)
    factor = torch.randn(rank, site.hidden, generator=torch.Generator().manual_seed(1)) * 0.1
    return FactoredLinear.from_factor(
        basis, factor, mask, role=site.role, fmt=plan.fmt, dtype=dtype, values=plan.values,
        rotation=16 if plan.values.startswith("nl") else 1,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_layers_are_saved_in_the_predicted_bytes_and_load_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model, predicted = mixed_llama(dtype)
    others = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if ".mlp." not in name and BASES not in name
    )
    assert fips.save(model, tmp_path / "out") == others + predicted
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == others + predicted
    assert {t.dtype for name, t in tensors.items() if name.endswith(".scales")} == {dtype}
    loaded = fips.load(tmp_path / "out")
    assert [layer.fmt for layer in factored_layers(loaded).values()] == [plan.fmt for plan in STORAGE]
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    batch = batches_for(loaded)[0]
    with torch.no_grad():
        if dtype == torch.float32:
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        merged = fips.merge(copy.deepcopy(loaded))
        error = (merged(**batch).logits - loaded(**batch).logits).norm() / loaded(**batch).logits.norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    assert not hasattr(basis_owner(merged), BASES)


def test_only_used_bases_are_counted() -> None:
    model = tiny_model("llama")
    (group,) = group_layers(locate_layers(model).sublayers)
    alone = [LayerStorage(7, shared=False)] * 9
    footprint = factored_footprint(group, rank=24, itemsize=2, layers=alone)
    assert (footprint.parameters, footprint.value_bytes, footprint.macs_per_token) == (63, 126, 63)
    assert footprint.pattern_bytes == 9 * 32 * 80 // 8
    joint = factored_footprint(group, rank=24, itemsize=2, layers=[LayerStorage(7)] * 9)
    assert joint == factored_footprint(group, rank=24, itemsize=2, kept=63, fmt="bitmask")


def test_a_layout_written_before_the_new_fields_still_parses_and_is_written_unchanged() -> None:
    old: dict[str, Any] = {
        "quant_method": "fips", "format_version": 1, "bases": {"g0": {"width": 32, "rank": 24}},
        "layers": {"a": {"basis": "g0", "role": "up", "columns": 80, "nonzeros": 5, "format": "bitmask", "bias": False,
                         "conv1d": True}},
    }  # fmt: skip
    layout = Layout.parse(old, where="here")
    assert layout.layers["a"].values == "float"
    assert layout.to_dict() == old
    old["layers"]["a"].update(format="dense", nonzeros=24 * 80)
    layout = Layout.parse(old, where="here")
    assert layout.layers["a"].format == "full"  # a file has its own word for it
    assert layout.to_dict() == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 32}, "either `basis` or `width`"),
        ({"basis": None}, "either `basis` or `width`"),
        ({"format": "block4", "columns": 81}, "does not fill the blocks of block4"),
        ({"values": "int9"}, "values"),
        ({"format": "full"}, "unknown packed format 'full'; known: dense, bitmask"),
        ({"format": "bitmsk"}, "did you mean 'bitmask'[?] known: dense, bitmask"),
        ({"hidden": 80}, "hidden.*not permitted"),
        ({"kept": 5}, "kept.*not permitted"),
        ({"rotation": 8}, "`rotation` is one of 1, 4, 16, 64"),
        ({"rotation": 16}, "`rotation` is for numbers on a grid and layers without a basis"),
    ],
)
def test_contradictory_layouts_are_refused(change: dict[str, object], message: str) -> None:
    model, _ = mixed_llama()
    fields = describe_layout(model).to_dict()
    fields["layers"]["model.layers.0.mlp.gate_proj"].update(change)
    with pytest.raises(CheckpointError, match=message):
        Layout.parse(fields, where="here")


def test_what_is_merged_in_inference_mode_trains() -> None:
    model = tiny_model("llama")
    batches = batches_for(model)
    fips.compress(model, batches, fips.CompressionConfig(bits=6.0, effort="fast"))
    with torch.inference_mode():
        fips.merge(model)
    model(**batches[0]).logits.sum().backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.grad is not None


def test_a_merged_model_has_one_type_and_its_numbers_are_rounded_once() -> None:
    """Packed numbers are often of a narrower type than the model computes in, and their biases too."""
    model, _ = mixed_llama(torch.float32)
    for layer in factored_layers(model).values():
        layer.to(torch.bfloat16)
        layer.bias = nn.Parameter(torch.randn(layer.out_features).to(torch.bfloat16))
    batch = batches_for(model)[0]
    with torch.no_grad():
        packed = model(**batch).logits
        merged = fips.merge(copy.deepcopy(model))
        assert {p.dtype for p in merged.parameters()} == {torch.float32}
        assert (merged(**batch).logits - packed).norm() / packed.norm() < 1e-5
        narrow = fips.merge(copy.deepcopy(model).to(torch.bfloat16))
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
        wide = fips.merge(copy.deepcopy(model), dtype=torch.float64)
        weight = wide.get_submodule("model.layers.0.mlp.up_proj").weight
        assert weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_of_packed_layers_alone_is_merged_into_the_type_of_its_weights(dtype: torch.dtype) -> None:
    layer, _ = make_layer("up", "bitmask", "int4", None)
    layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.bfloat16))
    layer.weight = torch.empty(0, dtype=dtype)
    model = nn.Module()
    model.layer = layer
    setattr(basis_owner(model), BASES, nn.ModuleDict())
    merged = fips.merge(model).get_submodule("layer")
    assert isinstance(merged, nn.Linear)
    assert merged.weight.dtype == merged.bias.dtype == dtype
    assert merged(torch.ones(2, layer.in_features, dtype=dtype)).dtype == dtype


def test_double_precision_is_kept_where_values_have_it() -> None:
    basis = make_basis().double()
    mask = mask_for("bitmask", "up", RANK, HIDDEN)
    factor = torch.randn(RANK, HIDDEN, dtype=torch.float64) * mask
    layer = FactoredLinear.from_factor(basis, factor, mask, role="up", fmt="bitmask")
    expected = factor.T @ basis.weight.detach().T
    assert layer.dense_weight().dtype == torch.float64
    assert (layer.dense_weight() - expected).abs().max() < 1e-13
