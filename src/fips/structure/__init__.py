"""What is in a model: where its MLPs are, and which of them share a basis. Knows no maths."""

from fips.structure.group import LayerGroup, group_mlps
from fips.structure.locate import LinearSite, Located, Mlp, Role, Skipped, locate_mlps
from fips.structure.patterns import matches

__all__ = ["LayerGroup", "LinearSite", "Located", "Mlp", "Role", "Skipped", "group_mlps", "locate_mlps", "matches"]
