"""Requests that are preempted, aborted, or split into samples: what is left stays exact, and no block leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine import v2_cpu
from tests.engine.cases import LONG, LONG_ANSWER, Ask, mixed, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact, params_of, tokens_of
from tests.longer import some

by_scheduler = pytest.mark.parametrize(
    "asynchronous",
    v2_cpu.reduced([True, False], to=some([True, False], [True])),
    ids=["async", "sync"],
)

TINY_POOL = 2 << 20
"""Bytes: about one and a half requests of the greatest length; a dozen want it at once."""


@by_scheduler
@pytest.mark.parametrize("group_layers", v2_cpu.reduced(some([1, 3], [3]), to=[3]))
def test_preempted_requests_stay_exact(
    open_engine: OpenEngine, group_layers: int, asynchronous: bool
) -> None:
    engine = open_engine(
        LONG, group_layers, kv_cache_memory_bytes=TINY_POOL, async_scheduling=asynchronous
    )
    asks = mixed(LONG.layers)
    # So that they fill the pool where a block is of one layer alone, too.
    asks = v2_cpu.reduced([replace(ask, max_tokens=LONG_ANSWER) for ask in asks], to=asks)
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted, "the pool is too large for this test"
    assert_exact(engine, asks, outputs)


def test_preempted_requests_stay_exact_in_chunks(open_engine: OpenEngine) -> None:
    """Recomputed prompts, outputs included, come in chunks that end inside an image."""
    engine = open_engine(
        LONG, 2, kv_cache_memory_bytes=TINY_POOL, max_num_batched_tokens=97, max_num_seqs=12
    )
    asks = [one_image(40 + i, i % (LONG.layers + 1)) for i in range(12)]
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted, "the pool is too large for this test"
    assert_exact(engine, asks, outputs)


def computed(engine: Engine, request_id: str) -> tuple[int, int]:
    """Computed tokens and prompt tokens of a request in the scheduler."""
    [request] = [
        r for r in engine.scheduler.requests.values() if r.request_id.startswith(f"{request_id}-")
    ]
    return request.num_computed_tokens, request.num_prompt_tokens


SURVIVORS = (one_image(51, 3), two_images(52, 1), one_image(54), text_only(55, 2))


@by_scheduler
@pytest.mark.parametrize("cliff", v2_cpu.reduced([0, 3, None], to=[3]))
def test_abort_during_prefill(
    open_engine: OpenEngine, cliff: int | None, asynchronous: bool
) -> None:
    engine = open_engine(
        LONG, 2, max_num_batched_tokens=97, max_num_seqs=12, async_scheduling=asynchronous
    )
    engine.add("unseen", two_images(60, cliff))
    engine.abort("unseen")
    engine.add("victim", two_images(60, cliff))
    engine.step()
    engine.step()
    done, prompt = computed(engine, "victim")
    assert 0 < done < prompt
    for index, ask in enumerate(SURVIVORS):
        engine.add(str(index), ask)
    engine.abort("victim")
    outputs = engine.drain()
    assert_exact(engine, SURVIVORS, [outputs[str(index)] for index in range(len(SURVIVORS))])


@by_scheduler
@pytest.mark.parametrize("cliff", v2_cpu.reduced([0, 3, None], to=[3]))
def test_abort_during_decode(
    open_engine: OpenEngine, cliff: int | None, asynchronous: bool
) -> None:
    engine = open_engine(LONG, 2, async_scheduling=asynchronous)
    victims = {"a": two_images(61, cliff), "b": one_image(63, 2), "c": text_only(64, cliff)}
    asks = dict(zip(("0", "a", "1", "b", "2", "c", "3"), (
        SURVIVORS[0], victims["a"], SURVIVORS[1], victims["b"], SURVIVORS[2], victims["c"], SURVIVORS[3]
    ), strict=True))  # fmt: skip
    for name, ask in asks.items():
        engine.add(name, ask)
    outputs = {}
    while len(tokens_of(outputs["a"]) if "a" in outputs else ()) < 3:
        outputs |= engine.step()
    for name in victims:
        engine.abort(name)
        # The survivors take over the batch slots one by one.
        outputs |= engine.step()
    outputs |= engine.drain()
    assert_exact(engine, SURVIVORS, [outputs[str(index)] for index in range(len(SURVIVORS))])


def test_abort_of_everything(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2)
    for index, ask in enumerate(mixed(LONG.layers)):
        engine.add(str(index), ask)
    for _ in range(3):
        engine.step()
    for index in range(len(mixed(LONG.layers))):
        engine.abort(str(index))
    engine.drain()
    engine.check_idle()
    assert_exact(engine, SURVIVORS, engine.run(SURVIVORS))


def test_several_samples_of_one_request(open_engine: OpenEngine) -> None:
    """vLLM makes a request of each sample, with an id that only it knows."""
    engine = open_engine(LONG, 2)
    ask = one_image(51, 3)
    params = params_of(ask)
    params.temperature, params.n, params.seed = 1.0, 3, 7
    [several] = engine.llm.generate(engine.prompt(ask), params, use_tqdm=False)
    assert len({tuple(out.token_ids) for out in several.outputs}) == 3
    outputs = engine.run([Ask(ask.prompt, ask.images, ask.cliff)])
    assert_exact(engine, [ask], outputs)
