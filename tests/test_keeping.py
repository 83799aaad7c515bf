"""Groups that are finished are kept: a run that was ended goes on behind them and ends with the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches_for, tiny_model
from torch import Tensor

import fips
from fips.errors import OutputError
from fips.storage.work import WorkDirectory

TRAINED = {"reconstruction": {"steps": 3}, "precision": "float32"}


class Ended(Exception):  # noqa: N818 - stands for a signal
    pass


def run(settings: Mapping[str, Any], work: Path | None) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors of a compressed model and what the report says of its groups, but for times, and notes."""
    model = tiny_model("llama")
    report = fips.compress(model, batches_for(model), fips.CompressionConfig(share_blocks=1, **settings), work=work)
    groups = [{key: value for key, value in group.items() if "seconds" not in key} for group in report.groups]
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, [*groups, *report.notes]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fips-paper", "budget": 0.5, **TRAINED},
        {"method": "svd-llm", "bits": 8.0},
        {"method": "svd", "bits": 8.0},
        {"method": "basis-sharing", "bits": 8.0},
        {"effort": "max", "bits": 4.5, "layers": "mlp"},
        {"sharing": "always", "bits": 8.0, "layers": "mlp", "values": "int8"},
        {"bits": 4.5, **TRAINED},
        {"bits": 4.5, "effort": "fast", **TRAINED},
        {"bits": 8.5, "reconstruction": {"steps": 2, "learning_rate": 10.0}, "precision": "float32"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values() if isinstance(value, str | float)),
)
def test_a_run_that_was_ended_goes_on_behind_the_groups_that_are_finished(
    settings: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, groups = run(settings, None)
    put = WorkDirectory.put
    finished: list[str] = []

    def keep(self: WorkDirectory, name: str, *made: Any) -> None:
        put(self, name, *made)
        if name.startswith("group-"):
            finished.append(name)
            if len(finished) == 1:
                raise Ended

    monkeypatch.setattr(WorkDirectory, "put", keep)
    with pytest.raises(Ended):
        run(settings, tmp_path / "work")
    assert finished == ["group-g0"]
    found, again = run(settings, tmp_path / "work")
    assert finished == ["group-g0", "group-g1", "group-g2"]
    assert again == groups
    if settings.get("reconstruction", {}).get("learning_rate", 0) > 1:
        assert sum("made the errors of `g0` no smaller" in str(note) for note in again) == 1
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_pieces_that_earlier_versions_kept_without_notes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"bits": 4.5, "effort": "max", "layers": "mlp"}
    put = WorkDirectory.put

    def without_notes(self: WorkDirectory, name: str, tensors: Any, fields: Any) -> None:
        put(self, name, tensors, {key: value for key, value in fields.items() if key != "notes"})

    monkeypatch.setattr(WorkDirectory, "put", without_notes)
    expected, groups = run(settings, tmp_path / "work")
    found, again = run(settings, tmp_path / "work")
    assert again == groups
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_what_is_trained_as_a_whole_keeps_its_trials(tmp_path: Path) -> None:
    settings = {"bits": 4.5, "effort": "max", "distill": {"steps": 2}}
    expected, _ = run(settings, tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").glob("*.safetensors")) == [
        f"try-g{index}.safetensors" for index in range(3)
    ]
    found, _ = run(settings, tmp_path / "work")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(OutputError, match="other settings"):
        run({**settings, "bits": 4.6}, tmp_path / "work")
