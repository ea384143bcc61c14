"""One is singular wherever a count is told."""

from __future__ import annotations

import pytest

from vllm_flow.counts import counted
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.layout import ImageSpans, TokenLayout
from vllm_flow.policy import FlowPolicy, Stage


def test_one_is_singular_and_none_is_plural() -> None:
    told = [counted(count, "image") for count in (0, 1, 2)]
    assert told == ["0 images", "1 image", "2 images"]
    told = [counted(count, "answer is", "answers are") for count in (0, 1, 2)]
    assert told == ["0 answers are", "1 answer is", "2 answers are"]


def test_a_storage_group_of_one_layer() -> None:
    assert (
        FlowSettings.read({"group_layers": 1}, EngineFacts(1)).storage
        == "1 storage group of 1 layer"
    )
    assert (
        FlowSettings.read({"group_layers": 2}, EngineFacts(4)).storage
        == "2 storage groups of 2 layers"
    )
    assert FlowSettings.read({}, EngineFacts(1)).summary.startswith(
        "1 decoder layer, 1 storage group"
    )


def test_a_policy_for_another_number_of_images() -> None:
    image = ImageSpans.from_ranges([(0, 4)])
    two = FlowPolicy(((Stage(1),), (Stage(2),)))
    with pytest.raises(ValueError, match=r"for 2 images, but there is 1$"):
        TokenLayout.of(two, image)
