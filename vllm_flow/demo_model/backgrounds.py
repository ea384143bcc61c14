"""Backgrounds of scenes: drawn from numbers, or cropped from a photograph. Knows no things."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image


def procedural_background(rng: random.Random, size: int) -> Image.Image:
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


def cropped_background(rng: random.Random, photo: Image.Image, size: int) -> Image.Image:
    """A random square crop of a photograph, possibly mirrored."""
    side = int(min(photo.size) * rng.uniform(0.3, 1.0))
    x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    crop = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def unseen_background(rng: random.Random, size: int) -> Image.Image:
    """Dots, rings or checks: patterns that ``procedural_background`` never draws."""
    npr = np.random.default_rng(rng.getrandbits(32))
    colours = npr.integers(0, 256, (2, 3))
    period = rng.uniform(12, 48)
    yy, xx = np.mgrid[:size, :size]
    kind = rng.randrange(3)
    if kind == 0:
        radius = period * rng.uniform(0.2, 0.4)
        chosen = np.hypot(xx % period - period / 2, yy % period - period / 2) < radius
    elif kind == 1:
        x, y = rng.uniform(0, size), rng.uniform(0, size)
        chosen = np.hypot(xx - x, yy - y) // (period / 2) % 2 == 0
    else:
        chosen = (xx // period + yy // period) % 2 == 0
    return Image.fromarray(colours[chosen.astype(int)].astype(np.uint8))
