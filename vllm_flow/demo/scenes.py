"""Composes scenes: one to four known objects pasted on a background. Knows nothing of models.

A scene is fully decided by its seed and the sprites it may use, so that training and held-out
scenes are kept apart by their seeds (``TRAIN_SEEDS``, ``HELDOUT_SEEDS``).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from vllm_flow.demo.classes import CLASSES, in_order

IMAGE_SIZE = 112
"""Side of a scene in pixels."""
GRID = 8
"""Patches per side (patch 14): the vision tower's 64 image tokens."""
BACKGROUND = len(CLASSES)
"""Patch label of a patch that no object covers."""

TRAIN_SEEDS = range(0, 1_000_000_000)
HELDOUT_SEEDS = range(2_000_000_000, 2_000_100_000)

Sprites = Mapping[str, Sequence[Image.Image]]
"""Class name -> RGBA cut-outs, trimmed to their content."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are one past the last."""


@dataclass(frozen=True)
class Scene:
    """A composed picture and what is known about it."""

    image: Image.Image
    objects: tuple[str, ...]
    """Distinct class names, in class order."""
    patches: np.ndarray
    """[GRID, GRID] int64: the class that covers most of the patch, or ``BACKGROUND``."""
    boxes: Mapping[str, Box] = field(default_factory=dict)
    """Class name -> the smallest box around the pixels where the object is to be seen."""


def procedural_background(rng: random.Random, size: int = IMAGE_SIZE) -> Image.Image:
    """A background drawn from numbers alone: gradients, low-frequency colour noise or bands."""
    kind = rng.random()
    npr = np.random.default_rng(rng.getrandbits(32))
    if kind < 0.3:
        a, b = (npr.integers(0, 256, 3) for _ in range(2))
        ramp = np.linspace(0, 1, size)[:, None, None]
        pixels = np.broadcast_to(a * (1 - ramp) + b * ramp, (size, size, 3))
        if rng.random() < 0.5:
            pixels = pixels.transpose(1, 0, 2)
    elif kind < 0.75:
        cells = rng.choice((2, 3, 5, 8, 14))
        coarse = npr.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        how = rng.choice(
            (Image.Resampling.BICUBIC, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
        )
        pixels = np.asarray(Image.fromarray(coarse).resize((size, size), how), dtype=np.float32)
        mean = pixels.mean((0, 1))
        pixels = mean + (pixels - mean) * rng.uniform(0.2, 0.9)
    else:
        colours = npr.integers(0, 256, (rng.randint(2, 5), 3))
        angle, period = rng.uniform(0, np.pi), rng.uniform(10, 60)
        yy, xx = np.mgrid[:size, :size]
        phase = (xx * np.cos(angle) + yy * np.sin(angle)) / period
        pixels = colours[np.floor(phase).astype(int) % len(colours)]
    noise = npr.normal(0, rng.choice((0, 0, 4, 12)) or 1e-3, (size, size, 1))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def cropped_background(
    rng: random.Random, photo: Image.Image, size: int = IMAGE_SIZE
) -> Image.Image:
    """A random square crop of a photograph, possibly mirrored."""
    side = int(min(photo.size) * rng.uniform(0.3, 1.0))
    x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    crop = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _vary(rng: random.Random, sprite: Image.Image, side: int) -> Image.Image:
    """Scale to ``side`` (longer edge, pixels), rotate a little, mirror, stretch, change colours."""
    stretch = rng.uniform(0.85, 1.18)
    scale = side / max(sprite.size)
    size = (
        max(6, int(sprite.width * scale * stretch)),
        max(6, int(sprite.height * scale / stretch)),
    )
    out = sprite.resize(size, Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        out = out.rotate(rng.gauss(0, 12), Image.Resampling.BILINEAR, expand=True)
    alpha, rgb = out.getchannel("A"), out.convert("RGB")
    if rng.random() < 0.7:
        rgb = ImageEnhance.Brightness(rgb).enhance(rng.uniform(0.65, 1.35))
        rgb = ImageEnhance.Color(rgb).enhance(rng.uniform(0.4, 1.5) if rng.random() < 0.85 else 0.0)
        rgb = ImageEnhance.Contrast(rgb).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.12:
        # A channel shuffle keeps shape and shading but breaks the colour: style must not decide.
        bands = list(rgb.split())
        rng.shuffle(bands)
        rgb = Image.merge("RGB", bands)
    rgb.putalpha(alpha)
    return rgb


def compose(
    seed: int,
    sprites: Sprites,
    photos: Sequence[Image.Image] = (),
    *,
    objects: Sequence[str] | None = None,
    photo_share: float = 0.3,
    gentle: bool = False,
) -> Scene:
    """Compose the scene of ``seed``.

    Objects are drawn without replacement (1 to 4) unless ``objects`` names them. ``gentle`` keeps
    objects at readable size and apart, as the held-out scenes do; training also crops and overlaps.
    """
    rng = random.Random(seed)
    names = (
        list(objects)
        if objects is not None
        else rng.sample(CLASSES, rng.choice((1, 2, 2, 3, 3, 4)))
    )
    canvas = (
        cropped_background(rng, rng.choice(photos))
        if photos and rng.random() < photo_share
        else procedural_background(rng)
    )
    canvas = canvas.convert("RGB")
    owner = np.full((IMAGE_SIZE, IMAGE_SIZE), BACKGROUND, dtype=np.int64)
    # Cells of a 2 x 2 layout keep objects mostly apart; a single object may fill the picture.
    cells = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], len(names))
    for name, (row, column) in zip(names, cells, strict=True):
        most = {1: 100, 2: 66}.get(len(names), 54)
        side = rng.randint(42 if gentle else 34, most)
        sprite = _vary(rng, rng.choice(sprites[name]), side)
        half, jitter = IMAGE_SIZE // 2, 4 if gentle else 10
        if len(names) == 1:
            room = max(1, IMAGE_SIZE - side)
            x, y = rng.randint(0, room), rng.randint(0, room)
        else:
            x = column * half + (half - sprite.width) // 2 + rng.randint(-jitter, jitter)
            y = row * half + (half - sprite.height) // 2 + rng.randint(-jitter, jitter)
        canvas.paste(sprite, (x, y), sprite)
        _claim(owner, np.asarray(sprite.getchannel("A")) > 96, x, y, CLASSES.index(name))
    if not gentle and rng.random() < 0.2:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return Scene(canvas, tuple(in_order(names)), _patch_labels(owner), _boxes(owner, names))


