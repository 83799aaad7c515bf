"""What is in a model and how it is built: where its MLPs are, which share a basis, whose classes make it. No maths."""

from fips.models.group import LayerGroup, group_mlps
from fips.models.locate import Located, Mlp, Skipped, locate_mlps
from fips.models.names import matches
from fips.models.sites import Part, Role, Site

__all__ = [
    "LayerGroup", "Located", "Mlp", "Part", "Role", "Site", "Skipped", "group_mlps", "locate_mlps", "matches",
]  # fmt: skip
