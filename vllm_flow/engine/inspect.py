"""Looking into a running engine: what requests took, and whether the block pool is sound.

Works on an engine in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``). Reads only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_flow.engine.core.footprints import Footprint
from vllm_flow.layout import TokenLayout, of_prompt

if TYPE_CHECKING:
    from vllm import LLM


def scheduler_of(llm: LLM | Any) -> Any:
    """The engine's scheduler.

    Raises:
        RuntimeError: the engine runs in another process, or without vLLM-Flow.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise RuntimeError(
            "the engine core runs in another process; set VLLM_ENABLE_V1_MULTIPROCESSING=0 "
            "before vLLM is imported to inspect it."
        )
    if not hasattr(core.scheduler, "flow_requests"):
        raise RuntimeError(
            "this engine runs without vLLM-Flow; pass additional_config={'vllm_flow': {}}."
        )
    return core.scheduler


def spares_last_layers(llm: LLM | Any) -> bool:
    """Whether image rows leave the last layer that sees them early; see ``engine/worker/passes/last_layer.py``."""
    scheduler_of(llm)  # in this process, and with the extension
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    return bool(runner.flow_state.planner.spares_last_layers)


def footprints(llm: LLM | Any) -> dict[str, Footprint]:
    """Footprints of the latest finished requests, by the engine's internal request id.

    The internal id is the caller's id, a dash and eight random characters.
    """
    return dict(scheduler_of(llm).flow_footprints.latest)


def attention_log(llm: LLM | Any) -> Any:
    """The :class:`~vllm_flow.engine.core.attention.writer.AttentionLogWriter`, None where none is configured."""
    logged = scheduler_of(llm).flow_logged
    return None if logged is None else logged.log


def check_integrity(llm: LLM | Any) -> None:
    """Check that no KV block is leaked, lost or shared wrongly; may run between any two steps.

    Raises:
        AssertionError: naming the blocks and requests concerned.
    """
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    live = set(scheduler.requests)
    layouts = scheduler.flow_requests.layouts
    _check(not layouts.keys() - live, "layouts of ended requests", layouts.keys() - live)

    uses: Counter[int] = Counter()
    owners: dict[int, tuple[int, str]] = {}
    for manager in scheduler.flow_groups.every:
        group = manager.kv_cache_group_id
        held = {request_id for request_id, blocks in manager.req_to_blocks.items() if blocks}
        _check(held <= live, f"group {group} holds blocks of ended requests", held - live)
        for request_id in held:
            blocks = manager.req_to_blocks[request_id]
            for block in blocks:
                if block.is_null:
                    continue  # in the place of states that are no longer needed
                uses[block.block_id] += 1
                first = owners.setdefault(block.block_id, (group, request_id))
                if first == (group, request_id):
                    continue
                # Two holders must have found it by one hash: same group, same policy, or none so far.
                _check(
                    first[0] == group
                    and block.block_hash is not None
                    and _salt(layouts, first[1]) == _salt(layouts, request_id),
                    f"block {block.block_id} is shared without a common prefix",
                    [first, (group, request_id)],
                )

    deferred = Counter(block.block_id for _, blocks in scheduler.deferred_frees for block in blocks)
    expected = uses + deferred
    wrong = {
        block.block_id: (block.ref_cnt, expected[block.block_id])
        for block in pool.blocks
        if not block.is_null and block.ref_cnt != expected[block.block_id]
    }
    _check(not wrong, "blocks whose reference count differs from their uses", wrong)
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    _check(len(free) == len(set(free)), "blocks are in the free queue twice", free)
    unused = {block.block_id for block in pool.blocks if not block.is_null and block.ref_cnt == 0}
    _check(set(free) == unused, "unused blocks and free queue differ", set(free) ^ unused)


def _salt(layouts: Mapping[str, TokenLayout], request_id: str) -> str | None:
    layout = of_prompt(layouts.get(request_id))
    return None if layout is None else layout.salt


def _check(holds: bool, what: str, found: Any) -> None:
    if not holds:
        raise AssertionError(f"KV storage: {what}: {found}")
