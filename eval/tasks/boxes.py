"""Boxes in answers: how each family of models writes one, brought to pixels of the picture. (pure)

Supported conventions, with where they are told:

- `llava` (LLaVA-1.5): `[x1, y1, x2, y2]` as shares of the picture padded to a square, which is what the model
  sees (LLaVA's issue 606). lmms-eval takes them for shares of the picture itself, which is right only for
  square pictures;
- `internvl`: `[[x1, y1, x2, y2]]` in thousandths of width and height (InternVL's documentation, grounding);
- `qwen`: `(x1,y1),(x2,y2)` in thousandths (Qwen2-VL's model card). The first Qwen-VL's script divides by 999;
- `qwen3`: `"bbox_2d": [x1, y1, x2, y2]` in thousandths (Qwen3-VL's cookbook on 2D grounding).

Not supported: Qwen2.5-VL, which writes pixels of a picture whose size its processor chose, and families
without boxes. Points and several boxes are not scored: the first box counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
IN_BRACKETS = re.compile(r"\[" + ",".join([NUMBER] * 4) + r"\]")
IN_PAIRS = re.compile(
    r"\(" + ",".join([NUMBER] * 2) + r"\)\s*,\s*\(" + ",".join([NUMBER] * 2) + r"\)"
)


class Box(NamedTuple):
    """Corners, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


Place = Callable[[Box, float, float], Box]


def _of_square(box: Box, width: float, height: float) -> Box:
    side = max(width, height)
    across, down = (side - width) // 2, (side - height) // 2
    return Box(
        box.left * side - across,
        box.top * side - down,
        box.right * side - across,
        box.bottom * side - down,
    )


def _thousandths(box: Box, width: float, height: float) -> Box:
    return Box(
        box.left * width / 1000,
        box.top * height / 1000,
        box.right * width / 1000,
        box.bottom * height / 1000,
    )


CONVENTIONS: Mapping[str, tuple[re.Pattern[str], Place]] = {
    "llava": (IN_BRACKETS, _of_square),
    "internvl": (IN_BRACKETS, _thousandths),
    "qwen": (IN_PAIRS, _thousandths),
    "qwen3": (IN_BRACKETS, _thousandths),
}


def parse_box(text: str, convention: str, width: float, height: float) -> Box | None:
    """The first box of an answer in pixels of a picture of that size; None where there is none."""
    pattern, place = CONVENTIONS[convention]
    found = pattern.search(text)
    return place(Box(*map(float, found.groups())), width, height) if found else None


def overlap(one: Box, other: Box) -> float:
    """Intersection over union; 0 for a box whose corners are not in order, which has nothing in common with any."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / (area(one) + area(other) - both)


def area(box: Box) -> float:
    """In square pixels, of a box whose corners are in order."""
    return (box.right - box.left) * (box.bottom - box.top)
