"""KV connectors: requests without a policy load and store blocks; those that evict are never heard of."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.v1.core.sched.output import CachedRequestData, KVConnectorBlockState, SchedulerOutput
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from tests.engine.bare_prompts import prompt
from tests.engine.bare_scheduler import LENGTH, OpenBare
from tests.engine.cases import LONG, one_image, text_only, two_images
from tests.engine.file_connector import FileConnector, Orders
from tests.engine.harness import BLOCK_SIZE, Engine, assert_exact, params_of
from vllm_flow.engine import adoption
from vllm_flow.engine.core.connectors import FlowConnector, hands_over, without


def connector_of(engine: Engine) -> FileConnector:
    found = engine.scheduler.connector
    assert isinstance(found, FileConnector) and isinstance(found, FlowConnector)
    return found


def test_untouched_requests_load_what_an_empty_cache_lacks(together: Engine) -> None:
    connector = connector_of(together)
    asks = [
        one_image(901, before=40),
        one_image(902, 2, before=40),
        two_images(903),
        replace(one_image(904), stages="1:60% uniform, 3:0"),
        text_only(905, 2, count=70),
    ]
    connector.known.clear()
    assert_exact(together, asks, together.run(asks))
    assert {request.num_prompt_tokens for request in connector.known.values()} == {
        len(ask.prompt.split()) + 1 + len(ask.images) * (LONG.image_tokens - 1)
        for ask in (asks[0], asks[2], asks[4])  # the last one has a policy and nothing to evict
    }
    assert together.reset_prefix_cache()
    loaded = connector.loaded
    outputs = together.run(asks)
    assert_exact(together, asks, outputs)
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[1] == cached[3] == 0
    assert cached[0] > LONG.image_tokens and cached[2] > LONG.image_tokens
    assert connector.loaded - loaded == sum(cached) // BLOCK_SIZE


def test_blocks_for_others_are_not_promised(together: Engine) -> None:
    """A router's order to load or to send blocks has no meaning for packed ones."""
    ask = one_image(911)
    params = params_of(ask)
    orders = {"kv_transfer_params": {"do_remote_decode": True}}
    params.extra_args = {"flow_cliff": 2, **orders}
    with pytest.raises(ValueError, match="flow_cliff=2: .*leave out kv_transfer_params"):
        together.llm.generate(together.prompt(ask), params, use_tqdm=False)
    params.extra_args = orders
    outputs = together.llm.generate(together.prompt(ask), params, use_tqdm=False)
    assert_exact(together, [ask], outputs)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("NixlConnector", True),
        ("NixlPullConnector", True),
        ("NixlPushConnector", False),
        ("OffloadingConnector", False),
    ],
)
def test_which_of_vllms_own_hand_packed_blocks_over(name: str, packed: bool) -> None:
    """What was tried between two servers: tests/server/test_handing_over.py."""
    assert hands_over(KVTransferConfig(kv_connector=name, kv_role="kv_both")) == packed


def step(**more: Any) -> SchedulerOutput:
    """A step of a new request and two running ones, 'b' of which evicts like the new 'd'."""
    cached = CachedRequestData(
        req_ids=["a", "b"],
        resumed_req_ids={"b"},
        new_token_ids=[],
        all_token_ids={"b": [1, 2]},
        new_block_ids=[None, ([3], [4])],
        num_computed_tokens=[5, 6],
        num_output_tokens=[1, 2],
    )
    return replace(
        SchedulerOutput.make_empty(),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=([ord(name)], [])) for name in "cd"
        ],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={"a": 1, "b": 1, "c": 7, "d": 9},
        total_num_scheduled_tokens=18,
        scheduled_encoder_inputs={"d": [0]},
        kv_connector_block_state=KVConnectorBlockState(
            set("abcd"), lambda name: ([ord(name)],), {"b": [(0, 1, 2)]}
        ),
        finished_req_ids={"e"},
        **more,
    )


def test_a_step_without_some_requests() -> None:
    whole = step()
    shown = without(whole, ["b", "d"])
    assert [new.req_id for new in shown.scheduled_new_reqs] == ["c"]
    assert shown.num_scheduled_tokens == {"a": 1, "c": 7}
    assert shown.total_num_scheduled_tokens == 8
    assert not shown.scheduled_encoder_inputs and shown.finished_req_ids == {"e"}
    cached = shown.scheduled_cached_reqs
    assert (cached.req_ids, cached.new_block_ids) == (["a"], [None])
    assert (cached.num_computed_tokens, cached.num_output_tokens) == ([5], [1])
    assert not cached.resumed_req_ids and not cached.all_token_ids
    state = shown.kv_connector_block_state
    assert state is not None and state.req_ids == {"a", "c"}
    assert not state.boundary_state_offloads and state.get_block_ids("b") is None
    # What the others took is overwritten, which who still stores it must know.
    assert shown.kv_cache_block_copies == [(block, block) for block in (ord("d"), 3, 4)]
    assert whole.kv_cache_block_copies is None
    assert whole.num_scheduled_tokens == {"a": 1, "b": 1, "c": 7, "d": 9}


def test_zeros_that_a_connector_makes_needless_stay_so() -> None:
    class Fills(FileConnector):
        def build_connector_meta(self, scheduler_output: Any) -> Any:
            assert "b" not in scheduler_output.num_scheduled_tokens
            scheduler_output.new_block_ids_to_zero = [8]
            return Orders()

    filling = Fills.__new__(Fills)
    adoption.adopt(filling, FlowConnector)
    filling.flow_layouts, filling.flow_handed = {"b": object()}, set()
    output = step(new_block_ids_to_zero=[7, 8])
    assert filling.build_connector_meta(output) == Orders()
    assert output.new_block_ids_to_zero == [8]


@pytest.mark.parametrize("cliff", [None, 2], ids=["plain", "evicts"])
def test_blocks_are_taken_when_what_they_held_is_stored(
    bare: OpenBare, monkeypatch: pytest.MonkeyPatch, cliff: int | None
) -> None:
    """vLLM's offloading stores the last blocks of a finished request a step later, if nobody takes them."""
    original = CPUOffloadingSpec.__init__

    def with_room(self: Any, config: Any) -> None:
        original(self, config)
        self.num_chunks = 1000  # there is no cache whose size says how many

    monkeypatch.setattr(CPUOffloadingSpec, "__init__", with_room)
    transfer = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": 1 << 20},
    )
    engine = bare(2, kv_transfer_config=transfer)
    connector = engine.scheduler.connector
    assert isinstance(connector, FlowConnector)
    told: list[Any] = []
    build = connector.build_connector_meta
    connector.build_connector_meta = lambda output: told.append(build(output)) or told[-1]
    engine.add("first", prompt(9, 60, 200))
    while engine.scheduler.has_unfinished_requests():
        engine.step()
    storing = set[int]().union(*(meta.store_jobs for meta in told))
    assert storing and not any(meta.jobs_to_flush for meta in told)
    engine.add("second", prompt(9, 60, LENGTH - 80, word=90), cliff)
    engine.step()
    assert told[-1].jobs_to_flush and told[-1].jobs_to_flush <= storing | set(told[-1].store_jobs)
