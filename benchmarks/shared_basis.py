r"""What a basis of full rank shared by the MLPs of all blocks is worth to today's solver, and what one could be worth.

    python benchmarks/shared_basis.py vit --models ../shared/models --data ../shared/data \
        --formats int4g64 tc4g64 --out benchmarks/results/shared-basis-vit.json

With rounding by error feedback and one step per row the error of a matrix goes with the mean square of its rows. In
coordinates B, with :math:`W = V B^T`, the moment :math:`B^T A B` of the inputs has the determinant of A times that of
:math:`B B^T`, and the least of the product is reached where :math:`B B^T` is the weights' own moment
:math:`M = \sum_n g_n w_n w_n^T`: the error is then the geometric instead of the arithmetic mean of its eigenvalues.
What a basis saves that all matrices share follows from the sum of their moments. For matrices that write the residual
stream B stands on the side of the rows, and less can be had: :math:`N^{-1} (\sum \sqrt \lambda)^2` instead of
:math:`\sum \lambda`.

Ways: `none`; `all`, one basis for all readers and one for all writers of the stream, in int8 with a scale per column,
columns turned in it as by default; `four`, one for every 4 blocks; `own`, one for every matrix; `random`, orthogonal,
in 32 bits. Errors are those of the default's metric; bytes of bases are told and not taken from the rest. Where a layer
has a bias, what its outputs are off on average is moved there, as the default does.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import compare_methods
import torch
from output import result_file
from torch import Tensor, nn

import fips
from fips.data import Batches
from fips.evaluation import evaluate
from fips.formats.rotation import rotate, widest_rotation
from fips.models.transformers import load_dense
from fips.record import environment
from fips.solve.moments import usable_moment
from fips.solve.oneshot import ROW_SHARE, OneShot
from fips.solve.structures import Choice, Pricing

BLOCKS = 4


@dataclass(frozen=True)
class Problem:
    """A matrix as the default method hands it to its solver, (O, I), in float64."""

    name: str
    weight_OI: Tensor
    moment_II: Tensor
    power_O: Tensor
    """What its rows count: half of it follows their gradients."""
    damping: float
    reads: bool
    """Whether it sums along the residual stream; else it writes to it."""
    mean_I: Tensor
    """Its mean input."""

    @cached_property
    def term_DD(self) -> Tensor:
        """The moment of its weights on the side of the stream, in units of its error."""
        size = len(self.moment_II)
        damped_II = self.moment_II + self.damping * self.moment_II.diagonal().mean() * torch.eye(size)
        unit = (torch.linalg.slogdet(damped_II).logabsdet / size).exp()
        if self.reads:
            return unit * (self.weight_OI.T * self.power_O) @ self.weight_OI
        weighted_OI = self.power_O.sqrt()[:, None] * self.weight_OI
        return unit * weighted_OI @ weighted_OI.T

    def loss(self, found_OI: Tensor) -> float:
        error_OI = found_OI - self.weight_OI
        return float((self.power_O[:, None] * (error_OI @ self.moment_II) * error_OI).sum())


def problems_of(source: str, examples: Batches) -> list[Problem]:
    """Of the MLPs of a model, recorded while it is compressed."""
    model = load_dense(source, dtype="float32", device=torch.device("cpu"))
    dense = {name: one.weight.detach().clone() for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    means = mean_inputs(model, examples)
    begin, found = OneShot.__init__, []

    def init(
        self: OneShot, weight_DF: Tensor, moment_II: Tensor, power_O: Tensor, axis: Any, *rest: Any, whole: bool
    ) -> None:
        begin(self, weight_DF, moment_II, power_O, axis, *rest, whole=whole)
        if moment_II.dim() == 2:
            weight_OI = weight_DF.T if axis == 0 else weight_DF
            (name,) = [name for name, one in dense.items() if one.shape == weight_OI.shape and one.equal(weight_OI)]
            found.append(Problem(
                name, weight_OI.double(), usable_moment(moment_II).double(), self.weight_N.double(), self.damping,
                axis == 0, means[name],
            ))  # fmt: skip

    with mock.patch.object(OneShot, "__init__", init):
        fips.compress(model, examples, fips.CompressionConfig(bits=4.4, layers="mlp", values="tc4g64", effort="fast"))
    return found


def mean_inputs(model: nn.Module, examples: Batches) -> dict[str, Tensor]:
    """Of all linear layers, over all tokens."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def add(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                rows = inputs[0].detach().double().flatten(0, -2)
                sums[name] = sums.get(name, torch.zeros(())) + rows.sum(0)
                tokens[name] = tokens.get(name, 0) + len(rows)

            hooks.append(layer.register_forward_pre_hook(add))
    with torch.no_grad():
        for batch in examples:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


def int8(basis_DD: Tensor) -> Tensor:
    steps_D = basis_DD.abs().amax(0, keepdim=True) / 127
    return (basis_DD / steps_D).round() * steps_D


def basis_of(problems: Sequence[Problem], way: str) -> Tensor | None:
    """For matrices that all read or all write."""
    if way == "none":
        return None
    size = len(problems[0].term_DD)
    if way == "random":
        return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double())[0]
    moment_DD = sum(problem.term_DD for problem in problems)
    assert isinstance(moment_DD, Tensor)
    values_D, vectors_DD = torch.linalg.eigh(moment_DD / moment_DD.trace() * size)
    values_D = values_D.clamp_min(1e-9)
    if problems[0].reads:
        return int8((vectors_DD * values_D.sqrt()) @ vectors_DD.T)
    power_D = torch.stack([problem.power_O for problem in problems]).sum(0)
    spread_DD = rotate(vectors_DD * values_D ** (1 / 4), widest_rotation(size))
    return int8((power_D / power_D.mean()).rsqrt()[:, None] * spread_DD)


