"""What an engine cannot do is refused to clients and operators alike, whatever is asked of whatever engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.settings_with import settings_with
from tests.engine.test_fitting import LAYERS, SETTINGS, request
from tests.unit.any_policy import policies
from vllm_flow.engine import obstacles
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end.default_policies import check_policies
from vllm_flow.engine.front_end.fitting import fitted
from vllm_flow.engine.front_end.fitting_engine import CONFIGURED, LOOKS, TOLD, unfit
from vllm_flow.engine.obstacles import Misfit, Obstacle
from vllm_flow.policy import FlowPolicy
from vllm_flow.ranks import RANKS, AttentionRank, HiddenRank

PICTURES = ((5, 900), (920, 800), (1730, 750), (2500, 701))
"""Greater than what any policy keeps in tokens."""


@st.composite
def engines(draw: st.DrawFn) -> EngineFacts:
    told = draw(st.sets(st.sampled_from([*LOOKS, obstacles.LATE])))
    return EngineFacts(
        LAYERS,
        attending=draw(st.sampled_from([(), (3, 7, 11, 31)])),
        pipeline=draw(st.sampled_from([(), (LAYERS // 2, LAYERS - LAYERS // 2)])),
        keep_states=draw(st.booleans()),
        quantised_keys=draw(st.booleans()),
        connected=draw(st.booleans()),
        obstacles=dict.fromkeys(sorted(told), "for a reason"),
    )


@given(policies(), engines())
def test_what_no_client_can_have_no_operator_can(policy: FlowPolicy, engine: EngineFacts) -> None:
    configured, told = (list(unfit(policy, engine, rules)) for rules in (CONFIGURED, TOLD))
    settings = settings_with(
        SETTINGS, default_policy=policy, **{name: getattr(engine, name) for name in vars(engine)}
    )
    if configured:
        with pytest.raises(ValueError, match="^default_policy: ") as refused:
            check_policies(settings)
        assert str(refused.value) == f"default_policy: {configured[0].sentence}"
    else:
        check_policies(settings)
    pictures = PICTURES[: len(policy.images)] if len(policy.images) > 1 else PICTURES
    kind = None
    try:
        fitted(request(None, *pictures), policy, settings, {})
    except Obstacle as obstacle:
        kind = obstacle.kind
        if kind == Misfit.ENGINE:
            assert str(obstacle) == [*configured, *told][0].sentence
    assert (kind == Misfit.ENGINE) == bool(configured or told) or kind == Misfit.PICTURE


@given(policies(), engines())
def test_an_engine_can_have_what_needs_nothing_that_it_lacks(
    policy: FlowPolicy, engine: EngineFacts
) -> None:
    """By every stage's rank, one after the other."""
    ranks = [RANKS[name] for name in policy.ranks]
    lacks = (
        any(
            isinstance(rank, some.kind)
            and (some.score is None or getattr(rank, "score", None) == some.score)
            and (not some.merging or getattr(rank, "merge", None) is not None)
            for rank in ranks
            for obstacle, some in LOOKS.items()
            if obstacle in engine.obstacles
        )
        or (engine.quantised_keys and any(isinstance(rank, AttentionRank) for rank in ranks))
        or (engine.pipeline and any(isinstance(rank, HiddenRank) for rank in ranks))
        or any(
            stage.rank is not None
            and RANKS[stage.rank].reads_layer
            and stage.layer - 1 not in (engine.attending or range(LAYERS))
            for stages in policy.images
            for stage in stages
        )
        or (
            policy.when == "decode"
            and bool(
                engine.connected
                or obstacles.LATE in engine.obstacles
                or (engine.attending and engine.keep_states)
            )
        )
    )
    assert bool(list(unfit(policy, engine))) == bool(lacks)


@given(policies(), engines())
def test_each_reason_has_a_remedy_that_the_engine_can_have(
    policy: FlowPolicy, engine: EngineFacts
) -> None:
    for found in unfit(policy, engine):
        reason, _, remedy = found.sentence.partition("; ")
        assert reason and remedy.endswith(".")
        if found.key is not None:
            assert found.key in remedy
        named = {name for name in RANKS if repr(name) in remedy}
        for name in named:
            stage = policy.images[0][0]
            other = FlowPolicy(((type(stage)(12, 9, name),),))
            assert not list(unfit(other, engine)), name
