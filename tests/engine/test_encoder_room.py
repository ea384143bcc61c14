"""Requests whose rank must see several pictures in one step all get them, though the encoder cache holds few more.

Without a model. A request that kept some of its pictures while it waits for the others would wait for ever beside a
second one that does; and behind one that waits, newer requests must not take the room again and again.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.bare_prompts import IMAGE, NEXT
from tests.engine.bare_scheduler import LENGTH, BareScheduler, OpenBare

TOGETHER = {"flow_stages": "2:50% last_prompt"}
"""From the first picture to the prompt's end in one step."""
ROOM = LENGTH
"""Of the encoder cache, in tokens of pictures: as many as a step has."""


def pictured(*sizes: int) -> list[int]:
    """Text, and pictures of some sizes, each before a little more of it; those of one size and place are the same."""
    return [5] * 5 + [token for size in sizes for token in [0] * size + [6] * 3]


def held(engine: BareScheduler, request_id: str) -> int:
    """How many pictures a request keeps in the encoder cache."""
    cache = engine.scheduler.encoder_cache_manager
    return sum(request_id in holders for holders in cache.cached.values())


def opened(bare: OpenBare, **options: Any) -> BareScheduler:
    engine = bare(2, 400, asynchronous=True, enable_prefix_caching=False, **options)
    assert engine.scheduler.encoder_cache_manager.cache_size == ROOM
    return engine


def test_two_requests_that_each_lack_the_others_pictures(bare: OpenBare) -> None:
    """Each comes while there is room for one of its three pictures. What a step has encoded, an asynchronous
    scheduler gives back two steps later."""
    engine = opened(bare)
    engine.add("before", pictured(225))
    assert engine.step() == ["before"]
    engine.add("first", pictured(144, 145, 146), answer=(7, 8), **TOGETHER)
    engine.add("beside", pictured(141))
    engine.step()
    assert held(engine, "first") == 0
    engine.add("second", pictured(147, 148, 143), answer=(7, 8), **TOGETHER)
    assert engine.drain() < 20
    answered = {name: len(answer) for name, answer in engine.answers.items()}
    assert answered == {"before": 4, "first": 2, "beside": 4, "second": 2}


def test_pictures_that_are_encoded_already_are_not_kept_either(bare: OpenBare) -> None:
    """Its first picture is there; it goes when another request needs its place."""
    engine = opened(bare)
    engine.add("seen", pictured(144), answer=(7,))
    engine.drain()
    engine.add("large", pictured(300))
    engine.step()
    engine.add("waits", pictured(144, 145, 146), **TOGETHER)
    engine.step()
    assert "waits" in engine.scheduler.requests
    assert held(engine, "waits") == 0
    engine.drain()


def test_newer_requests_do_not_take_the_room_for_ever(bare: OpenBare) -> None:
    """One a step, with a picture of its own: what the last one has taken is not given back when the next one comes."""
    engine = opened(bare)
    engine.add("newer", pictured(100), answer=(7,))
    engine.step()
    engine.add("waits", pictured(144, 145, 146), answer=(7, 8), **TOGETHER)
    for number in range(1, 40):
        # Of another size than the last ones', and so another picture.
        engine.add(f"newer {number}", pictured(100 + number % 5), answer=(7,))
        engine.step()
    assert "waits" not in engine.scheduler.requests, "it waits for as long as others come"
    engine.drain()


def side_by_side(gap: int, *sizes: int, before: int = 5) -> list[int]:
    """Text, pictures with ``gap`` tokens of text between them, and text."""
    tokens = [5] * before
    for number, size in enumerate(sizes):
        tokens += [IMAGE if number % 2 else NEXT] * size + [6] * gap
    return tokens + [6] * 9


def reading_ahead(bare: OpenBare, **options: Any) -> BareScheduler:
    """As beside EAGLE: of a picture's successor a drafter reads the first token, and vLLM keeps a picture till then."""
    engine = opened(bare, **options)
    engine.scheduler.num_prefill_lookahead = 1
    return engine


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_picture_that_has_begun_is_gone_before_the_next_one_waits(
    bare: OpenBare, gap: int
) -> None:
    """Behind one that lacks room, a request ends its first picture and may not begin its second one."""
    engine = reading_ahead(bare)
    engine.add("before", [5] * 300)
    engine.add("short", side_by_side(3, 140, 139, before=150), answer=(7,), **TOGETHER)
    engine.add("behind", side_by_side(gap, 240, 150), answer=(7,))
    assert set(engine.step()) == {"before", "short", "behind"}
    assert held(engine, "behind") == 1, "its first picture has not begun"
    engine.drain(40)


RANKED = {"flow_stages": "2:50% diversity"}


@pytest.mark.parametrize(("gap", "chunk", "keys"), [(1, 245, {}), (1, 245, RANKED), (0, 200, {})])
def test_two_requests_whose_second_pictures_there_is_no_room_for(
    bare: OpenBare, gap: int, chunk: int, keys: dict[str, Any]
) -> None:
    """Each has a first one that vLLM keeps: the next token that a drafter reads is the second one's."""
    engine = reading_ahead(bare, long_prefill_token_threshold=chunk)
    engine.add("one", side_by_side(gap, 240, 240, before=5), answer=(7,), **keys)
    engine.add("other", side_by_side(gap, 239, 239, before=6), answer=(7,), **keys)
    engine.step()
    assert (held(engine, "one"), held(engine, "other")) == (1, 1)
    engine.drain(40)
