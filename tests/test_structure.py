"""MLPs are found by structure in every family, and grouped without crossing widths or lists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import DECODER, SMALL, batches_for, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

import fips
from fips.errors import ConfigError, NoMatchError
from fips.layers.linear import factored_layers
from fips.models import Part, Site, group_layers, locate_layers
from fips.models.sites import Linear
from fips.plan.plan import plan_compression

EXPECTED = {
    "llama": (3, "gated", "model.layers.0.mlp", "model.layers.0", (32, 80)),
    "gemma2": (3, "gated", "model.layers.0.mlp", "model.layers.0", (32, 80)),
    "gemma3_text": (3, "gated", "model.layers.0.mlp", "model.layers.0", (32, 80)),
    "mistral": (3, "gated", "model.layers.0.mlp", "model.layers.0", (32, 80)),
    "qwen3": (3, "gated", "model.layers.0.mlp", "model.layers.0", (32, 80)),
    "phi3": (3, "fused-gated", "model.layers.0.mlp", "model.layers.0", (32, 160)),
    "gpt2": (3, "plain", "transformer.h.0.mlp", "transformer.h.0", (32, 128)),
    "opt": (3, "plain", "model.decoder.layers.0", "model.decoder.layers.0", (32, 80)),
    "bert": (3, "plain", "bert.encoder.layer.0", "bert.encoder.layer.0", (32, 80)),
    "vit": (3, "plain", "vit.layers.0.mlp", "vit.layers.0", (32, 80)),
    "swin": (4, "plain", "swin.encoder.layers.0.blocks.0.mlp", "swin.encoder.layers.0.blocks.0", (16, 64)),
    "dinov2": (3, "plain", "dinov2.encoder.layer.0.mlp", "dinov2.encoder.layer.0", (32, 128)),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_mlp_of_a_family_is_found(family: str) -> None:
    count, kind, name, block, shape = EXPECTED[family]
    model = tiny_model(family)
    located = locate_layers(model)
    assert len(located.sublayers) == count
    first = located.sublayers[0]
    assert (first.kind, first.name, first.block) == (kind, name, block)
    assert (first.sites[0].width, first.sites[0].hidden) == shape
    assert [site.role for site in first.sites] == (["up", "up", "down"] if kind == "gated" else ["up", "down"])
    for site in first.sites:
        layer = model.get_submodule(site.name)
        assert tuple(layer.weight.shape) == site.weight_shape
        assert site.has_bias == (getattr(layer, "bias", None) is not None)
    attention = ("attn", "attention.q", "q_proj", "query")
    assert not [
        site.name for sublayer in located.sublayers for site in sublayer.sites if any(a in site.name for a in attention)
    ]


def test_encoder_and_decoder_are_both_found_and_never_share() -> None:
    fields = {"d_model": 32, "d_ff": 80, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **fields, feed_forward_proj="gated-gelu"))
    groups = group_layers(locate_layers(model).sublayers)
    assert [group.blocks for group in groups] == [
        ("encoder.block.0", "encoder.block.1"),
        ("decoder.block.0", "decoder.block.1"),
    ]
    assert [site.name.rpartition(".")[2] for site in groups[0].sites[:3]] == ["wi_0", "wi_1", "wo"]


def test_fused_experts_whose_code_is_their_own_are_skipped_with_the_reason() -> None:
    with torch.device("meta"):
        fields = {"num_local_experts": 4, "kv_channels": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **{**DECODER, **fields}))
    with pytest.raises(NoMatchError, match=r"4 experts fused in tensors of shape \(4, .*use_experts_implementation"):
        locate_layers(model)


def test_every_expert_of_a_fused_mixture_is_an_mlp_of_its_own() -> None:
    fields = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    with torch.device("meta"):
        config = AutoConfig.for_model("qwen2_moe", **DECODER, **fields, mlp_only_layers=[0])
        model = AutoModelForCausalLM.from_config(config)
    before = dict(model.named_parameters())
    located = locate_layers(model)
    assert {name: id(one) for name, one in model.named_parameters()} == {name: id(one) for name, one in before.items()}
    assert [sublayer.sites[0].hidden for sublayer in located.sublayers] == [80, *[32] * 4, 24, *[32] * 4, 24]
    first = located.sublayers[1]
    assert (first.name, first.block, first.kind) == ("model.layers.1.mlp.experts.0", "model.layers.1", "fused-gated")
    names = [(site.name, site.role.value, site.inputs, site.outputs, len(site.parts)) for site in first.sites]
    assert names == [
        ("model.layers.1.mlp.experts.gate_up_proj.0", "up", 32, 32, 2),
        ("model.layers.1.mlp.experts.down_proj.0", "down", 16, 32, 1),
    ]
    assert {site.mixture for site in first.sites} == {"model.layers.1.mlp.experts"}
    assert not located.skipped
    assert not located.sublayers[5].sites[0].mixture  # the one that all tokens go to


def test_patterns_name_a_mixture_an_expert_or_one_of_its_layers() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **DECODER, num_local_experts=2))
    left = locate_layers(model, ignore=["layers.0.mlp.experts", "experts.1", "*.2.mlp.experts.down_proj.0"])
    assert [sublayer.name for sublayer in left.sublayers] == ["model.layers.1.mlp.experts.0"]
    taken = locate_layers(model, targets=["layers.0.mlp.experts", "layers.1.mlp.experts.down_proj.1"])
    assert [len(sublayer.sites) for sublayer in taken.sublayers] == [4, 1]


def test_an_mlp_outside_a_block_is_skipped_with_the_reason() -> None:
    located = locate_layers(AutoModel.from_config(AutoConfig.for_model("siglip_vision_model", **SMALL)))
    assert [(item.name, item.reason) for item in located.skipped] == [("head.mlp", "it is not inside a repeated block")]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 48), nn.Linear(48, 16)


class MixtureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.experts = nn.ModuleList([Expert(), Expert()])
        self.mlp = Expert()


def test_experts_in_a_list_are_found_beside_the_dense_mlp() -> None:
    located = locate_layers(nn.ModuleDict({"layers": nn.ModuleList([MixtureBlock(), MixtureBlock()])}))
    assert {sublayer.name: sublayer.sites[0].mixture for sublayer in located.sublayers} == {
        f"layers.{block}.{name}": f"layers.{block}.experts" if "experts" in name else ""
        for block in (0, 1)
        for name in ("experts.0", "experts.1", "mlp")
    }
    assert {sublayer.block for sublayer in located.sublayers} == {"layers.0", "layers.1"}


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Linear):
    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(x)


class Renamed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def blocks_with(first: nn.Module) -> nn.Module:
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": first, "fc2": nn.Linear(48, 16)})})
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


@pytest.mark.parametrize("layer", [Doubled(16, 48), Scaled(16, 48, 2.0)])
def test_linear_classes_that_compute_something_else_are_skipped(layer: nn.Module) -> None:
    with pytest.raises(NoMatchError, match=f"its layers are `{type(layer).__name__}`"):
        locate_layers(blocks_with(layer))


@pytest.mark.parametrize("layer", [Renamed(16, 48), Scaled(16, 48)])
def test_linear_classes_that_compute_the_same_are_found(layer: nn.Module) -> None:
    assert len(locate_layers(blocks_with(layer)).sublayers) == 1


def test_targets_replace_the_search_and_may_name_attention() -> None:
    model = tiny_model("llama")
    located = locate_layers(model, targets=["q_proj", "self_attn.o_proj", "layers.1.mlp"])
    names = [site.name.removeprefix("model.layers.") for sublayer in located.sublayers for site in sublayer.sites]
    assert sorted(names) == sorted(
        [f"{i}.self_attn.{p}_proj" for i in range(3) for p in "qo"]
        + [f"1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    )


def test_blocks_have_their_attention_beside_their_mlps() -> None:
    located = locate_layers(tiny_model("llama"), layers="blocks")
    kinds = [(sublayer.name.removeprefix("model.layers."), sublayer.kind) for sublayer in located.sublayers]
    assert kinds == [
        (f"{i}.{name}", kind) for i in range(3) for name, kind in (("self_attn", "attention"), ("mlp", "gated"))
    ]
    assert {len(sublayer.sites) for sublayer in located.sublayers} == {3, 4}


def test_ignore_takes_one_layer_of_attention_and_leaves_the_others() -> None:
    located = locate_layers(tiny_model("llama"), layers="blocks", ignore=["k_proj", "layers.1.self_attn"])
    left = [site.name.split(".")[-1] for sublayer in located.sublayers[:1] for site in sublayer.sites]
    assert left == ["q_proj", "v_proj", "o_proj"]
    assert "model.layers.1.self_attn" not in [sublayer.name for sublayer in located.sublayers]
    assert [item.name for item in located.skipped] == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_low_rank_attention_is_compressed_with_what_lies_between(tmp_path: Path) -> None:
    """Latent attention of DeepSeek: q_b_proj and kv_b_proj neither read nor write the residual stream."""
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        first_k_dense_replace=2, max_position_embeddings=64, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NoMatchError, match="q_b_proj"):
        locate_layers(model, targets=["*q_b_proj"])
    alone = [one for one in locate_layers(model, layers="blocks").sublayers if len(one.sites) == 1]
    assert [one.name.split(".")[-1] for one in alone] == ["q_b_proj", "kv_b_proj"] * 2
    ids = {"input_ids": torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))}
    fips.compress(model, [ids], fips.CompressionConfig(bits=5.0, layers="blocks"))
    assert {name.split(".")[-1] for name in factored_layers(model)} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    fips.save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(fips.load(tmp_path / "m")(**ids).logits, model(**ids).logits)


def test_attention_of_torch_itself_is_left_alone_with_the_reason() -> None:
    """Its output projection is never called: the whole of it is one function of its weights."""
    located = locate_layers(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 48), 2), layers="blocks")
    assert [sublayer.kind for sublayer in located.sublayers] == ["plain", "plain"]
    assert {(item.name, item.reason) for item in located.skipped} == {
        (f"layers.{i}.self_attn.out_proj", "it is `NonDynamicallyQuantizableLinear`, not a plain linear layer")
        for i in range(2)
    }


def test_what_reorders_neurons_takes_mlps_alone() -> None:
    with pytest.raises(ConfigError, match=r"`layers` takes other layers of `model\.layers\.0`"):
        plan_compression(tiny_model("llama"), fips.CompressionConfig(bits=6.0, pattern="block4"))
    with pytest.raises(ConfigError, match="`targets` names the layers"):
        fips.CompressionConfig(bits=6.0, layers="all", targets=["q_proj"])


def test_a_target_that_matches_nothing_shows_the_closest_names() -> None:
    with pytest.raises(
        NoMatchError, match=r"`targets` pattern `mlp\.gate_prj` matched none.*`model\.layers\.0\.mlp\.gate_proj`"
    ):
        locate_layers(tiny_model("llama"), targets=["mlp.gate_prj"])
    with pytest.raises(NoMatchError, match="`ignore` pattern"):
        locate_layers(tiny_model("llama"), ignore=["layers.9.mlp"])


@pytest.mark.parametrize("part", ["model.layers.0", "layers.0"])
def test_a_pattern_that_names_a_part_is_told_one_that_fits_what_is_inside(part: str) -> None:
    with pytest.raises(NoMatchError, match=r"`[^`]*` fits the 8 whose") as refused:
        locate_layers(tiny_model("llama"), ignore=[part])
    told = re.findall(r"`([^`]*)` fits the", str(refused.value))
    layers = {site.name for part in locate_layers(tiny_model("llama"), ignore=told).sublayers for site in part.sites}
    assert layers
    assert not any(name.startswith("model.layers.0.") for name in layers)


@pytest.mark.parametrize("pattern", ["model.layers.1.mlp", "layers.1.mlp", "*.layers.1.*", r"re:layers\.1\."])
def test_ignore_leaves_layers_alone_and_says_so(pattern: str) -> None:
    located = locate_layers(tiny_model("llama"), ignore=[pattern])
    assert [sublayer.name for sublayer in located.sublayers] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert [(item.name, item.reason) for item in located.skipped] == [("model.layers.1.mlp", "matched by `ignore`")]


def test_groups_hold_consecutive_blocks_of_one_width() -> None:
    sublayers = locate_layers(tiny_model("swin", depths=[2, 5])).sublayers
    groups = group_layers(sublayers, share_blocks=3)
    assert [(group.width, len(group.blocks)) for group in groups] == [(16, 2), (32, 3), (32, 2)]
    assert [group.name for group in groups] == ["g0", "g1", "g2"]
    assert groups[1].hidden == 3 * 2 * 128


def test_explicit_groups_count_over_all_blocks() -> None:
    sublayers = locate_layers(tiny_model("swin")).sublayers
    groups = group_layers(sublayers, groups=[[0, 1], [3]])
    assert [group.blocks for group in groups] == [
        ("swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.blocks.1"),
        ("swin.encoder.layers.1.blocks.1",),
    ]


@pytest.mark.parametrize(
    ("groups", "message"),
    [([[0, 9]], "names block 9.*blocks 0 to 3"), ([[0], [0]], "names block 0 twice"), ([[]], "empty list"),
     ([[1, 2]], r"mixes blocks of widths \[16, 32\]")],
)  # fmt: skip
def test_wrong_groups_are_refused(groups: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group_layers(locate_layers(tiny_model("swin")).sublayers, groups=groups)


def described(family: str, *targets: str, **changes: object) -> dict[str, tuple[str, str, str]]:
    """Role, what is read and what is written of the first block's layers, by the last part of their names."""
    model = tiny_model(family, **changes)
    sites = [site for sublayer in locate_layers(model, targets=targets).sublayers[:1] for site in sublayer.sites]
    for site in sites:
        assert tuple(model.get_submodule(site.name).weight.shape) == site.weight_shape
        assert site.width == 32
    read, written = (
        [" ".join(f"{part.space} {part.features}" for part in getattr(site, side)) for site in sites]
        for side in ("reads", "writes")
    )
    names = [".".join(site.name.split(".")[-2:]) for site in sites]
    return dict(zip(names, zip((str(site.role) for site in sites), read, written, strict=True), strict=True))


