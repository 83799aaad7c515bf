"""What is in a model and how it is built: where its MLPs are, which share a basis, whose classes make it. No maths."""

from fips.models.group import LayerGroup, group_layers
from fips.models.locate import Located, locate_layers
from fips.models.names import matches
from fips.models.sites import Part, Role, Site
from fips.models.sublayers import Skipped, Sublayer

__all__ = [
    "LayerGroup",
    "Located",
    "Part",
    "Role",
    "Site",
    "Skipped",
    "Sublayer",
    "group_layers",
    "locate_layers",
    "matches",
]  # fmt: skip
