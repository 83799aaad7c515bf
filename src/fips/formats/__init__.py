"""What stored bytes mean: integers of few bits, patterns of kept entries. Knows torch only."""

from fips.formats import trellis as trellis  # registers its value formats
