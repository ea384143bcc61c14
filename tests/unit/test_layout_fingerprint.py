"""What two engines compare before one takes the other's blocks: one fingerprint, the same tokens in the same slots."""

from __future__ import annotations

import pytest

from vllm_flow.layout import TokenLayout
from vllm_flow.policy_keys import parse_policy
from vllm_flow.spans import ImageSpans

LAYERS = 6
IMAGE = ((4, 36),)


def fingerprint(
    keys: dict[str, object],
    *images: tuple[tuple[int, int], ...],
    prompt: int = 50,
    group: int = 2,
) -> str:
    spans = [ImageSpans.from_ranges(ranges) for ranges in images or (IMAGE,)]
    layout = TokenLayout.of(parse_policy(keys, LAYERS), spans, prompt)
    assert layout is not None
    return layout.fingerprint(group)


def test_whatever_moves_a_token_has_another_fingerprint() -> None:
    same = {"flow_cliff": 3}
    found = [
        fingerprint(same),
        fingerprint({"flow_cliff": 2}),
        fingerprint({"flow_stages": "2:50% uniform"}),
        fingerprint({"flow_stages": "2:50% random", "flow_seed": 1}),
        fingerprint({"flow_stages": "2:50% random", "flow_seed": 2}),
        fingerprint({"flow_cliff": 3, "flow_when": "decode"}),
        fingerprint(same, ((5, 37),)),
        fingerprint(same, ((4, 20), (21, 37))),
        fingerprint(same, prompt=51),
        fingerprint(same, group=3),
    ]
    assert len(set(found)) == len(found)


def test_one_policy_has_one_fingerprint_however_it_is_spelt() -> None:
    assert fingerprint({"flow_cliff": 3}) == fingerprint({"flow_stages": "3:0"})


@pytest.mark.parametrize("rank", ["uniform", "last_image"])
def test_two_pictures_side_by_side_are_not_one(rank: str) -> None:
    """Of each as many tokens stay, whoever chooses; where none stays, it is the same."""
    two = ((4, 20),), ((20, 36),)
    for keep in ("4", "30%"):
        keys = {"flow_stages": f"2:{keep} {rank}"}
        assert fingerprint(keys, *two) != fingerprint(keys)
    assert fingerprint({"flow_cliff": 3}, *two) == fingerprint({"flow_cliff": 3})
