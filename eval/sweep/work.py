"""What the driver hands to an engine, and what an engine hands back, as rows. (pure)

Knows the records' schema and policies; nothing of Ray, vLLM or scoring.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vllm_flow.block_counts import Geometry, predict_blocks
from vllm_flow.eval.sweep.policies import Policy
from vllm_flow.eval.sweep.schema import Key
from vllm_flow.eval.tasks.base import Item, Task

SEQUENCES = {"cpu": 256, "gpu": 1024}
"""``max_num_seqs`` of vLLM where nobody says otherwise, on the largest devices."""

BATCH_REQUESTS = 64
"""Requests in a batch, which is retried, written, and lost with a driver as a whole; more only where one item
is asked under more policies."""

IN_FLIGHT = 32
"""Batches at an engine at most. They are answered side by side, so that none waits for another one's slowest
request, and so many that long answers fill the engine where short ones have left it."""

WORK = pa.schema(
    [
        pa.field("task", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("image", pa.string()),
        pa.field("preparation", pa.string()),
        pa.field("reading", pa.string()),  # of the picture's file, see `vllm_flow.pictures`
        pa.field("max_tokens", pa.int32()),
        pa.field("policies", pa.list_(pa.string())),  # names; those that have no answer yet
    ]
)
"""One row is one item with everything still to be asked about it."""


@dataclass(frozen=True)
class TaskWork:
    """A task's items and how they are asked."""

    task: str
    items: Sequence[Item]
    max_tokens: int
    preparation: str
    reading: str = "server"
    """How pictures are read: one of `vllm_flow.pictures.READINGS`."""


def sample(
    items: Sequence[Item], limit: int | None, seed: int, task: Task | None = None
) -> list[Item]:
    """At most `limit` items, drawn with `seed` and left in their order; what `task` scores together is
    drawn together."""
    if limit is None or limit >= len(items):
        return list(items)
    bundles: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        bundles.setdefault(task.bundle(item)[0] if task else item.id, []).append(index)
    drawn = list(bundles.values())
    kept: list[int] = []
    for choice in random.Random(seed).sample(range(len(drawn)), min(limit, len(drawn))):
        if len(kept) + len(drawn[choice]) <= limit:
            kept += drawn[choice]
    return [items[index] for index in sorted(kept)]


def plan_work(
    tasks: Iterable[TaskWork], policies: Sequence[Policy], done: set[Key]
) -> list[dict[str, Any]]:
    """The rows of `WORK` that are left, in the order of tasks and items; nothing that is done."""
    rows = []
    for work in tasks:
        for item in work.items:
            left = [p.name for p in policies if (work.task, item.id, p.name) not in done]
            if left:
                rows.append(
                    {
                        "task": work.task,
                        "item_id": item.id,
                        "text": item.text,
                        "image": item.image,
                        "preparation": work.preparation,
                        "reading": work.reading,
                        "max_tokens": work.max_tokens,
                        "policies": left,
                    }
                )
    return rows


def batches_of(
    rows: Sequence[Mapping[str, Any]], size: int, requests: int = BATCH_REQUESTS
) -> list[pa.Table]:
    """The rows in tables, the unit that is given to an engine, retried and written.

    Args:
        size: rows of a table, at most.
        requests: of a table, at most, as long as that is one row or more.
    """
    batches: list[list[Mapping[str, Any]]] = []
    held = 0
    for row in rows:
        asked = len(row["policies"])
        if not batches or len(batches[-1]) == size or held + asked > requests:
            batches.append([])
            held = 0
        batches[-1].append(row)
        held += asked
    return [pa.Table.from_pylist(batch, schema=WORK) for batch in batches]


def requests_of(rows: pa.Table | Sequence[Mapping[str, Any]]) -> int:
    """Requests of rows of `WORK`, or of a table of them: one for each policy of each row."""
    if isinstance(rows, pa.Table):
        return sum(map(len, rows["policies"].to_pylist()))
    return sum(len(row["policies"]) for row in rows)


def in_flight(batches: Sequence[int], engines: int, sequences: int) -> int:
    """Batches at an engine.

    No more than its share, so that the one that starts first does not take them all; nor than fill the
    engine twice with one in preparation, so that large ones are done, and written, one after the other.

    Args:
        batches: requests of each.
        sequences: that run at once in an engine.
    """
    share = -(-len(batches) // engines)
    filling = -(-2 * sequences // max(batches, default=1)) + 1
    return max(1, min(IN_FLIGHT, share, filling))


def savings(
    geometry: Geometry,
    *,
    image_rows: int,
    image_tokens: int,
    full_image_tokens: int,
    computed_tokens: int,
    blocks: Sequence[int],
) -> dict[str, int]:
    """The columns of a row that say what a policy saved in an engine.

    Args:
        image_rows: image tokens x layers of the prefill.
        image_tokens: in the prompt.
        full_image_tokens: of the same prompt without a policy.
        computed_tokens: with keys and values at the end, as prefilled.
        blocks: held at the end, per storage group.
    """
    whole = computed_tokens - image_tokens + full_image_tokens
    baseline = sum(predict_blocks(whole, None, geometry.group_starts, geometry.block_size))
    held = sum(blocks)
    return {
        "kv_blocks": held,
        "kv_blocks_baseline": baseline,
        "kv_bytes_saved": (baseline - held) * geometry.block_bytes,
        "prefill_rows_saved": full_image_tokens * geometry.num_layers - image_rows,
    }
