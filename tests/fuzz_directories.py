"""Damage directories of packed models at random and look at how they load: ``python tests/fuzz_directories.py``.

Every mutation is loaded by ``fips.load``, ``fips.load(verify=False)`` and ``from_pretrained``; what loads runs forward,
once from the packed bytes and once decoded. Forked workers do it, so that crashes are seen. Faults are

* a crash, 20 seconds without an answer, 256 MiB more than before, an exception that is none of ours
* another model accepted by ``fips.load`` with its default ``verify=True`` though its manifest was not made to agree
* an exception that transformers raises after the model was built, if ``config.json`` still says that it is ours: our
  code has looked at the files by then

Counts go to stdout as JSON, with every fault and how to see it again (``--only INDEX``); the exit status is 1 if there
is one. Exceptions of ``from_pretrained`` that transformers raises without any of our code are counted by name.

With the library built with ``-DFIPS_SANITIZE=address``, reads and writes out of bounds end the worker and are counted::

    export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
    FIPS_KERNELS=build/libfips_kernels.so ASAN_OPTIONS=detect_leaks=0 python tests/fuzz_directories.py --mutations 10000

(without the second library every C++ exception, also of torch, ends the process).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import logging
import os
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FIPS_CACHE", tempfile.mkdtemp(prefix="fips-fuzz-cache-"))

import torch
import transformers
from conftest import DECODER, tiny_model
from directory_mutations import mutate
from torch import nn
from transformers import PreTrainedModel

import fips
from fips.layers.linear import BASES, FactoredLinear, SharedBasis, basis_owner, factored_layers
from fips.models import locate_layers
from fips.storage.layout import describe_layout, replace_linear

STORED = Path(__file__).parent / "fixtures"
HANG_S = 20.0
MEMORY_BYTES = 256 << 20
CASES_OF_A_WORKER = 200
LIBC = ctypes.CDLL(None)
AFTER_BUILDING = ("_load_pretrained_model", "_finalize_model_loading", "postprocess_model")
"""What ``from_pretrained`` calls once our quantizer has seen the model and the files."""
Loader = Callable[[Path], PreTrainedModel]


# ---------------------------------------------------------------------------------------------------- what is damaged


@dataclass(frozen=True)
class Recipe:
    """A tiny model packed in some formats, layer after layer; no compression, the values are those of the weights.

    Without formats all of its matrices are compressed, embedding, head and experts too, but for one expert.
    """

    family: str
    storages: tuple[tuple[str, str], ...] = ()
    """Pattern and values of layers, one after the other; levels are stored turned."""
    rank: int | None = None
    shard: str | int = "5GB"
    layers: int = 1


RECIPES = {
    "basis": Recipe("llama", (("bitmask", "float"), ("full", "int8"), ("4:16", "int5")), rank=16),
    "patterns": Recipe("llama", (("2:4", "float"), ("4:16", "int8"), ("1:2", "int4"), ("8:16", "float")), layers=2),
    "blocks": Recipe(
        "llama", (("block4", "float"), ("block8", "int8"), ("block8", "float"), ("block4", "int6")), layers=2
    ),
    "narrow": Recipe("llama", (("bitmask", "int4"), ("full", "int3"), ("bitmask", "int7"), ("full", "int2")), layers=2),
    "groups": Recipe(
        "llama", (("bitmask", "int4g32"), ("full", "int3g16"), ("4:16", "int8g64"), ("block4", "int5g128"))
    ),
    "levels": Recipe("llama", (("full", "nl4g64"), ("bitmask", "nl3"), ("full", "nl5"), ("4:16", "nl2g16"))),
    "coded": Recipe("llama", (("full", "tc4g64"), ("full", "tc3"), ("full", "tc2g16")), layers=2),
    "conv1d": Recipe("gpt2", (("bitmask", "float"), ("4:16", "int4"), ("full", "int8")), layers=2),
    "sharded": Recipe("llama", (("bitmask", "int8"), ("full", "float")), shard=20_000),
    "images": Recipe("vit", (("bitmask", "int8"), ("full", "int4"))),
    "tied": Recipe("llama"),
    "experts": Recipe("mixtral"),
    "shared-16-bit": Recipe("gemma3_text", (("bitmask", "float"), ("full", "int6")), rank=16),
}


def make_fixtures(root: Path) -> list[Path]:
    """Directories written by past versions, and one of every recipe written by this one."""
    for path in sorted(STORED.iterdir()):
        if path.is_dir():
            shutil.copytree(path, root / path.name)
    for name, recipe in RECIPES.items():
        fips.save(packed_model(recipe), root / name, max_shard_size=recipe.shard)
    return sorted(root.iterdir())


def packed_model(recipe: Recipe) -> PreTrainedModel:
    if not recipe.storages:
        return compressed_model(recipe)
    model, generator = tiny_model(recipe.family, num_hidden_layers=recipe.layers), torch.Generator().manual_seed(0)
    if recipe.family.startswith("gemma"):
        model.to(torch.bfloat16)
    bases: dict[int, SharedBasis] = {}
    sites = [site for sublayer in locate_layers(model).sublayers for site in sublayer.sites]
    for index, site in enumerate(sites):
        dense = model.get_submodule(site.name)
        weight = dense.weight.detach().float()
        weight = weight.T if site.conv1d else weight
        factor = weight.T if site.role == "up" else weight  # (width, hidden)
        basis = None
        if recipe.rank is not None:
            basis = bases.setdefault(site.width, _random_basis(site.width, recipe.rank, dense.weight.dtype, generator))
            factor = basis.weight.detach().float().T @ factor
        fmt, values = recipe.storages[index % len(recipe.storages)]
        mask = _random_mask(factor, fmt, site.role, generator)
        layer = FactoredLinear.from_factor(
            basis, factor, mask, role=site.role, fmt=fmt, dtype=dense.weight.dtype, values=values,
            rotation=16 if values.startswith("nl") else 1,
        )  # fmt: skip
        layer.conv1d, layer.bias = site.conv1d, dense.bias
        replace_linear(model, site.name, layer)
    owner = basis_owner(model)
    setattr(owner, BASES, nn.ModuleDict({f"g{index}": basis for index, basis in enumerate(bases.values())}))
    return model.eval()


def compressed_model(recipe: Recipe) -> PreTrainedModel:
    fields: dict[str, Any] = {"num_hidden_layers": recipe.layers}
    if recipe.family == "mixtral":
        config = transformers.MixtralConfig(**DECODER | fields, num_local_experts=3)
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.MixtralForCausalLM(config)
    else:
        model = tiny_model(recipe.family, **fields)
    ignore = ("mlp.experts.1",) if recipe.family == "mixtral" else ()
    settings = fips.CompressionConfig(method="gptq", bits=5.0, layers="all", ignore=ignore)
    fips.compress(model, [{"input_ids": torch.arange(128).view(4, 32) % 64}], settings)
    return model.eval()


def _random_basis(width: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> SharedBasis:
    return SharedBasis.of(torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q, dtype)


def _random_mask(factor_RF: torch.Tensor, fmt: str, role: str, generator: torch.Generator) -> torch.Tensor:
    """A support that the format can hold, laid out as the factor is."""
    rows, cols = factor_RF.shape[::-1] if role == "up" else factor_RF.shape
    noise = torch.rand(rows, cols, generator=generator)
    if fmt == "full":
        mask = torch.ones(rows, cols, dtype=torch.bool)
    elif ":" in fmt:
        n, m = map(int, fmt.split(":"))
        groups = noise.reshape(-1, m)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n).indices, True).view(rows, cols)
    elif fmt.startswith("block"):
        size, axis = int(fmt.removeprefix("block")), 0 if role == "up" else 1
        kept = torch.rand(rows // size if axis == 0 else rows, cols if axis == 0 else cols // size, generator=generator)
        mask = (kept < 0.5).repeat_interleave(size, axis)
    else:
        mask = noise < 0.4
    return mask.T if role == "up" else mask


# ------------------------------------------------------------------------------------------------------- one directory


def _from_pretrained(path: Path) -> PreTrainedModel:
    images = path.name == "images"
    auto = transformers.AutoModelForImageClassification if images else transformers.AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(path, trust_remote_code=False)
    return model


LOADERS: dict[str, Loader] = {
    "load": fips.load,
    "load, verify=False": lambda path: fips.load(path, verify=False),  # type: ignore[no-any-return]
    "from_pretrained": _from_pretrained,
}


def identity(model: PreTrainedModel) -> str:
    """A digest of everything a model computes with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "quantization_config")}
    layout = describe_layout(model).to_dict() if factored_layers(model) else None  # transformers passes over a method
    digest.update(json.dumps([settings, layout], default=str, sort_keys=True).encode())  # of a name it does not know
    return digest.hexdigest()


