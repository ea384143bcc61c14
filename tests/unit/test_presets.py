"""Published recipes: stages of any decoder, at the cost their papers say."""

import re

import pytest

from vllm_flow.policy_keys import parse_policy, request_keys
from vllm_flow.presets import PRESETS


@pytest.mark.parametrize("layers", [1, 2, 3, 12, 28, 30, 32, 64])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_stages_of_any_decoder(name: str, layers: int) -> None:
    preset = PRESETS[name]
    policy = parse_policy({"flow_preset": name}, layers)
    stages = () if policy is None else policy.images[0]
    assert stages == preset.stages(layers)
    if policy is not None:
        # As a client would write it: a preset passes every rule that stages must pass.
        assert parse_policy(request_keys(policy), layers) == policy
    if layers == 32:
        assert stages == preset.published
    sentences = (*preset.same, *preset.different)
    assert preset.same and preset.different and all(text.endswith(".") for text in sentences)
    assert re.fullmatch(r"\d{4}\.\d{5}", preset.paper.arxiv) and preset.paper.title


def test_the_recipes_cost_what_their_papers_say() -> None:
    """Average image tokens per layer, of 576, over 32 layers."""

    def average(name: str) -> float:
        policy = parse_policy({"flow_preset": name}, 32)
        assert policy is not None
        return sum(policy.kept(layer, 0, 576) for layer in range(32)) / 32

    assert average("horizon-192") == 284 * 20 / 32
    assert average("horizon-64") == 98 * 21 / 32
    assert average("divprune") == 56
    assert average("pyramiddrop") == 576 * (8 + 4 + 2 + 1) / 32
    assert average("fastv") == 576 * (2 + 15) / 32
