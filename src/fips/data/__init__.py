"""Images and texts as batches a model accepts, read through the ``datasets`` library.

``describe_source`` decides from names what a source is; ``load_batches`` turns it into ``Batches``. Choices of samples
are ``numpy.random.default_rng(seed).permutation(n)[:num_samples]``, so a smaller number is a subset of a larger one.
"""

from fips.data.batches import IGNORED_LABEL, Batches, Kind, Purpose
from fips.data.load import load_batches, load_data
from fips.data.source import Source, describe_source

__all__ = ["IGNORED_LABEL", "Batches", "Kind", "Purpose", "Source", "describe_source", "load_batches", "load_data"]
