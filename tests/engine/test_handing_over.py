"""Prefill in one engine, decode in another: requests that evict go over with their packed blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from vllm import RequestOutput
from vllm.distributed.kv_transfer import kv_transfer_state

from tests.engine.cases import LONG, Ask, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.handing_connector import HandingConnector
from tests.engine.harness import BLOCK_SIZE, Engine, assert_exact, params_of
from tests.engine.tiny_llava import words
from vllm_flow.engine.core.connectors import LAYOUT_KEY, FlowConnector
from vllm_flow.engine.report import REPORT_KEY
from vllm_flow.policy_keys import parse_policy
from vllm_flow.profile.dimensions import ModelShape, Workload
from vllm_flow.profile.ideal import kv_blocks, kv_bytes

GROUP_LAYERS = 2
STARTS = range(0, LONG.layers, GROUP_LAYERS)
SHAPE = ModelShape(
    LONG.layers, 1, LONG.heads, LONG.kv_heads, LONG.head_dim, mlp=1, vocab=1, value_bytes=4
)
SEND = {"do_remote_decode": True}
ASKS = (
    one_image(951, 2, before=40),
    two_images(952, 3),
    one_image(953),
    replace(one_image(954), stages="1:60% uniform, 3:0"),
    replace(one_image(955), stages="2:50% diversity, 4:0"),
    one_image(956, 0, before=0),
    text_only(957, 2),
    one_image(958, LONG.layers),
)


@dataclass
class Node:
    """An engine, and the workers' half of its connector, of which vLLM knows one per process."""

    engine: Engine
    worker: HandingConnector

    @contextmanager
    def current(self) -> Iterator[None]:
        kv_transfer_state._KV_CONNECTOR_AGENT = self.worker
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None

    def run(self, asks: Sequence[Ask], transfers: Sequence[Any]) -> list[RequestOutput]:
        """Each request with its ``kv_transfer_params``, all in one call."""
        params = [params_of(ask) for ask in asks]
        for own, transfer in zip(params, transfers, strict=True):
            own.extra_args = {**(own.extra_args or {}), "kv_transfer_params": transfer}
        prompts = [self.engine.prompt(ask) for ask in asks]
        with self.current():
            return self.engine.llm.generate(prompts, params, use_tqdm=False)

    def prefill(self, asks: Sequence[Ask]) -> list[dict[str, Any]]:
        """What a router hands on with each request: the prefill's ``kv_transfer_params``, all of them."""
        once = [replace(ask, max_tokens=1) for ask in asks]
        outputs = self.run(once, [SEND] * len(asks))
        assert_exact(self.engine, once, outputs)
        return [dict(output.kv_transfer_params or {}) for output in outputs]


OpenNode = Any
"""``open_node(name, wait=False)``."""


@pytest.fixture
def open_node(
    open_engine: OpenEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenNode]:
    folder = tmp_path_factory.getbasetemp() / "handed"
    folder.mkdir(exist_ok=True)

    def get(name: str, wait: bool = False) -> Node:
        transfer = {
            "kv_connector": "HandingConnector",
            "kv_connector_module_path": "tests.engine.handing_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"folder": str(folder), "wait": wait, "name": name},
        }
        engine = open_engine(LONG, GROUP_LAYERS, kv_transfer_config=transfer, **OPTIONS)
        if (worker := kv_transfer_state._KV_CONNECTOR_AGENT) is not None:
            engine.workers_half = worker  # it has just started
            kv_transfer_state._KV_CONNECTOR_AGENT = None
        assert isinstance(engine.scheduler.connector, FlowConnector)
        return Node(engine, engine.workers_half)

    yield get
    kv_transfer_state._KV_CONNECTOR_AGENT = None


OPTIONS = {"enable_prefix_caching": True, "max_num_batched_tokens": 200, "max_num_seqs": 12}


def work(ask: Ask, output: RequestOutput) -> Workload:
    image = len(ask.images) * LONG.image_tokens
    text = len(output.prompt_token_ids or ()) - image
    return Workload(text, image, output_tokens=1, images=len(ask.images))


def policy_of(ask: Ask) -> Any:
    found = parse_policy(ask.extra_args, LONG.layers)
    return LONG.layers if found is None else found


@pytest.mark.parametrize("wait", [False, True], ids=["meanwhile", "before a step"])
def test_the_other_engine_goes_on_exactly(open_node: OpenNode, wait: bool) -> None:
    first, second = open_node("prefill"), open_node(f"decode {wait}", wait)
    before = set(first.worker.bytes)
    handed = first.prefill(ASKS)
    assert first.worker.bytes.keys() - before == {own["remote_request_id"] for own in handed}
    computed, given = (
        getattr(second.engine.scheduler.connector, name) for name in ("computed", "given")
    )
    computed.clear(), given.clear()
    outputs = second.run(ASKS, handed)
    assert_exact(second.engine, ASKS, outputs)
    # Of a prompt its last token alone, whose logits nobody sent.
    assert list(computed.values()) == [ask.max_tokens for ask in ASKS]
    received = list(given.values())
    for ask, own, output, held in zip(ASKS, handed, outputs, received, strict=True):
        blocks = kv_blocks(work(ask, output), policy_of(ask), STARTS, BLOCK_SIZE)
        bytes_each = GROUP_LAYERS * BLOCK_SIZE * SHAPE.token_bytes
        assert first.worker.bytes[own["remote_request_id"]] == sum(blocks) * bytes_each
        assert held == blocks, "no more than what is sent"
    second.engine.check_blocks()


