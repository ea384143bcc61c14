"""Run directories: nothing lost, nothing twice, nothing mixed."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.eval.sweep import records
from vllm_flow.eval.sweep.records import Run, RunError
from vllm_flow.eval.sweep.schema import ANSWERS, KEY, one_row_per_key
from vllm_flow.eval.tasks.base import Item
from vllm_flow.outputs import OutputError

META = {"model": "m", "num_layers": 6, "versions": {"vllm": "0.32.0"}, "tasks": [], "policies": []}
ITEMS = [
    Item("1", "Is it?", "a.png", {"label": "yes", "n": [1, 2]}, "random"),
    Item("2", "Où ? ", None, {}),
]
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def row(item: str, policy: str = "baseline", minute: int = 0, **more: Any) -> dict[str, Any]:
    said = {} if "error" in more else {"answer": "Yes"}
    at = START + timedelta(minutes=minute)
    return {"task": "t", "item_id": item, "policy": policy, "written_at": at, **said, **more}


def keys(run: Run) -> list[tuple[str, ...]]:
    return [tuple(r[name] for name in KEY) for r in run.answers().to_pylist()]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", META)
    run.write_items("t", ITEMS)
    full = row("1", finish_reason="stop", kv_blocks=3, kv_bytes_saved=1 << 40, seconds=0.5)
    run.append([full, row("2", "cliff=3", error="no such file")])
    run.append([])
    again = Run.open(tmp_path / "run")
    assert again.items("t") == ITEMS
    assert again.meta["model"] == "m" and "created" in again.meta
    table = again.answers()
    assert table.schema == ANSWERS
    first, second = table.to_pylist()
    assert full.items() <= first.items() and first["error"] is None
    assert second["error"] == "no such file" and second["answer"] is None
    assert again.done() == {("t", "1", "baseline"), ("t", "2", "cliff=3")}
    assert again.failed() == {("t", "2", "cliff=3")}
    assert len(list((tmp_path / "run" / "answers").iterdir())) == 1


def test_no_row_twice_and_an_answer_beats_an_error(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META)
    run.append([row("1", error="refused"), row("2", answer="first")])
    run.append([row("1", minute=1, answer="Yes"), row("2", minute=1, answer="second")])
    run.append([row("2", minute=2, error="later")])
    found = {r["item_id"]: r for r in run.answers().to_pylist()}
    assert found["1"]["answer"] == "Yes" and found["1"]["error"] is None
    assert found["2"]["answer"] == "first"
    assert run.answers().num_rows == 2 and not run.failed()


rows = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["p", "q"]), st.integers(0, 3), st.booleans())
)


@settings(deadline=None)  # a busy machine takes its time over tables
@given(rows, st.randoms(use_true_random=False))
def test_the_rows_that_count_do_not_depend_on_files(
    specs: list[tuple[str, str, int, bool]], shuffler: random.Random
) -> None:
    table = pa.Table.from_pylist(
        [
            row(item, policy, minute, **({"error": "e"} if bad else {"answer": f"{minute}"}))
            for item, policy, minute, bad in specs
        ],
        schema=ANSWERS,
    )
    kept = one_row_per_key(table)
    order = list(range(table.num_rows))
    shuffler.shuffle(order)
    assert one_row_per_key(table.take(pa.array(order, pa.int64()))).equals(kept)
    assert one_row_per_key(kept).equals(kept)
    best = {}
    for item, policy, minute, bad in specs:
        best[item, policy] = min(best.get((item, policy), (bad, minute)), (bad, minute))
    found = {(r["item_id"], r["policy"]): r for r in kept.to_pylist()}
    assert found.keys() == best.keys() and kept.num_rows == len(best)
    for key, (bad, minute) in best.items():
        assert found[key]["answer"] == (None if bad else f"{minute}")


def test_compacting_changes_files_only(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META)
    for number in range(5):
        run.append([row(str(number % 3), minute=number)])
    before = run.answers()
    run.compact()
    assert run.answers().equals(before)
    assert len(list((tmp_path / "answers").iterdir())) == 1
    run.append([row("9")])
    assert run.answers().num_rows == 4


def test_a_crash_while_compacting_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path, META)
    for number in range(3):
        run.append([row(str(number))])
    before = run.answers()

    def crash(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("part-"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", crash)
        run.compact()
    assert len(list((tmp_path / "answers").glob("part-*"))) == 4
    assert Run.open(tmp_path).answers().equals(before)


def test_a_crash_while_writing_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path, META)
    run.append([row("1")])

    def half_written(table: pa.Table, where: Path, **options: Any) -> None:
        where.write_bytes(b"PAR1")
        os.kill(os.getpid(), 9)

    def append() -> None:
        monkeypatch.setattr(pq, "write_table", half_written)
        run.append([row("2")])

    child = multiprocessing.get_context("fork").Process(target=append)
    child.start()
    child.join()
    assert child.exitcode == -9
    assert [p.name[:5] for p in sorted((tmp_path / "answers").iterdir())] == [".tmp-", "part-"]
    assert keys(Run.open(tmp_path)) == [("t", "1", "baseline")]


def test_an_interrupt_while_the_first_times_are_read_is_no_missing_package() -> None:
    """pyarrow says so of whatever keeps it from loading zoneinfo, and would load it in the middle of a run."""
    look = "import vllm_flow.eval.sweep.schema, sys; print('zoneinfo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"


def test_one_writer(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META)
    with run.writing(), pytest.raises(RunError, match="another process"), run.writing():
        pass
    with run.writing():
        pass


def test_items_are_unique_and_of_a_task(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META)
    run.write_items("t", ITEMS)
    before = (tmp_path / "items" / "t.parquet").stat().st_ino
    run.write_items("t", ITEMS)
    assert (tmp_path / "items" / "t.parquet").stat().st_ino == before, "written once"
    run.write_items("t", ITEMS[:1])
    assert run.items("t") == ITEMS[:1] and run.item_rows("v") == []
    with pytest.raises(RunError, match="not unique"):
        run.write_items("u", [ITEMS[0], ITEMS[0]])
    with pytest.raises(RunError, match="no items of the task 'v' .it has: t."):
        run.items("v")
    with pytest.raises(RunError, match="no task's name"):
        run.items("../t")


def test_extending_keeps_what_was_there(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META)
    run.extend(["a"], [{"name": "baseline", "kind": "baseline", "cliff": None}])
    run.extend(["b", "a"], [{"name": "baseline"}, {"name": "cliff=3", "kind": "cliff", "cliff": 3}])
    meta = Run.open(tmp_path).meta
    assert meta["tasks"] == ["a", "b"]
    assert [p["name"] for p in meta["policies"]] == ["baseline", "cliff=3"]
    assert meta["policies"][0]["kind"] == "baseline"


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        Run.create(tmp_path, META)
    for text, why in (
        ("{", "Expecting property name"),
        ("[]", "it is no JSON object"),
        ("{}", "it has no version"),
        (f'{{"version": {records.VERSION}, "tasks": [null, true]}}', r"tasks is \[null, true\]"),
        *(
            (
                f'{{"version": 1, "policies": [{{"name": "p", "kind": "stages", {more}}}]}}',
                "policies is",
            )
            for more in ('"keys": [1]', '"side": "2"', '"cliff": -1')
        ),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunError, match=f"is damaged .{why}.*; put back a copy of it, or name"):
            Run.open(tmp_path)
    (tmp_path / "run.json").write_text(f'{{"version": {records.VERSION + 1}}}')
    with pytest.raises(RunError, match=r"another version of the format \(2\).* reads 1: take the"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="already"):
        Run.create(tmp_path, META)


def test_a_run_can_be_created_after_a_crash_while_creating(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / ".tmp-1-run.json").write_text("{")
    assert Run.create(tmp_path, META).answers().num_rows == 0


def test_answers_of_a_run_that_nobody_knows_are_not_taken_over(tmp_path: Path) -> None:
    """They may have been asked with any settings."""
    run = Run.create(tmp_path, META)
    run.append([row("1")])
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match="holds answers, and no run.json .*; put back a copy of it"):
        Run.create(tmp_path, META)


def test_what_is_written_outlives_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is on the disk before anybody goes on; where there is none, it is named."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file))
    run, seen = Run.create(tmp_path / "run", META), 0
    for write in (
        lambda: run.extend(["t"], []),
        lambda: run.write_items("t", ITEMS),
        lambda: run.append([row("1")]),
    ):
        assert len(synced) > seen
        seen = len(synced)
        write()
    assert len(synced) > seen
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/run/items.* cannot be"):
        Run.create(tmp_path / "file" / "run", META)


def test_rows_that_cannot_be_recorded_are_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META)
    with pytest.raises(ValueError, match="an answer or an error"):
        run.append([row("1", error="both", answer="Yes")])
    with pytest.raises(ValueError, match="no column colour"):
        run.append([row("1", colour="red")])


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path, META)
    run.append([row("1")])
    (part,) = (tmp_path / "answers").iterdir()
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(RunError, match="part-.* is damaged"):
        run.answers()
