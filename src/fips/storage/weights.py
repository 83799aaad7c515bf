"""The weights of a directory: what the headers of its safetensors files say, checked before any tensor is read."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fips.errors import CheckpointError
from fips.files.manifest import read_json
from fips.files.untrusted import MAX_JSON_BYTES, file_inside, parse_object
from fips.formats.patterns import pattern_named
from fips.formats.values import values_named
from fips.layers.embedding import TiedLayer
from fips.layers.linear import BASES, FactoredLinear, SharedBasis
from fips.models.sites import Role
from fips.storage.layout import LayerLayout, Layout
from fips.storage.memory import MappedFiles

__all__ = [
    "FLOATS",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "Stored",
    "StoredWeights",
    "check_layout",
    "check_types",
    "require",
    "weight_files",
]

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of tensors that models have, by their names in safetensors."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header of its file describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All tensors of some safetensors files by name; nothing but the headers is read."""

    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, files: Sequence[str | Path]) -> StoredWeights:
        """Raises ``CheckpointError`` for a file that is damaged and for a name that is in two files."""
        tensors: dict[str, Stored] = {}
        for path in map(Path, files):
            for name, stored in _read_header(path).items():
                if name in tensors:
                    raise CheckpointError(f"tensor `{name}` is both in `{tensors[name].path}` and in `{path}`")
                tensors[name] = stored
        return cls(tuple(map(Path, files)), tensors)

    @classmethod
    def of_directory(cls, directory: Path) -> StoredWeights:
        """The weights of a directory, which its index describes rightly where it has one."""
        weights = cls.of([directory / name for name in weight_files(directory) if name != WEIGHTS_INDEX])
        if (directory / WEIGHTS_INDEX).is_file():
            _check_index(directory, weights)
        return weights

    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def read(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """The tensors, copied out of their files: what happens to those afterwards does not reach the model."""
        for path in self.files:
            try:
                with safe_open(path, framework="pt", device=str(device)) as file:
                    names = list(file.keys())
                    if torch.device(device).type == "cpu":
                        mapped = [file.get_tensor(name) for name in names]
                        yield from zip(names, MappedFiles().copies(mapped), strict=True)
                    else:
                        for name in names:
                            yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"`{path}` is cut short or not a safetensors file: {error}") from None


def weight_files(directory: Path) -> list[str]:
    """Names of the files that hold the weights, and of their index if there is one.

    Raises ``CheckpointError`` if there are none, if the weights are there twice, or if the index is malformed.
    """
    whole, index = directory / WEIGHTS, directory / WEIGHTS_INDEX
    if index.is_symlink() or index.exists():
        if whole.is_symlink() or whole.exists():
            raise CheckpointError(
                f"`{directory}` has both `{WEIGHTS}` and `{WEIGHTS_INDEX}`; remove the one that is old"
            )
        file_inside(directory, WEIGHTS_INDEX, where=f"`{directory}`")
        return [WEIGHTS_INDEX, *sorted(set(_weight_map(directory).values()))]
    file_inside(directory, WEIGHTS, where=f"`{directory}`")
    return [WEIGHTS]


def _weight_map(directory: Path) -> dict[str, str]:
    where = f"`{directory / WEIGHTS_INDEX}`"
    index = read_json(directory / WEIGHTS_INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{where}: `weight_map` wants an object of tensor names and files, got {str(places)[:60]}"
        )
    if not isinstance(index.get("metadata"), dict):  # transformers reads it, be it empty
        raise CheckpointError(f"{where}: `metadata` wants an object, got {str(index.get('metadata'))[:60]}")
    for name in places.values():
        file_inside(directory, name, where=f"{where}: `weight_map`")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: `weight_map` names {name[:100]!r}, which is no safetensors file")
    return places


def _check_index(directory: Path, weights: StoredWeights) -> None:
    places = _weight_map(directory)
    for name in [*places, *weights.tensors]:
        stored = weights.tensors.get(name)
        if stored is None or name not in places or directory / places[name] != stored.path:
            found = "no file" if stored is None else f"`{stored.path}`"
            raise CheckpointError(
                f"`{directory / WEIGHTS_INDEX}`: `weight_map` has tensor `{name}` in {places.get(name)!r}, "
                f"{found} holds it"
            )


def _read_header(path: Path) -> dict[str, Stored]:
    where = f"the header of `{path}`"
    try:
        with safe_open(path, framework="pt"):  # refuses offsets that overlap, leave gaps, or do not fit the shapes
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{where} has {length:,} bytes; wants at most {MAX_JSON_BYTES:,}")
            content = file.read(length)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"`{path}` is cut short or not a safetensors file: {error}") from None
    entries = parse_object(content, where=where)
    return {name: _stored(entry, name, path) for name, entry in entries.items() if name != "__metadata__"}


