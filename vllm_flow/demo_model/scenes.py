"""Composes scenes: things on a background, some of them several times, and signs.

A scene is fully decided by its seed, the palette and the style, so that training and held-out scenes
are kept apart by their seeds (``TRAIN_SEEDS``, ``HELDOUT_SEEDS``). Knows nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from vllm_flow.demo_model.backgrounds import (
    cropped_background,
    procedural_background,
    unseen_background,
)
from vllm_flow.demo_model.facts import Box, Facts, Sign, Thing
from vllm_flow.demo_model.signs import Plate, draw_plate
from vllm_flow.demo_model.vocabulary import CLASSES, INDEX, KIND_OF, WORD_INDEX, WORDS

SIZE = 168
"""Side of a scene in pixels."""
PATCH = 14
GRID = SIZE // PATCH
"""Patches per side: the vision tower's 144 image tokens."""
LABELS = (*CLASSES, *WORDS)
"""What a patch may show: a thing of a class, or part of a sign with a word."""
BACKGROUND = len(LABELS)
"""Patch label of a patch that nothing covers."""
NO_LETTER = 26

TRAIN_SEEDS = range(0, 2_000_000_000)
HELDOUT_SEEDS = range(3_000_000_000, 3_001_000_000)

SIDES = {1: (64, 112), 2: (54, 92), 3: (48, 78), 4: (44, 66), 5: (42, 58)}
"""Number of things and signs -> least and greatest longer side of a thing in pixels."""


@dataclass(frozen=True)
class Palette:
    """What scenes are made of."""

    sprites: Mapping[str, Sequence[Image.Image]]
    """Class name -> RGBA cut-outs; classes without one are not drawn."""
    photos: Sequence[Image.Image] = ()
    """Photographs for backgrounds."""
    photo_share: float = 0.0
    """Share of scenes with a photograph behind."""
    unseen_backgrounds: bool = False
    """Draw patterns that training never shows instead of the usual ones."""


@dataclass(frozen=True)
class Style:
    """How scenes are laid out; the shares are probabilities."""

    sign_share: float = 0.5
    """Scenes of things that also have a sign."""
    page_share: float = 0.0
    """Scenes of signs: two to four of them, and at most one thing."""
    repeat_share: float = 0.45
    """Scenes in which one of the classes comes two to four times."""
    kind_share: float = 0.5
    """Scenes whose things are all of one kind, as things that belong together often are."""
    rough: bool = False
    """Things may overlap, be cut off by the edge, blurred and partly covered, as in training."""


@dataclass(frozen=True)
class Scene:
    """A composed picture and what is known about it."""

    image: Image.Image
    facts: Facts
    patches: np.ndarray
    """[GRID, GRID] int64: index into ``LABELS`` of what covers the patch, or ``BACKGROUND``."""
    letters: np.ndarray
    """[GRID, GRID] int64: the letter that covers most of the patch, or ``NO_LETTER``."""
    centres: np.ndarray
    """[GRID, GRID] bool: whether a thing's middle is in the patch."""


def compose(seed: int, palette: Palette, style: Style) -> Scene:
    """The scene of ``seed``."""
    rng = random.Random(seed)
    canvas = _background(rng, palette)
    names, words = _contents(rng, palette, style)
    # Which thing owns a pixel: 0 none, then things and signs by number from 1.
    owner = np.zeros((SIZE, SIZE), dtype=np.int16)
    letters = np.full((SIZE, SIZE), NO_LETTER, dtype=np.int16)
    labels, taken = [BACKGROUND], []
    for word in words:
        plate = draw_plate(rng, word)
        spot = _spot(rng, plate.image.size, taken, rough=False, tries=24)
        if spot is None:
            continue
        taken.append(_claim(canvas, owner, plate.image, spot, len(labels)))
        _claim_letters(letters, plate, spot)
        labels.append(len(CLASSES) + WORD_INDEX[word])
    least, most = SIDES[min(5, len(names) + len(labels) - 1)] if names else (0, 0)
    for name in names:
        side = rng.randint(least, most)
        for attempt in range(6):
            sprite = vary(rng, rng.choice(palette.sprites[name]), side, style.rough)
            loose = style.rough or attempt == 5
            spot = _spot(rng, sprite.size, taken, style.rough, tries=12, least=not loose)
            if spot is not None:
                break
            side = max(38, int(side * 0.85))
        else:
            continue
        taken.append(_claim(canvas, owner, sprite, spot, len(labels)))
        labels.append(INDEX[name])
    if style.rough:
        canvas = _roughened(rng, canvas)
    return _scene(canvas, owner, letters, labels)


