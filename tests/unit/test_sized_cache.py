"""A cache bounded by bytes: what it holds, and what it lets go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.sized_cache import SizedCache

ROOM = 40


@given(st.lists(st.integers(0, 15), max_size=60))
def test_it_holds_what_was_used_last_and_fits(asked: list[int]) -> None:
    """Against a list that is walked through; a value is as large as its key."""
    cache = SizedCache[str](ROOM, lambda key, _: key)
    expected: list[int] = []
    for key in asked:
        made: list[int] = []
        assert cache.get(key, lambda key=key, made=made: made.append(key) or str(key)) == str(key)
        assert made == ([] if key in expected else [key])
        if key in expected:
            expected.remove(key)
        if key <= ROOM // 4:
            expected.append(key)
        while sum(expected) > ROOM:
            expected.pop(0)
        assert cache.held_bytes == sum(expected) <= ROOM
        assert len(cache) == len(expected)


def test_who_makes_a_value_may_ask_for_another_one() -> None:
    cache = SizedCache[int](ROOM, lambda *_: 1)
    assert cache.get("a", lambda: cache.get("b", lambda: 1) + 1) == 2
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == cache.held_bytes == 0
