r"""The default method: measure what an error costs, choose structure and size of every group, solve, train, pack.

An error E of a matrix costs :math:`\mathrm{tr}(E^\top A E G)` with the second moments A of the layer's inputs and G of
the gradients of its outputs (``fips.calibration.moments``). Every group becomes a shared basis with sparse factors, or
sparse matrices alone, of floating values or integers, as this error, measured at a few sizes, asks for.

``settings`` says what may be asked for, ``stages`` has one function per stage of the work, ``method`` runs them.

References: arXiv 2411.09816 (shared basis, sparse factors); Martens & Grosse, arXiv 1503.05671 (the metric).
"""

from fips.methods.fips.method import Fips
from fips.methods.fips.settings import FipsConfig, MetricConfig
from fips.methods.fips.stages import site_problem

__all__ = ["Fips", "FipsConfig", "MetricConfig", "site_problem"]
