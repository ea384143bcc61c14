"""The driver without Ray: when a run stops, and how many batches an engine has at a time."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray")

from vllm_flow.eval.sweep.driver import SweepError, batches_at_once, collect  # noqa: E402
from vllm_flow.eval.sweep.engine_options import EngineOptions  # noqa: E402
from vllm_flow.eval.sweep.machines import Pool  # noqa: E402
from vllm_flow.eval.sweep.records import Run  # noqa: E402
from vllm_flow.eval.sweep.schema import answers_table  # noqa: E402
from vllm_flow.eval.sweep.work import (  # noqa: E402
    BATCH_REQUESTS,
    IN_FLIGHT,
    batches_of,
    in_flight,
    requests_of,
)


def batch(*errors: str | None) -> pa.Table:
    return answers_table(
        [
            {"task": "t", "item_id": f"{id(errors)}-{n}", "policy": "baseline"}
            | ({"answer": "Yes"} if error is None else {"error": error})
            for n, error in enumerate(errors)
        ]
    )


def test_too_many_errors_stop_the_run_and_are_kept(tmp_path: Path) -> None:
    batches = [batch(None, "a: 1"), batch("a: 2", "b", None), batch(None)]
    run = Run.create(tmp_path / "run", {})
    with pytest.raises(
        SweepError, match="3 requests failed, more than --max-errors 2.*2 x a; 1 x b"
    ):
        collect(run, iter(batches), max_errors=2)
    assert run.answers().num_rows == 5
    for limit in (3, None):
        progress = collect(Run.create(tmp_path / f"run {limit}", {}), batches, limit)
        assert (progress.answered, progress.errors) == (6, 3)


@pytest.mark.parametrize(
    ("batches", "engines", "expected"),
    [(1000, 1, IN_FLIGHT), (7, 2, 4), (2, 8, 1), (0, 1, 1), (3, 1, 3)],
)
def test_no_engine_takes_more_than_its_share(batches: int, engines: int, expected: int) -> None:
    """Two engines and seven batches: the one that starts first leaves three to the other."""
    assert in_flight([32] * batches, engines, sequences=1024) == expected


@pytest.mark.parametrize(
    ("requests", "sequences", "expected"),
    [(64, 256, 9), (248, 256, 4), (248, 1024, 10), (5000, 256, 2), (8, 4, 2)],
)
def test_large_batches_are_done_one_after_the_other(
    requests: int, sequences: int, expected: int
) -> None:
    """Eight pictures under 31 policies fill an engine: sixteen such batches would all end at the end."""
    found = in_flight([requests] * 1000, 1, sequences)
    assert found == expected
    assert (found - 1) * requests >= 2 * sequences


def work(counts: list[int]) -> list[dict]:
    """Rows of items under so many policies each."""
    return [
        {"task": "t", "item_id": str(item), "text": "", "policies": [f"cliff={n}" for n in range(count)]}
        for item, count in enumerate(counts)
    ]  # fmt: skip


@given(st.lists(st.integers(1, 90), max_size=40), st.integers(1, 40))
def test_a_batch_is_as_many_items_as_its_requests_allow(counts: list[int], size: int) -> None:
    """In their order, none lost, and none alone that the batch before it had room for."""
    batches = batches_of(work(counts), size)
    items = [table["item_id"].to_pylist() for table in batches]
    assert [item for batch in items for item in batch] == [str(n) for n in range(len(counts))]
    requests = [requests_of(table) for table in batches]
    assert sum(requests) == sum(counts)
    for number, (batch, asked) in enumerate(zip(items, requests, strict=True)):
        assert 1 <= len(batch) <= size
        assert asked <= BATCH_REQUESTS or len(batch) == 1
        if number + 1 < len(items):
            following = counts[int(items[number + 1][0])]
            assert len(batch) == size or asked + following > BATCH_REQUESTS


def test_what_is_at_an_engine_is_counted_in_requests_not_in_items() -> None:
    """Pictures under 31 policies: 32 batches of two at an engine would all be written at the end."""
    batches = batches_of(work([31] * 400), 32)
    options = EngineOptions("m", "float32", 1, 16, "llava-1.5", ())
    assert [requests_of(table) for table in batches] == [62] * 200
    assert batches_at_once(batches, options, Pool(1, 0, 1)) == 10
    assert batches_at_once(batches, options, Pool(1, 1, None)) == IN_FLIGHT
