"""``python -m fips``, and ``torchrun -m fips``."""

import sys

from fips.cli import main

if __name__ == "__main__":
    sys.exit(main())
