"""Heads of every kind, layers that say nothing, numbers that are not finite, sizes that leave nothing."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import DECODER, SMALL, batches_for, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrObjectDetectionOutput
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput
from transformers.utils import ModelOutput

import fips
from fips.calibration.heads import ScoredHead, draw_direction, read_heads
from fips.calibration.moments import RunningVariance, collect_moments
from fips.errors import BudgetError, ModelError, NoMatchError
from fips.formats.values import integers
from fips.layers.linear import FactoredLinear, factored_layers
from fips.methods.gptq import gptq
from fips.methods.lowrank import shared_whitened_svd, whitened_svd
from fips.methods.pruning import sparsegpt, wanda
from fips.models import locate_layers
from fips.plan.finite import count_bad
from fips.plan.least import round_up
from fips.plan.planner import PLANNERS
from fips.solve.conjugate import conjugate_gradients
from fips.solve.feedback import inverse_root
from fips.solve.problems import LayerProblem
from fips.solve.search import GroupSearch
from fips.solve.structures import Choice, Pricing

METHODS = tuple(PLANNERS)


def settings(**changes: Any) -> fips.CompressionConfig:
    fields = {"bits": 6.4, **changes}
    if "budget" in changes:
        del fields["bits"]
    if fields.get("method") == "fips-paper":
        fields = {"reconstruction": {"steps": 2}, **fields}
    return fips.CompressionConfig(**fields)


def small(family: str, kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, kind)(AutoConfig.for_model(family, **changes)).eval()


def opt(layers: int = 2) -> PreTrainedModel:
    return tiny_model("opt", num_hidden_layers=layers)


def all_finite(model: nn.Module) -> bool:
    return not any(count_bad(tensor) for tensor in model.state_dict().values())


def distance(model: nn.Module, original: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        ours = torch.cat([model(**batch).logits.flatten() for batch in batches])
        theirs = torch.cat([original(**batch).logits.flatten() for batch in batches])
    return float((ours - theirs).norm() / (theirs - theirs.mean()).norm())


# heads


class Fields(nn.Module):
    """A model of which only the configuration matters."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = type("Config", (), fields)()


@dataclasses.dataclass
class Spans(ModelOutput):
    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None


@dataclasses.dataclass
class Logits(ModelOutput):
    logits: Tensor | None = None
    hidden_states: Tensor | None = None


@dataclasses.dataclass
class PocketImageSegmentationOutput(ModelOutput):
    logits: Tensor | None = None
    conditional_embeddings: Tensor | None = None


@dataclasses.dataclass
class Towers(ModelOutput):
    logits_per_image: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclasses.dataclass
class Depth(ModelOutput):
    predicted_depth: Tensor | None = None