def _stored(entry: dict[str, Any], name: str, path: Path) -> Stored:
    if entry["dtype"] not in TYPES:
        raise CheckpointError(f"tensor `{name}` of `{path}` has type {entry['dtype']}; wants one of {', '.join(TYPES)}")
    return Stored(TYPES[entry["dtype"]], tuple(entry["shape"]), path)


def check_layout(layout: Layout, weights: StoredWeights) -> None:
    """Raise ``CheckpointError`` unless the files hold the packed tensors of a layout in their sizes and types.

    Called before modules are made: sizes that no file holds are never allocated.
    """
    for name, basis in layout.bases.items():
        ending = f"{BASES}.{name}.weight"
        for key, stored in weights.tensors.items():  # below the module that owns it; one that is missing is named later
            if key == ending or key.endswith(f".{ending}"):
                require(key, stored, FLOATS, (basis.width, basis.rank))
    for name, entry in layout.layers.items():
        for key, (dtypes, shape) in _packed_tensors(layout, entry).items():
            require(f"{name}.{key}", weights.tensors.get(f"{name}.{key}"), dtypes, shape)


def require(name: str, stored: Stored | None, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> None:
    """Raise ``CheckpointError`` unless a tensor is there with one of these types and this shape."""
    if stored is None:
        raise CheckpointError(f"the checkpoint lacks tensor `{name}` of layer `{name.rpartition('.')[0]}`")
    if stored.shape != tuple(shape):
        raise CheckpointError(f"tensor `{name}` has shape {stored.shape}, wanted {tuple(shape)}")
    if stored.dtype not in dtypes:
        raise CheckpointError(f"tensor `{name}` has type {stored.dtype}, wanted a type like {dtypes[0]}")


def _packed_tensors(layout: Layout, entry: LayerLayout) -> dict[str, tuple[Sequence[torch.dtype], tuple[int, ...]]]:
    """Types and shape of every tensor of a packed layer, the placeholder left out."""
    rank, values, pattern = layout.rank(entry), values_named(entry.values), pattern_named(entry.format)
    tensors: dict[str, tuple[Sequence[torch.dtype], tuple[int, ...]]] = {}
    stored = FLOATS if values.dtype is None else (values.dtype,)
    tensors["values"] = (stored, (values.length(entry.kept),))
    if values.scaled:
        scales, groups = values.num_scales_of(*Role(entry.role).stored_shape(rank, entry.hidden))
        tensors["scales"] = (FLOATS, (scales,))
        if groups:
            tensors["group_scales"] = ((torch.uint8,), (groups,))
    if pattern.group_bits:
        tensors["pattern"] = ((torch.uint8,), (pattern.nbytes(entry.hidden * rank),))
    if entry.bias:
        tensors["bias"] = (FLOATS, (layout.features(entry)[1],))
    return tensors


def check_types(model: nn.Module, weights: StoredWeights) -> None:
    """Raise ``CheckpointError`` for a dense parameter of another floating type than the model runs in.

    A model runs in the type that most of its dense entries have. Some parts of it may have another one (norms, routers)
    where all parameters of a kind have it, or the class of the model names them; a single one is damage, and the first
    call would fail on it.
    """
    kinds = _kinds(model)
    found = {name: weights.tensors[name].dtype for name in kinds if name in weights.tensors}
    stored = {name: dtype for name, dtype in found.items() if dtype in FLOATS}
    if not stored:
        return
    sizes: Counter[torch.dtype] = Counter()
    for name, dtype in stored.items():
        sizes[dtype] += math.prod(weights.tensors[name].shape)
    main = sizes.most_common(1)[0][0]
    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    kept += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    alike: dict[tuple[str, ...], list[torch.dtype]] = {}
    for name, dtype in stored.items():
        alike.setdefault(kinds[name], []).append(dtype)
    for name, dtype in stored.items():
        several = alike[kinds[name]]
        whole = len(several) > 1 and len(set(several)) == 1
        if dtype != main and not whole and not any(part in name for part in kept):
            raise CheckpointError(
                f"tensor `{name}` has type {dtype}, wanted a type like {main}, in which the model runs"
            )


def _kinds(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every dense parameter of one axis or more what it is: class and name of its module, its own name.

    Norms have many names and are of one kind; bias and weight of a layer are of one kind too.
    """
    kinds: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FactoredLinear | SharedBasis | TiedLayer):
            continue
        name = type(module).__name__
        last = "" if "norm" in name.lower() else path.rpartition(".")[2]
        of_torch = type(module).__module__.startswith("torch.nn.")
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim:
                kinds[f"{path}.{key}" if path else key] = (name, last, "" if of_torch else key)
    return kinds
