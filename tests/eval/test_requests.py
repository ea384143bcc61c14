"""Planning a sweep: nothing twice, nothing forgotten, and what a policy saves."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.block_counts import Geometry, predict_blocks
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.work import TaskWork, batches_of, plan_work, savings
from vllm_flow.eval.tasks.base import Item
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

POLICIES = parse_policies("baseline,cliff=2,text-only", 6)

tasks = st.dictionaries(st.sampled_from(["a", "b"]), st.sets(st.sampled_from("1234567")))


def keys_of(rows: list[dict]) -> list[tuple[str, str, str]]:
    return [(row["task"], row["item_id"], name) for row in rows for name in row["policies"]]


@settings(deadline=None)
@given(tasks, st.data(), st.integers(1, 5))
def test_done_and_left_are_everything_once(
    ids: dict[str, set[str]], data: st.DataObject, size: int
) -> None:
    work = [
        TaskWork(task, [Item(i, "?", None, {}) for i in sorted(members)], 8, "pad")
        for task, members in ids.items()
    ]
    every = keys_of(plan_work(work, POLICIES, set()))
    assert len(every) == 3 * sum(len(members) for members in ids.values())
    done = set(data.draw(st.lists(st.sampled_from(every)))) if every else set()
    rows = plan_work(work, POLICIES, done)
    assert Counter([*keys_of(rows), *done]) == Counter(every)
    batches = batches_of(rows, size)
    assert [row for batch in batches for row in batch.to_pylist()] == rows
    assert all(1 <= batch.num_rows <= size for batch in batches)


@given(st.integers(0, 8), st.integers(0, 40), st.integers(1, 60))
def test_what_a_cliff_saves(cliff: int, image: int, text: int) -> None:
    geometry = Geometry(8, (0, 2, 4, 6), 4, 100)
    layout = TokenLayout.of(FlowPolicy.withdrawal(cliff), ImageSpans.from_ranges([(0, image)]))
    if cliff == 8:
        layout = None
    blocks = predict_blocks(image + text, layout, (0, 2, 4, 6), 4)
    found = savings(
        geometry,
        image_rows=cliff * image,
        image_tokens=image,
        full_image_tokens=image,
        computed_tokens=image + text,
        blocks=blocks,
    )
    assert found["kv_blocks_baseline"] == 4 * -(-(image + text) // 4)
    assert found["kv_blocks"] == sum(blocks)
    assert found["kv_bytes_saved"] == 100 * (found["kv_blocks_baseline"] - sum(blocks)) >= 0
    assert found["prefill_rows_saved"] == (8 - cliff) * image


def test_what_a_reduced_picture_saves() -> None:
    geometry = Geometry(8, (0, 4), 4, 10)
    found = savings(
        geometry,
        image_rows=72,
        image_tokens=9,
        full_image_tokens=64,
        computed_tokens=20,
        blocks=(5, 5),
    )
    assert found == {
        "kv_blocks": 10,
        "kv_blocks_baseline": 2 * 19,  # 75 tokens
        "kv_bytes_saved": 280,
        "prefill_rows_saved": 55 * 8,
    }
