"""What a command may change of a run: settings before its first answer, and what answers do not depend on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray")

from vllm_flow.eval.sweep.records import Run, RunError
from vllm_flow.eval.sweep.resuming import (
    difference,
    has_answers,
    items_obstacle,
    opened_run,
    preparations,
)
from vllm_flow.eval.sweep.work import TaskWork, sample
from vllm_flow.eval.tasks.base import Item

ITEMS = [
    Item("1", "Is it?", "/data/t/a.png", {"label": "yes", "n": [1, 2]}, "random"),
    Item("2", "Où ? ", None, {}),
]
META = {"model": "m", "dtype": "float32", "data": "/data", "limit": 2, "versions": {"vllm": "1"}}


def work(items: list[Item] = ITEMS, task: str = "t") -> list[TaskWork]:
    return [TaskWork(task, items, 8, "plain")]


def answer(run: Run, item: str = "1", **said: Any) -> None:
    run.append(
        [{"task": "t", "item_id": item, "policy": "baseline", **(said or {"answer": "Yes"})}]
    )


def started(path: Path, **said: Any) -> Path:
    """A run of `META` with one row."""
    with opened_run(path, META, work()) as run:
        run.extend(["t"], [])
        answer(run, **said)
    return path


def test_settings_that_differ_are_named() -> None:
    meta = {"model": "m", "dtype": "float32", "versions": {"vllm": "1", "ray": "1"}, "engines": 1}
    assert difference(meta, meta) == []
    other = {**meta, "engines": 8, "hardware": "x", "versions": {"vllm": "1", "ray": "2"}}
    assert difference(meta, other) == []
    other = {**meta, "model": "n", "versions": {"vllm": "2"}}
    assert difference(meta, other) == [
        'model is "m" there and "n" here',
        "vllm is version 1 there and 2 here",
    ]


def test_packages_of_ranks_and_tasks_join_a_run_and_stay_what_they_are(tmp_path: Path) -> None:
    def meta(**packages: str) -> dict[str, Any]:
        named = {name.replace("_", " ", 1): version for name, version in packages.items()}
        return {**META, "versions": {**META["versions"], **named}}

    path = tmp_path / "run"
    with opened_run(path, meta(rank_center="a 1"), work()) as run:
        assert run.meta["versions"]["rank center"] == "a 1"
    with opened_run(path, meta(rank_center="a 2"), work()) as run:  # no answer yet
        assert run.meta["versions"]["rank center"] == "a 2"
        run.extend(["t"], [])
        answer(run)
    with opened_run(path, meta(rank_edge="b 1", task_t="c 1"), work()) as run:
        had = {"vllm": "1", "rank center": "a 2", "rank edge": "b 1", "task t": "c 1"}
        assert run.meta["versions"] == had == Run.open(path).meta["versions"]
    with opened_run(path, META, work()) as run:  # asks under other policies
        assert run.meta["versions"] == had
    for other in ({"rank_center": "a 1"}, {"task_t": "d 1"}):
        ((name, version),) = other.items()
        name = name.replace("_", " ", 1)
        says = f"other settings: {name} is that of {had[name]} there and of {version} here[.]"
        with (
            pytest.raises(RunError, match=says),
            opened_run(path, meta(**other), work()),
        ):
            pass


def test_engine_arguments_count_where_answers_depend_on_them() -> None:
    """Where things lie and who shares a step may differ; what is computed may not."""
    before = {"engine_args": {"max_num_seqs": 64, "kv_cache_dtype": "fp8"}}
    same = {"engine_args": {"gpu_memory_utilization": 0.5, "kv_cache_dtype": "fp8"}}
    assert difference(before, same) == [] == difference({}, {"engine_args": {}})
    for name, value in (
        ("kv_cache_dtype", "auto"), ("tensor_parallel_size", 2), ("quantization", "fp8"), ("seed", 1),
        ("max_model_len", 99), ("mm_processor_kwargs", {"max_pixels": 9}), ("enforce_eager", False),
    ):  # fmt: skip
        (said,) = difference(before, {"engine_args": {**before["engine_args"], name: value}})
        assert said.startswith(f"engine argument {name} is ") and json.dumps(value) in said


@pytest.mark.parametrize("said", [{}, {"error": "no memory"}], ids=["nothing", "errors"])
def test_a_run_without_an_answer_takes_other_settings(
    tmp_path: Path, said: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a misspelt engine argument; what failed under the old settings is asked again."""
    with opened_run(tmp_path / "run", META, work()) as run:
        run.extend(["t"], [{"name": "baseline", "kind": "baseline"}], {"started": "now"})
        if said:
            answer(run, **said)
    other = {**META, "dtype": "bfloat16", "limit": 1, "engine_args": {"quantization": "fp8"}}
    with opened_run(tmp_path / "run", other, work(ITEMS[:1])) as run:
        assert run.meta["dtype"] == "bfloat16" and run.items("t") == ITEMS[:1]
        assert not run.done() and not run.meta.get("policies")
    assert "has no answer yet" in capsys.readouterr().out
    assert Run.open(tmp_path / "run").meta["limit"] == 1


