"""All methods by name. A method is one file of this package: its maths, its settings, what it needs, how it proceeds.

``register`` makes it known: to ``CompressionConfig(method=...)``, recipes, the command line and ``fips compare``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

from fips.config import NAMED, SETTINGS, CompressionConfig, settings_of
from fips.errors import ConfigError
from fips.methods.workbench import CompressedGroup, Needs, Workbench
from fips.plan.plan import CompressionPlan
from fips.plan.planner import PLANNERS, C, Planner, planner_of

__all__ = ["Method", "method_of", "register"]


class Method(Planner[C]):
    """One way to compress a model, with its settings ``config``; see ``Planner`` for how it plans."""

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names for some of its settings: ``method: <name>`` stands for the method with these fields."""

    @property
    def needs(self) -> Needs:
        """What is measured for it."""
        return Needs.NOTHING

    @property
    def temperature(self) -> float:
        """Of the softmax whose change it takes gradients of."""
        return 1.0

    @property
    def by_block(self) -> bool:
        """Whether it makes every block by itself and keeps what is finished (``fips.methods.sweep``)."""
        return False

    @property
    def influence_examples(self) -> int:
        """Examples that tell the influence of layers, if it needs that."""
        return 0

    @property
    def moment_memory(self) -> int:
        """Bytes of moments that it holds at a time, if it needs them; at least those of one group are held."""
        return 0

    @property
    def moment_copies(self) -> int:
        """Times that the moments of a group are held where it takes gradients: once more in what is made of them."""
        return 2

    @property
    def holds_out(self) -> bool:
        """Whether it wants to know what a part of the data says alone, which takes half as much memory again."""
        return False

    @property
    def tried_rows(self) -> int:
        """Rows of a layer that are rounded in order to choose, all structures together."""
        return 0

    @property
    def sweeps(self) -> int:
        """Over the columns of a matrix after it was rounded."""
        return 0

    @property
    def trains_blocks(self) -> bool:
        """Whether it trains block by block."""
        return False

    @property
    def trains_model(self) -> bool:
        """Whether it trains the model as a whole."""
        return False

    @abstractmethod
    def compress(self, bench: Workbench, plan: CompressionPlan) -> list[CompressedGroup]:
        """The layers of every group of the plan; the model stays as it is."""


M = TypeVar("M", bound=type[Method[Any]])


def register(method: M) -> M:
    """Make a method known under the default ``method`` of its settings, and its aliases under theirs.

    Raises ``ConfigError`` if a name is taken.
    """
    name = method.settings.model_fields["method"].default
    for wanted in (name, *method.aliases):
        if wanted in SETTINGS or wanted in NAMED:
            owner = PLANNERS[settings_of(wanted).model_fields["method"].default]
            raise ConfigError(f"there is a `method: {wanted}` already, {owner.__qualname__}; take another name")
    SETTINGS[name] = method.settings
    PLANNERS[name] = method
    NAMED.update({alias: {"method": name, **fields} for alias, fields in method.aliases.items()})
    return method


def method_of(config: CompressionConfig) -> Method[Any]:
    """The method that settings ask for; raises ``ConfigError`` if there is none."""
    return cast(Method[Any], planner_of(config))
