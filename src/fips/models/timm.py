"""timm models: built without weights, loaded, described by timm's own config.json, and fed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn

from fips.errors import ModelError
from fips.files.manifest import read_json, write_json
from fips.models.gguf import is_gguf_source
from fips.optional import require

__all__ = [
    "PixelBatches",
    "TimmProcessor",
    "build_timm",
    "is_timm_config",
    "is_timm_model",
    "is_timm_source",
    "load_timm",
    "rebuild_timm",
    "restore_buffers",
    "write_timm_config",
]

PREFIX = "timm/"
_MODES = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def is_timm_model(model: nn.Module) -> bool:
    """Whether timm made the model and knows how to make it again."""
    return isinstance(getattr(model, "pretrained_cfg", None), Mapping) and hasattr(model, "num_classes")


def is_timm_config(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is timm's own; the one of transformers' wrapper also names a ``model_type``."""
    return "architecture" in fields and "pretrained_cfg" in fields and "model_type" not in fields


def is_timm_source(source: str) -> bool:
    """``timm/NAME``, or a directory with timm's config.json."""
    path = Path(source) / "config.json"
    if path.is_file():
        return is_timm_config(read_json(path))
    return source.startswith(PREFIX) and not is_gguf_source(source)


def build_timm(source: str | Path) -> nn.Module:
    """The model of ``timm/NAME`` or of a directory, with parameters on the meta device; buffers are real."""
    with init_empty_weights(include_buffers=False):
        return _create(str(source), pretrained=False)


def rebuild_timm(model: nn.Module) -> nn.Module:
    """As ``build_timm``, from the config.json that would be written for a model."""
    with tempfile.TemporaryDirectory(prefix="fips-timm-") as scratch:
        write_timm_config(model, Path(scratch), quantization={})
        return build_timm(scratch)


def load_timm(source: str, *, dtype: str = "auto", device: torch.device | str = "cpu") -> nn.Module:
    """A model with its weights, from a directory or through timm from the hub, in evaluation mode."""
    return _create(source, pretrained=True).to(device, None if dtype == "auto" else getattr(torch, dtype))


def restore_buffers(model: nn.Module) -> None:
    """Compute the buffers that no file holds and timm derives from parameters, such as masks of shifted windows."""
    for module in model.modules():
        initialize = getattr(module, "init_non_persistent_buffers", None)
        if initialize is not None:
            initialize()


def _create(source: str, *, pretrained: bool) -> nn.Module:
    timm = require("timm", extra="timm", purpose=f"model `{source}`")
    try:
        if not Path(source).is_dir():
            model: nn.Module = timm.create_model(source.removeprefix(PREFIX), pretrained=pretrained)
        elif pretrained:
            model = timm.create_model(f"local-dir:{source}", pretrained=True)
        else:
            hub = require("timm.models._hub", extra="timm", purpose=f"model `{source}`")
            pretrained_cfg, name, arguments = hub.load_model_config_from_path(source)
            if not timm.is_model(name):
                raise ModelError(f"`architecture` in config.json of `{source}` must name a model of timm, got {name!r}")
            model = timm.create_model(name, pretrained=False, pretrained_cfg=pretrained_cfg, **(arguments or {}))
    except ModelError:
        raise
    except Exception as error:  # fields and files are anyone's, and each model fails in its own way
        first = " ".join(str(error).split())[:200]
        raise ModelError(f"timm cannot make `{source}`: {first} (give timm/NAME, or a timm directory)") from None
    return model.eval()


def write_timm_config(model: nn.Module, directory: Path, *, quantization: Mapping[str, Any]) -> None:
    """timm's config.json with the layout of the packed layers added, which timm ignores."""
    hub = require("timm.models._hub", extra="timm", purpose="saving a timm model")
    path = directory / "config.json"
    hub.save_config_for_hf(model, str(path))
    write_json(path, {**read_json(path), "quantization_config": quantization})


@dataclass(frozen=True, slots=True)
class TimmProcessor:
    """timm's evaluation transform: resize, crop in the center, normalize."""

    height: int
    width: int
    crop_pct: float
    squash: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module) -> TimmProcessor:
        """What ``pretrained_cfg`` says, with timm's defaults; the size is that of the model's position embedding."""
        cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
        return cls(
            height=int(size[0]),
            width=int(size[1]),
            crop_pct=cfg.get("crop_pct") or 0.875,
            squash=cfg.get("crop_mode") == "squash",
            interpolation=cfg.get("interpolation") or "bilinear",
            mean=tuple(cfg.get("mean") or (0.485, 0.456, 0.406)),
            std=tuple(cfg.get("std") or (0.229, 0.224, 0.225)),
        )

    def __call__(self, images: Iterable[Image.Image], *, return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self._pixels(image.convert("RGB")) for image in images])}

    def _pixels(self, image: Image.Image) -> Tensor:
        height, width = (math.floor(size / self.crop_pct) for size in (self.height, self.width))
        if not self.squash:
            scale = max(height / image.height, width / image.width)
            height, width = max(height, int(image.height * scale)), max(width, int(image.width * scale))
        resized = image.resize((width, height), _MODES.get(self.interpolation, Image.Resampling.BICUBIC))
        left, top = round((width - self.width) / 2), round((height - self.height) / 2)
        cropped = resized.crop((left, top, left + self.width, top + self.height))
        pixels = torch.from_numpy(np.array(cropped, dtype=np.float32) / 255)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)


@dataclass(frozen=True, slots=True)
class PixelBatches:
    """The pixels of image batches alone, as timm models are called."""

    batches: Any

    @property
    def same_every_pass(self) -> bool:
        return bool(getattr(self.batches, "same_every_pass", False))

    @property
    def description(self) -> dict[str, Any]:
        return dict(self.batches.description)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (batch["pixel_values"] for batch in self.batches)

    def only(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        return (batch["pixel_values"] for batch in self.batches.only(numbers))
