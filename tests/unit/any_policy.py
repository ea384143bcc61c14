"""Any policy that a request's keys can write, for property tests."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import strategies as st

from vllm_flow.policy import WHOLE, FlowPolicy, Stage
from vllm_flow.ranks import RANKS, merges

LAYERS = 32


@st.composite
def policies(draw: st.DrawFn) -> FlowPolicy:
    """Any policy that keys can write."""
    when = draw(st.sampled_from(["prefill", "decode"]))
    ranks = st.sampled_from(sorted(n for n in RANKS if when == "prefill" or RANKS[n].late))
    shares = st.fractions(0, 1, max_denominator=1000).filter(lambda share: 0 < share < 1)
    keeps = st.integers(0, 700) | shares | st.just(WHOLE)

    def stage(layer: int, keep: int | Fraction) -> Stage:
        possible = ranks.filter(lambda name: layer or not RANKS[name].reads_layer)
        # What chooses among all tokens of an image comes first.
        possible = possible.filter(
            lambda name: layer == first or getattr(RANKS[name], "nested", True)
        )
        possible = possible.filter(lambda name: layer == 0 or not merges(RANKS[name]))
        rank = draw(possible) if keep else None
        return Stage(layer, keep or 0, rank)

    if draw(st.booleans()):
        rank = draw(ranks.filter(lambda n: not RANKS[n].reads_layer and not merges(RANKS[n])))
        cliffs = draw(st.lists(st.integers(0, LAYERS), min_size=2, max_size=4))
        images = [(Stage(c, k, rank if k else None),) for c in cliffs for k in [draw(keeps) or 0]]
    else:
        layers = sorted(draw(st.sets(st.integers(0, LAYERS - 1), min_size=1, max_size=4)))
        amounts = sorted(
            draw(
                st.one_of(
                    st.lists(st.integers(1, 700), min_size=len(layers), max_size=len(layers)),
                    st.lists(shares, min_size=len(layers), max_size=len(layers)),
                )
            ),
            reverse=True,
        )
        if draw(st.booleans()):
            amounts[-1] = 0
        first = layers[0]
        images = [tuple(map(stage, layers, amounts))]
    draws = any(s.rank == "random" for stages in images for s in stages)
    seed = draw(st.integers(0, 2**32 - 1)) if draws else 0
    return FlowPolicy(tuple(images), seed, when)
