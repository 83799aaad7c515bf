"""FiPS: smaller transformers by fine-grained parameter sharing (arXiv 2411.09816).

report = fips.compress(model, batches, fips.CompressionConfig(budget=0.5))
fips.save(model, "smaller")
model = fips.load("smaller")
"""

from fips.compress import compress
from fips.config import CompressionConfig, DataConfig, Recipe, ReconstructionConfig
from fips.errors import FipsError
from fips.layers.linear import FactoredLinear, SharedBasis
from fips.layers.merge import merge
from fips.plan.plan import plan_compression
from fips.record import CompressionReport
from fips.storage.checkpoint import load, save
from fips.version import __version__

__all__ = [
    "CompressionConfig",
    "CompressionReport",
    "DataConfig",
    "FactoredLinear",
    "FipsError",
    "Recipe",
    "ReconstructionConfig",
    "SharedBasis",
    "__version__",
    "compress",
    "load",
    "merge",
    "plan_compression",
    "save",
]