def _background(rng: random.Random, palette: Palette) -> Image.Image:
    if palette.photos and rng.random() < palette.photo_share:
        return cropped_background(rng, rng.choice(palette.photos), SIZE).convert("RGB")
    if palette.unseen_backgrounds:
        return unseen_background(rng, SIZE)
    return procedural_background(rng, SIZE).convert("RGB")


def _contents(rng: random.Random, palette: Palette, style: Style) -> tuple[list[str], list[str]]:
    """Names of the things (with repetitions, in the order they are drawn) and words of the signs."""
    known = [name for name in CLASSES if palette.sprites.get(name)]
    if rng.random() < style.page_share:
        return rng.sample(known, rng.randint(0, 1)), rng.sample(WORDS, rng.randint(2, 4))
    words = rng.sample(WORDS, 1) if rng.random() < style.sign_share else []
    if rng.random() < style.kind_share:
        kind = KIND_OF[rng.choice(known)]
        known = [name for name in known if KIND_OF[name] == kind]
    names = rng.sample(known, min(len(known), rng.choice((1, 2, 2, 3, 3, 4))))
    if rng.random() < style.repeat_share:
        names = names[:3]
        names += [names[0]] * rng.randint(1, min(3, 5 - len(names)))
    rng.shuffle(names)
    return names, words


def vary(rng: random.Random, sprite: Image.Image, side: int, rough: bool) -> Image.Image:
    """Scale to ``side`` (longer edge, pixels), rotate a little, mirror, stretch, change colours."""
    stretch = rng.uniform(0.85, 1.18)
    scale = side / max(sprite.size)
    size = (
        max(10, int(sprite.width * scale * stretch)),
        max(10, int(sprite.height * scale / stretch)),
    )
    out = sprite.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.6:
        out = out.rotate(rng.gauss(0, 10), Image.Resampling.BILINEAR, expand=True)
    alpha, rgb = out.getchannel("A"), out.convert("RGB")
    if rng.random() < 0.7:
        rgb = ImageEnhance.Brightness(rgb).enhance(rng.uniform(0.65, 1.35))
        rgb = ImageEnhance.Color(rgb).enhance(rng.uniform(0.4, 1.5) if rng.random() < 0.85 else 0.0)
        rgb = ImageEnhance.Contrast(rgb).enhance(rng.uniform(0.7, 1.3))
    if rough and rng.random() < 0.15:
        # A channel shuffle keeps shape and shading but breaks the colour: style must not decide.
        bands = list(rgb.split())
        rng.shuffle(bands)
        rgb = Image.merge("RGB", bands)
    if rough and rng.random() < 0.1:
        # Part of the thing is covered: parts must be enough.
        width, height = rgb.width // 3, rgb.height // 3
        hidden = Image.new("L", (width, height), 0)
        alpha.paste(hidden, (rng.randint(0, 2) * width, rng.randint(0, 2) * height))
    rgb.putalpha(alpha)
    return rgb