def test_what_is_sent_is_the_arithmetic_of_scale(open_node: OpenNode) -> None:
    """To the byte, where prompts fill their blocks and cliffs lie between storage groups."""
    node, sent = open_node("prefill"), {}
    prompt = f"{words(20, 961)} <image> {words(20, 962)} <image> {words(23, 963)}"
    asks = [Ask(prompt, (961, 962), cliff) for cliff in (0, 2, 4, None)]
    for ask, own in zip(asks, node.prefill(asks), strict=True):
        load = Workload(64, 2 * LONG.image_tokens, output_tokens=1, images=2)
        sent[ask.cliff] = node.worker.bytes[own["remote_request_id"]]
        assert sent[ask.cliff] == kv_bytes(SHAPE, load, policy_of(ask))
    assert sent[0] < sent[2] < sent[4] < sent[None]


def test_what_came_over_is_found_by_the_next_turn(open_node: OpenNode) -> None:
    first, second = open_node("prefill"), open_node("decode False")
    ask = one_image(964, 2, before=40)
    longer = replace(ask, prompt=f"{ask.prompt} {words(9, 965)}")
    assert_exact(second.engine, [ask], second.run([ask], first.prefill([ask])))
    (output,) = second.run([longer], [None])
    assert_exact(second.engine, [longer], [output])
    assert output.num_cached_tokens > LONG.image_tokens


def test_blocks_that_are_sent_after_the_answer_are_reported_and_forgotten(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NIXL does it: a prefill's blocks stay until the other engine has fetched them."""
    node = open_node("prefill")
    at_once = HandingConnector.request_finished_all_groups
    monkeypatch.setattr(
        HandingConnector,
        "request_finished_all_groups",
        lambda *args: (True, at_once(*args)[1]),
    )
    fetched: set[str] = set()
    monkeypatch.setattr(node.worker, "get_finished", lambda finished: (set(fetched), None))
    (own,) = node.prefill([one_image(968, 2)])
    assert own[REPORT_KEY]["image_tokens_evicted"] == LONG.image_tokens
    scheduler = node.engine.scheduler
    fetched |= scheduler.requests.keys()
    assert len(fetched) == 1, "its blocks wait"
    with node.current():
        node.engine.step()
    node.engine.check_idle()
    assert not scheduler.flow_reports._evicted and not scheduler.flow_requests.layouts


def test_what_never_came_is_found_by_nobody(
    open_node: OpenNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client leaves while its prompt is awaited, and the transfer fails."""
    first, second = open_node("prefill"), open_node("decode False")
    engine, worker, ask = second.engine, second.worker, one_image(969, 2, before=40)
    (own,) = first.prefill([ask])
    params = params_of(ask)
    params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": own}
    ordered: set[str] = set()

    def fail(forward_context: Any, **kwargs: Any) -> None:
        ordered.update(worker._get_connector_metadata().receive)

    monkeypatch.setattr(worker, "start_load_kv", fail)
    with second.current():
        engine.llm.llm_engine.add_request("leaves", engine.prompt(ask), params)
        engine.step()
        assert len(ordered) == 1
        engine.abort("leaves")
        worker.received = ordered
        engine.step()
    assert not engine.scheduler.requests
    (output,) = second.run([ask], [None])
    assert_exact(engine, [ask], [output])
    assert output.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("sent", "asked", "says"),
    [
        ({"cliff": 2}, {"cliff": 3}, "flow_cliff=3: .*prefilled without this policy"),
        ({}, {"cliff": 3}, "flow_cliff=3: .*prefilled without this policy"),
        ({"cliff": 2}, {}, "vllm_flow_layout='[0-9a-f]*': .*send that policy"),
        ({"cliff": 2}, {"cliff": 2, "late": True}, "flow_when.*KV connector"),
    ],
    ids=["another", "the first had none", "the second has none", "late"],
)
def test_a_prompt_of_another_policy_is_refused(
    open_node: OpenNode, sent: dict[str, Any], asked: dict[str, Any], says: str
) -> None:
    first, second = open_node("prefill"), open_node("decode False")
    ask = one_image(966)
    handed = first.prefill([replace(ask, **sent)])
    assert (LAYOUT_KEY in handed[0]) == bool(sent)
    with pytest.raises(ValueError, match=says):
        second.run([replace(ask, **asked)], handed)
    ok = replace(ask, **sent)
    assert_exact(second.engine, [ok], second.run([ok], handed))
