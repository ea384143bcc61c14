"""The two halves of the cache of processed pictures stay equal, whatever is refused, dropped or reordered.

With vLLM's own engine half, on traffic drawn by hypothesis; then in an engine. tests/server/test_pictures.py
has the same over HTTP.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.multimodal.cache import LruKeyReplicatedReceiverCache, MultiModalCacheMissError
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from tests.engine.cases import GQA, Ask, one_image, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact
from vllm_flow.engine.front_end.processor_cache import SentPictures

GIB = 1 << 30
CAPACITY = 1000
"""Bytes: three small pictures; the largest fits nowhere."""
SIZES = (300, 300, 300, 300, 600, 1100)
UPDATES = ("placeholder",)


def model_config(capacity: int) -> Any:
    config = SimpleNamespace(mm_processor_cache_gb=capacity / GIB)
    return SimpleNamespace(get_multimodal_config=lambda: config)


def processed(picture: int) -> MultiModalKwargsItem:
    data = torch.full((SIZES[picture],), picture, dtype=torch.uint8)
    return MultiModalKwargsItem(
        {"pixel_values": MultiModalFieldElem(data=data, field=MultiModalBatchedField())}
    )


def render(cache: SentPictures, pictures: Sequence[int]) -> list[MultiModalFeatureSpec]:
    """What vLLM's processor does with the cache, in its order."""
    hashes = [str(picture) for picture in pictures]
    known = cache.is_cached(hashes)
    fresh = [
        None if one else processed(picture) for one, picture in zip(known, pictures, strict=True)
    ]
    features = []
    try:
        for mm_hash in hashes:
            cache.touch_sender_cache_item(mm_hash)
        for position, (mm_hash, item) in enumerate(zip(hashes, fresh, strict=True)):
            found, updates = cache.get_and_update_item(
                None if item is None else (item, UPDATES), mm_hash
            )
            assert updates == UPDATES
            features.append(feature(mm_hash, found, position))
    finally:
        cache.release_sender_touches()
    return features


def feature(
    mm_hash: str, item: MultiModalKwargsItem | None, position: int = 0
) -> MultiModalFeatureSpec:
    where = PlaceholderRange(offset=position, length=1)
    return MultiModalFeatureSpec(item, "image", mm_hash, where, mm_hash)


class Halves:
    """The front end's half, and the engine's as another process has it: with copies."""

    def __init__(self) -> None:
        self.front = SentPictures(model_config(CAPACITY), engine_keeps=True)
        self.engine = LruKeyReplicatedReceiverCache(model_config(CAPACITY))

    def deliver(self, features: Sequence[MultiModalFeatureSpec]) -> list[MultiModalFeatureSpec]:
        return self.engine.get_and_update_features(copy.deepcopy(self.front.send(features)))

    def state(self) -> list[str]:
        return list(self.front.held._cache.order)

    def check(self) -> None:
        assert self.state() == list(self.engine._cache.order)
        for mm_hash in self.state():
            one, other = (half._cache.cache[mm_hash] for half in (self.front.held, self.engine))
            assert torch.equal(one["pixel_values"].data, other["pixel_values"].data)


