"""Ranks by what the patches of the vision tower receive: who has them, who pays for them, and who is refused them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from tests.engine.cases import (
    LONG,
    NEXT,
    SIGLIP,
    SIGLIP_NEXT,
    Ask,
    one_image,
    text_only,
    two_images,
)
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.test_tower_ranks import encoded_pictures, encodings
from tests.engine.tiny_llava import Shape
from vllm_flow.engine import scored_pictures
from vllm_flow.engine.front_end import fitting
from vllm_flow.engine.obstacles import Obstacle
from vllm_flow.engine.requests import layout_of
from vllm_flow.engine.scored_pictures import MERGING_MARK, NAME_MARK
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.worker.tower import scores as tower_scores
from vllm_flow.engine.worker.tower.attention import received_attention
from vllm_flow.policy_keys import parse_policy

RECEIVED = (
    "0:50% received_attention",
    "2:30% received_attention, 3:0",
    "1:75% uniform, 3:30% received_attention",
)


def received_asks(seed: int) -> list[Ask]:
    """One image and two, beside requests that rank otherwise."""
    asks = [replace(one_image(seed + n), stages=stages) for n, stages in enumerate(RECEIVED)]
    return [
        *asks,
        replace(two_images(seed + 5), stages=RECEIVED[0]),
        replace(two_images(seed + 7), stages=("0:9 received_attention", "2:0")),
        one_image(seed + 9, 2),
        one_image(seed + 10),
        replace(text_only(4), stages=RECEIVED[0]),
    ]


@pytest.mark.parametrize("shape", [SIGLIP, LONG, SIGLIP_NEXT, NEXT], ids=lambda shape: shape.name)
def test_what_patches_receive_is_exact(open_engine: OpenEngine, shape: Shape) -> None:
    """With a class token and without one, of pictures and of tiles."""
    engine = open_engine(shape, 2)
    asks = received_asks(370)
    assert_exact(engine, asks, engine.run(asks))
    engine.check_idle()


def test_who_asks_for_what_patches_receive_has_pictures_encoded_for_it(
    open_engine: OpenEngine,
) -> None:
    """Nobody pays for it where nobody asks, and pictures that others had encoded without it serve nobody by mistake."""
    engine = open_engine(SIGLIP, 2)
    first = one_image(390)
    later = [replace(first, stages=stages) for stages in RECEIVED[:2]]
    scored = "vllm_flow.engine.worker.tower.attention.received_attention"
    with encodings() as encoded, mock.patch(scored, side_effect=received_attention) as counted:
        assert_exact(engine, [first], engine.run([first]))
        assert (encoded.call_count, counted.call_count) == (1, 0)
        assert_exact(engine, later[:1], engine.run(later[:1]))
        assert (encoded.call_count, counted.call_count) == (2, 1)
        again = [*later, replace(first, prompt=f"{first.prompt} w1"), replace(first, cliff=1)]
        assert_exact(engine, again, engine.run(again))
        assert (encoded.call_count, counted.call_count) == (2, 1)
        assert_exact(engine, [one_image(391)], engine.run([one_image(391)]))
        assert (encoded.call_count, counted.call_count) == (3, 1)
    names = encoded_pictures(engine)
    assert {hasattr(p, tower_scores.SCORES_FIELD) for n, p in names.items() if NAME_MARK in n} == {
        True
    }
    assert sum(NAME_MARK in name for name in names) < len(names)


def test_a_tower_without_a_class_token_is_refused_the_ranks_by_it(open_engine: OpenEngine) -> None:
    """Per request, with the rank that is in their place."""
    engine = open_engine(SIGLIP, 2)
    others = "'uniform' or 'random' or 'diversity' or 'received_attention' or 'holov_received' or 'visionzip_received'"
    by_class = ("cls_attention", "cls_diverse", "scope", "holov", "hired", "visionzip", "prumerge")
    for rank in by_class:
        with pytest.raises(
            ValueError,
            match=rf"flow_stages.*'{rank}' reads the attention of the vision tower's class token, and this model's "
            rf"tower, a SiglipVisionModel, has no such token; rank by {others} .*",
        ):
            engine.run([replace(one_image(395), stages=f"0:9 {rank}")])
        engine.check_idle()


def feature(modality: str, offset: int, name: str, mm_hash: str | None = None) -> Any:
    """An input of 36 tokens."""
    return MultiModalFeatureSpec(None, modality, name, PlaceholderRange(offset, 36), mm_hash)


def asked(stages: str, *features: Any) -> tuple[Any, Any]:
    """A policy of such stages, and its layout of a prompt with such inputs."""
    policy = parse_policy({"flow_stages": stages}, SIGLIP.layers)
    return policy, layout_of(policy, features, SIGLIP.layers, 200)


def test_names_tell_apart_what_is_encoded_with_another_score() -> None:
    """Once, whatever else a request brings; its pixels are found by the name that they have."""
    features = [feature("image", 1, "a", "b"), feature("audio", 50, "c"), feature("image", 99, "d")]
    _, layout = asked("1:50% uniform, 2:9 received_attention", *features)
    found = scored_pictures.named(features, layout)
    names = [(one.identifier, one.mm_hash) for one in found]
    assert names == [(f"{NAME_MARK}a", "b"), ("c", None), (f"{NAME_MARK}d", "d")]
    assert [one.identifier for one in features] == ["a", "c", "d"]
    assert scored_pictures.named(found, layout) == found
    for stages, mark in (
        ("0:9 visionzip", MERGING_MARK),
        ("0:9 visionzip_received", NAME_MARK + MERGING_MARK),
        ("0:9 prumerge, 2:5 received_attention", NAME_MARK + MERGING_MARK),
    ):
        _, layout = asked(stages, *features)
        found = scored_pictures.named(features, layout)
        assert [one.identifier for one in found] == [f"{mark}a", "c", f"{mark}d"]
        assert scored_pictures.named(found, layout) == found
    for stages in ("0:50% cls_attention", "2:0", "0:64 received_attention, 2:0"):
        _, layout = asked(stages, *features)
        assert scored_pictures.named(features, layout) == features


def test_videos_are_refused(open_engine: OpenEngine) -> None:
    settings = FlowSettings.of(open_engine(SIGLIP, 2).llm.llm_engine.vllm_config)
    assert settings is not None
    pictures = [feature("image", 1, "a"), feature("video", 99, "b")]
    _, layout = asked("0:50% received_attention", *pictures)
    with pytest.raises(
        Obstacle, match="a video's frames compare; send frames as single pictures, or"
    ):
        fitting.check_encoded(layout, settings.engine, pictures)
    fitting.check_encoded(layout, settings.engine, pictures[:1])
    _, other = asked("0:50% diversity", *pictures)
    fitting.check_encoded(other, settings.engine, pictures)
