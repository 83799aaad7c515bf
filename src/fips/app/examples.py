"""A few examples that a compressed model and its original are shown: how texts go on, what is in images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fips.app.page import Example, Side, sides_of
from fips.data import Batches

__all__ = ["examples_of"]

PROMPT_TOKENS, NEW_TOKENS = 48, 48
BEST = 5
PICTURE_SIDE = 192


def examples_of(models: Mapping[str, nn.Module], batches: Batches, processor: Any, *, count: int) -> list[Example]:
    """``count`` examples spread over ``batches``, and what the models, by name, say to them.

    A text is gone on with by the likeliest token each time; of an image the five likeliest classes are named. Other
    models, and language models that cannot generate, have no examples.
    """
    if batches.task not in ("causal-lm", "image-classification"):
        return []
    if batches.kind == "text" and not all(_can_generate(model) for model in models.values()):
        return []
    count = min(count, batches.num_samples)
    numbers = [index * batches.num_samples // count for index in range(count)]
    show = _text if batches.kind == "text" else _image
    rows = [(number, _row(batches, number)) for number in numbers]
    with torch.inference_mode():
        return [show(models, row, processor, batches, f"example {number + 1:,}") for number, row in rows]


def _can_generate(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", bool)())


def _row(batches: Batches, number: int) -> dict[str, Tensor]:
    """One example, by its number among all, as a batch of one."""
    for index, chunk in enumerate(batches.chunks):
        if number < len(chunk):
            (batch,) = batches.only([index])
            return {name: value[number : number + 1] for name, value in batch.items()}
        number -= len(chunk)
    raise IndexError(number)


def _text(
    models: Mapping[str, nn.Module], row: Mapping[str, Tensor], tokenizer: Any, batches: Batches, caption: str
) -> Example:
    ids = row["input_ids"][0]
    if "attention_mask" in row:
        ids = ids[row["attention_mask"][0].bool()]
    prompt = ids[: min(PROMPT_TOKENS, max(1, len(ids) // 2))][None]
    said = {}
    for name, model in models.items():
        place = next(model.parameters()).device
        generated = model.generate(  # type: ignore[operator]
            prompt.to(place), attention_mask=torch.ones_like(prompt, device=place), max_new_tokens=NEW_TOKENS,
            do_sample=False, num_beams=1, pad_token_id=0,
        )  # fmt: skip
        said[name] = tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)
    return Example(sides=sides_of(said), caption=caption, prompt=tokenizer.decode(prompt[0], skip_special_tokens=True))


def _image(
    models: Mapping[str, nn.Module], row: Mapping[str, Tensor], processor: Any, batches: Batches, caption: str
) -> Example:
    pixels, said = row["pixel_values"], {}
    names = _class_names(next(iter(models.values())), batches)
    for name, model in models.items():
        first = next(value for value in model.parameters() if value.is_floating_point())
        output = model(pixels.to(first.device, first.dtype))
        chances = getattr(output, "logits", output)[0].float().softmax(-1).cpu()
        best = chances.topk(min(BEST, len(chances)))
        lines = [
            f"{100 * chance:5.1f} %  {names.get(index, f'class {index}')}"
            for chance, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        said[name] = "\n".join(lines)
    if "labels" in row:
        label = int(row["labels"][0])
        caption = f"{caption}, {names.get(label, f'class {label}')}"
    sides = tuple(Side(name=name, same=text) for name, text in said.items())
    return Example(sides=sides, caption=caption, picture=_picture(pixels[0], processor))


def _class_names(model: nn.Module, batches: Batches) -> dict[int, str]:
    known = getattr(getattr(model, "config", None), "id2label", None) or {}
    return {int(index): str(name) for index, name in known.items()} | dict(enumerate(batches.class_names or ()))


def _picture(pixels_CHW: Tensor, processor: Any) -> str | None:
    """The pixels that the model saw, their normalization undone, as a ``data:`` address; None for other than colors."""
    if pixels_CHW.dim() != 3 or len(pixels_CHW) != 3:
        return None
    mean, std = (
        torch.tensor(getattr(processor, f"image_{name}", None) or getattr(processor, name, None) or [0.5] * 3)
        for name in ("mean", "std")
    )
    colors = (pixels_CHW.float() * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    image = Image.fromarray((255 * colors).round().to(torch.uint8).permute(1, 2, 0).numpy())
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=80)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
