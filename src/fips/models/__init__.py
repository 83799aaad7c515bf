"""What is in a model and how it is built: where its MLPs are, which share a basis, whose classes make it. No maths."""

from fips.models.group import LayerGroup, group_mlps
from fips.models.locate import LinearSite, Located, Mlp, Role, Skipped, locate_mlps
from fips.models.names import matches

__all__ = ["LayerGroup", "LinearSite", "Located", "Mlp", "Role", "Skipped", "group_mlps", "locate_mlps", "matches"]
