"""Find the MLPs of a transformer by module structure, not by a list of model names.

An MLP is a pair ``d -> p, p -> d`` of linear layers, a gated triple ``d -> p, d -> p, p -> d``, or a pair with gate and
up fused, ``d -> 2p, p -> d``, that sits in one container or is spread over children of one container that hold a single
linear layer each (as in ViT and BERT, where the two matrices live in sibling modules). Containers with any other set
of linear layers, such as attention, are closed: nothing in them is paired with what lies outside.

Experts of a mixture are MLPs of which every token goes to a few. Those that a model keeps in 3-D tensors are found once
they are taken apart (``fips.models.experts``).

A *block* is the innermost ancestor that is an element of a homogeneous ``ModuleList`` or ``Sequential``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fips.errors import NoMatchError
from fips.models.attention import attention_around, attention_site, is_attention
from fips.models.ends import find_ends
from fips.models.experts import ExpertList, experts_apart, why_whole
from fips.models.names import matches, require_matches
from fips.models.sites import Linear, Site
from fips.models.sublayers import Skipped, Sublayer, oddity

__all__ = ["Located", "locate_layers"]


@dataclass(frozen=True, slots=True)
class Located:
    sublayers: tuple[Sublayer, ...]
    skipped: tuple[Skipped, ...]
    ends: tuple[Sublayer, ...] = ()
    """Embedding and head, where they are asked for."""


def locate_layers(
    model: nn.Module,
    *,
    layers: Literal["mlp", "blocks", "all"] = "mlp",
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
) -> Located:
    """Every MLP inside a repeated block, in module order, and what was passed over with the reason.

    With ``layers`` of ``blocks`` the linear layers of attention too, with ``all`` also the embedding and the head.
    ``targets`` replaces the search: all linear layers inside blocks whose name, or whose MLP's name, fits a pattern
    are taken. ``ignore`` then removes layers the same way; of attention the one layer that it names.

    Layers of experts have the names that they have once those are taken apart, ``experts_apart(model)``.

    Raises ``NoMatchError`` if a pattern fits nothing or nothing is left.
    """
    with experts_apart(model):
        return _located(model, layers, targets, ignore)


def _located(
    model: nn.Module,
    layers: Literal["mlp", "blocks", "all"],
    targets: Sequence[str] | None,
    ignore: Sequence[str],
) -> Located:
    found: list[Sublayer] = []
    skipped: list[Skipped] = [*_whole_experts(model)]
    _scan(model, "", model, found, skipped)
    every = {linear.name: linear for linear in _linears(model)}
    found = list(_once(found, every, skipped))
    ends: list[Sublayer] = []
    if layers != "mlp" and targets is None:
        found = _with_attention(model, found, every, skipped)
        ends = find_ends(model, skipped) if layers == "all" else []
    names = [*every, *dict.fromkeys(name for sublayer in (*found, *ends) for name in sublayer.names)]
    if targets is not None:
        require_matches("targets", targets, names)
        found = _select_targets(model, found, every, targets)
    require_matches("ignore", ignore, names)
    kept = []
    for sublayer in found:
        left = _without_ignored(sublayer, ignore)
        if left is not sublayer:
            skipped.append(Skipped(sublayer.name, "matched by `ignore`"))
        if left is not None:
            kept.append(left)
    if not kept:
        reasons = "; ".join(f"`{item.name}`: {item.reason}" for item in skipped[:3])
        raise NoMatchError(
            f"no {'MLP' if layers == 'mlp' else 'MLP or attention'} to compress among the {len(every)} linear layers "
            f"of `{type(model).__name__}`" + (f" ({reasons})" if reasons else "") + "; name the layers with `targets`"
        )
    taken = [end for end in ends if not any(matches(name, ignore) for name in (end.name, *end.sites[0].tied))]
    skipped += [Skipped(end.name, "matched by `ignore`") for end in ends if end not in taken]
    return Located(tuple(kept), tuple(skipped), tuple(taken))


def _once(found: Sequence[Sublayer], every: Mapping[str, Linear], skipped: list[Skipped]) -> Iterator[Sublayer]:
    """MLPs without those that hold layers registered before under another name, which are the same layers."""
    for sublayer in found:
        again = next((site.name for site in sublayer.sites if site.name not in every), None)
        if again is None:
            yield sublayer
        else:
            skipped.append(
                Skipped(sublayer.name, f"`{again}` is a layer of an earlier MLP too, and is compressed there")
            )


def _without_ignored(sublayer: Sublayer, ignore: Sequence[str]) -> Sublayer | None:
    """The same if nothing of it is to be ignored. An MLP is left alone as a whole."""
    named = [site for site in sublayer.sites if matches(site.name, ignore)]
    whole = any(matches(name, ignore) for name in sublayer.names)
    if not named and not whole:
        return sublayer
    if sublayer.kind != "attention" or whole or len(named) == len(sublayer.sites):
        return None
    return replace(sublayer, sites=tuple(site for site in sublayer.sites if site not in named))


def _as_linear(name: str, module: nn.Module) -> Linear | None:
    if isinstance(module, nn.Linear):
        return Linear(name, module, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return Linear(name, module, module.nx, module.nf)
    return None


def _linears(model: nn.Module) -> Iterator[Linear]:
    for name, module in model.named_modules():
        linear = _as_linear(name, module)
        if linear is not None:
            yield linear


def _scan(module: nn.Module, name: str, root: nn.Module, found: list[Sublayer], skipped: list[Skipped]) -> list[Linear]:
    """Collect MLPs below ``module``; return its linear layers that are still free to pair with a sibling's."""
    own: list[Linear] = []
    loose: list[Linear] = []
    if isinstance(module, ExpertList):
        _accept_experts(name, module, root, found, skipped)
        return []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        linear = _as_linear(path, child)
        if linear is not None:
            own.append(linear)
            loose.append(linear)
        else:
            below = _scan(child, path, root, found, skipped)
            if len(below) == 1 and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                loose += below
    for candidates in (loose, own, [linear for linear in loose if linear.inputs != linear.outputs]):
        pairing = _pair(candidates, _norm_width(module))
        if pairing is not None and not is_attention(module, name):
            _accept(name, pairing, root, found, skipped)
            return []
    return loose