ROUNDS = st.lists(
    st.tuples(
        st.sampled_from(["good"] * 4 + ["render", "send", "send", "drop", "client's own", "lost"]),
        st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=4),
        st.integers(0, 10),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(ROUNDS)
def test_both_halves_are_equal_after_any_traffic(rounds: list[tuple[str, list[int], int]]) -> None:
    """Requests are sent in another order than rendered, several times (``n``), or not at all."""
    halves = Halves()
    waiting: list[tuple[list[int], list[MultiModalFeatureSpec]]] = []
    for action, pictures, which in rounds:
        before = halves.state()
        if action == "good":
            halves.deliver(render(halves.front, pictures))
        elif action == "render" or (action in ("send", "drop") and not waiting):
            waiting.append((pictures, render(halves.front, pictures)))
            assert halves.state() == before
        elif action == "drop":  # refused, or its client left
            del waiting[which % len(waiting)]
            assert halves.state() == before
        elif action == "send":
            pictures, features = waiting.pop(which % len(waiting))
            for _ in range(1 + which % 2):
                received = halves.deliver(features)
                for picture, got in zip(pictures, received, strict=True):
                    assert int(got.data["pixel_values"].data[0]) == picture
        elif (
            action == "client's own"
        ):  # /inference/v1/generate: processed by the client, or not sent
            features = [
                feature(str(picture), processed(picture) if which % 2 else None)
                for picture in pictures
            ]
            try:
                halves.deliver(features)
            except MultiModalCacheMissError as miss:
                for mm_hash in miss.mm_hashes:
                    halves.front.invalidate(mm_hash)
        else:  # the operator resets it
            halves.front.clear_cache()
            halves.engine.clear_cache()
        halves.check()


def test_a_picture_that_is_evicted_before_its_request_is_sent_goes_out_with_it() -> None:
    halves = Halves()
    halves.deliver(render(halves.front, [0]))
    late = render(halves.front, [0])
    halves.deliver(render(halves.front, [1, 2, 3]))
    assert "0" not in halves.state()
    (sent,) = halves.front.send(late)
    assert sent.data is late[0].data


def test_a_picture_that_the_engine_holds_is_not_sent_again() -> None:
    halves = Halves()
    halves.deliver(render(halves.front, [0, 1]))
    assert [sent.data for sent in halves.front.send(render(halves.front, [1, 0]))] == [None, None]
    assert halves.front.make_stats().hits == 2


def test_one_picture_that_two_requests_bring_at_once_is_processed_once() -> None:
    halves = Halves()
    first, second = render(halves.front, [0]), render(halves.front, [0])
    assert first[0].data is second[0].data
    del first, second
    assert halves.front.is_cached(["0"]) == [False], "it outlived the requests that brought it"


def test_what_a_failed_rendering_was_promised_is_nobodys() -> None:
    """vLLM says that it is done with a prompt's pictures only where it could process all of them."""
    halves = Halves()
    halves.deliver(render(halves.front, [0]))
    assert halves.front.is_cached(["0", "1"]) == [True, False]  # and picture 1 cannot be read
    halves.front.clear_cache()
    named_anew = processed(1)  # a client's name for a picture that it has changed
    assert halves.front.is_cached(["0"]) == [False]
    found, _ = halves.front.get_and_update_item((named_anew, UPDATES), "0")
    assert found is named_anew


def test_where_the_engine_keeps_nothing_everything_is_sent() -> None:
    front = SentPictures(model_config(CAPACITY), engine_keeps=False)
    for _ in range(2):
        (sent,) = front.send(render(front, [0]))
        assert sent.data is not None
    assert front.make_stats(delta=True) == (1, 2) and front.make_stats(delta=True) == (0, 0)


TINY_CACHE_GB = 3.5 * 3 * 16 * 16 * 4 / GIB
"""Three pictures of the engine's, of 16 by 16 pixels."""


def halves_of(engine: Engine) -> tuple[Any, Any]:
    front = engine.llm.llm_engine.renderer.mm_processor_cache
    return front, engine.llm.llm_engine.engine_core.engine_core.mm_receiver_cache


def check_halves(engine: Engine) -> None:
    front, receiver = halves_of(engine)
    assert isinstance(front, SentPictures)
    assert list(front.held._cache.order) == list(receiver._cache.order)


REFUSED = (
    {"extra_args": {"flow_cliff": -1}},
    {"extra_args": {"flow_cliff": [2, 2, 2]}},
    {"logit_bias": {9999999: 1.0}},
    {"allowed_token_ids": [1 << 30]},
)


def test_engine_after_random_traffic(open_engine: OpenEngine) -> None:
    """Good, refused and aborted requests over a cache of three pictures."""
    engine = open_engine(GQA, 2, mm_processor_cache_gb=TINY_CACHE_GB)
    seed = int(os.environ.get("VLLM_FLOW_FUZZ_SEED", "0"))
    draw = random.Random(seed)
    asks: dict[str, Ask] = {}
    done: dict[str, Any] = {}
    for number in range(80):
        ask = draw.choice([one_image, two_images])(draw.randrange(5), draw.choice([None, 0, 2]))
        kind = draw.choice(["good", "good", "refused", "aborted"])
        if kind == "refused":
            front, _ = halves_of(engine)
            before = list(front.held._cache.order)
            with pytest.raises((ValueError, VLLMClientError)):
                params = SamplingParams(max_tokens=4, **draw.choice(REFUSED))
                engine.llm.llm_engine.add_request(str(number), engine.prompt(ask), params)
            assert list(front.held._cache.order) == before
        else:
            engine.add(str(number), ask)
            if kind == "good":
                asks[str(number)] = ask
            else:
                if draw.random() < 0.5:
                    done |= engine.step()
                engine.abort(str(number))
        check_halves(engine)
        for _ in range(draw.randrange(4)):
            done |= engine.step()
    done |= engine.drain()
    assert_exact(engine, list(asks.values()), [done[number] for number in asks], ties=True)
