"""FiPS: smaller transformers by fine-grained parameter sharing (arXiv 2411.09816).

    model = AutoModelForCausalLM.from_pretrained("...")
    batches = fips.load_data("text.txt", model)
    report = fips.compress(model, batches, fips.CompressionConfig(bits=4.8))
    print(report.summary())
    fips.save(model, "smaller")
    model = fips.load("smaller")

Importing this package is quick: torch and transformers are imported with the first name that is used. From then on, and
whichever is imported first, ``from_pretrained`` of transformers reads packed models and peft adapts their layers.
Nothing is printed; what there is to say goes to the logger ``fips``.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from fips.errors import FipsError
from fips.registration import register_when_imported as _register_when_imported
from fips.version import __version__

if TYPE_CHECKING:
    from fips.compression import ProgressEvent, compress
    from fips.config import CompressionConfig, DataConfig, Recipe, ReconstructionConfig
    from fips.data.load import load_data
    from fips.evaluation.quality import evaluate
    from fips.layers.linear import FactoredLinear, SharedBasis
    from fips.layers.merge import merge
    from fips.plan.plan import plan_compression
    from fips.record import CompressionReport
    from fips.storage.checkpoint import load, save
    from fips.training.qat import finish_qat, prepare_qat

__all__ = [
    "CompressionConfig",
    "CompressionReport",
    "DataConfig",
    "FactoredLinear",
    "FipsError",
    "ProgressEvent",
    "Recipe",
    "ReconstructionConfig",
    "SharedBasis",
    "__version__",
    "compress",
    "evaluate",
    "finish_qat",
    "load",
    "load_data",
    "merge",
    "plan_compression",
    "prepare_qat",
    "save",
]

_HOMES = {
    "CompressionConfig": "fips.config",
    "CompressionReport": "fips.record",
    "DataConfig": "fips.config",
    "FactoredLinear": "fips.layers.linear",
    "ProgressEvent": "fips.compression",
    "Recipe": "fips.config",
    "ReconstructionConfig": "fips.config",
    "SharedBasis": "fips.layers.linear",
    "compress": "fips.compression",
    "evaluate": "fips.evaluation.quality",
    "finish_qat": "fips.training.qat",
    "load": "fips.storage.checkpoint",
    "load_data": "fips.data.load",
    "merge": "fips.layers.merge",
    "plan_compression": "fips.plan.plan",
    "prepare_qat": "fips.training.qat",
    "save": "fips.storage.checkpoint",
}
"""Where the public names are defined; no module of this package may have one of them as its own name."""


if not TYPE_CHECKING:  # type checkers know the names from above, and would take any other for one of these

    def __getattr__(name: str) -> object:
        """A public name, imported when it is first used, or a package of fips."""
        if name in _HOMES:
            found = globals()[name] = getattr(_import_module(_HOMES[name]), name)
            return found
        if not name.startswith("_"):
            try:
                return _import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register_when_imported()