def _norm_width(module: nn.Module) -> int | None:
    """Width of the residual stream as seen in the container's own normalization layers, if they agree."""
    weights = [getattr(child, "weight", None) for child in module.children() if "norm" in type(child).__name__.lower()]
    widths = {weight.shape[0] for weight in weights if isinstance(weight, Tensor)}
    return widths.pop() if len(widths) == 1 else None


def _pair(linears: Sequence[Linear], norm_width: int | None) -> tuple[str, list[Site]] | None:
    """The kind of MLP that some layers form, and its sites; None if they form none."""
    if len(linears) == 2:
        up, down = linears
        if norm_width is not None and up.inputs != norm_width and down.inputs == norm_width:
            up, down = down, up
        if (up.inputs, up.outputs) == (down.outputs, down.inputs):
            return "plain", [Site.reader(up), Site.writer(down)]
        if up.inputs == down.outputs and up.outputs == 2 * down.inputs:
            return "fused-gated", [Site.reader(up, parts=2), Site.writer(down)]
    if len(linears) == 3:
        for index in (2, 1, 0):
            down = linears[index]
            ups = [linear for position, linear in enumerate(linears) if position != index]
            if all((up.inputs, up.outputs) == (down.outputs, down.inputs) for up in ups):
                return "gated", [*(Site.reader(up) for up in ups), Site.writer(down)]
    return None


