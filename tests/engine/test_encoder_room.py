"""Requests whose rank must see several pictures in one step all get them, though the encoder cache holds few more.

Without a model. A request that kept some of its pictures while it waits for the others would wait for ever beside a
second one that does; and behind one that waits, newer requests must not take the room again and again.
"""

from __future__ import annotations

from typing import Any

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
