"""Random traffic on a pool that is too small: arrivals, aborts, shared prefixes, every cliff.

What the other tests arrange one by one happens here at once, and the block pool is checked after
every step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.engine import v2_cpu
from tests.engine.cases import LONG, Ask, text_only
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.tiny_llava import words

REQUESTS = 40
TINY_POOL = 1700 << 10
"""Bytes: hardly more than one request of the greatest length."""


def chunks_of(tokens: int) -> dict[str, int]:
    """Chunks by vLLM's threshold, not by the step's budget: that is the encoder cache's size, too.

    With an encoder cache of one picture, stock vLLM 0.32 dies of "Encoder cache miss" under this
    traffic when prefix caching is on.
    """
    return {"max_num_batched_tokens": 512, "long_prefill_token_threshold": tokens}


ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "cache-groups-of-2": (2, dict(enable_prefix_caching=True, **chunks_of(97))),
    "cache-groups-of-1-async": (
        1,
        dict(enable_prefix_caching=True, async_scheduling=True, **chunks_of(64)),
    ),
    "cache-groups-of-3-async": (
        3,
        dict(enable_prefix_caching=True, async_scheduling=True, max_num_batched_tokens=512),
    ),
    "groups-of-3-async": (3, dict(max_num_batched_tokens=48, async_scheduling=True)),
    "cache-groups-of-6": (6, dict(enable_prefix_caching=True, **chunks_of(150))),
}


def random_ask(rng: np.random.Generator) -> Ask:
    """One of few beginnings, cut at random, so that prefixes of all lengths are shared."""
    cliff = [None, *range(LONG.layers + 1)][rng.integers(LONG.layers + 2)]
    kind, tokens = rng.integers(8), int(rng.integers(2, 33))
    if kind == 0:
        return Ask(text_only(int(rng.integers(3)), count=90).prompt, (), cliff, tokens)
    picture = int(rng.integers(2))
    said = words(100, 700 + picture).split()
    before, after = said[:35], said[35 : 36 + int(rng.integers(65))]
    if kind == 1:
        prompt = " ".join([*before, "<image>", *after[:10], "<image>", *after[10:], "w1"])
        return Ask(prompt, (picture, picture + 1), cliff, tokens)
    return Ask(" ".join([*before, "<image>", *after]), (picture,), cliff, tokens)


@pytest.mark.parametrize("seed", v2_cpu.reduced(range(2), to=[0]))
@pytest.mark.parametrize("name", v2_cpu.reduced(ENGINES, to=["cache-groups-of-3-async"]))
def test_random_traffic_is_exact(open_engine: OpenEngine, name: str, seed: int) -> None:
    group_layers, options = ENGINES[name]
    engine = open_engine(
        LONG, group_layers, kv_cache_memory_bytes=TINY_POOL, max_num_seqs=12, **options
    )
    rng = np.random.default_rng(seed)
    asks = {f"{seed}-{index}": random_ask(rng) for index in range(REQUESTS)}
    waiting, live, outputs, aborted = list(asks), set[str](), {}, set[str]()
    with engine.count_preemptions() as preempted:
        while waiting or live:
            for _ in range(min(len(waiting), int(rng.integers(3)))):
                live.add(waiting[0])
                engine.add(waiting[0], asks[waiting.pop(0)])
            if live and rng.random() < 0.04:
                victim = sorted(live)[rng.integers(len(live))]
                engine.abort(victim)
                live.discard(victim)
                aborted.add(victim)
            for request_id, output in engine.step().items():
                outputs[request_id] = output
                if output.finished:
                    live.discard(request_id)
            engine.check_blocks()
    names = [name for name in asks if name not in aborted]
    assert preempted and aborted and len(names) > REQUESTS / 4
    assert_exact(engine, [asks[name] for name in names], [outputs[n] for n in names], ties=True)