def readers(prefix: str, names: str, queries: int, keys: int) -> dict[str, tuple[str, str, str]]:
    spaces = zip(names.split(), ("queries", "keys", "values"), (queries, keys, keys), strict=True)
    return {f"{prefix}.{name}": ("up", "residual 32", f"{space} {size}") for name, space, size in spaces}


ATTENTION = {
    "llama": {
        **readers("self_attn", "q_proj k_proj v_proj", 32, 16), "self_attn.o_proj": ("down", "heads 32", "residual 32"),
    },
    "qwen3": {
        **readers("self_attn", "q_proj k_proj v_proj", 64, 32), "self_attn.o_proj": ("down", "heads 64", "residual 32"),
    },
    "opt": {
        **readers("self_attn", "q_proj k_proj v_proj", 32, 32),
        "self_attn.out_proj": ("down", "heads 32", "residual 32"),
    },
    "vit": {
        **readers("attention", "q_proj k_proj v_proj", 32, 32), "attention.o_proj": ("down", "heads 32", "residual 32"),
    },
    "bert": {
        **readers("self", "query key value", 32, 32), "output.dense": ("down", "heads 32", "residual 32"),
    },
    "gpt2": {
        "attn.c_attn": ("up", "residual 32", "queries 32 keys 32 values 32"),
        "attn.c_proj": ("down", "heads 32", "residual 32"),
    },
    "phi3": {
        "self_attn.qkv_proj": ("up", "residual 32", "queries 32 keys 16 values 16"),
        "self_attn.o_proj": ("down", "heads 32", "residual 32"),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_reads_the_residual_stream_and_its_output_projection_writes_it(family: str) -> None:
    assert described(family, r"re:attn\.|attention\.") == ATTENTION[family]


def test_the_layers_of_an_mlp_read_and_write_the_stream_and_its_neurons() -> None:
    assert described("llama", "*.mlp.*") == {
        "mlp.gate_proj": ("up", "residual 32", "hidden 80"),
        "mlp.up_proj": ("up", "residual 32", "hidden 80"),
        "mlp.down_proj": ("down", "hidden 80", "residual 32"),
    }
    assert described("phi3", "*.mlp.*")["mlp.gate_up_proj"] == ("up", "residual 32", "hidden 80 hidden 80")


class OtherAttention(nn.Module):
    """Square layers under names that nobody uses, in a block without an MLP."""

    def __init__(self, names: str = "alpha beta gamma") -> None:
        super().__init__()
        self.num_heads = 2
        for name in names.split():
            setattr(self, name, nn.Linear(16, 16))


def blocks_of(attention: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mixer": attention})])})


def roles_of(model: nn.Module) -> str:
    return " ".join(
        str(site.role) for sublayer in locate_layers(model, targets=["*"]).sublayers for site in sublayer.sites
    )


def test_under_unknown_names_the_last_layer_of_an_attention_module_writes() -> None:
    assert roles_of(blocks_of(OtherAttention())) == "up up down"
    assert roles_of(blocks_of(OtherAttention("alpha out_proj q_proj"))) == "up down up"
    lone = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mixer": nn.Linear(16, 16)})])})
    assert roles_of(lone) == "up"  # outside of attention nothing tells


def test_queries_keys_and_values_mixed_head_by_head_are_not_split() -> None:
    attention = OtherAttention("")
    attention.query_key_value, attention.dense = nn.Linear(16, 48), nn.Linear(16, 16)
    (sublayer,) = locate_layers(blocks_of(attention), targets=["*"]).sublayers
    assert [site.parts for site in sublayer.sites] == [(Part("heads", 48),), (Part("heads", 16),)]


def test_a_layer_between_two_inner_spaces_is_refused() -> None:
    attention = OtherAttention("q_a_proj k_proj v_proj o_proj")
    attention.q_b_proj = nn.Linear(8, 24)
    with pytest.raises(
        NoMatchError, match=r"q_b_proj` \(8 -> 24\), which neither reads nor writes the residual stream"
    ):
        locate_layers(blocks_of(attention), targets=["*"])


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "fips"), ("llama", "gptq"), ("gpt2", "gptq")]
    + [(family, "fips-paper") for family in ("llama", "gpt2", "bert", "vit", "phi3", "qwen3")],
)
@pytest.mark.slow
def test_attention_is_compressed_saved_and_loaded_through_targets(family: str, method: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    batches = batches_for(model)
    size = {"budget": 0.5, "sharing": "always", "values": "int8"} if method == "fips" else {"bits": 6.4}
    quick = {"reconstruction": {"steps": 2}, "precision": "float32"} if method == "fips-paper" else {}
    settings = fips.CompressionConfig(method=method, targets=[r"re:attn\.|attention\."], **size, **quick)
    fips.compress(model, batches, settings)
    roles = {".".join(name.split(".")[-2:]): str(layer.role) for name, layer in factored_layers(model).items()}
    assert roles == {name: role for name, (role, _, _) in ATTENTION[family].items()}
    with torch.no_grad():
        expected = model(**batches[0])[0]
    fips.save(model, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(fips.load(tmp_path / "m")(**batches[0])[0], expected)


def test_a_matrix_and_its_stored_form_are_each_others_inverse() -> None:
    for linear, site in (
        (nn.Linear(3, 5), Site.reader), (nn.Linear(5, 3), Site.writer), (Conv1D(5, 3), Site.reader),
    ):  # fmt: skip
        inputs, outputs = (5, 3) if site == Site.writer else (3, 5)
        place = site(Linear("layer", linear, inputs, outputs))
        assert (place.width, place.hidden, place.inputs, place.outputs) == (3, 5, inputs, outputs)
        matrix_DF = place.matrix(linear.weight)
        assert matrix_DF.shape == (3, 5)
        x = torch.randn(2, inputs)
        wanted = linear(x) - linear.bias
        stored = place.role.to_linear(matrix_DF)
        assert stored.shape == place.role.stored_shape(3, 5) == (outputs, inputs)
        assert torch.allclose(x @ stored.T, wanted, atol=1e-6)
        assert torch.equal(place.role.to_factor(stored), matrix_DF)
        assert matrix_DF.sum(place.role.reduction).shape == (outputs,)
        assert stored.shape[place.role.hidden_axis] == 5


def test_an_unknown_role_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown role 'sideways'; known: up, down"):
        fips.FactoredLinear(None, role="sideways", hidden=4, kept=4, width=4)


def test_the_names_of_roles_are_compared_in_one_place_and_written_by_the_layout_of_files() -> None:
    source = Path(fips.__file__).parent
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(re.sub(r"__slots__ = .*", "", path.read_text())))
        if isinstance(node, ast.Constant) and node.value in ("up", "down")
    }
    assert found == {"models/sites.py", "storage/layout.py"}
