"""Storage groups are asked only where their answers may differ, and no answer outlives its request."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.engine.bare_prompts import prompt
from tests.engine.bare_scheduler import LAYERS, BareScheduler, OpenBare
from tests.engine.harness import BLOCK_SIZE
from vllm_flow.engine.core.cache_keys import POSITION
from vllm_flow.engine.core.storage import FlowAttentionManager

ASKED = ("get_num_blocks_to_allocate", "allocate_new_blocks", "cache_prefixes", "cache_blocks")
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"flow_cliff": 0},
    {"flow_cliff": 3},
    {"flow_stages": "0:9 uniform, 2:4 uniform, 5:0"},
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often groups are asked, by method."""
    found: Counter[str] = Counter()

    def counted(name: str) -> None:
        ask = getattr(FlowAttentionManager, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return ask(*args, **kwargs)

        monkeypatch.setattr(FlowAttentionManager, name, run)

    for name in ASKED:
        counted(name)
    return found


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_most_decode_steps_ask_no_group(
    bare: OpenBare, asked: Counter[str], policy: dict[str, Any]
) -> None:
    """One in a block's length may fill a block of tokens, and one a packed block."""
    answers = 3 * BLOCK_SIZE
    engine = bare(1, 100)
    engine.add("one", prompt(21, 60, 19), answer=range(7, 7 + answers), **policy)
    while len(engine.answers.get("one", ())) < 2:
        engine.step()
    quiet = 0
    for _ in range(answers - 4):
        asked.clear()
        engine.step()
        quiet += not asked
    # Blocks of tokens and packed ones are full at different steps; each is followed by one to be found.
    kinds = 1 + len({manager.findable.stages(layout) for layout, manager in _packed(engine)})
    assert quiet >= answers - 4 - 2 * kinds * -(-answers // BLOCK_SIZE)
    assert quiet > answers // 2
    engine.drain()


def _packed(engine: BareScheduler) -> list[tuple[Any, Any]]:
    layout = engine.sent["one"].layout
    return [] if layout is None else [(layout, manager) for manager in engine.managers]


@pytest.mark.parametrize("policy", POLICIES[:3], ids=str)
def test_a_block_is_found_once_it_has_a_hash(bare: OpenBare, policy: dict[str, Any]) -> None:
    """vLLM 0.33 hashes a block late, where drafters read the tokens behind it."""
    engine = bare(1, 100)
    engine.add("one", prompt(21, 60, 19), answer=range(7, 90), **policy)
    [request] = engine.scheduler.requests.values()
    known = request.block_hashes[:]
    del request.block_hashes[1:]  # until the first token of the answer
    engine.step()
    cached = engine.scheduler.kv_cache_manager.coordinator.flow_cached
    if not policy:  # others' are named anew for the report of what is cached by then
        assert cached[request.request_id] == 1
    assert len(request.block_hashes) == len(known) == 3
    engine.step()
    assert cached[request.request_id] == 3
    engine.drain()


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_blocks_that_an_image_has_left_are_not_found_by_position(
    bare: OpenBare, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of a prompt's last block comes in the step in which its image leaves, as with vLLM 0.33's drafters."""
    engine = bare(layers, 100)
    for memory in ("_write", "_check"):  # which knows no moves
        monkeypatch.setattr(engine, memory, lambda *_: None)
    tokens = prompt(21, 60, 15)
    assert len(tokens) == 3 * BLOCK_SIZE
    engine.add("one", tokens, cliff=3, answer=range(7, 90), flow_when="decode")
    [request] = engine.scheduler.requests.values()
    last = request.block_hashes.pop()  # until the first token of the answer
    engine.step()
    assert request.block_hashes[2] == last
    engine.step()
    left = [manager for manager in engine.managers if manager.spec.last_layer >= 3]
    for manager in engine.managers:
        found = [manager.findable.find_cached(block, POSITION) for block in request.block_hashes]
        assert all(found[:2]) and (found[2] is None) == (manager in left)
    assert left
    engine.drain()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_known_of_a_request_that_has_gone(bare: OpenBare, asynchronous: bool) -> None:
    """Ended, aborted, or preempted, whose blocks are all to be asked for again."""
    engine = bare(2, 6, asynchronous=asynchronous)
    coordinator = engine.scheduler.kv_cache_manager.coordinator
    for index, policy in enumerate(POLICIES * 2):
        engine.add(f"r{index}", prompt(21, 90, 19 + index), answer=range(7, 60), **policy)
    preempted = False
    for step in range(60):
        engine.step()
        if step == 5:
            engine.abort("r1")
        running = {request.request_id for request in engine.scheduler.running}
        assert set(coordinator.flow_room) == running
        assert set(coordinator.flow_cached) <= running
        preempted |= any(r.num_preemptions for r in engine.scheduler.requests.values())
    assert preempted, "the pool is too large for this test"
    engine.drain()
    assert not coordinator.flow_room and not coordinator.flow_cached


@pytest.mark.parametrize("group_layers", [1, LAYERS])
def test_room_is_what_the_fullest_group_has(bare: OpenBare, group_layers: int) -> None:
    """No more than has a slot in every layer, and all of it."""
    engine = bare(group_layers, 100)
    coordinator = engine.scheduler.kv_cache_manager.coordinator
    for index, policy in enumerate(POLICIES):
        engine.add(f"r{index}", prompt(21, 60, 19 + index), answer=range(7, 60), **policy)
    for _ in range(40):
        engine.step()
        for name, room in coordinator.flow_room.items():
            slots = [len(m.req_to_blocks[name]) * BLOCK_SIZE for m in engine.managers]
            fits = [
                next(
                    n - 1
                    for n in range(engine.sent[name].request.num_computed_tokens + 1, 999)
                    if manager.stored_tokens(name, n) > held
                )
                for manager, held in zip(engine.managers, slots, strict=True)
            ]
            assert room <= min(fits)
            assert room == min(fits) or not engine.answers.get(name), name
