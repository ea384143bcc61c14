"""The driver without Ray: when a run stops, and how many batches an engine has at a time."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

pytest.importorskip("ray")

from vllm_flow.eval.sweep.driver import SweepError, collect  # noqa: E402
from vllm_flow.eval.sweep.records import Run  # noqa: E402
from vllm_flow.eval.sweep.schema import answers_table  # noqa: E402
from vllm_flow.eval.sweep.work import IN_FLIGHT, in_flight  # noqa: E402


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
    assert in_flight([32] * batches, engines, sequences=256) == expected


@pytest.mark.parametrize(
    ("requests", "sequences", "expected"),
    [(248, 256, 4), (248, 1024, 10), (5000, 256, 2), (8, 4, 2)],
)
def test_large_batches_are_done_one_after_the_other(
    requests: int, sequences: int, expected: int
) -> None:
    """Eight pictures under 31 policies fill an engine: sixteen such batches would all end at the end."""
    found = in_flight([requests] * 1000, 1, sequences)
    assert found == expected
    assert (found - 1) * requests >= 2 * sequences
