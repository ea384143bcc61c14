"""What two engines compare before one takes the other's blocks: one name, the same tokens in the same slots."""

from __future__ import annotations

from vllm_flow.layout import TokenLayout
from vllm_flow.policy_keys import parse_policy
from vllm_flow.spans import ImageSpans

LAYERS = 6
IMAGE = ((4, 36),)


def name(
    keys: dict[str, object],
    ranges: tuple[tuple[int, int], ...] = IMAGE,
    prompt: int = 50,
    group: int = 2,
) -> str:
    layout = TokenLayout.of(parse_policy(keys, LAYERS), ImageSpans.from_ranges(ranges), prompt)
    assert layout is not None
    return layout.name(group)


def test_whatever_moves_a_token_has_another_name() -> None:
    same = {"flow_cliff": 3}
    names = [
        name(same),
        name({"flow_cliff": 2}),
        name({"flow_stages": "2:50% uniform"}),
        name({"flow_stages": "2:50% random", "flow_seed": 1}),
        name({"flow_stages": "2:50% random", "flow_seed": 2}),
        name({"flow_cliff": 3, "flow_when": "decode"}),
        name(same, ((5, 37),)),
        name(same, ((4, 20), (21, 37))),
        name(same, prompt=51),
        name(same, group=3),
    ]
    assert len(set(names)) == len(names)


def test_one_policy_has_one_name_however_it_is_spelt() -> None:
    assert name({"flow_cliff": 3}) == name({"flow_stages": "3:0"})
