"""Whether a command may go on with a run that is there, and what of the run follows the command.

What answers depend on must be the same once there is an answer. Before that, and for what no answer depends on,
the command that comes has its way. Knows the settings of runs; nothing of engines and Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from vllm_flow.counts import counted
from vllm_flow.eval.sweep.checked import RunError
from vllm_flow.eval.sweep.records import Run, relocated
from vllm_flow.eval.sweep.schema import ITEMS, items_table
from vllm_flow.eval.sweep.versions import of_brought
from vllm_flow.eval.sweep.work import TaskWork
from vllm_flow.user_text import shown

SETTINGS = (
    "version", "model", "num_layers", "group_layers", "block_size", "dtype", "max_model_len", "seed",
    "conversation", "prompt", "image_reading",
)  # fmt: skip
"""Entries of `run.json` that a resumed run must share, since answers depend on them. So they do on "limit",
"image_preparation" and "engine_args", which are compared part by part, and on "data" by the items read from it."""

VERSIONS = ("vllm_flow", "vllm", "transformers", "torch")
"""Entries of `run.json`'s "versions" that it must share as well."""

NO_MATTER = (
    "gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "mm_processor_cache_gb",
    "max_num_seqs", "max_num_batched_tokens", "disable_log_stats", "use_tqdm_on_load", "download_dir",
)  # fmt: skip
"""Of "engine_args", what says where things lie and which requests share a step, no more. Who shares a step with
whom is another matter in every run, as batches and engines come; `--kv-cache-gib`, `--batch` and `--engines` are not
compared, either."""

LEFT_ALONE = ("chair", "amber", "refcoco-")
"""Beginnings of tasks whose pictures older runs left alone; they padded all others."""


def difference(
    before: Mapping[str, Any], after: Mapping[str, Any], growing: bool = False
) -> list[str]:
    """What keeps two `run.json` from being one run, a sentence part each; empty if nothing does.

    Args:
        growing: `after` may ask more items, if they are the items of `before` and others.
    """
    old_limit, limit = before.get("limit"), after.get("limit")
    grown = growing and old_limit is not None and (limit is None or limit > old_limit)
    names = SETTINGS if grown else (*SETTINGS, "limit")
    found = [
        _differs(name, before.get(name), after[name])
        for name in names
        if name in after and before.get(name) != after[name]
    ]
    prepared = preparations(before)
    found += [
        f"pictures of {task} are prepared as {prepared[task]!r} there and {one!r} here "
        f"(--image-preparation {prepared[task]})"
        for task, one in after.get("image_preparation", {}).items()
        if prepared.get(task, one) != one
    ]
    had, has = (dict(meta.get("engine_args") or {}) for meta in (before, after))
    found += [
        _differs(f"engine argument {name}", had.get(name), has.get(name))
        for name in sorted(had.keys() | has.keys())
        if name not in NO_MATTER and had.get(name) != has.get(name)
    ]
    old, new = before.get("versions", {}), after.get("versions", {})
    found += [
        f"{name} is version {old.get(name)} there and {new.get(name)} here"
        for name in VERSIONS
        if name in new and old.get(name) != new.get(name)
    ]
    return found + [  # what the run has not had yet may join
        f"{name} is that of {old[name]} there and of {here} here"
        for name, here in of_brought(new).items()
        if old.get(name, here) != here
    ]


def _differs(name: str, there: Any, here: Any) -> str:
    return f"{name} is {json.dumps(there)} there and {json.dumps(here)} here"


def preparations(meta: Mapping[str, Any]) -> dict[str, str]:
    """What a run did to the pictures of each of its tasks, in the words of `pictures.PREPARATIONS`.

    Runs from before the conversation decided have one word for all tasks, "task" for each as it says.
    """
    told = meta.get("image_preparation", {})
    if isinstance(told, Mapping):
        return {str(task): str(one) for task, one in told.items()}
    if told in ("pad", "plain"):
        return dict.fromkeys(meta.get("tasks", []), told)
    return {
        task: "plain" if task.startswith(LEFT_ALONE) else "pad" for task in meta.get("tasks", [])
    }


