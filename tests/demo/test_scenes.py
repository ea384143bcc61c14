"""Scenes are decided by their seed, label what they show, and are kept apart by range of seeds."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vllm_flow.demo.classes import CLASSES
from vllm_flow.demo.scenes import BACKGROUND, GRID, HELDOUT_SEEDS, TRAIN_SEEDS, compose


@pytest.fixture(scope="module")
def sprites() -> dict[str, list[Image.Image]]:
    """One disc per class stands for its drawings."""
    disc = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(disc).ellipse((0, 0, 63, 63), fill=(200, 30, 30, 255))
    return {name: [disc] for name in CLASSES}


def test_same_seed_same_scene(sprites: dict[str, list[Image.Image]]) -> None:
    one, two, other = (compose(seed, sprites) for seed in (5, 5, 6))
    assert one.objects == two.objects and (one.patches == two.patches).all()
    assert one.image.tobytes() == two.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_patches_show_only_the_scenes_objects(
    seed: int, sprites: dict[str, list[Image.Image]]
) -> None:
    scene = compose(seed, sprites, gentle=True)
    assert scene.patches.shape == (GRID, GRID)
    assert 1 <= len(scene.objects) <= 4
    shown = {CLASSES[i] for i in np.unique(scene.patches) if i != BACKGROUND}
    assert shown == set(scene.objects)  # held-out scenes hide nothing


def test_named_objects_are_used(sprites: dict[str, list[Image.Image]]) -> None:
    assert compose(1, sprites, objects=["tree", "dog"]).objects == ("dog", "tree")


def test_training_never_draws_heldout_seeds() -> None:
    common = pytest.importorskip("vllm_flow.demo.training.common")
    budget = common.Budget()
    drawn = [
        range(
            common.VISION_SEED,
            common.VISION_SEED + sum(budget.vision_steps) * budget.vision_batch,
        ),
        range(
            common.PROJECTOR_SEED,
            common.PROJECTOR_SEED + budget.projector_steps * budget.projector_batch,
        ),
        range(common.LORA_SEED, common.LORA_SEED + 60_000_000),
        range(common.SMALL_SEED, common.SMALL_SEED + budget.small_steps * budget.small_batch),
        range(common.CHECK_SEED, common.CHECK_SEED + 1000),
        range(common.POLISH_SEED, common.POLISH_SEED + 60_000_000),
    ]
    ends = [0] + [part.stop for part in drawn]
    assert all(part.start >= end for part, end in zip(drawn, ends, strict=False))  # no overlap
    assert drawn[-1].stop <= TRAIN_SEEDS.stop <= HELDOUT_SEEDS.start


@pytest.mark.parametrize("seed", range(20))
def test_boxes_hold_their_objects(seed: int, sprites: dict[str, list[Image.Image]]) -> None:
    scene = compose(seed, sprites, gentle=True)
    assert tuple(scene.boxes) == scene.objects
    side = scene.image.width // GRID
    for name, (left, top, right, bottom) in scene.boxes.items():
        assert 0 <= left < right <= scene.image.width and 0 <= top < bottom <= scene.image.height
        for row, column in np.argwhere(scene.patches == CLASSES.index(name)):
            assert left < (column + 1) * side and column * side < right
            assert top < (row + 1) * side and row * side < bottom