@torch.no_grad()
def run_forward(model: PreTrainedModel) -> None:
    """A few tokens and many, or an image, from the packed bytes and decoded."""
    for policy, counts in (("packed", (1, 3, 16)), ("decode", (3,))):
        for layer in factored_layers(model).values():
            layer.runtime.policy = policy
        if model.main_input_name == "pixel_values":
            model(pixel_values=torch.zeros(1, 3, 32, 32))
        else:
            for tokens in counts:
                model(input_ids=torch.arange(tokens).view(1, -1) % 8)


@dataclass(frozen=True)
class Outcome:
    """What became of one directory with one loader."""

    name: str
    fault: bool = False
    text: str = ""


def attempt(loader: str, path: Path, known: set[str], expected: str, *, agrees: bool) -> Outcome:
    """Load a directory and run it, unless it is a ``known`` one, which then holds it.

    ``expected`` is the model that was written; ``agrees`` says that the manifest is not the one that was written.
    """
    stage = "load"
    try:
        model = LOADERS[loader](path)
        found = identity(model)
        same = found == expected
        stage = "forward"
        if found not in known:
            run_forward(model)
            known.add(found)
    except fips.FipsError as error:
        memory = any(word in str(error) for word in ("MemoryError", "allocate memory"))
        return Outcome("allocation refused" if memory else type(error).__name__, memory, str(error))
    except Exception as error:
        return _foreign(loader, stage, error, path)
    if loader == "load" and not (same or agrees):
        return Outcome("another model accepted", True)
    return Outcome("same model" if same else "another model")


