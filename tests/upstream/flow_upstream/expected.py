"""The tests of vLLM that are expected to fail, in which run, and why. Nothing else may.

Knows neither pytest nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EVERY_RUN = ("stock", "1", "2")


@dataclass(frozen=True)
class Difference:
    """Tests that fail for one reason; every test that it names must."""

    kind: str
    """In a few words, the same for all of a kind."""
    reason: str
    """What the tests do that makes them fail, in one sentence."""
    tests: tuple[str, ...]
    """``file.py::test``; all of a test's parameters, or ``test[parameters]``; ``*`` is anything."""
    runs: tuple[str, ...]
    """``stock``, or numbers of storage groups."""
    raises: type[Exception] | tuple[type[Exception], ...] = AssertionError
    """With what they fail; another failure is a new one."""

    def matches(self, node_id: str) -> bool:
        """Whether this difference names the test."""
        return any(_names(pattern, node_id) for pattern in self.tests)


def _names(pattern: str, node_id: str) -> bool:
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(rf"(.*/)?{expression}(\[.*\])?", node_id) is not None


def unmatched(differences: Iterable[Difference], node_ids: Sequence[str]) -> list[str]:
    """Patterns that name none of the tests, though tests of their file were collected."""
    files = {_file(node_id) for node_id in node_ids}
    return [
        pattern
        for difference in differences
        for pattern in difference.tests
        if _file(pattern) in files and not any(_names(pattern, node_id) for node_id in node_ids)
    ]


def _file(node_id: str) -> str:
    return node_id.partition("::")[0].rpartition("/")[2]


BY_HAND = "puts the scheduler together by hand"

COUNTS = "counts the blocks of one group"
CONNECTOR = "uses a KV connector of one block table per request, which the extension refuses"

EXPECTED: tuple[Difference, ...] = (
    Difference(
        BY_HAND,
        "makes a scheduler without its constructor, so that it has nothing of ours.",
        (
            "test_scheduler.py::test_abort_request_when_structured_output_fsm_cannot_advance",
            "test_async_scheduler.py::test_abort_request_when_structured_output_fsm_cannot_advance",
        ),
        ("1", "2"),
        AttributeError,
    ),
    Difference(
        BY_HAND,
        "gives a scheduler another KV-cache manager, with HiSparse groups that ours refuses.",
        (
            "test_prefix_caching.py::test_hisparse_async_admission_requires_full_prompt_host_pages",
            "test_prefix_caching.py::test_hisparse_admitted_async_loads_can_finish_with_nothing_running",
        ),
        ("1", "2"),
        AttributeError,
    ),
    Difference(
        COUNTS,
        "compares a request's block ids, or the pool's free blocks, with those of a single group.",
        (
            "test_prefix_caching.py::test_prefill",
            "test_prefix_caching.py::test_prefill_plp",
            "test_prefix_caching.py::test_decode",
            "test_prefix_caching.py::test_evict",
            "test_prefix_caching.py::test_computed_blocks_not_evicted",
            "test_prefix_caching.py::test_mm_prefix_caching",
            "test_prefix_caching.py::test_cache_key_salting",
            "test_prefix_caching.py::test_prefill_not_enough_free_blocks_with_computed_blocks",
            "test_prefix_caching.py::test_reset_prefix_cache",
            "test_prefix_caching.py::test_session_id_does_not_affect_prefix_cache_identity",
            "test_prefix_caching.py::test_eagle_enabled_removes_last_block",
        ),
        ("2",),
    ),
    Difference(
        COUNTS,
        "expects the events of one group: two announce every block of tokens, each with its group.",
        (
            "test_prefix_caching.py::test_kv_cache_events",
            "test_prefix_caching.py::test_block_stored_event_session_id",
            "test_prefix_caching.py::test_block_stored_event_group_idx_out_of_bounds",
        ),
        ("2",),
    ),
    Difference(
        COUNTS,
        "leaves so many free blocks by hand that a request of one group just fits, or just does not.",
        (
            "test_prefix_caching.py::test_full_sequence_admission_reserves_device_blocks_for_immediate_chunk[10-False]",
            "test_deferred_block_free.py::test_cow_retentions_deferred_until_copy_step_processed",
        ),
        ("2",),
    ),
    Difference(
        COUNTS,
        "expects the pool to be as large as one group makes it.",
        (
            "test_scheduler.py::test_kv_connector_basic",
            "test_scheduler.py::test_ec_connector_with_partial_cache_hit_multi_round[True]",
            "test_scheduler.py::test_ec_connector_unable_to_allocate[False]",
        ),
        ("2",),
    ),
    Difference(
        CONNECTOR,
        "asks a connector without support for several groups, which vLLM asserts never happens.",
        (
            "test_scheduler.py::test_pause_new_drains_async_kv_loads[load-in-flight]",
            "test_scheduler.py::test_pause_new_drains_async_kv_loads[load-done]",
            "test_scheduler.py::test_external_prefix_cache_metrics[True-*]",
            "test_scheduler.py::test_kv_connector_unable_to_allocate",
            "test_scheduler.py::test_kv_connector_handles_preemption",
            "test_scheduler.py::test_priority_scheduling_preemption_and_resumption_when_out_of_kv",
            "test_scheduler.py::test_ec_connector_unable_to_allocate[True]",
            "test_scheduler.py::test_priority_scheduling_ec_connector_preemption_and_resumption[True-*]",
            "test_scheduler.py::test_ec_connector_allocate_encoder_tokens_with_external_load[True]",
            "test_scheduler.py::test_abort_request_waiting_for_remote_kvs",
            "test_scheduler.py::test_abort_request_finished_recving",
            "test_async_scheduler.py::test_kv_pressure_preempt_mid_handoff[kv_consumer-*]",
        ),
        ("2",),
    ),
)
