"""Prefix caching: a policy's blocks are found by nobody else, and baseline requests still hit as in stock vLLM."""

from __future__ import annotations

from tests.engine.cases import LONG, Ask, one_image, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, assert_exact

CACHED = {"enable_prefix_caching": True}


def long_prompt(seed: int, cliff: int | None = None) -> Ask:
    """Whole blocks of text before and after the image."""
    return one_image(seed, cliff, before=70, after=80)


def test_baseline_beside_policies(open_engine: OpenEngine) -> None:
    """The same prompt before, after and between requests with a policy."""
    engine, stock = open_engine(LONG, 2, **CACHED), open_engine(LONG, STOCK, **CACHED)
    for cliffs in ([None], [2], [None], [0, None, 5, None, 2], [2, 2, 3], [None]):
        asks = [long_prompt(71, cliff) for cliff in cliffs]
        outputs = engine.run(asks)
        assert_exact(engine, asks, outputs)
        expected = stock.run([ask for ask in asks if ask.cliff is None])
        hits = [
            out.num_cached_tokens
            for ask, out in zip(asks, outputs, strict=True)
            if ask.cliff is None
        ]
        assert hits == [out.num_cached_tokens for out in expected]
    assert hits and hits[0], "the last baseline request found nothing in the cache"


def test_policy_first(open_engine: OpenEngine) -> None:
    """A policy's request must not fill the cache with blocks that a baseline request finds."""
    engine = open_engine(LONG, 2, **CACHED)
    for cliff in (1, 0, 4, None, 4, None):
        asks = [long_prompt(72, cliff), two_images(73, cliff)]
        assert_exact(engine, asks, engine.run(asks))


def test_common_text_before_different_images(open_engine: OpenEngine) -> None:
    """Blocks of the text before the image are the same for all; nothing behind it is."""
    engine = open_engine(LONG, 2, **CACHED)
    prompt = long_prompt(74).prompt
    asks = [Ask(prompt, (seed,), cliff) for seed in (1, 2) for cliff in (None, 3, None, 1)]
    for ask in asks:
        assert_exact(engine, [ask], engine.run([ask]))
    assert_exact(engine, asks, engine.run(asks))


def test_preemption_with_a_cache(open_engine: OpenEngine) -> None:
    """A preempted baseline request resumes from cached blocks, a policy's recomputes."""
    engine = open_engine(LONG, 2, kv_cache_memory_bytes=2 << 20, **CACHED)
    asks = [one_image(80 + i, (None, 2, None, 4)[i % 4]) for i in range(12)]
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted, "the pool is too large for this test"
    assert_exact(engine, asks, outputs)