BOXES = torch.rand(2, 5, 4)
CASES: list[tuple[Any, dict[str, Any], list[tuple[str, tuple[int, ...]]]]] = [
    (Logits(torch.rand(2, 7, 64)), {}, [("softmax", (2, 7, 64))]),
    (Logits(torch.rand(2, 3)), {}, [("softmax", (2, 3))]),
    (Logits(torch.rand(2, 3)), {"problem_type": "multi_label_classification"}, [("sigmoid", (2, 3))]),
    (Logits(torch.rand(2, 3)), {"problem_type": "regression"}, [("number", (2, 3))]),
    (Logits(torch.rand(2, 1)), {}, [("number", (2, 1))]),
    (Logits(torch.rand(2, 7, 1)), {}, [("number", (2, 7, 1))]),
    (SemanticSegmenterOutput(logits=torch.rand(2, 3, 8, 9)), {}, [("softmax", (2, 8, 9, 3))]),
    (SemanticSegmenterOutput(logits=torch.rand(2, 1, 8, 9)), {}, [("sigmoid", (2, 8, 9, 1))]),
    (PocketImageSegmentationOutput(torch.rand(2, 8, 9), torch.rand(2, 4)), {}, [("sigmoid", (2, 8, 9, 1))]),
    (Spans(None, torch.rand(2, 7), torch.rand(2, 7)), {}, [("softmax", (2, 7))] * 2),
    (DetrObjectDetectionOutput(logits=torch.rand(2, 5, 4), pred_boxes=BOXES), {},
     [("softmax", (2, 5, 4)), ("number", (2, 5, 4))]),
    (DeformableDetrObjectDetectionOutput(logits=torch.rand(2, 5, 4), pred_boxes=BOXES), {"focal_alpha": 0.25},
     [("sigmoid", (2, 5, 4)), ("number", (2, 5, 4))]),
    (Towers(torch.rand(2, 2), torch.rand(2, 16), torch.rand(2, 16)), {}, [("number", (2, 16))] * 2),
    (Depth(torch.rand(2, 8, 9)), {}, [("number", (2, 8, 9))]),
    (Logits(None, torch.rand(2, 7, 32)), {}, [("number", (2, 7, 32))]),
    (torch.rand(2, 9), {}, [("number", (2, 9))]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_output_is_read_for_what_it_stands_for(case: int) -> None:
    output, config, expected = CASES[case]
    found = read_heads(output, Fields(**config))
    assert [(head.kind, tuple(head.scores.shape)) for head in found] == expected
    assert all(head.over_tokens == isinstance(output, Spans) for head in found)


def test_the_class_axis_of_pixels_is_the_second() -> None:
    logits = torch.rand(2, 3, 8, 9)
    (head,) = read_heads(SemanticSegmenterOutput(logits=logits), Fields())
    assert torch.equal(head.scores[1, 4, 5], logits[1, :, 4, 5])


def test_a_classifier_that_returns_a_bare_tensor_is_a_softmax() -> None:
    model = nn.Module()
    model.num_classes = 9
    assert read_heads(torch.rand(2, 9), model)[0].kind == "softmax"
    assert read_heads(torch.rand(2, 5, 9), model)[0].kind == "number"


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "number"])
def test_directions_have_the_covariance_of_the_distribution(kind: Any) -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, 0.0])
    head = ScoredHead(scores.expand(40000, 4), kind)
    found_TV = draw_direction(head, 2.0, torch.Generator().manual_seed(0)).double()
    covariance = found_TV.T @ found_TV / len(found_TV)
    soft, single = (scores.double() / 2).softmax(0), (scores.double() / 2).sigmoid()
    wanted = {
        "softmax": torch.diag(soft) - torch.outer(soft, soft),
        "sigmoid": torch.diag(single * (1 - single)),
        "number": torch.eye(4, dtype=torch.float64),
    }[kind]
    assert (covariance - wanted).abs().max() < 0.02


def test_a_span_is_never_at_padding() -> None:
    choices = torch.ones(3, 6, dtype=torch.bool)
    choices[:, 4:] = False
    head = ScoredHead(torch.randn(3, 6), "softmax", over_tokens=True, choices=choices)
    direction = draw_direction(head, 2.0, torch.Generator().manual_seed(0))
    assert direction[:, 4:].abs().max() == 0
    assert direction[:, :4].abs().min() > 0


@pytest.mark.parametrize(
    ("labels", "problem"), [(1, None), (3, "regression"), (2, None), (5, "multi_label_classification")], ids=str
)
@pytest.mark.slow
def test_heads_of_few_examples_have_gradients_and_are_not_far_behind_gptq(labels: int, problem: str | None) -> None:
    model = small(
        "llama", "LlamaForSequenceClassification", **DECODER, num_labels=labels, problem_type=problem
    )  # fmt: skip
    batches = batches_for(model, count=6)
    sites = [site for sublayer in locate_layers(model).sublayers for site in sublayer.sites]
    model.requires_grad_(False)
    moments = collect_moments(model, sites, batches, lambda m, b: m(**b), temperature=2.0, floor=0.4, seed=0)
    assert all(float(found.gradients_OO.diagonal().sum()) > 0 for found in moments.values())
    errors = {}
    for method in ("fips", "gptq", "magnitude"):
        candidate = copy.deepcopy(model)
        changes = {"sharing": "never"} if method == "fips" else {}
        fips.compress(candidate, batches, settings(method=method, **changes))
        errors[method] = distance(candidate, model, batches)
    assert errors["fips"] < 2 * errors["gptq"]
    assert errors["fips"] < 0.5 * errors["magnitude"]


