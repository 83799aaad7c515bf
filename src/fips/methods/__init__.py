"""How a group of layers is compressed: the solver in the metric of the output, the paper's recipe, other papers.

Every module that registers a method is imported here, so that the method is known wherever ``fips`` is.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
