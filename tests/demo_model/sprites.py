"""Sprites drawn from numbers, one per class: the published ones are not in the repository."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from vllm_flow.demo_model.scenes import Palette
from vllm_flow.demo_model.training.sprites import Assets
from vllm_flow.demo_model.vocabulary import CLASSES


def drawn_palette(classes: tuple[str, ...] = CLASSES) -> Palette:
    """A palette of blobs."""
    sprites = {}
    for name in classes:
        rng = random.Random(name)
        image = Image.new("RGBA", (rng.randint(50, 112), rng.randint(50, 112)), (0, 0, 0, 0))
        colour = tuple(rng.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).ellipse((0, 0, image.width - 1, image.height - 1), (*colour, 255))
        sprites[name] = [image]
    return Palette(sprites)


PHOTOGRAPHED = ("dog", "zebra", "car", "guitar")


def drawn_assets() -> Assets:
    """Blobs for every set; held-out photo cut-outs of ``PHOTOGRAPHED`` alone."""
    every = dict(drawn_palette().sprites)
    photos = {**dict.fromkeys(every, []), **drawn_palette(PHOTOGRAPHED).sprites}
    return Assets(every, every, every, every, photos)
