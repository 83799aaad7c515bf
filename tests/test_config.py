"""Settings refuse what they do not know, in one readable line; the shipped recipes plan their real models."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from fips.app.compare import method_config
from fips.app.compressing import plan_source
from fips.app.tables import format_bytes
from fips.config import CompressionConfig, DataConfig, Recipe
from fips.errors import ConfigError
from fips.formats.values import automatic_values
from fips.methods.gptq import GptqConfig
from fips.recipes import load_recipe, recipe_names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, r"`budget`.*greater than 0, got 0"),
        ({"budget": 1.5}, r"`budget`.*less than or equal to 1, got 1.5"),
        ({}, r"one of `bits` .*, `size` .* and `budget` .*, got none"),
        ({"budget": 0.5, "bits": 8.0}, r"got bits and budget"),
        ({"budget": 0.5, "sparsity": 0.5}, r"`sparsity` belongs to `method: fips-paper`, not to `method: fips`"),
        ({"budget": 0.5, "schedule": "gmp"}, r"starts from dense factors"),
        ({"budget": 0.5, "schedule": "rigl", "pattern": "block4"}, r"needs `pattern: unstructured`"),
        (
            {"budget": 0.5, "method": "svd", "values": "int8"},
            r"`values` belongs to `method: fips` and .*`method: wanda`.*, not to `method: svd`",
        ),
        ({"budget": 0.5, "method": "magnitud"}, r"`method`: there is no `magnitud`; did you mean `magnitude`\?.*gptq"),
        ({"budget": 0.5, "method": "fips-shrd"}, r"`method`: there is no `fips-shrd`; did you mean `fips-shared`\?"),
        ({"budget": 0.5, "method": ["fips"]}, r"`method`: there is no"),
        (
            {"bits": 8.0, "method": "gptq", "reconstruction": {"steps": 1}},
            r"`reconstruction` belongs to `method: fips` and `method: fips-paper`",
        ),
        ({"budget": 0.5, "activation_bits": 8}, r"`activation_bits` goes with integer `values`"),
        ({"bits": 8.0, "activation_bits": 4}, r"`activation_bits`.*8"),
        ({"budget": 0.5, "method": "wanda", "distill": {"steps": 3}}, r"`distill` belongs to `method: fips`"),
        ({"budget": 0.5, "method": "fips-paper", "sharing": "never"}, r"`sharing` belongs to `method: fips`"),
        ({"budget": 0.5, "method": "sparsegpt", "sparsity": 0.5}, r"`sparsity` belongs to `method: fips-paper`"),
        ({"budget": 0.5, "method": "wanda", "pattern": "2:4"}, r"`pattern` belongs to `method: fips` and"),
        ({"budget": 0.5, "method": "wanda", "values": "auto"}, r"`values`.*unknown value format 'auto'.*int4"),
        (
            {"budget": 0.5, "sparsty": 1},
            r"unknown field `sparsty` of `method: fips`; did you mean `sparsity`\?.*known fields: .*sharing",
        ),
        (
            {"budget": 0.5, "reconstruction": {"step": 1}},
            r"unknown field `step` in ReconstructionConfig; did you mean `steps`",
        ),
        (
            {"bits": 5, "groups": ()},
            r"`groups` wants at least one group of .*got \[\]; leave it",
        ),
        ({"bits": 5, "groups": [[0], []]}, r"`groups` wants at least one group.*got \[\[0\], \[\]\]"),
        ({"bits": 5, "seed": 2**64}, r"`seed`: Input should be less than 18446744073709551616"),
        ({"bits": 5, "reconstruction": {"learning_rate": float("inf")}}, r"`learning_rate`: .*finite number, got inf"),
        ({"bits": 5, "activation_memory": "1,5GiB"}, r"`activation_memory`: wants a size such as 6GiB, got '1,5GiB'"),
        ({"bits": 5, "activation_memory": "5 furlongs"}, r"^`activation_memory`: wants a size such as 6GiB, got '5 f"),
        ({"bits": 5, "activation_memory": "5 5"}, r"`activation_memory`: wants a size such as 6GiB"),
        ({"bits": 5, "activation_memory": "9" * 400}, r"`activation_memory`: wants a size such as 6GiB"),
        ({"bits": 5, "metric": {"memory": -1}}, r"`memory`: .*greater than or equal to 0, got -1"),
        ({"size": "9" * 400}, r"`size`: wants bytes"),
        ({"bits": 5, "self": 1, "cls": 2}, r"unknown field `self` .*unknown field `cls`"),
        ({"budget": 0.5, "pattern": "4-16"}, r"`pattern`"),
        ({"budget": 0.5, "pattern": "8:4"}, r"0 < N < M"),
        ({"budget": 0.5, "method": "fips-paper", "pattern": "4:16", "sparsity": 0.5}, r"contradicts `pattern`"),
        ({"budget": 0.5, "pattern": "4:16", "schedule": "rigl"}, r"needs `pattern: unstructured`"),
    ],
)
def test_wrong_settings_are_one_clear_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        CompressionConfig(**fields)
    assert "\n" not in str(error.value)


def test_settings_are_frozen_and_replaced_with_validation() -> None:
    config = CompressionConfig(budget=0.5)
    with pytest.raises(Exception, match="frozen"):
        config.budget = 0.6  # type: ignore[misc]
    assert config.replace(budget=0.25).budget == 0.25
    with pytest.raises(ConfigError):
        config.replace(budget=7)


def test_settings_are_of_the_class_of_their_method() -> None:
    for config in (CompressionConfig(bits=4.8, method="gptq"), GptqConfig(bits=4.8)):
        assert type(config) is GptqConfig
        assert config.method == "gptq"
        assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    with pytest.raises(ConfigError, match="`method`"):
        GptqConfig(bits=4.8, method="wanda")
    text = "compression: {method: gptq, bits: 4.8, metric: {memory: 1GiB}}"
    recipe = Recipe.from_yaml(text, name="r")
    assert type(recipe.compression) is GptqConfig
    assert Recipe.from_yaml(recipe.to_yaml(), name="r") == recipe


def test_another_method_takes_over_the_settings_that_it_has_too() -> None:
    fields = {
        "sharing": "never",
        "seed": 3,
        "metric": {"memory": 5, "token_floor": 0.1},
        "reconstruction": {"steps": 2},
    }
    config = CompressionConfig(bits=6.4, **fields)
    other = config.replace(method="gptq")
    assert type(other) is GptqConfig
    assert (other.bits, other.seed, other.metric.memory) == (6.4, 3, 5)
    paper = config.replace(method="fips-paper")
    assert (paper.reconstruction.steps, paper.reconstruction.learning_rate) == (2, 4e-4)
    assert config.replace(seed=4).sharing == "never"
    with pytest.raises(ConfigError, match=r"`sharing` belongs to `method: fips`, not to `method: gptq`"):
        config.replace(method="gptq", sharing="always")


def test_sparsity_follows_the_pattern() -> None:
    assert CompressionConfig(method="fips-paper", budget=0.5).factor_sparsity == 0.75
    assert CompressionConfig(method="fips-paper", budget=0.5, pattern="2:4").factor_sparsity == 0.5
    assert CompressionConfig(method="fips-paper", budget=0.5, sparsity=0.0).factor_sparsity == 0.0


def test_defaults_follow_the_method() -> None:
    paper, ours = CompressionConfig(method="fips-paper", budget=0.5), CompressionConfig(bits=8.0)
    assert (paper.pattern, paper.schedule, paper.reconstruction.steps) == ("unstructured", "gmp", 600)
    assert (ours.method, ours.pattern, ours.schedule, ours.reconstruction.steps) == ("fips", "auto", "static", 0)
    assert ours.value_choices == automatic_values(coded=False)
    assert [one.name for one in CompressionConfig(budget=0.5).value_choices] == ["float"]
    assert CompressionConfig(bits=8.0, schedule="rigl").resolved_pattern == "unstructured"


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_its_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_yaml(recipe.to_yaml(), name=name) == recipe


def test_sharing_has_the_same_settings_as_a_recipe_and_in_comparisons() -> None:
    recipe, alias = load_recipe("fips-shared").compression, method_config("fips-shared", bits=4.8, seed=0)
    assert recipe.reconstruction.steps > 0
    assert alias.reconstruction.steps == 0
    assert recipe.replace(reconstruction={}) == alias
    assert (alias.sharing, alias.effort, alias.share_blocks) == ("always", "max", 4)
    assert CompressionConfig(method="gptq", bits=4.8).replace(method="fips-shared") == alias.replace(layers="blocks")
    assert Recipe.from_yaml("compression: {method: fips-shared, bits: 4.8}", name="r").compression == alias


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compression: {budget: 0.5}\nmodle: x", r"recipe `r`: unknown field `modle` in Recipe; did you mean `model`"),
        ("compression: {budget: 0.5, stepz: 1}", r"recipe `r`: unknown field `stepz` of `method: fips`"),
        ("compression: [", r"recipe `r` is not valid YAML"),
        ("- 1", r"recipe `r` must be a mapping"),
    ],
)
def test_wrong_recipes_name_the_recipe_and_the_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Recipe.from_yaml(text, name="r")
    assert "\n" not in str(error.value)


def test_recipes_that_earlier_versions_wrote_are_read() -> None:
    """They hold the settings of all methods."""
    text = (
        "compression: {budget: 0.6, method: fips-paper, sharing: auto, metric: {temperature: 2.0}, growth_tau: 16.0,"
        " distill: {steps: 0}, threshold: layer, ignore: [], calibration: {steps: 3, precision: float32}, seed: 1}"
    )
    wanted = CompressionConfig(
        budget=0.6, method="fips-paper", growth_tau=16.0, threshold_scope="layer", seed=1,
        reconstruction={"steps": 3}, precision="float32",
    )  # fmt: skip
    assert Recipe.from_yaml(text, name="r").compression == wanted


def test_an_unknown_recipe_shows_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"no recipe `paper-deit`; did you mean `paper-deit-b`\?"):
        load_recipe("paper-deit")


def test_data_settings_need_a_source() -> None:
    with pytest.raises(ConfigError, match="`source` is required"):
        DataConfig()


# Parameters of the published models, and the ranks of the formula floor(b d P / (d + (1 - s) P)) at b = .5, s = .75.
PAPER_MODELS = {
    "paper-deit-b": (86_567_656, [4, 4, 4], [1365] * 3),
    "paper-swin-l": (196_532_476, [2, 2, 6, 6, 6, 2], [307, 614, 1417, 1417, 1417, 2457]),
    "paper-gemma-2-2b": (2_614_341_888, [2, 8, 8, 8], [3949, 4423, 4423, 4423]),
    "paper-gemma-2-9b": (9_241_705_984, [2, 8, 8, 8, 8, 8], [6144, 6881, 6881, 6881, 6881, 6881]),
    "paper-llama-3.2-1b": (1_235_814_400, [4] * 4, [3780] * 4),
    "paper-llama-3.1-8b": (8_030_261_248, [4] * 8, [7479] * 8),
}


def test_every_paper_recipe_is_checked() -> None:
    assert {name for name in recipe_names() if re.match(r"paper-", name)} == set(PAPER_MODELS)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_paper_recipes_plan_their_real_models(name: str) -> None:
    parameters, sizes, ranks = PAPER_MODELS[name]
    recipe = load_recipe(name)
    _, plan = plan_source(None, recipe)
    assert plan.model_parameters == parameters
    assert [len(group.group.blocks) for group in plan.groups] == sizes
    assert [group.rank for group in plan.groups] == ranks
    assert 0.499 < plan.factored.parameters / plan.dense.parameters <= 0.5
    itemsize = 2 if "gemma" in name or "llama" in name else 4
    assert plan.dense.bytes == plan.dense.parameters * itemsize
    mask_bytes = sum(-(-group.rank * site.hidden // 8) for group in plan.groups for site in group.group.sites)
    assert plan.factored.bytes == plan.factored.parameters * itemsize + mask_bytes
    assert plan.skipped == ()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (22_252_064, "22.3 MB"), (999_499, "999 kB"), (999_600, "1.00 MB"),
     (16_060_522_496, "16.1 GB"), (5_000_000_000_000, "5000 GB")],
)  # fmt: skip
def test_sizes_are_written_with_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", r"is not UTF-8 text \(byte 0\); write it anew in that encoding"),
        (b"compression: {bits: 2024-13-45}", "is not valid YAML: month must be in 1..12"),
        (b"compression: " + b"[" * 5000, "is not valid YAML: maximum recursion depth"),
        (b"self: 1\ncompression: {bits: 5}", "unknown field `self` in Recipe"),
    ],
    ids=["encoding", "date", "depth", "self"],
)
def test_files_that_are_no_recipes_are_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_recipe(str(path))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"cannot read recipe .*: Is a directory"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptq+metric=[", "wanted `field=value`, a value as in YAML, got `metric=\\["),
        ("gptq+metric=2024-13-45", "a value as in YAML"),
        ("gptq+bits.x=1", "`bits` has no fields, got `bits.x=1`"),
        ("gptq+bits=4", "`bits` is given for all methods alike, by the sizes"),
        ("gptq+seed=7", "`seed` is given for all methods alike, by the seeds"),
        ("gptq+method=rtn", "`method` is given for all methods alike, as its name"),
    ],
)
def test_changes_of_a_method_that_are_none_are_refused(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_config(method, bits=5, seed=0)
