"""The rows of a run, as typed tables: what each column means, and which row counts. (pyarrow only)"""

from __future__ import annotations

import json

# pyarrow loads it with the first time it writes, and takes an interrupt at that moment for its absence.
import zoneinfo  # noqa: F401
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vllm_flow.eval.tasks.base import Item

ITEMS = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("image", pa.string()),
        pa.field("truth", pa.string(), nullable=False),  # JSON
    ]
)

ANSWERS = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("answer", pa.string()),  # stripped; null on error
        pa.field("error", pa.string()),  # the reason; null where there is an answer
        pa.field("finish_reason", pa.string()),  # vLLM's: "stop", "length"
        pa.field("prompt_tokens", pa.int32()),  # image tokens included
        pa.field("image_tokens", pa.int32()),  # as prefilled: fewer under `downsample`
        pa.field("output_tokens", pa.int32()),
        pa.field("kv_blocks", pa.int32()),  # held when the request ended, all storage groups
        pa.field("kv_blocks_baseline", pa.int32()),  # the same answer without the policy
        pa.field("kv_bytes_saved", pa.int64()),
        pa.field("prefill_rows_saved", pa.int64()),  # image tokens x layers not computed
        pa.field("seconds", pa.float64()),  # first scheduled to last token; batches share steps
        pa.field("engine", pa.string()),  # host and process that answered
        pa.field("written_at", pa.timestamp("us", tz="UTC")),
    ]
)

KEY = ("task", "item_id", "policy")
Key = tuple[str, str, str]


def items_table(task: str, items: Iterable[Item]) -> pa.Table:
    """Items as a table of the schema :data:`ITEMS`."""
    return pa.Table.from_pylist(
        [
            {
                "task": task,
                "item_id": item.id,
                "group": item.group,
                "text": item.text,
                "image": item.image,
                "truth": json.dumps(dict(item.truth), ensure_ascii=False, sort_keys=True),
            }
            for item in items
        ],
        schema=ITEMS,
    )


def answers_table(rows: pa.Table | Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of the schema :data:`ANSWERS`; ValueError where one cannot be recorded."""
    if isinstance(rows, pa.Table):
        return rows.select(ANSWERS.names).cast(ANSWERS)
    rows = list(rows)
    for row in rows:
        unknown = row.keys() - set(ANSWERS.names)
        if unknown:
            raise ValueError(f"answers have no column {', '.join(sorted(unknown))}")
        if (row.get("answer") is None) == (row.get("error") is None):
            raise ValueError(f"a row needs an answer or an error, and not both: {dict(row)}")
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def one_row_per_key(table: pa.Table) -> pa.Table:
    """The rows that count: an answer beats an error, else the earlier row; sorted by key."""
    ranked = table.append_column("_failed", pc.is_valid(table["error"])).append_column(
        "_order", pa.array(range(table.num_rows), pa.int64())
    )
    ranked = ranked.sort_by(
        [(name, "ascending") for name in (*KEY, "_failed", "written_at", "_order")]
    )
    keys = list(zip(*(ranked[name].to_pylist() for name in KEY), strict=True))
    first = [index == 0 or keys[index - 1] != key for index, key in enumerate(keys)]
    return ranked.filter(pa.array(first, pa.bool_())).select(table.column_names)
