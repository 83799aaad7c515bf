"""Which layers share a basis: those of consecutive blocks of one list and one width, or explicit lists of blocks."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from fips.errors import ConfigError
from fips.models.sites import Site
from fips.models.sublayers import Sublayer

__all__ = ["LayerGroup", "group_layers"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that may share one basis."""

    name: str
    sublayers: tuple[Sublayer, ...]

    @property
    def width(self) -> int:
        """D, equal for all members."""
        return self.sublayers[0].width

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for sublayer in self.sublayers for site in sublayer.sites)

    @property
    def hidden(self) -> int:
        """P: hidden features of all member matrices together."""
        return sum(site.hidden for site in self.sites)

    def without(self, names: Container[str]) -> LayerGroup | None:
        """The group without some layers, the same one where it has none of them; None if nothing is left."""
        if not any(site.name in names for site in self.sites):
            return self
        sublayers = [
            replace(sublayer, sites=tuple(site for site in sublayer.sites if site.name not in names))
            for sublayer in self.sublayers
        ]
        sublayers = [sublayer for sublayer in sublayers if sublayer.sites]
        return LayerGroup(self.name, tuple(sublayers)) if sublayers else None

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the member blocks, in order, each once; an embedding or a head is none."""
        return tuple(dict.fromkeys(sublayer.block for sublayer in self.sublayers if not sublayer.is_end))

    @property
    def is_end(self) -> bool:
        """Whether it is an embedding, a head, or the one matrix of both, which is a group by itself."""
        return self.sublayers[0].is_end


def group_layers(
    sublayers: Sequence[Sublayer], *, share_blocks: int = 4, groups: Sequence[Sequence[int]] | None = None
) -> tuple[LayerGroup, ...]:
    """Split layers into groups that share a basis.

    Without ``groups``: runs of ``share_blocks`` consecutive blocks, never across two block lists or two widths; the
    last group of a run may be smaller. With ``groups``: lists of block indices, counted from 0 over all blocks found;
    blocks in no list stay dense.

    Raises ``ConfigError`` for an unknown or repeated index and for a group of unequal widths.
    """
    blocks = list(dict.fromkeys(sublayer.block for sublayer in sublayers))
    members = {block: [sublayer for sublayer in sublayers if sublayer.block == block] for block in blocks}
    parts: list[list[Sublayer]] = []
    if groups is None:
        for _, run in groupby(blocks, key=lambda block: (members[block][0].block_list, _widths(members[block]))):
            names = list(run)
            for start in range(0, len(names), share_blocks):
                parts += _split_by_width(
                    [sublayer for block in names[start : start + share_blocks] for sublayer in members[block]]
                )
    else:
        _check_indices(groups, len(blocks))
        parts = [[sublayer for index in group for sublayer in members[blocks[index]]] for group in groups]
        for part, indices in zip(parts, groups, strict=True):
            widths = sorted({sublayer.width for sublayer in part})
            if len(widths) > 1:
                raise ConfigError(
                    f"`groups` entry {list(indices)} mixes blocks of widths {widths}, but a basis has one"
                )
    return tuple(LayerGroup(f"g{index}", tuple(part)) for index, part in enumerate(parts))


def _widths(sublayers: Sequence[Sublayer]) -> tuple[int, ...]:
    return tuple(sublayer.width for sublayer in sublayers)


def _split_by_width(sublayers: Sequence[Sublayer]) -> list[list[Sublayer]]:
    """A block may hold MLPs of several widths (token and channel mixing): each width gets its own group."""
    return [
        [sublayer for sublayer in sublayers if sublayer.width == width]
        for width in dict.fromkeys(sublayer.width for sublayer in sublayers)
    ]


def _check_indices(groups: Sequence[Sequence[int]], num_blocks: int) -> None:
    seen: set[int] = set()
    for group in groups:
        if not group:
            raise ConfigError("`groups` holds an empty list; every group needs at least one block index")
        for index in group:
            if not 0 <= index < num_blocks:
                raise ConfigError(f"`groups` names block {index}, but the model has blocks 0 to {num_blocks - 1}")
            if index in seen:
                raise ConfigError(f"`groups` names block {index} twice; a block shares one basis")
            seen.add(index)
