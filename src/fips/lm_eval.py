"""``python -m fips.lm_eval ...``: the stock ``lm_eval`` command, with fips known to transformers."""

from __future__ import annotations

import sys

from fips.errors import FipsError
from fips.optional import require

__all__ = ["main"]


def main() -> int:
    """Hand every argument to lm-eval; importing this package has registered packed models before."""
    try:
        command = require("lm_eval.__main__", extra="lm-eval", purpose="python -m fips.lm_eval")
    except FipsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    sys.argv[0] = "lm_eval"
    command.cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