def _spot(
    rng: random.Random,
    size: tuple[int, int],
    taken: Sequence[Box],
    rough: bool,
    tries: int,
    least: bool = True,
) -> tuple[int, int] | None:
    """Left and top for a picture of ``size``: of several drawn places the one that overlaps least.

    None where more than 6 % would be covered (``rough``: 30 %), unless ``least`` is off.
    """
    width, height = size
    margin = 0.15 if rough and rng.random() < 0.25 else 0.0
    low_x, low_y = -int(width * margin), -int(height * margin)
    high_x, high_y = max(low_x, SIZE - width - low_x), max(low_y, SIZE - height - low_y)
    best, spot = 2.0, (low_x, low_y)
    for _ in range(tries):
        x, y = rng.randint(low_x, high_x), rng.randint(low_y, high_y)
        worst = max((_overlap((x, y, x + width, y + height), box) for box in taken), default=0.0)
        if worst < best:
            best, spot = worst, (x, y)
        if best == 0.0:
            break
    return None if least and best > (0.3 if rough else 0.06) else spot


def _overlap(one: Box, other: Box) -> float:
    """Shared area over the smaller one's."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / min(areas)


def _claim(
    canvas: Image.Image, owner: np.ndarray, picture: Image.Image, spot: tuple[int, int], number: int
) -> Box:
    """Paste ``picture`` at ``spot`` and give it its pixels; returns its box on the canvas."""
    canvas.paste(picture, spot, picture)
    x, y = spot
    mask = np.asarray(picture.getchannel("A")) > 96
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + mask.shape[0], SIZE), min(x + mask.shape[1], SIZE)
    owner[top:bottom, left:right][mask[top - y : bottom - y, left - x : right - x]] = number
    return (left, top, right, bottom)


def _claim_letters(letters: np.ndarray, plate: Plate, spot: tuple[int, int]) -> None:
    x, y = spot
    top, bottom = max(y, 0), max(y + plate.image.height, 0)
    letters[top:bottom, max(x, 0) : max(x + plate.image.width, 0)] = NO_LETTER
    for letter, start, end in plate.letters:
        letters[top:bottom, max(0, round(x + start)) : max(0, round(x + end))] = letter


def _roughened(rng: random.Random, canvas: Image.Image) -> Image.Image:
    if rng.random() < 0.2:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.3:
        canvas = ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.2:
        canvas = ImageEnhance.Color(canvas).enhance(rng.uniform(0.3, 1.4))
    return canvas


def _scene(
    canvas: Image.Image, owner: np.ndarray, letters: np.ndarray, labels: Sequence[int]
) -> Scene:
    """Boxes and patch labels of what is to be seen in ``owner``."""
    things, signs = [], []
    centres = np.zeros((GRID, GRID), dtype=bool)
    share = np.zeros((len(labels), GRID, GRID), dtype=np.int64)
    for number, label in enumerate(labels[1:], start=1):
        mine = owner == number
        share[number] = tiles(mine).sum((2, 3))
        rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        if not len(rows):
            continue
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        if label < len(CLASSES):
            things.append(Thing(CLASSES[label], box))
            centres[(box[1] + box[3]) // 2 // PATCH, (box[0] + box[2]) // 2 // PATCH] = True
        else:
            signs.append(Sign(WORDS[label - len(CLASSES)], box))
    covered = share.sum(0) >= PATCH * PATCH / 4
    patches = np.where(covered, np.asarray(labels)[share.argmax(0)], BACKGROUND)
    return Scene(
        canvas, Facts(tuple(things), tuple(signs)), patches, _letter_labels(letters), centres
    )


def tiles(pixels: np.ndarray) -> np.ndarray:
    """[SIZE, SIZE] -> [GRID, GRID, PATCH, PATCH]."""
    return pixels.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2)


def _letter_labels(letters: np.ndarray) -> np.ndarray:
    """[GRID, GRID]: the letter in most of a patch's columns, where letters are in a third of it."""
    flat = tiles(letters).reshape(GRID * GRID, PATCH * PATCH)
    counts = np.zeros((GRID * GRID, NO_LETTER + 1), dtype=np.int64)
    for letter in np.unique(letters):
        counts[:, letter] = (flat == letter).sum(1)
    there = counts[:, :NO_LETTER]
    found = there.sum(1) >= PATCH * PATCH / 3
    return np.where(found, there.argmax(1), NO_LETTER).reshape(GRID, GRID)