@pytest.mark.slow
def test_question_answering_is_measured_without_its_padding() -> None:
    model = small("bert", "BertForQuestionAnswering", **SMALL, vocab_size=64)
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    report = fips.compress(model, [{"input_ids": ids, "attention_mask": mask}], settings(sharing="never"))
    assert not [note for note in report.notes if "held out" not in note]
    assert all_finite(model)


def clip() -> PreTrainedModel:
    text = {**SMALL, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    text |= {"bos_token_id": 1, "pad_token_id": 0}
    vision = {**SMALL, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    return small("clip", "CLIPModel", text_config=text, vision_config=vision, projection_dim=16)


def clip_batches(size: int, count: int = 3) -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(3, 64, (size, 16), generator=make),
            "pixel_values": torch.randn(size, 3, 32, 32, generator=make),
        }
        for _ in range(count)
    ]


@pytest.mark.slow
def test_both_towers_count_even_with_one_example_at_a_time() -> None:
    model, original, batches = clip(), clip(), clip_batches(1)
    report = fips.compress(model, batches, settings(sharing="never"))
    assert not report.plan["left_dense"]["layers"]
    assert len(factored_layers(model)) == 24  # two blocks of each tower: four of attention, two of the MLP
    for name in ("text_embeds", "image_embeds"):
        with torch.no_grad():
            ours, theirs = (getattr(one(**batches[0]), name) for one in (model, original))
        assert float((ours - theirs).norm() / theirs.norm()) < 0.3, name


# layers that say nothing


def test_a_head_of_zeros_falls_back_to_the_outputs_of_layers_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, original = opt(), opt()
    for one in (model, original):
        one.lm_head.weight = nn.Parameter(torch.zeros(64, 32))
        one.config.tie_word_embeddings = False
    batches = batches_for(model)
    with caplog.at_level(logging.WARNING, "fips"):
        report = fips.compress(model, batches, settings(sharing="never"))
    assert any("no layer has a gradient" in note for note in report.notes)
    assert any("no layer has a gradient" in record.message for record in caplog.records)
    assert not report.plan["left_dense"]["layers"]
    rounded = copy.deepcopy(original)
    fips.compress(rounded, batches, settings(method="gptq"))
    errors = []
    for one in (model, rounded):
        with torch.no_grad():
            ours, theirs = (m.model(**batches[0]).last_hidden_state for m in (one, original))
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_tower_that_never_runs_is_left_dense_and_the_rest_goes_on(method: str, tmp_path: Path) -> None:
    class TextOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.images = opt(), opt()

        def forward(self, input_ids: Tensor, images: Tensor | None = None) -> Any:
            output = self.words(input_ids=input_ids)
            return output if images is None else self.images(input_ids=images)

    model = TextOnly()
    report = fips.compress(model, batches_for(model.words, count=2), settings(method=method, layers="blocks"))
    assert {name.split(".")[0] for name in factored_layers(model)} == {"words"}
    left = report.plan["left_dense"]
    assert {item["name"].split(".")[0] for item in left["layers"]} == {"images"}
    assert all("never ran" in item["reason"] for item in left["layers"])
    blocks = 2 * (2 * 32 * 80 + 4 * 32 * 32)
    assert left["parameters"] == blocks
    stored = report.plan["layers"]
    assert stored["dense"]["parameters"] == blocks
    assert stored["factored"]["bytes"] <= 0.4 * 2 * stored["dense"]["parameters"] + 8 * len(factored_layers(model))
    assert fips.CompressionReport.from_dict(report.to_dict()).to_dict() == report.to_dict()