def items_obstacle(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], growing: bool = False
) -> str | None:
    """Why the items of a run are not those of a command, as a clause; None if they are.

    Args:
        growing: the command may ask others beside them.
    """
    here = {row["item_id"]: row for row in after}
    same = "use the same data, --limit and --seed, or another directory."
    for old in before:
        new = here.get(old["item_id"])
        if new is None:
            return f"item {old['item_id']} of the run is not among the {counted(len(after), 'item')} here; {same}"
        if new != old:
            column = next(name for name in ITEMS.names if old[name] != new[name])
            return (
                f"the items differ from those of the run: item {old['item_id']} has {column} "
                f"{shown(old[column])} there and {shown(new[column])} here; {same}"
            )
    if len(after) != len(before) and not growing:
        return f"the run has {counted(len(before), 'item')} and the data {len(after)}; {same}"
    known = {row["item_id"] for row in before}
    if [row["item_id"] for row in after if row["item_id"] in known] != [
        row["item_id"] for row in before
    ]:
        return f"the items come in another order than the run's; {same}"
    return None


@contextmanager
def opened_run(
    path: Path,
    meta: Mapping[str, Any],
    tasks: Sequence[TaskWork],
    *,
    growing: bool = False,
    beside: Sequence[str] = (),
) -> Iterator[Run]:
    """The run at `path` with these tasks' items, begun if it is not there, and held for this writer.

    A run without an answer takes the settings `meta`. One that has answers keeps those that they depend on.

    Args:
        growing: a larger `limit` may add items.
        beside: files in the run's folder that count as answers where they are not empty.

    Raises:
        RunError: a run with other settings or items is there, or is being written; names what differs.
    """
    if not (path / "run.json").exists():
        Run.create(path, meta)
    with Run.open(path).writing():
        run = Run.open(path)  # as the last writer left it
        rows = {work.task: items_table(work.task, work.items).to_pylist() for work in tasks}
        if has_answers(run, beside):
            _go_on(run, meta, rows, growing)
        else:
            _take_over(run, meta, rows)
        had, has = run.meta.get("versions", {}), of_brought(meta.get("versions", {}))
        if not has.keys() <= had.keys():
            run.update({"versions": {**had, **has}})
        for work in tasks:
            run.write_items(work.task, work.items)
        yield run


def has_answers(run: Run, beside: Sequence[str] = ()) -> bool:
    """Whether anything of a run would be lost with its settings; errors are asked again."""
    files = [run.path / name for name in beside]
    if any(file.exists() and file.stat().st_size for file in files):
        return True
    return bool(run.answers().filter(pc.field("answer").is_valid()).num_rows)


def _take_over(run: Run, meta: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    found = difference(run.meta, meta)
    other = [
        task
        for task, ours in rows.items()
        if (had := run.item_rows(task)) and items_obstacle(had, ours)
    ]
    if found:
        print(f"{run.path} has no answer yet, and now the settings of this command.", flush=True)
    if found or other or run.meta.get("data") != meta.get("data"):
        run.begin_anew(meta)


def _go_on(run: Run, meta: Mapping[str, Any], rows: Mapping[str, Any], growing: bool) -> None:
    found = difference(run.meta, meta, growing)
    if found:
        raise RunError(
            f"{run.path} was made with other settings: {'; '.join(found)}. Answers of both would be "
            "mixed: use the same settings, or another --out."
        )
    old, new = (str(one.get("data", "")) for one in (run.meta, meta))
    if old != new and os.path.exists(old):
        raise RunError(
            f"{run.path} was made with other settings: {_differs('data', old, new)}, and {old} is still there. Use "
            "that, or another --out. (Where data was moved, a run goes on with the same items in the new place.)"
        )
    for task, ours in rows.items():
        before = relocated(run.item_rows(task), old, new)
        why = items_obstacle(before, ours, growing) if before else None
        if why is not None:
            raise RunError(f"{run.path}: task {task}: {why}")
    if old != new:
        run.relocate(old, new)
    prepared = {**preparations(run.meta), **meta.get("image_preparation", {})}
    kept = {name: meta[name] for name in ("data", "limit", "tolerance") if name in meta}
    run.update({**kept, "image_preparation": prepared})
