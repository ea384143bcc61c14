"""The attention log against Hugging Face's attention: every answer token once, every share to float tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import RequestOutput

from tests.engine import v2_cpu
from tests.engine.attention_logging import LoggingEngine, assert_logged
from tests.engine.cases import (
    GQA,
    LONG,
    MISTRAL,
    QWEN,
    Ask,
    adjacent_images,
    mixed,
    one_image,
    text_only,
    two_images,
)
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, Engine, assert_exact, assert_same, params_of, tokens_of
from tests.engine.test_lifecycle import TINY_POOL
from tests.engine.tiny_llava import Shape
from tests.longer import long_under_v2, some
from vllm_flow.engine.core.attention import writer
from vllm_flow.engine.core.attention.answers import LoggedAnswers
from vllm_flow.engine.wire import ATTENTION_FIELD


@pytest.fixture
def open_logging(open_engine: OpenEngine, engine_store: Any) -> Any:
    """``open_logging(shape, group_layers, **options)``."""

    def get(shape: Shape, group_layers: int, **options: Any) -> LoggingEngine:
        return LoggingEngine(open_engine, engine_store.root, shape, group_layers, **options)

    return get


def logging_some(asks: Sequence[Ask], layers: int, max_tokens: int = 6) -> list[Ask]:
    """The same requests: one in four logs nothing, one some layers, one the heat too."""
    kinds: tuple[dict[str, Any], ...] = (
        {"log": True},
        {"log": (layers - 1, 0)},
        {},
        {"log": True, "heat": True},
    )
    return [replace(ask, max_tokens=max_tokens, **kinds[i % 4]) for i, ask in enumerate(asks)]


CASES = {
    "whole prompts": (LONG, 2, {}),
    "chunks of 97": (LONG, 3, {"max_num_batched_tokens": 97, "max_num_seqs": 12}),
    "chunks of 32": (LONG, 6, {"max_num_batched_tokens": 32, "max_num_seqs": 4}),
    "one key head": (MISTRAL, 1, {}),
    "head size 80": (QWEN, 2, {}),
    "few": (GQA, 2, {"max_num_batched_tokens": 48, "max_num_seqs": 3}),
}
QUICK = ("chunks of 97", "one key head", "few")


@pytest.mark.parametrize("case", v2_cpu.reduced(some(CASES, QUICK), to=["few"]))
def test_the_log_is_the_oracles_attention(open_logging: Any, case: str) -> None:
    shape, group_layers, options = CASES[case]
    logging = open_logging(shape, group_layers, **options)
    asks = logging_some(mixed(shape.layers), shape.layers)
    outputs = logging.engine.run(asks)
    assert_exact(logging.engine, asks, outputs)
    assert_logged(logging, asks, outputs)


def test_the_log_of_what_leaves_after_the_prefill(open_logging: Any) -> None:
    """The first token's row sees the image in every layer, those after it what is left."""
    shape, group_layers, options = CASES["chunks of 97"]
    logging = open_logging(shape, group_layers, **options)
    asks = [replace(one_image(505 + cliff, cliff), late=True) for cliff in (0, 2, 4)]
    asks += [replace(two_images(508), stages="1:50% uniform, 3:20% uniform, 5:0", late=True)]
    asks = [replace(ask, log=True, heat=not ask.stages, max_tokens=4) for ask in asks]
    outputs = logging.engine.run(asks)
    assert_exact(logging.engine, asks, outputs)
    assert_logged(logging, asks, outputs)


@pytest.mark.parametrize("cliff", v2_cpu.reduced([None, 3], to=[3]))
def test_a_cached_prefix_is_read_like_any_other(open_logging: Any, cliff: int | None) -> None:
    """The first answer token's keys were written by another request."""
    logging = open_logging(LONG, 2, enable_prefix_caching=True)
    silent = replace(one_image(501, cliff, before=40), max_tokens=3)
    two = replace(two_images(502, cliff), max_tokens=3)
    logging.engine.run([silent, two])
    asks = [replace(silent, log=True, heat=True), replace(two, log=True)]
    outputs = logging.engine.run(asks)
    # A request that logs finds what one that does not has left, and the other way round.
    assert all(out.num_cached_tokens > 0 for out in outputs)
    assert_exact(logging.engine, asks, outputs)
    assert_logged(logging, asks, outputs)