def test_errors_stay_where_settings_do(tmp_path: Path) -> None:
    path = started(tmp_path, error="gone.png")
    with opened_run(path, META, work()) as run:
        assert run.failed() == {("t", "1", "baseline")}
    # One setting alone, of the same questions about the same data.
    for other in ({"dtype": "half"}, {"data": "/elsewhere"}):
        with opened_run(path, {**META, **other}, work()) as run:
            assert not run.failed() and other.items() <= run.meta.items()
            answer(run, error="gone.png")


def test_a_run_with_an_answer_keeps_its_settings(tmp_path: Path) -> None:
    path = started(tmp_path)
    with (
        pytest.raises(RunError, match='other settings: dtype is "float32" there and "half" here'),
        opened_run(path, {**META, "dtype": "half"}, work()),
    ):
        pass
    changed = [ITEMS[0], Item("2", "Where?", None, {})]
    with (
        pytest.raises(RunError, match="item 2 has text 'Où . ' there and 'Where.' here"),
        opened_run(path, META, work(changed)),
    ):
        pass
    with (
        pytest.raises(RunError, match="item 2 of the run is not among"),
        opened_run(path, META, work(ITEMS[:1])),
    ):
        pass
    assert Run.open(path).items("t") == ITEMS and Run.open(path).meta["dtype"] == "float32"


def test_what_counts_as_an_answer(tmp_path: Path) -> None:
    """The cliff finder keeps measurements beside the run."""
    run = Run.create(tmp_path, META)
    (tmp_path / "measured.jsonl").touch()
    assert not has_answers(run, ("measured.jsonl",))
    (tmp_path / "measured.jsonl").write_text("{}\n")
    assert has_answers(run, ("measured.jsonl",)) and not has_answers(run)
    with (
        pytest.raises(RunError, match="dtype"),
        opened_run(tmp_path, {**META, "dtype": "half"}, work(), beside=("measured.jsonl",)),
    ):
        pass


def test_somebody_else_who_writes_keeps_the_settings(tmp_path: Path) -> None:
    with (
        opened_run(tmp_path, META, work()),
        pytest.raises(RunError, match="another process"),
        opened_run(tmp_path, {**META, "dtype": "half"}, work()),
    ):
        pass
    assert Run.open(tmp_path).meta["dtype"] == "float32"


MORE = [Item("0", "New?", None, {}), *ITEMS]


@pytest.mark.parametrize("limit", [3, None])
def test_a_larger_limit_adds_questions(tmp_path: Path, limit: int | None) -> None:
    path, larger = started(tmp_path), {**META, "limit": limit}
    with pytest.raises(RunError, match="limit is 2 there"), opened_run(path, larger, work(MORE)):
        pass
    with opened_run(path, larger, work(MORE), growing=True) as run:
        assert run.items("t") == MORE and run.done() == {("t", "1", "baseline")}
    assert Run.open(path).meta["limit"] == limit
    with pytest.raises(RunError, match="limit is"), opened_run(path, META, work(), growing=True):
        pass


