"""What the other tests arrange one by one happens here at once: random traffic on a small pool.

``test_random_traffic_is_exact`` is a fixed selection; ``test_fuzz``, no part of ``make test``, draws engines,
pools and traffic until its time is up: ``VLLM_FLOW_FUZZ_SECONDS`` (``make fuzz`` for an hour), from
``VLLM_FLOW_FUZZ_SEED`` on.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.engine import left_behind, traffic, v2_cpu
from tests.engine.cases import LONG, text_only
from tests.engine.fixtures import OpenEngine
from tests.longer import some

REQUESTS = 40
TINY_POOL = 1700 << 10
"""Bytes: hardly more than one request of the greatest length."""

FUZZ_SECONDS = float(os.environ.get("VLLM_FLOW_FUZZ_SECONDS", "10"))
FUZZ_SEED = int(os.environ.get("VLLM_FLOW_FUZZ_SEED", "1000"))
FUZZ_ENGINES = 16
"""Engines of a fuzz; they stay open, so an hour's run must not draw new ones for ever."""
ROUNDS = 4
"""Rounds of traffic before the next engine: starting one costs as much as a hundred steps."""


def chunks_of(tokens: int) -> dict[str, int]:
    """Chunks by vLLM's threshold, not by the step's budget: that is the encoder cache's size, too."""
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
QUICK = ("cache-groups-of-2", "groups-of-3-async")


@pytest.mark.parametrize("seed", v2_cpu.reduced(some([1, 2], [1]), to=[1]))
@pytest.mark.parametrize(
    "name", v2_cpu.reduced(some(ENGINES, QUICK), to=["cache-groups-of-3-async"])
)
def test_random_traffic_is_exact(open_engine: OpenEngine, name: str, seed: int) -> None:
    group_layers, options = ENGINES[name]
    engine = open_engine(
        LONG, group_layers, kv_cache_memory_bytes=TINY_POOL, max_num_seqs=12, **options
    )
    went = traffic.run(engine, seed, REQUESTS)
    assert went.preempted and went.aborted and went.finished > REQUESTS / 4


def test_random_traffic_of_every_policy_is_exact(open_engine: OpenEngine) -> None:
    """The whole grammar: ranks of all kinds, stages, values per image, late ones, cliffs, the baseline."""
    options = dict(enable_prefix_caching=True, async_scheduling=True, max_num_batched_tokens=512)
    engine = open_engine(LONG, 3, kv_cache_memory_bytes=TINY_POOL, max_num_seqs=12, **options)
    met: set[str] = set()
    with mock.patch.object(
        engine.scheduler, "add_request", wraps=engine.scheduler.add_request
    ) as add:
        went = traffic.run(engine, 3, REQUESTS, stages=0.8, late=0.3)
        met.update(call.args[0].request_id for call in add.call_args_list)
    assert went.preempted and went.aborted and went.finished > REQUESTS / 4
    assert len(met) >= REQUESTS
    engine.add("last", text_only(1))  # with which workers hear of those that ended
    engine.drain()
    engine.scheduler.flow_footprints.latest.clear()  # of the last few thousand requests
    front_end = engine.llm.llm_engine
    # vLLM 0.32 keeps what was asked for several answers and aborted by the client's own id.
    front_end.output_processor.parent_requests.clear()
    roots = {"core": front_end.engine_core.engine_core, "front end": front_end}
    assert not left_behind.found(roots, met)


def random_engine(rng: np.random.Generator) -> tuple[int, dict[str, Any]]:
    """Storage groups, pool, chunks, caching and scheduling, each drawn by itself."""
    chunk = int(rng.choice([32, 48, 97, 150, 512]))
    cached = bool(rng.random() < 0.7)
    small_steps = bool(rng.random() < 0.5)  # and so an encoder cache of a picture or two
    options = dict(
        kv_cache_memory_bytes=int(rng.choice([1700, 2200, 4000])) << 10,
        max_num_seqs=int(rng.choice([3, 12])),
        enable_prefix_caching=cached,
        async_scheduling=bool(rng.random() < 0.5),
        scheduling_policy=str(rng.choice(["fcfs", "priority"])),
        **{"max_num_batched_tokens": chunk} if small_steps else chunks_of(chunk),
    )
    return int(rng.choice([1, 2, 3, 6])), options


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(FUZZ_SECONDS + 600)
def test_fuzz(open_engine: OpenEngine) -> None:
    end = time.monotonic() + FUZZ_SECONDS
    total = traffic.Traffic(0, 0, 0, 0, 0)
    for seed in itertools.count(FUZZ_SEED):
        drawn = (seed - FUZZ_SEED) // ROUNDS % FUZZ_ENGINES
        group_layers, options = random_engine(np.random.default_rng(FUZZ_SEED + drawn))
        engine = open_engine(LONG, group_layers, **options)
        # Shown by pytest where the run fails: what it takes to repeat it.
        print(f"seed {seed}: groups of {group_layers}, {options}")
        total += traffic.run(
            engine, seed, REQUESTS, resets=0.01 * (seed % 3), stages=0.6, late=0.1 * (seed % 4)
        )
        if time.monotonic() > end:
            break
    print(f"fuzz: {total}")
    assert total.finished > REQUESTS / 4