def _accept(
    name: str,
    pairing: tuple[str, list[Site]],
    root: nn.Module,
    found: list[Sublayer],
    skipped: list[Skipped],
) -> None:
    kind, sites = pairing
    odd = next((reason for site in sites if (reason := oddity(root.get_submodule(site.name))) is not None), None)
    block = _block_of(root, sites[0].name)
    if odd is not None:
        skipped.append(Skipped(name, f"its layers are {odd}, not plain linear layers"))
    elif block is None:
        skipped.append(Skipped(name or "(model)", "it is not inside a repeated block"))
    else:
        mixture = _mixture_of(root, name, block)
        sites = [replace(site, mixture=mixture) for site in sites]
        found.append(Sublayer(name, block[0], block[1], kind, tuple(sites)))  # type: ignore[arg-type]


def _accept_experts(
    name: str, module: ExpertList, root: nn.Module, found: list[Sublayer], skipped: list[Skipped]
) -> None:
    block = _block_of(root, name)
    if block is None:
        skipped.append(Skipped(name, "it is not inside a repeated block"))
        return
    for expert in range(module.num_experts):
        first, last = (
            _as_linear(f"{name}.{key}.{expert}", layer)
            for key, layer in zip((module.first, module.last), module.layers(expert), strict=True)
        )
        assert first is not None
        assert last is not None
        sites = (Site.reader(first, parts=module.parts), Site.writer(last))
        kind: Literal["plain", "fused-gated"] = "fused-gated" if module.fused.has_gate else "plain"
        own = tuple(replace(site, mixture=name) for site in sites)
        found.append(Sublayer(f"{name}.{expert}", block[0], block[1], kind, own))


def _block_of(root: nn.Module, name: str) -> tuple[str, str] | None:
    """``(block, list)`` names of the innermost homogeneous list element that contains ``name``."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        container = root.get_submodule(".".join(parts[: end - 1])) if end > 1 else root
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or not parts[end - 1].isdigit():
            continue
        if end > 2 and isinstance(root.get_submodule(".".join(parts[: end - 2])), ExpertList):
            continue
        element = ".".join(parts[:end])
        if len({type(child) for child in container}) == 1 and not _is_expert_list(root, parts[: end - 1], element):
            return element, ".".join(parts[: end - 1])
    return None


def _is_expert_list(root: nn.Module, list_parts: Sequence[str], element: str) -> bool:
    """Whether a list's elements are bare MLPs and the list itself lies inside an element of another list."""
    nested = any(part.isdigit() for part in list_parts)
    return nested and 2 <= sum(1 for _ in _linears(root.get_submodule(element))) <= 3 and _is_bare(root, element)


def _is_bare(root: nn.Module, element: str) -> bool:
    holders = [
        module for module in root.get_submodule(element).modules() if any(True for _ in module.parameters(False))
    ]
    return all(_as_linear("", module) is not None for module in holders)


def _mixture_of(root: nn.Module, name: str, block: tuple[str, str]) -> str:
    """The list or dictionary of several modules alike, inside a block, that an MLP is one of; empty if it is none."""
    parent = root.get_submodule(name.rpartition(".")[0])
    several = isinstance(parent, (nn.ModuleList, nn.ModuleDict)) and len(parent) > 1
    alike = several and len({type(child) for child in parent.children() if any(True for _ in child.parameters())}) == 1
    return name.rpartition(".")[0] if alike and name != block[0] else ""


def _whole_experts(model: nn.Module) -> Iterator[Skipped]:
    """Experts in 3-D tensors that cannot be taken apart."""
    for name, module in model.named_modules():
        if not any(part.isdigit() for part in name.split(".")) or isinstance(module, nn.modules.conv._ConvNd):
            continue
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] > 1]
        if shapes:
            listed = " and ".join(str(shape) for shape in shapes)
            what = f"{shapes[0][0]} experts fused in tensors of shape {listed}"
            yield Skipped(name, f"{what}, {why_whole(module)}; not compressed")


