"""Draws plates with words on them. Knows no scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono-Bold",
    "DejaVuSans-Oblique",
)  # fmt: skip
"""Fonts as matplotlib carries them: the same on every machine."""
SIZES = range(24, 37)
"""Font sizes in pixels."""
WIDEST = 156
"""A plate is no wider, in pixels: the font is made smaller until it fits."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Plate:
    """A drawn word."""

    image: Image.Image
    """RGBA."""
    letters: tuple[tuple[int, float, float], ...]
    """Per letter: its index in ``LETTERS``, its left and its right edge in pixels of the plate."""


@lru_cache(maxsize=256)
def font(name: str, size: int) -> Any:
    """One of matplotlib's fonts."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def draw_plate(rng: random.Random, word: str) -> Plate:
    """A plate of random colours, font, size and letter case; dark on light or light on dark."""
    text = rng.choice((word, word, word.upper(), word.upper(), word.capitalize()))
    name, size = rng.choice(FONTS), rng.choice(SIZES)
    pad = rng.randint(4, 9)
    while font(name, size).getlength(text) + 2 * pad > WIDEST:
        size -= 1
    face = font(name, size)
    left, top, right, bottom = face.getbbox(text)
    width, height = int(right - left) + 2 * pad, int(bottom - top) + 2 * pad
    light = tuple(rng.randint(185, 255) for _ in range(3))
    dark = tuple(rng.randint(0, 90) for _ in range(3))
    ground, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    border = rng.choice((0, 0, 2, 3))
    draw.rounded_rectangle(
        (0, 0, width - 1, height - 1),
        rng.choice((0, 4, 10)),
        ground,
        ink if border else None,
        max(1, border),
    )
    draw.text((pad - left, pad - top), text, ink, face)
    edges = [pad - left + face.getlength(text[:count]) for count in range(len(text) + 1)]
    letters = tuple(
        (LETTERS.index(letter), edges[number], edges[number + 1])
        for number, letter in enumerate(text.lower())
    )
    return Plate(image, letters)
