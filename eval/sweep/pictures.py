"""What is done to an item's picture before the model's own processor sees it.

Knows PIL; nothing of tasks, policies or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

PREPARATIONS = ("pad", "plain")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""CLIP's channel means, for values in [0, 1]."""


def pad_to_square(image: Image, mean: Sequence[float] = CLIP_MEAN) -> Image:
    """The picture in the middle of a square of the mean colour (LLaVA-1.5's `expand2square`).

    The colour is truncated, not rounded, to whole values, and the smaller margin comes first, as
    in LLaVA's code: scores are compared with those it gave.
    """
    from PIL import Image as image_module

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = image_module.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare(image: Image, preparation: str) -> Image:
    """The picture as the model's processor is to see it; `preparation` is one of `PREPARATIONS`."""
    if preparation == "pad":
        return pad_to_square(image)
    if preparation == "plain":
        return image
    raise ValueError(f"image preparation {preparation!r}: it must be one of {PREPARATIONS}")