def _with_attention(
    model: nn.Module, mlps: Sequence[Sublayer], every: Mapping[str, Linear], skipped: list[Skipped]
) -> list[Sublayer]:
    """MLPs and what lies in the attention of blocks, in the order of their first layers."""
    taken = {site.name for sublayer in mlps for site in sublayer.sites}
    modules: dict[str, tuple[str, str]] = {}
    for name in every:
        block = None if name in taken else _block_of(model, name)
        place = None if block is None else attention_around(model, block[0], name)
        if block is not None and place is not None:
            modules.setdefault(place, block)
    found = list(mlps)
    for place, (block_name, block_list) in modules.items():
        members = [linear for name, linear in every.items() if name.startswith(f"{place}.") and name not in taken]
        width = _stream_width(model, block_name, mlps) or _width_of(members)
        sites = []
        for linear in members:
            odd = oddity(linear.module)
            site = attention_site(linear, members, width)
            if odd is not None:
                skipped.append(Skipped(linear.name, f"it is {odd}, not a plain linear layer"))
            elif site is None:  # between two small spaces, as in low-rank queries: by itself
                found.append(Sublayer(linear.name, block_name, block_list, "attention", (Site.inner(linear),)))
            else:
                sites.append(site)
        if sites:
            found.append(Sublayer(place, block_name, block_list, "attention", tuple(sites)))
    places = {name: index for index, name in enumerate(every)}
    return sorted(found, key=lambda sublayer: places[sublayer.sites[0].name])


def _select_targets(
    model: nn.Module, found: Sequence[Sublayer], every: dict[str, Linear], targets: Sequence[str]
) -> list[Sublayer]:
    """One ``Sublayer`` per block with the layers that fit ``targets``."""
    known = {site.name: (site, sublayer) for sublayer in found for site in sublayer.sites}
    chosen: dict[str, list[Site]] = {}
    lists: dict[str, str] = {}
    for name, linear in every.items():
        site_mlp = known.get(name)
        around = () if site_mlp is None else site_mlp[1].names
        if not any(matches(one, targets) for one in (name, *around)):
            continue
        block = _block_of(model, name)
        if block is None:
            raise NoMatchError(f"`targets` matched `{name}`, which is not inside a repeated block")
        odd = oddity(linear.module)
        if odd is not None:
            raise NoMatchError(f"`targets` matched `{name}`, which is {odd}, not a plain linear layer; leave it out")
        site = site_mlp[0] if site_mlp is not None else _other_site(linear, block[0], model, found, every)
        chosen.setdefault(block[0], []).append(site)
        lists[block[0]] = block[1]
    return [Sublayer(block, block, lists[block], "custom", tuple(sites)) for block, sites in chosen.items()]


def _other_site(
    linear: Linear, block: str, model: nn.Module, found: Sequence[Sublayer], every: Mapping[str, Linear]
) -> Site:
    """A layer of no MLP: by the rule of ``fips.models.attention``, elsewhere by the side that has the block's width.

    Elsewhere both sides may have it, or the width may be unknown: such a layer is taken to read the stream.
    """
    width = _stream_width(model, block, found)
    attention = attention_around(model, block, linear.name)
    site = None
    if attention is not None:
        members = [other for name, other in every.items() if name.startswith(f"{attention}.")]
        site = attention_site(linear, members, width or _width_of(members))
    elif width is None or linear.inputs == width:
        site = Site.reader(linear)
    elif linear.outputs == width:
        site = Site.writer(linear)
    if site is None:
        raise NoMatchError(
            f"`targets` matched `{linear.name}` ({linear.inputs} -> {linear.outputs}), which neither reads nor writes "
            f"the residual stream, {width} wide in its block; leave it out"
        )
    return site


def _stream_width(model: nn.Module, block: str, mlps: Sequence[Sublayer]) -> int | None:
    """Width of the residual stream in a block, as its MLPs have it, or its normalization layers; None: unknown."""
    widths = {sublayer.width for sublayer in mlps if sublayer.block == block}
    return widths.pop() if widths else _norm_width(model.get_submodule(block))


def _width_of(members: Sequence[Linear]) -> int:
    """Width of the residual stream as the layers of an attention module have it: most of them read it."""
    return Counter(member.inputs for member in members).most_common(1)[0][0]
