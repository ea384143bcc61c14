"""Scenes of the demo model: decided by their seed, and their labels true to what was drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.demo_model.sprites import drawn_palette
from vllm_flow.demo_model.facts import Facts
from vllm_flow.demo_model.scenes import (
    BACKGROUND,
    GRID,
    HELDOUT_SEEDS,
    LABELS,
    NO_LETTER,
    PATCH,
    SIZE,
    TRAIN_SEEDS,
    Palette,
    Scene,
    Style,
    compose,
)
from vllm_flow.demo_model.signs import LETTERS
from vllm_flow.demo_model.training import budget, sources
from vllm_flow.demo_model.vocabulary import CLASSES, INDEX, KIND_OF, KINDS, WORDS

PALETTE = drawn_palette()
STYLES = {
    "calm": Style(),
    "rough": Style(rough=True),
    "page": Style(page_share=1.0),
    "signs": Style(sign_share=1.0, page_share=0.0),
}
seeds = st.integers(0, 10**6)
styles = st.sampled_from(list(STYLES))


def made(seed: int, style: str = "calm", palette: Palette = PALETTE) -> Scene:
    return compose(seed, palette, STYLES[style])


def patch_of(x: float, y: float) -> tuple[int, int]:
    return min(GRID - 1, int(y) // PATCH), min(GRID - 1, int(x) // PATCH)


@settings(max_examples=25, deadline=None)
@given(seeds, styles)
def test_the_seed_decides_everything(seed: int, style: str) -> None:
    one, two = made(seed, style), made(seed, style)
    assert one.image.tobytes() == two.image.tobytes()
    assert one.facts == two.facts
    assert (one.patches == two.patches).all() and (one.letters == two.letters).all()
    assert one.image.tobytes() != made(seed + 1, style).image.tobytes()


@settings(max_examples=60, deadline=None)
@given(seeds, styles)
def test_labels_are_those_of_the_facts(seed: int, style: str) -> None:
    scene = made(seed, style)
    known = {INDEX[name] for name in scene.facts.objects}
    known |= {LABELS.index(sign.word) for sign in scene.facts.signs}
    assert set(np.unique(scene.patches)) - {BACKGROUND} <= known
    assert scene.image.size == (SIZE, SIZE) and scene.patches.shape == (GRID, GRID)
    for thing in scene.facts.things:
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
        assert scene.centres[patch_of((left + right) // 2, (top + bottom) // 2)]
    assert scene.centres.sum() <= len(scene.facts.things)
    assert set(np.unique(scene.letters)) <= set(range(NO_LETTER + 1))
    letters = {LETTERS.index(letter) for sign in scene.facts.signs for letter in sign.word}
    assert set(scene.letters[scene.letters != NO_LETTER]) <= letters


def overlaps(scene: Scene) -> list[float]:
    """Of every two things, the shared part of the smaller one's box."""
    found = []
    boxes = [thing.box for thing in scene.facts.things]
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            width = min(one[2], other[2]) - max(one[0], other[0])
            height = min(one[3], other[3]) - max(one[1], other[1])
            areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
            found.append(max(0, width) * max(0, height) / min(areas))
    return found


def test_calm_scenes_keep_things_apart_and_rough_ones_do_not() -> None:
    calm, rough = (
        [share for seed in range(200) for share in overlaps(made(seed, style))]
        for style in ("calm", "rough")
    )
    assert sum(share > 0.1 for share in calm) / len(calm) < 0.01
    assert sum(share > 0.1 for share in rough) / len(rough) > 0.02
    assert max(calm) < 0.25


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_thing_owns_the_patch_in_its_middle(seed: int) -> None:
    scene = made(seed)
    for thing in scene.facts.things:
        row, column = patch_of(thing.middle, (thing.box[1] + thing.box[3]) / 2)
        if min(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]) >= 3 * PATCH:
            assert scene.patches[row, column] == INDEX[thing.name]


def test_what_scenes_hold_follows_the_style() -> None:
    scenes = [made(seed, "signs") for seed in range(300)]
    assert sum(len(scene.facts.signs) == 1 for scene in scenes) > 290
    assert {len(scene.facts.things) for scene in scenes} == {1, 2, 3, 4, 5}
    repeated = [scene for scene in scenes if max(scene.facts.counts.values()) > 1]
    assert 0.35 < len(repeated) / 300 < 0.55
    assert {max(scene.facts.counts.values()) for scene in scenes} == {1, 2, 3, 4}
    one_kind = sum(len({KIND_OF[n] for n in s.facts.objects}) == 1 for s in scenes)
    assert 0.5 < one_kind / 300 < 0.85
    pages = [made(seed, "page") for seed in range(100)]
    assert all(len(page.facts.things) <= 1 for page in pages)
    assert {len(page.facts.signs) for page in pages} >= {2, 3, 4}
    seen = {name for scene in scenes for name in scene.facts.objects}
    assert len(seen) > 0.9 * len(CLASSES)


def test_classes_without_a_sprite_are_not_drawn() -> None:
    palette = drawn_palette(("dog", "zebra"))
    names = {name for seed in range(40) for name in made(seed, "rough", palette).facts.objects}
    assert names == {"dog", "zebra"}


def test_unseen_backgrounds_differ_from_the_usual_ones() -> None:
    strange = Palette(PALETTE.sprites, unseen_backgrounds=True)
    assert made(5).image.tobytes() != made(5, palette=strange).image.tobytes()


def test_training_and_heldout_seeds_do_not_meet() -> None:
    assert TRAIN_SEEDS.stop <= HELDOUT_SEEDS.start
    spent = budget.Budget()
    ranges = [
        (budget.VISION_SEED, spent.vision_steps * spent.vision_batch),
        (budget.PROJECTOR_SEED, spent.projector_steps * spent.projector_batch),
        (budget.LORA_SEED, spent.lora_steps * spent.lora_batch),
        (budget.CHECK_SEED, 10_000),
        (budget.SMALL_SEED, spent.small_steps * spent.small_batch),
    ]
    for (first, count), (after, _) in zip(ranges, ranges[1:], strict=False):
        assert first + count <= after
    assert ranges[-1][0] + ranges[-1][1] <= TRAIN_SEEDS.stop


@given(seeds, styles)
@settings(max_examples=25, deadline=None)
def test_facts_survive_json(seed: int, style: str) -> None:
    facts = made(seed, style).facts
    assert Facts.from_json(facts.as_json()) == facts


def test_the_vocabulary_is_sound() -> None:
    assert len(set(LABELS)) == len(LABELS) == len(CLASSES) + len(WORDS)
    assert 60 <= len(CLASSES) <= 80
    assert sum(map(len, KINDS.values())) == len(CLASSES)
    assert all(word.isalpha() and word.islower() for word in WORDS)


@pytest.mark.parametrize("table", ["EMOJI", "PHOTOS", "STAMPS", "CLIPART"])
def test_sources_name_known_classes_once(table: str) -> None:
    sources_of = getattr(sources, table)
    assert set(sources_of) <= set(CLASSES)
    files = [file for names in sources_of.values() for file in names.split()]
    assert len(files) == len(set(files))
    if table == "EMOJI":
        assert set(sources_of) == set(CLASSES)


@given(st.lists(st.text("ab", min_size=1), unique=True, max_size=30))
def test_a_quarter_of_the_photos_is_held_out_and_some_remain(names: list[str]) -> None:
    held = sources.held_out(names)
    assert set(held) <= set(names)
    if names:
        assert set(held) != set(names)
    if len(names) >= 2:
        assert held and abs(len(held) - len(names) / 4) <= 1