@pytest.mark.slow
def test_layers_that_run_in_later_batches_only_are_compressed() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.images = opt(), opt()

        def forward(self, input_ids: Tensor | None = None, images: Tensor | None = None) -> Any:
            return self.words(input_ids=input_ids) if images is None else self.images(input_ids=images)

    for method in ("fips", "magnitude", "gptq", "fips-paper"):
        model = Sometimes()
        text = batches_for(model.words, count=18, batch=1)
        batches = [*text, *({"images": batch["input_ids"]} for batch in text[:2])]
        report = fips.compress(model, batches, settings(method=method, layers="mlp", share_blocks=1))
        assert len(factored_layers(model)) == 8, method
        assert all(math.isfinite(group["relative_error_final"]) for group in report.groups), method


class Block(nn.Module):
    """A block of a plain model, with a hidden layer that may be dead."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


def chain(blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).eval()


def inputs(count: int = 3) -> list[Tensor]:
    return [torch.randn(8, 16, generator=torch.Generator().manual_seed(index)) for index in range(count)]


def test_layers_without_influence_are_left_dense_within_their_group() -> None:
    model = chain()
    model[1].fc2.weight.data.zero_()
    report = fips.compress(model, inputs(), settings(sharing="never"))
    reasons = {item["name"]: item["reason"] for item in report.plan["left_dense"]["layers"]}
    assert reasons.keys() == {"1.fc1"}
    assert "no influence" in reasons["1.fc1"]
    assert set(factored_layers(model)) == {"0.fc1", "0.fc2", "1.fc2", "2.fc1", "2.fc2"}
    model = chain()
    model[1].fc1.bias.data.fill_(-1e3)
    report = fips.compress(model, inputs(), settings(sharing="never"))
    reasons = {item["name"]: item["reason"] for item in report.plan["left_dense"]["layers"]}
    assert reasons.keys() == {"1.fc1", "1.fc2"}
    assert "nothing but zeros" in reasons["1.fc2"]


def test_blocks_of_neighbours_leave_the_whole_mlp_dense() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain()
            self.body[1].fc1.bias.data.fill_(-1e3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model, original = Holder(), Holder()
    model.body[1].fc2.bias.data.fill_(0.5)
    original.body[1].fc2.bias.data.fill_(0.5)
    report = fips.compress(model, inputs(), settings(pattern="block4", values="float", bits=14.4))
    assert {item["name"] for item in report.plan["left_dense"]["layers"]} == {"body.1.fc1", "body.1.fc2"}
    with torch.no_grad():
        ours, theirs = (one(inputs()[0]) for one in (model, original))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.1


@pytest.mark.parametrize("pattern", ["block4", "unstructured"])
def test_only_blocks_of_neighbours_need_the_whole_mlp(pattern: str) -> None:
    model = chain()
    model[1].fc2.weight.data.zero_()
    report = fips.compress(model, inputs(), settings(pattern=pattern, values="float", bits=14.4))
    left = {item["name"]: item["reason"] for item in report.plan["left_dense"]["layers"]}
    assert left.keys() == ({"1.fc1", "1.fc2"} if pattern == "block4" else {"1.fc1"})


def test_the_last_block_whose_output_is_not_read_is_left_dense_where_gradients_are_measured() -> None:
    class LastButOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            states = [x]
            for block in self.blocks:
                states.append(block(states[-1]))
            return states[-2]

    torch.manual_seed(0)
    report = fips.compress(LastButOne().eval(), inputs(), settings())
    reasons = {item["name"]: item["reason"] for item in report.plan["left_dense"]["layers"]}
    assert reasons.keys() == {"blocks.2.fc1", "blocks.2.fc2"}
    assert all("does not reach" in reason for reason in reasons.values())
    for method in ("gptq", "basis-sharing"):
        model = LastButOne().eval()
        fips.compress(model, inputs(), settings(method=method))
        assert len(factored_layers(model)) == 6, method


def test_one_error_where_nothing_is_left() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    for method in METHODS:
        with pytest.raises(NoMatchError, match="none of the 4 layers can be compressed on this calibration data"):
            fips.compress(Idle(), inputs(), settings(method=method))


def test_a_projector_of_zeros_leaves_what_is_before_it_dense() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = chain(2)
            self.projector = nn.Linear(16, 16, bias=False)
            self.language = chain(2)
            self.projector.weight.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.language(x + self.projector(self.vision(x)))

    model = Projected().eval()
    report = fips.compress(model, inputs(), settings(sharing="never"))
    assert {name.split(".")[0] for name in factored_layers(model)} == {"language"}
    assert len(report.plan["left_dense"]["layers"]) == 4
    assert not [note for note in report.notes if "held out" not in note]


# degenerate data and weights


def half_dead(model: PreTrainedModel) -> None:
    model.model.decoder.layers[0].fc1.bias.data[:40] = -100


def all_dead(model: PreTrainedModel) -> None:
    model.model.decoder.layers[0].fc1.bias.data[:] = -100


def zero_layer(model: PreTrainedModel) -> None:
    model.model.decoder.layers[0].fc1.weight.data.zero_()
    model.model.decoder.layers[0].fc2.weight.data.zero_()


def rank_one(model: PreTrainedModel) -> None:
    weight = model.model.decoder.layers[0].fc1.weight
    weight.data = torch.outer(torch.randn(80), torch.randn(32))


def nothing(_: PreTrainedModel) -> None:
    pass


DEGENERATE: list[tuple[Callable[[PreTrainedModel], None], str]] = [
    (half_dead, "plenty"), (all_dead, "plenty"), (zero_layer, "plenty"), (rank_one, "plenty"),
    (nothing, "one token"), (nothing, "identical"),
]  # fmt: skip
DATA = {
    "plenty": lambda model: batches_for(model, count=2),
    "one token": lambda model: [{"input_ids": torch.tensor([[5]])}],
    "identical": lambda model: [{"input_ids": torch.full((2, 8), 5)}] * 2,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_gives_finite_weights_on_degenerate_layers_and_data(method: str) -> None:
    for damage, data in DEGENERATE:
        model = opt()
        damage(model)
        batches = DATA[data](model)
        original = copy.deepcopy(model)
        report = fips.compress(model, batches, settings(method=method, layers="mlp", share_blocks=1))
        case = f"{damage.__name__}, {data}"
        assert all_finite(model), case
        assert factored_layers(model), case
        assert all(math.isfinite(group["relative_error_final"]) for group in report.groups), case
        assert distance(model, original, batches) < 1.2, case


@pytest.mark.parametrize(
    "moment", [torch.zeros(24, 24), torch.diag(torch.eye(24)[3]), torch.ones(24, 24)], ids=["zero", "one", "equal"]
)
def test_published_methods_take_any_moment(moment: Tensor) -> None:
    weight = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    basis, (factor,) = shared_whitened_svd([weight.T.contiguous()], moment, rank=5)
    codes, steps, _ = gptq(weight, moment, values=integers(4), dtype=torch.float32)
    found = {
        "gptq": codes * steps.unsqueeze(1),
        "sparsegpt": sparsegpt(weight, moment, density=0.5)[0],
        "wanda": wanda(weight, moment, density=0.5)[0],
        "down": torch.matmul(*whitened_svd(weight, moment, reads_stream=False, rank=5)),
        "up": (basis @ factor).T,
    }
    for name, approximation in found.items():
        assert bool(approximation.isfinite().all()), name
        if not bool(moment.any()):  # then they are what they are without data, which is close to the matrix
            assert float((approximation - weight).norm() / weight.norm()) < 0.75, name


def test_conjugate_gradients_end_where_the_operator_is_zero() -> None:
    start, residual = torch.zeros(3), torch.ones(3)
    found = conjugate_gradients(lambda x: 0 * x, start, residual, iterations=5, enough=torch.zeros(()))
    assert torch.equal(found, start)


def test_a_search_of_a_matrix_that_costs_nothing_divides_by_nothing() -> None:
    problem = LayerProblem(torch.zeros(16, 48), torch.eye(16), torch.eye(48))
    search = GroupSearch([problem], [0], Pricing(value=2.0, basis_entry=2.0))
    size = 0.6 * search.dense_bytes(Choice(False, "unstructured"))
    assert search.first_ratio(Choice(True, "unstructured"), 3 * size) == math.inf
    assert [point.loss for point in search.trials([Choice(False, "unstructured")], size)] == [0.0] * 4
    _, share = problem.sample(0, 12)
    assert share == 12 / 48


def test_the_scale_of_a_constant_is_its_square() -> None:
    constant, zero = RunningVariance(), RunningVariance()
    constant.add(torch.full((7,), 3.0))
    zero.add(torch.zeros(7))
    assert constant.scale == pytest.approx(9.0)
    assert zero.scale == 1.0


# NaN and infinity


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_weight_is_found_before_any_pass_and_named(method: str, bad: float) -> None:
    model = opt()
    model.model.decoder.layers[1].self_attn.q_proj.weight.data[3, :5] = bad

    def stop(*_: Any) -> None:
        raise AssertionError("a pass was made")

    model.register_forward_pre_hook(stop)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.weight` \(float32\) holds 5 of 1024") as error:
        fips.compress(model, batches_for(model), settings(method=method))
    assert "bfloat16" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_overflow_is_named_by_module_and_blames_the_real_type(dtype: torch.dtype) -> None:
    model = chain().to(dtype)
    model[1].fc2.weight.data.fill_(torch.finfo(dtype).max / 2)
    batches = [batch.to(dtype) for batch in inputs()]
    with pytest.raises(ModelError, match=r"`1\.fc2` \(Linear\) returns is not finite") as error:
        fips.compress(model, batches, settings())
    assert ("load the model in bfloat16" in str(error.value)) == (dtype == torch.float16)
    assert ("is in float32" in str(error.value)) == (dtype == torch.float32)
    assert not factored_layers(model)


def test_an_overflow_in_a_later_batch_is_found_too() -> None:
    model = chain()
    batches = [*inputs(), torch.full((8, 16), 3e38)]
    with pytest.raises(ModelError, match="is not finite"):
        fips.compress(model, batches, settings())


def test_a_weight_beyond_the_storage_type_is_refused_before_any_pass() -> None:
    model = chain()
    model[2].fc1.weight.data[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"`2\.fc1` holds 1e\+06, but float16 ends at 65504"):
        fips.compress(model, inputs(), settings(factor_dtype="float16"))


@pytest.mark.parametrize("method", ["fips", "gptq"])
def test_what_a_method_spoils_is_caught_before_the_model_is_changed(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FactoredLinear.from_integers.__func__  # type: ignore[attr-defined]

    def spoil(cls: type[FactoredLinear], *args: Any, **kwargs: Any) -> FactoredLinear:
        layer: FactoredLinear = original(cls, *args, **kwargs)
        layer.scales[0] = math.nan
        return layer

    monkeypatch.setattr(FactoredLinear, "from_integers", classmethod(spoil))
    model = chain()
    with pytest.raises(ModelError, match=rf"`method: {method}` made 1 of 64 entries of `0\.fc1` \(scales\) NaN"):
        fips.compress(model, inputs(), settings(method=method))
    assert not factored_layers(model)


@pytest.mark.parametrize("where", ["embed", "scales", "bias"])
def test_a_model_with_nan_is_not_saved(where: str, tmp_path: Path) -> None:
    model = opt()
    fips.compress(model, batches_for(model), settings(method="gptq"))
    layer = next(iter(factored_layers(model).values()))
    tensor = {"embed": model.get_input_embeddings().weight, "scales": layer.scales, "bias": layer.bias}[where]
    tensor.data.view(-1)[0] = math.nan
    with pytest.raises(ModelError, match=r"holds 1 of \d+ entries that are NaN or infinite.*cannot be saved"):
        fips.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# sizes


VARIANTS: list[dict[str, Any]] = [
    {"method": "fips"}, {"method": "fips", "pattern": "2:16"}, {"method": "fips", "pattern": "block4"},
    {"method": "fips", "values": "float", "sharing": "never"}, {"method": "fips", "values": "int4"},
    {"method": "fips", "sharing": "always"}, {"method": "fips-paper"}, {"method": "fips-paper", "pattern": "2:4"},
    {"method": "fips-paper", "sparsity": 0.9}, *({"method": method} for method in METHODS if method[:4] != "fips"),
    {"method": "wanda", "values": "int4"},
]  # fmt: skip


@pytest.mark.parametrize("setting", ["budget", "bits"])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.slow
def test_the_smallest_size_named_is_accepted_and_leaves_no_matrix_empty(fields: dict[str, Any], setting: str) -> None:
    if fields["method"] == "gptq" and setting == "budget":
        pytest.skip("gptq takes no budget")
    model = tiny_model("opt", num_hidden_layers=1)
    batches = batches_for(model, count=1)

    def stop(*_: Any) -> None:
        raise AssertionError("a pass was made")

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(BudgetError, match=f"the smallest `{setting}` for these settings is") as error:
        fips.compress(model, batches, settings(layers="mlp", **fields, **{setting: 1e-4}))
    least = float(str(error.value).rsplit(" ", 1)[1])
    with pytest.raises(BudgetError, match="the smallest"):
        fips.compress(model, batches, settings(layers="mlp", **fields, **{setting: 0.97 * least}))
    handle.remove()
    report = fips.compress(model, batches, settings(layers="mlp", **fields, **{setting: least}))
    layers = factored_layers(model).values()
    assert len(layers) == 2
    if fields.get("sharing") == "always" or fields["method"] == "fips-paper":  # one threshold for all layers
        assert sum(layer.kept for layer in layers) >= sum(layer.hidden for layer in layers)
    else:
        assert all(layer.kept >= max(layer.factor_shape) for layer in layers)
    stored = report.plan["layers"]
    if setting == "budget":
        assert stored["factored"]["parameters"] <= least * stored["dense"]["parameters"] + 1
    else:
        assert 8 * stored["factored"]["bytes"] <= least * stored["dense"]["parameters"] + 32


def test_layers_that_are_sampled_keep_their_least_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fips.solve.search.SAMPLE", 24)
    model = chain(1)
    with pytest.raises(BudgetError) as error:
        fips.compress(model, inputs(), settings(bits=1e-3))
    least = float(str(error.value).rsplit(" ", 1)[1])
    fips.compress(model, inputs(), settings(bits=least))
    assert all(layer.kept >= max(layer.factor_shape) for layer in factored_layers(model).values())


@pytest.mark.parametrize("value", [0.02343750001, 0.1, 3e-5, 0.9996, 0.12345, 1.0])
def test_rounding_up_never_rounds_down(value: float) -> None:
    assert value <= float(round_up(value)) <= value * 1.0101


def test_where_even_everything_is_too_small_the_error_says_so() -> None:
    model = nn.Sequential(*(Block() for _ in range(2)))
    for block in model:
        block.norm, block.fc1, block.fc2 = nn.LayerNorm(1), nn.Linear(1, 2), nn.Linear(2, 1)
    with pytest.raises(BudgetError, match="so is 16, the most there is"):
        fips.compress(model, [torch.randn(4, 1)], settings(method="svd", bits=16.0))


def test_blocks_of_neighbours_need_whole_mlps() -> None:
    with pytest.raises(fips.FipsError, match=r"reorders the hidden neurons of whole MLPs, but `targets` takes other"):
        fips.compress(chain(), inputs(), settings(pattern="block4", targets=["fc1"]))
    fips.compress(chain(), inputs(), settings(pattern="block4", targets=["fc1", "fc2"], bits=11.2))


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_activations_whose_squares_leave_float32_end(effort: str, llama: PreTrainedModel) -> None:
    """The spread of the moments of parts came out as NaN, and damping was raised for ever."""
    for part in (llama.model.layers[0].mlp.up_proj, llama.model.layers[0].mlp.gate_proj):
        part.weight.data *= 1e6
    fips.compress(llama, batches_for(llama), settings(effort=effort))
    weight = llama.model.layers[0].mlp.down_proj.dense_weight()
    assert bool(weight.isfinite().all())
    assert bool(weight.any())


def test_a_metric_without_an_inverse_is_an_error_whatever_the_damping() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        inverse_root(-torch.eye(4), math.nan)