def solved(problem: Problem, values: str, basis_DD: Tensor | None) -> Tensor:
    """The matrix that a value format makes of it, all entries kept, in the coordinates of a basis."""
    weight_OI, moment_II, power_O = problem.weight_OI, problem.moment_II, problem.power_O
    if basis_DD is not None and problem.reads:
        weight_OI = torch.linalg.solve(basis_DD, weight_OI.T).T
        moment_II = basis_DD.T @ moment_II @ basis_DD
    elif basis_DD is not None:
        weight_OI = torch.linalg.solve(basis_DD, weight_OI)
        power_O = (basis_DD.square() * power_O[:, None]).sum(0)
    power_O = (power_O - (1 - ROW_SHARE) * power_O.mean()) / ROW_SHARE  # what the solver takes the rows' weight from
    rotation = 1 if values.endswith("-as-is") else widest_rotation(weight_OI.shape[1])
    shot = OneShot(
        weight_OI.float(), moment_II.float(), power_O.float(), 1, Pricing(2.0, 2.0), torch.float32, None,
        problem.damping, rotation, 2, whole=True,
    )  # fmt: skip
    found = shot.solve(Choice(False, "unstructured", values.removesuffix("-as-is")), math.inf).factors_RF[0].double()
    if basis_DD is None:
        return found
    return found @ basis_DD.T if problem.reads else basis_DD @ found


def sharing(problems: Sequence[Problem], way: str) -> list[list[Problem]]:
    """Those that share a basis: readers and writers apart."""
    size = {"own": 1, "four": BLOCKS}.get(way)
    sets: dict[tuple[bool, int], list[Problem]] = {}
    for place, problem in enumerate(problems):
        found = re.search(r"\.(\d+)\.", problem.name)
        assert found is not None
        number = 0 if size is None else place if size == 1 else int(found[1]) // size
        sets.setdefault((problem.reads, number), []).append(problem)
    return list(sets.values())


def possible(problems: Sequence[Problem]) -> dict[str, float]:
    """Errors that the formula says are left, own basis and one of all, mean over matrices; of readers and writers."""
    found = {}
    for reads in (True, False):
        terms = [p.term_DD / p.term_DD.trace() * len(p.term_DD) for p in problems if p.reads is reads]
        shared_DD = torch.stack(terms).mean(0)
        values = [torch.linalg.eigvalsh(one).clamp_min(1e-9) for one in (*terms, shared_DD)]
        left = [float(one.log().mean().exp() if reads else one.sqrt().mean() ** 2) for one in values]
        kind = "readers" if reads else "writers"
        found |= {f"{kind}, own": sum(left[:-1]) / len(terms), f"{kind}, all": left[-1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--formats", nargs="*", default=["tc4g64"], help="`-as-is` behind one: columns are not turned")
    parser.add_argument("--ways", nargs="+", default=["none", "all", "four", "own", "random"])
    parser.add_argument("--eval-samples", type=int)
    parser.add_argument("--out", type=result_file, required=True)
    args = parser.parse_args()
    facts: dict[str, Any] = {
        "benchmark": f"a basis shared by all MLPs, {args.name}", "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]), "environment": environment(torch.device("cpu")),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        source, calibration, evaluation = compare_methods.settings(args.name, args.models, args.data, Path(scratch))
        if args.eval_samples:
            evaluation = evaluation.replace(num_samples=args.eval_samples)
        original = load_dense(source, dtype="float32", device=torch.device("cpu"))
        examples, scored = compare_methods.load_examples(
            source, original, (calibration, "calibration"), (evaluation, "evaluation")
        )
        problems = problems_of(source, examples)
        facts["possible"] = possible(problems)
        print(json.dumps(facts["possible"]), flush=True)
        runs: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
        for values in args.formats:
            for way in args.ways:
                if not any((one["values"], one["way"]) == (values, way) for one in runs):
                    runs.append(run(problems, values, way, source, original, scored))
                    print(json.dumps(runs[-1])[:300], flush=True)
                args.out.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")


def run(
    problems: Sequence[Problem], values: str, way: str, source: str, original: nn.Module, scored: Batches
) -> dict[str, Any]:
    started = time.perf_counter()
    model = load_dense(source, dtype="float32", device=torch.device("cpu"))
    losses, basis_bytes = {True: 0.0, False: 0.0}, 0
    for some in sharing(problems, way):
        basis_DD = basis_of(some, way)
        basis_bytes += 0 if basis_DD is None else basis_DD.numel() * (4 if way == "random" else 1)
        for problem in some:
            found_OI = solved(problem, values, basis_DD)
            losses[problem.reads] += problem.loss(found_OI)
            layer = model.get_submodule(problem.name)
            layer.weight.data.copy_(found_OI)
            if layer.bias is not None:
                layer.bias.data += ((problem.weight_OI - found_OI) @ problem.mean_I).float()
    weights = sum(problem.weight_OI.numel() for problem in problems)
    return {
        "values": values, "way": way, "loss_readers": losses[True], "loss_writers": losses[False],
        "basis_bits_per_weight": 8 * basis_bytes / weights, "seconds": time.perf_counter() - started,
        "quality": asdict(evaluate(model, scored, against=original)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
