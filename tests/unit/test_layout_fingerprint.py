"""What two engines compare before one takes the other's blocks: one fingerprint, the same tokens in the same slots."""

from __future__ import annotations

from vllm_flow.layout import TokenLayout
from vllm_flow.policy_keys import parse_policy
from vllm_flow.spans import ImageSpans

LAYERS = 6
IMAGE = ((4, 36),)


def fingerprint(
    keys: dict[str, object],
    ranges: tuple[tuple[int, int], ...] = IMAGE,
    prompt: int = 50,
    group: int = 2,
) -> str:
    layout = TokenLayout.of(parse_policy(keys, LAYERS), ImageSpans.from_ranges(ranges), prompt)
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