def _boxes(owner: np.ndarray, names: Sequence[str]) -> dict[str, Box]:
    """The box of each named class in ``owner``, in class order; none for one that is hidden."""
    found = {}
    for name in in_order(names):
        rows, columns = np.nonzero(owner == CLASSES.index(name))
        if len(rows):
            found[name] = (
                int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
            )  # fmt: skip
    return found


def _claim(owner: np.ndarray, mask: np.ndarray, x: int, y: int, label: int) -> None:
    """Mark in ``owner`` the pixels that a sprite with ``mask`` at (x, y) covers."""
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + mask.shape[0], owner.shape[0]), min(x + mask.shape[1], owner.shape[1])
    if bottom > top and right > left:
        owner[top:bottom, left:right][mask[top - y : bottom - y, left - x : right - x]] = label


def _patch_labels(owner: np.ndarray) -> np.ndarray:
    """[GRID, GRID]: the class with most pixels in a patch where objects cover a quarter of it."""
    side = IMAGE_SIZE // GRID
    tiles = owner.reshape(GRID, side, GRID, side).swapaxes(1, 2).reshape(GRID, GRID, -1)
    counts = (tiles[..., None] == np.arange(len(CLASSES))).sum(axis=2)
    covered = counts.sum(axis=-1) >= side * side / 4
    return np.where(covered, counts.argmax(axis=-1), BACKGROUND)