def test_a_larger_sample_without_the_smaller_one_is_refused(tmp_path: Path) -> None:
    path, others = started(tmp_path), [MORE[0], ITEMS[1], Item("9", "?", None, {})]
    with (
        pytest.raises(
            RunError,
            match="item 1 of the run is not among the 3 items here; use the same data, --limit",
        ),
        opened_run(path, {**META, "limit": 3}, work(others), growing=True),
    ):
        pass


@given(st.integers(1, 400), st.data())
def test_obstacles_of_samples(count: int, data: st.DataObject) -> None:
    """A larger sample is taken if and only if it holds the smaller one."""
    items = [{"item_id": str(n), "text": f"{n}"} for n in range(count)]
    small = data.draw(st.integers(1, count))
    large = data.draw(st.integers(small, count))
    few, many = (
        sample([Item(i["item_id"], "", None, {}) for i in items], k, 0) for k in (small, large)
    )
    before, after = ([{"item_id": item.id} for item in chosen] for chosen in (few, many))
    holds = {item.id for item in few} <= {item.id for item in many}
    assert (items_obstacle(before, after, growing=True) is None) == holds
    assert (items_obstacle(before, after) is None) == (before == after)
    assert items_obstacle(items, items[::-1]) is None or count > 1


def test_the_order_of_the_questions_is_the_runs() -> None:
    rows = [{"item_id": str(n)} for n in range(3)]
    said = items_obstacle(rows, rows[::-1])
    assert said is not None and "another order" in said
    random.Random(0).shuffle(rows)
    assert items_obstacle(rows, rows) is None


def test_data_that_moved(tmp_path: Path) -> None:
    """The same questions about pictures of the same names, and nothing left in the old place."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    items = [Item("1", "Is it?", f"{old}/t/a.png", {}), Item("2", "?", "/elsewhere/b.png", {})]
    there = [Item("1", "Is it?", f"{new}/t/a.png", {}), items[1]]
    meta, moved = ({**META, "data": str(place)} for place in (old, new))
    with opened_run(tmp_path / "run", meta, work(items)) as run:
        run.write_items("u", [Item("3", "?", f"{old}/u/c.png#0", {})])
        answer(run)
    with (
        pytest.raises(RunError, match="old is still there"),
        opened_run(tmp_path / "run", moved, work(there)),
    ):
        pass
    old.rmdir()
    with (
        pytest.raises(RunError, match="item 1 has text"),
        opened_run(
            tmp_path / "run", moved, work([Item("1", "Was it?", there[0].image, {}), there[1]])
        ),
    ):
        pass
    assert Run.open(tmp_path / "run").items("t") == items, "refused, so as it was"
    with opened_run(tmp_path / "run", moved, work(there)) as run:
        assert run.items("t") == there and run.done() == {("t", "1", "baseline")}
        assert run.items("u")[0].image == f"{new}/u/c.png#0"
    assert Run.open(tmp_path / "run").meta["data"] == str(new)


def test_preparations_of_older_runs() -> None:
    tasks = ["pope", "chair-opera", "amber", "refcoco", "refcoco-qwen"]
    meta = {"tasks": tasks, "image_preparation": "task"}
    assert list(preparations(meta).values()) == ["pad", "plain", "plain", "pad", "plain"]
    assert set(preparations({**meta, "image_preparation": "pad"}).values()) == {"pad"}
    now = {"image_preparation": {"pope": "plain", "chair-opera": "plain", "gqa": "plain"}}
    assert difference(meta, now) == [
        "pictures of pope are prepared as 'pad' there and 'plain' here (--image-preparation pad)"
    ]
    assert difference(now, {"image_preparation": {"pope": "plain", "mme": "pad"}}) == []


# The command, without Ray and engines.
