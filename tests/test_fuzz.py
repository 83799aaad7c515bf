"""A sample of the fuzzer of directories, see ``fuzz_directories``; and that it sees what it looks for."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import fuzz_directories
import pytest
from fuzz_directories import LOADERS, Plan, attempt, fuzz, outcomes

SAMPLE = 120
FIXTURE = Path(__file__).parent / "fixtures" / "format-1-bitmask"


@pytest.mark.slow
def test_no_damage_of_a_sample_is_a_fault() -> None:
    result = fuzz(range(SAMPLE), seed=7)
    assert result["faults"] == []
    seen = result["outcomes"]["load"]
    assert sum(seen.values()) == SAMPLE
    assert seen["CheckpointError"] > SAMPLE // 2
    assert seen["same model"] > 0
    assert seen["another model"] > 0  # strangers may write other models, with a manifest that agrees


def _die(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep(_: Path) -> None:
    time.sleep(60)


def _hoard(_: Path) -> None:
    bytearray(b"x" * (256 << 20))
    raise fuzz_directories.fips.FipsError("what was asked for is too large")


def _stumble(_: Path) -> None:
    raise KeyError("nonzeros")


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        (_die, "crash: SIGKILL"),
        (_sleep, "no answer for 1 s"),
        (_hoard, "memory"),
        (_stumble, "foreign: KeyError at test_fuzz.py:"),
    ],
)
@pytest.mark.slow
def test_a_fault_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: Callable[[Path], None], name: str
) -> None:
    monkeypatch.setitem(LOADERS, "load", loader)  # type: ignore[arg-type]
    monkeypatch.setattr(fuzz_directories, "MEMORY_BYTES", 32 << 20)
    if loader is _sleep:
        monkeypatch.setattr(fuzz_directories, "HANG_S", 1.0)
    plan = Plan(0, [FIXTURE], {(FIXTURE.name, "load"): "nothing"}, ["load"], tmp_path)
    freed = [bytes(100_000) for _ in range(6000)]
    del freed[:-1]  # the last keeps what lies below it from going back to the system
    found = list(outcomes(plan, [3, 4], workers=1))
    assert [record["index"] for record in found] == [3, 4]  # a fault does not end the search
    for record in found:
        assert record["outcome"]["fault"], record
        assert record["outcome"]["name"].startswith(name)


def test_another_model_is_a_fault_unless_its_manifest_agrees() -> None:
    for agrees in (False, True):
        outcome = attempt("load", FIXTURE, set(), "the digest of another", agrees=agrees)
        assert outcome.fault is not agrees
        assert outcome.name == ("another model" if agrees else "another model accepted")


def test_a_mutation_can_be_made_again(tmp_path: Path) -> None:
    plan = Plan(5, [FIXTURE], {}, [], tmp_path)
    first, again = (fuzz_directories.damaged(plan, 11, tmp_path / name) for name in ("a", "b"))
    assert first[1] == again[1]
    assert json.dumps(sorted(path.name for path in first[0].iterdir())) == json.dumps(
        sorted(path.name for path in again[0].iterdir())
    )