@long_under_v2
@pytest.mark.parametrize("asynchronous", v2_cpu.reduced(some([True, False], [True]), to=[False]))
def test_a_preempted_request_logs_each_token_once(open_logging: Any, asynchronous: bool) -> None:
    """Recomputed in chunks, outputs included: a chunk may end in a row whose token was logged."""
    options = {} if asynchronous else {"max_num_batched_tokens": 97, "max_num_seqs": 12}
    logging = open_logging(
        LONG, 3, kv_cache_memory_bytes=TINY_POOL, async_scheduling=asynchronous, **options
    )
    tokens = 24
    asks = [replace(ask, max_tokens=tokens, log=True) for ask in mixed(LONG.layers)[:9]]
    with logging.engine.count_preemptions() as preempted:
        outputs = logging.engine.run(asks)
    assert preempted, "the pool is too large for this test"
    assert_exact(logging.engine, asks, outputs)
    assert_logged(logging, asks, outputs)


def test_a_row_computed_for_no_token_is_not_logged(open_logging: Any) -> None:
    """Asynchronous scheduling learns of a stop when the next step is under way already."""
    logging = open_logging(LONG, 3, kv_cache_memory_bytes=TINY_POOL, async_scheduling=True)
    ask = replace(one_image(503, 2), max_tokens=12, log=True)
    [whole] = logging.engine.run([ask])
    stop = tokens_of(whole)[5]
    params = params_of(ask)
    params.stop_token_ids = [stop]
    params.update_from_generation_config({})
    [out] = logging.engine.llm.generate(logging.engine.prompt(ask), params, use_tqdm=False)
    assert len(tokens_of(out)) == tokens_of(whole).index(stop) + 1 < 12
    assert_logged(logging, [ask], [out])


def test_every_sample_has_a_key_of_its_own(open_logging: Any) -> None:
    logging = open_logging(LONG, 2, enable_prefix_caching=True)
    ask = replace(one_image(504, 2), log=(1,), max_tokens=3)
    params = params_of(ask)
    params.n, params.temperature, params.seed = 2, 1.0, 1
    [out] = logging.engine.llm.generate(logging.engine.prompt(ask), params, use_tqdm=False)
    ids = [f"{index}_{out.request_id}" for index in range(2)]
    rows = logging.rows("mass", ids)
    assert sorted((row["request_id"], row["token"]) for row in rows) == [
        (request_id, token) for request_id in ids for token in range(3)
    ]


def test_logging_changes_no_token(open_engine: OpenEngine, open_logging: Any) -> None:
    logging = open_logging(LONG, 2)
    asks = [ask.without_policy() for ask in mixed(LONG.layers)]
    stock = open_engine(LONG, STOCK).run(asks)
    assert_same(logging.engine.run(asks), stock)
    outputs = logging.engine.run([replace(ask, log=True) for ask in asks])
    assert_same(outputs, stock)
    report = outputs[0].kv_transfer_params["vllm_flow"]
    assert report == {
        "attention_rows": LONG.layers * len(tokens_of(outputs[0])),
        "attention_rows_dropped": 0,
    }


def attention_layers(engine: Engine) -> list[Any]:
    context = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return list(context.values())


def test_without_a_directory_nothing_is_touched(open_engine: OpenEngine, open_logging: Any) -> None:
    engine = open_engine(LONG, 2)
    assert all("forward" not in vars(layer) for layer in attention_layers(engine))
    assert engine.scheduler.flow_logged is None
    ask = replace(one_image(505), log=True)
    with pytest.raises(ValueError, match='flow_log_attention=true: .*"attention_log": "DIRECTORY"'):
        engine.run([ask])
    ask = replace(ask, log=False)
    assert_exact(engine, [ask], engine.run([ask]))
    # The check above sees a wrapped layer where there is one.
    logging = open_logging(LONG, 2)
    assert all("forward" in vars(layer) for layer in attention_layers(logging.engine))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"flow_log_attention": [6]}, "there is no layer 6; .* from 0 to 5"),
        ({"flow_log_attention": []}, "no layer is named"),
        ({"flow_log_attention": "all"}, "must be true"),
        ({"flow_log_attention_heat": True}, "send flow_log_attention too"),
    ],
)
def test_a_bad_log_is_refused(open_logging: Any, keys: dict[str, Any], message: str) -> None:
    engine = open_logging(LONG, 2).engine
    params = params_of(one_image(506))
    params.extra_args = keys
    with pytest.raises(ValueError, match=message):
        engine.llm.generate(engine.prompt(one_image(506)), params, use_tqdm=False)