def _foreign(loader: str, stage: str, error: Exception, path: Path) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)
    ours = any(Path(fips.__file__).parent in Path(frame.filename).parents for frame in frames)
    last = frames[-1]
    where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} while {stage}"
    built = any(frame.name in AFTER_BUILDING for frame in frames) and _says_fips(path)
    if loader == "from_pretrained" and not (ours or built) and stage == "load":
        return Outcome(f"of transformers: {where}", text=str(error)[:200])
    head = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-6:]))
    return Outcome(f"foreign: {where}", True, f"{str(error)[:200]} [{head}]")


def _says_fips(path: Path) -> bool:
    """Whether the configuration names our method: transformers passes over others and never calls us."""
    fields = json.loads((path / "config.json").read_text()).get("quantization_config")
    return isinstance(fields, dict) and fields.get("quant_method") == "fips"


# ------------------------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True)
class Plan:
    """What all workers share."""

    seed: int
    fixtures: Sequence[Path]
    expected: dict[tuple[str, str], str]
    loaders: Sequence[str]
    scratch: Path


def damaged(plan: Plan, index: int, root: Path) -> tuple[Path, tuple[str, str, bool]]:
    """The directory with this number, written below ``root`` under the name of the whole one, and what was done."""
    rng = Random(f"{plan.seed}:{index}")
    fixture = rng.choice(list(plan.fixtures))
    place = root / fixture.name
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(fixture, place)
    for path in place.iterdir():
        path.chmod(0o644)
    return place, mutate(rng, place)


def work(plan: Plan, indices: Sequence[int], out: TextIO) -> None:
    """Try some directories; a line before and after every one, so that the parent knows which one ended a worker."""

    def say(record: dict[str, Any]) -> None:
        out.write(json.dumps(record) + "\n")
        out.flush()

    root = plan.scratch / f"case-{os.getpid()}"
    for index in indices:
        place, (kind, words, agrees) = damaged(plan, index, root)
        known = set(plan.expected.values())
        for loader in plan.loaders:
            record = {"index": index, "fixture": place.name, "kind": kind, "words": words[:200], "loader": loader}
            say(record)
            before = _reset_peak()
            outcome = attempt(loader, place, known, plan.expected[place.name, loader], agrees=agrees)
            grown = _peak() - before
            if grown > MEMORY_BYTES:
                outcome = Outcome("memory", True, f"{grown:,} bytes more; {outcome.name}")
            say({**record, "outcome": vars_of(outcome)})
    shutil.rmtree(root, ignore_errors=True)


def vars_of(outcome: Outcome) -> dict[str, Any]:
    return {"name": outcome.name, "fault": outcome.fault, "text": outcome.text[:600]}


def _reset_peak() -> int:
    """Forget the most memory held so far (Linux); returns what is held now.

    First what was freed goes back to the system: used again, it would not be seen to grow.
    """
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def limit_memory() -> None:
    """No more than 4 GB of addresses beyond those of now; a sanitizer has terabytes, there the peak alone counts."""
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30), now + (4 << 30)))


