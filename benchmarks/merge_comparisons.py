"""Several runs of compare_methods.py on one model as one table and plot: what each was run with is kept beside it.

    python benchmarks/merge_comparisons.py RESULT_DIR... --output benchmarks/results/compare-vit

A method, size and seed that stands in several of them is taken from the last.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from output import result_directory

from fips.app.compare import Comparison, Run, write_comparison
from fips.evaluation import Divergence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=result_directory, required=True)
    args = parser.parse_args()
    parts: list[dict[str, Any]] = [json.loads((path / "compare.json").read_text()) for path in args.results]
    first = parts[0]
    alike = all(math.isclose(part["original"], first["original"], rel_tol=1e-4) for part in parts)  # on any machine
    if not alike or len({(part["benchmark"], part["metric"]) for part in parts}) > 1:
        parser.error("the results are of different models or data")
    runs: dict[tuple[str, float, int], Run] = {}
    for part in parts:
        for fields in part.pop("runs"):
            against = Divergence(**fields["against"]) if fields.get("against") else None
            run = Run(**{**fields, "formats": tuple(fields["formats"]), "against": against})
            runs[run.method, run.bits, run.seed] = run
    ordered = sorted(runs.values(), key=lambda run: (-run.bits, run.seed))
    methods = list(dict.fromkeys(run.method for run in ordered))
    ordered.sort(key=lambda run: methods.index(run.method))
    merged = Comparison(first["metric"], first["higher_is_better"], first["original"], tuple(ordered))
    known = ("metric", "higher_is_better", "original")
    facts = [{key: value for key, value in part.items() if key not in known} for part in parts]
    made_of: list[dict[str, Any]] = []
    for fact in (fact for part in facts for fact in part.get("made_of", [part])):  # of results that were merged before
        if fact not in made_of:
            made_of.append(fact)
    write_comparison(merged, args.output, facts={"benchmark": first["benchmark"], "made_of": made_of})


if __name__ == "__main__":
    main()