def test_a_failing_disk_costs_rows_and_no_answer(
    open_logging: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging = open_logging(LONG, 2)

    def dropped() -> float:
        name = logging.engine.llm.llm_engine.vllm_config.model_config.served_model_name
        return REGISTRY.get_sample_value(
            "vllm_flow:attention_rows_dropped_total", {"model_name": name}
        )

    def broken(table: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    assert (
        logging.engine.scheduler.flow_logged.log.flush()
    )  # of what earlier tests left in the queue
    before = dropped()
    ask = replace(one_image(507, 2), log=True, max_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_table", broken)
        [out] = logging.engine.run([ask])
        assert_exact(logging.engine, [ask], [out])
        assert logging.engine.scheduler.flow_logged.log.flush()
    assert logging.rows("mass", [out.request_id]) == []
    # What was lost after the answer was out is told with the next one.
    again = logging.engine.run([ask])
    assert_logged(logging, [ask], again)
    assert dropped() - before == 4 * LONG.layers
    assert again[0].kv_transfer_params["vllm_flow"]["attention_rows"] == 4 * LONG.layers


def test_requests_join_and_leave_a_running_batch(open_logging: Any) -> None:
    """Batch slots change hands between requests with different logs, layers and cliffs."""
    logging = open_logging(LONG, 2)
    engine = logging.engine
    asks = logging_some(
        [one_image(511, 2), text_only(512), adjacent_images(513, 4), two_images(514, 0)],
        LONG.layers,
        10,
    )
    outputs: dict[str, RequestOutput] = {}
    for index, ask in enumerate(asks):
        engine.add(f"join-{index}", ask)
        outputs |= engine.step()
        outputs |= engine.step()
    engine.add("join-gone", replace(one_image(515, 1), log=True))
    engine.step()
    engine.abort("join-gone")
    outputs |= engine.drain()
    assert_logged(logging, asks, [outputs[f"join-{index}"] for index in range(len(asks))])
    assert logging.rows("mass", ["join-gone"]) != []  # up to the abort
    # Nothing of them stays behind; a worker hears of ended requests with the next step.
    engine.run([text_only(516)])
    [runner] = engine.llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)
    assert not runner.flow_state.tap.requests and not engine.scheduler.flow_logged.rows


class Steps:
    """Steps of an engine whose scheduler has one observer; who is not too late gets a token."""

    def __init__(self, **num_output_tokens: int) -> None:
        self.requests: dict[str, Any] = {
            name: SimpleNamespace(request_id=name, num_output_tokens=count)
            for name, count in num_output_tokens.items()
        }
        self.logged: list[tuple[str, int]] = []
        log: Any = SimpleNamespace(
            add=lambda request_id, found: self.logged.append((request_id, found.token)) or True
        )
        self.observer = LoggedAnswers(log, self.requests, num_layers=2)
        self.observer.rows = dict.fromkeys(self.requests, 0)

    def step(self, taken: set[str], **rows: int) -> list[tuple[str, int]]:
        """What is logged of a step that has these rows and adds a token to these answers."""
        found = {name: SimpleNamespace(token=token, num_rows=6) for name, token in rows.items()}
        self.logged.clear()
        self.observer.step_ended(SimpleNamespace(**{ATTENTION_FIELD: found}))
        for request_id, request in self.requests.items():
            request.num_output_tokens += request_id in taken
        self.observer.step_told([])
        return list(self.logged)


def test_a_token_is_logged_when_it_becomes_part_of_the_answer() -> None:
    a, b = "a-12345678", "b-12345678"
    scheduler = Steps(**{a: 3, b: 0})
    assert scheduler.step({a, b}, **{a: 3, b: 0}) == [("a", 3), ("b", 0)]
    # Thrown away, as after a preemption: computed again later, and logged then.
    assert scheduler.step({b}, **{a: 4, b: 1}) == [("b", 1)]
    assert scheduler.step({a}, **{a: 4}) == [("a", 4)]
    # A recomputed chunk that ends in a row whose token has long been there.
    assert scheduler.step({b}, **{a: 2, b: 2}) == [("b", 2)]
    assert scheduler.step({a}, **{a: 5, "gone-12345678": 7}) == [("a", 5)]
    assert scheduler.observer.rows == {a: 18, b: 18}