@dataclass
class Lane:
    """One worker process after another, through its share of the directories."""

    plan: Plan
    indices: list[int]
    done: int = 0
    pid: int = 0
    pipe: int = -1
    """What the worker writes, a line for each step."""
    unread: bytes = b""
    last: dict[str, Any] = field(default_factory=dict)
    since: float = 0.0

    def start(self) -> bool:
        """Fork a worker for the next directories; False when there are none."""
        share = self.indices[self.done : self.done + CASES_OF_A_WORKER]
        if not share:
            return False
        self.pipe, write = os.pipe()
        self.unread, self.last, self.since = b"", {}, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _child(self.plan, share, write, self.stderr())
        os.close(write)
        return True

    def stderr(self) -> Path:
        return self.plan.scratch / f"stderr-{self.indices[0]}"

    def read(self) -> list[dict[str, Any]] | None:
        """Outcomes that the worker has written; None at its end."""
        content = os.read(self.pipe, 1 << 16)
        if not content:
            return None
        *lines, self.unread = (self.unread + content).split(b"\n")
        return [self.last for line in lines if self._take(line)]

    def _take(self, line: bytes) -> bool:
        """Note a step of the worker; whether it is an outcome."""
        self.last, self.since = json.loads(line), time.monotonic()
        if "outcome" in self.last and self.last["loader"] == self.plan.loaders[-1]:
            self.done = self.indices.index(self.last["index"]) + 1
        return "outcome" in self.last

    def end(self, *, hung: bool = False) -> dict[str, Any] | None:
        """Wait for the worker; returns the fault that ended it before its time, if one did."""
        if hung:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        if status == 0 and not hung:
            return None
        name = f"no answer for {HANG_S:g} s" if hung else _ending(status)
        if "index" in self.last:
            self.done = self.indices.index(self.last["index"]) + 1
        else:
            self.done += 1
        lines = self.stderr().read_text(errors="replace").splitlines() if self.stderr().exists() else []
        start = next((at for at, line in enumerate(lines) if "ERROR: " in line), max(0, len(lines) - 8))
        return {**self.last, "outcome": vars_of(Outcome(name, True, " | ".join(lines[start : start + 8])))}


def _ending(status: int) -> str:
    number = os.waitstatus_to_exitcode(status)
    return f"crash: {signal.Signals(-number).name}" if number < 0 else f"crash: exit status {number}"


def _child(plan: Plan, share: Sequence[int], write: int, stderr: Path) -> None:
    """The life of a worker; never returns."""
    try:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        limit_memory()
        with os.fdopen(write, "w", encoding="utf-8") as out:
            work(plan, share, out)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def outcomes(plan: Plan, indices: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """All outcomes, as they come."""
    with selectors.DefaultSelector() as selector:
        for start in range(min(workers, len(indices))):
            lane = Lane(plan, list(indices[start::workers]))
            if lane.start():
                selector.register(lane.pipe, selectors.EVENT_READ, lane)
        while selector.get_map():
            for key, _ in selector.select(timeout=1.0):
                found = key.data.read()
                yield from _finish(key.data, selector) if found is None else found
            for key in list(selector.get_map().values()):
                if time.monotonic() - key.data.since > HANG_S:
                    yield from _finish(key.data, selector, hung=True)


def _finish(lane: Lane, selector: selectors.BaseSelector, *, hung: bool = False) -> Iterator[dict[str, Any]]:
    """Bury a worker and start the next one."""
    selector.unregister(lane.pipe)
    fault = lane.end(hung=hung)
    if fault is not None:
        yield fault
    if lane.start():
        selector.register(lane.pipe, selectors.EVENT_READ, lane)


# ------------------------------------------------------------------------------------------------------------- command


def fuzz(indices: Sequence[int], *, seed: int = 0, workers: int = 1, loaders: Sequence[str] = tuple(LOADERS)) -> Any:
    """Try the directories with these numbers; returns counts per loader, faults, and how long it took."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        prefix="fips-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as name:
        root = Path(name)
        (root / "fixtures").mkdir()
        fixtures = make_fixtures(root / "fixtures")
        expected = {(path.name, loader): _intact(loader, path) for path in fixtures for loader in loaders}
        counts: dict[str, Counter[str]] = {loader: Counter() for loader in loaders}
        faults: list[dict[str, Any]] = []
        gc.collect()
        gc.freeze()  # what is imported is neither searched nor copied by workers
        begin = time.monotonic()
        for record in outcomes(Plan(seed, fixtures, expected, loaders, root), indices, workers):
            outcome = record["outcome"]
            counts[record.get("loader", loaders[0])][outcome["name"]] += 1
            if outcome["fault"]:
                faults.append(record)
                sys.stderr.write(json.dumps(record) + "\n")
        seconds = time.monotonic() - begin
        gc.unfreeze()
    return {
        "seed": seed,
        "mutations": len(indices),
        "seconds": round(seconds, 1),
        "mutations_per_second": round(len(indices) / seconds, 1),
        "address_sanitizer": "asan" in os.environ.get("LD_PRELOAD", ""),
        "outcomes": {loader: dict(counter.most_common()) for loader, counter in counts.items()},
        "faults": faults,
    }


def _intact(loader: str, path: Path) -> str:
    model = LOADERS[loader](path)
    run_forward(model)
    return identity(model)


def main() -> int:
    """0 if nothing is wrong, 1 if there are faults."""
    parser = argparse.ArgumentParser(description="Damage directories of packed models and look at how they load.")
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", type=int, help="number of a single mutation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    quieten()
    indices = [args.only] if args.only is not None else range(args.start, args.start + args.mutations)
    result = fuzz(indices, seed=args.seed, workers=args.workers)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 1 if result["faults"] else 0


def quieten() -> None:
    """Thousands of damaged files would fill the screen."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
