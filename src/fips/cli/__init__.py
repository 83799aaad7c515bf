"""The ``fips`` command: results to stdout, progress and words to stderr.

Exit codes: 0 success, 1 failure, 2 wrong usage or setting, 128 + n ended by signal n (130 Ctrl-C, 143 SIGTERM).
"""

from fips.cli.run import main

__all__ = ["main"]
