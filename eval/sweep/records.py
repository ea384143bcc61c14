"""What a run leaves behind: its settings, its items and every answer, as JSON and Parquet.

The one place that knows the layout of a run directory. Knows nothing of engines, Ray or scoring.

    RUN/run.json                settings; what answers depend on stays as it is once there is one (`resuming`)
    RUN/items/<task>.parquet    the questions, written before the first answer (`schema.ITEMS`)
    RUN/answers/part-*.parquet  one file per batch, complete or not there at all (`schema.ANSWERS`)

A run's key is (task, item_id, policy). Files may hold a key twice, when a crash fell between two
steps or a failed request was asked again; readers see it once: an answer beats an error, else the
earlier row counts.
"""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vllm_flow.eval.sweep.checked import RunError, read_meta, read_table
from vllm_flow.eval.sweep.schema import (
    ANSWERS,
    ITEMS,
    KEY,
    Key,
    answers_table,
    items_table,
    one_row_per_key,
)
from vllm_flow.eval.tasks.base import Item
from vllm_flow.outputs import OutputError, write_whole
from vllm_flow.user_text import parse_json

VERSION = 1
"""Raise when a reader of the last version would misread what is written."""


class Run:
    """One run directory, open for reading; :meth:`writing` guards the writers."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta

    @classmethod
    def create(cls, path: Path | str, meta: Mapping[str, Any]) -> Run:
        """Start a run in an empty or new directory.

        Args:
            meta: `run.json`; "version" and "created" are added.

        Raises:
            RunError: there is a run already, or files of somebody else.
        """
        path = Path(path)
        if (path / "run.json").exists():
            raise RunError(f"{path} holds a run already; open it, or name another directory.")
        if path.exists() and (not path.is_dir() or any(_foreign(path))):
            raise RunError(f"{path} is no run and not empty; name another directory.")
        if any((path / "answers").glob("part-*.parquet")):
            raise RunError(
                f"{path} holds answers, and no run.json that says what they are of; put back a copy of it, or name "
                "another directory."
            )
        for folder in (path / "items", path / "answers"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(str(folder), error) from None
        run = cls(path, {**_stamp(), **meta})
        run._write_meta()
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """An existing run; RunError where there is none, or one of a later version."""
        path = Path(path)
        meta = read_meta(path / "run.json", VERSION)
        return cls(path, meta)

    @contextmanager
    def writing(self) -> Iterator[Run]:
        """Hold the run for one writer; the system lets go of it when the process ends, however.

        Raises:
            RunError: another process is writing.
        """
        # For reading, too: a pipe in its place would wait for somebody to read it.
        with (self.path / ".lock").open("ab+", buffering=0) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.path}: another process is writing to this run; wait for it, or name "
                    "another directory."
                ) from None
            yield self

    # Settings.

    def extend(
        self,
        tasks: Iterable[str],
        policies: Iterable[Mapping[str, Any]],
        session: Mapping[str, Any] | None = None,
    ) -> None:
        """Add tasks and policies that the run has not had yet; those it has stay.

        `session` says who comes to answer them: it joins the others under "sessions".
        """
        known = list(self.meta.get("tasks", []))
        self.meta["tasks"] = known + [task for task in tasks if task not in known]
        had = list(self.meta.get("policies", []))
        names = {policy["name"] for policy in had}
        self.meta["policies"] = had + [dict(p) for p in policies if p["name"] not in names]
        if session is not None:
            self.meta["sessions"] = [*self.meta.get("sessions", []), dict(session)]
        self._write_meta()

    def update(self, changes: Mapping[str, Any]) -> None:
        """Write other values of some settings."""
        self.meta |= changes
        self._write_meta()

    def begin_anew(self, meta: Mapping[str, Any]) -> None:
        """Forget items, errors and settings of a run that has no answer, and take `meta` for its settings."""
        for path in [*self._parts(), *self._item_files()]:
            path.unlink()
        self.meta = {**_stamp(), **meta}
        self._write_meta()

    def _write_meta(self) -> None:
        text = json.dumps(self.meta, indent=2, ensure_ascii=False) + "\n"
        write_whole(
            self.path / "run.json", lambda draft: draft.write_text(text, "utf-8"), durable=True
        )

    # Items.

    def write_items(self, task: str, items: Sequence[Item]) -> None:
        """Write a task's items in place of those that are there.

        Raises:
            RunError: an id comes twice.
        """
        table = items_table(task, items)
        if len(set(table["item_id"].to_pylist())) != table.num_rows:
            raise RunError(f"task {task}: item ids are not unique.")
        path = self._items_path(task)
        if not path.exists() or not read_table(path, ITEMS).equals(table):
            _write_parquet(path, table)

    def item_rows(self, task: str) -> list[dict[str, Any]]:
        """A task's items as rows of `schema.ITEMS`; none where the run has none of that task."""
        path = self._items_path(task)
        return read_table(path, ITEMS).to_pylist() if path.exists() else []

    def relocate(self, old: str, new: str) -> None:
        """Let all items' pictures that lie in the folder `old` lie in `new`."""
        for path in self._item_files():
            rows = relocated(read_table(path, ITEMS).to_pylist(), old, new)
            _write_parquet(path, pa.Table.from_pylist(rows, schema=ITEMS))

    def _item_files(self) -> list[Path]:
        return sorted((self.path / "items").glob("*.parquet"))

    def items(self, task: str) -> list[Item]:
        """A task's items in their order; RunError where the run has none of that task."""
        path = self._items_path(task)
        if not path.exists():
            have = ", ".join(sorted(p.stem for p in path.parent.glob("*.parquet"))) or "none"
            raise RunError(f"{self.path} has no items of the task {task!r} (it has: {have}).")
        items = []
        for row in read_table(path, ITEMS).to_pylist():
            try:
                truth = parse_json(row["truth"])
            except ValueError as error:
                raise RunError(
                    f"{path} is damaged (item {row['item_id']}: {error}); delete it and resume."
                ) from None
            items.append(Item(row["item_id"], row["text"], row["image"], truth, row["group"]))
        return items

    def _items_path(self, task: str) -> Path:
        if not task or "/" in task or task.startswith("."):
            raise RunError(f"{task!r} is no task's name.")
        return self.path / "items" / f"{task}.parquet"

    # Answers.

    def append(self, rows: pa.Table | Iterable[Mapping[str, Any]]) -> None:
        """Write answers to a part file of their own: all of them, or after a crash none.

        Rows are mappings, or a table, with the columns of :data:`ANSWERS`; missing ones are null.
        """
        table = answers_table(rows)
        if table.num_rows:
            _write_parquet(self._part(), table)

    def answers(self) -> pa.Table:
        """Every answer and error, none twice, ordered by task, item and policy."""
        return one_row_per_key(self._all_answers())

    def done(self) -> set[Key]:
        """The keys that need no asking: those with an answer or an error."""
        table = self._all_answers(list(KEY))
        return set(zip(*(table[name].to_pylist() for name in KEY), strict=True))

    def failed(self) -> set[Key]:
        """The keys that have an error and no answer."""
        table = self.answers().filter(pc.field("error").is_valid())
        return set(zip(*(table[name].to_pylist() for name in KEY), strict=True))

    def compact(self) -> None:
        """Turn many part files into one. A crash on the way leaves rows twice, never too few."""
        parts = self._parts()
        if len(parts) < 2:
            return
        _write_parquet(self._part(), self.answers())
        for part in parts:
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted((self.path / "answers").glob("part-*.parquet"))

    def _part(self) -> Path:
        # The time first, so that names sort in the order of writing.
        stamp = _now().strftime("%Y%m%dT%H%M%S%f")
        return self.path / "answers" / f"part-{stamp}-{uuid.uuid4().hex[:8]}.parquet"

    def _all_answers(self, columns: list[str] | None = None) -> pa.Table:
        tables = [read_table(part, ANSWERS, columns) for part in self._parts()]
        schema = ANSWERS if columns is None else pa.schema([ANSWERS.field(c) for c in columns])
        return pa.concat_tables(tables) if tables else schema.empty_table()


def relocated(rows: Iterable[Mapping[str, Any]], old: str, new: str) -> list[dict[str, Any]]:
    """Rows of items with pictures in the folder `new` that were in `old`."""

    def moved(image: str | None) -> str | None:
        inside = image is not None and image.startswith(old.rstrip("/") + "/")
        return new.rstrip("/") + image[len(old.rstrip("/")) :] if image and inside else image

    return [{**row, "image": moved(row["image"])} for row in rows]


def _stamp() -> dict[str, Any]:
    return {"version": VERSION, "created": _now().isoformat(timespec="seconds")}


def _foreign(path: Path) -> Iterator[Path]:
    # What a crash while creating a run may have left is no reason to refuse the directory.
    ours = {"items", "answers", ".lock"}
    return (p for p in path.iterdir() if p.name not in ours and not p.name.startswith(".tmp-"))


def _write_parquet(path: Path, table: pa.Table) -> None:
    write_whole(path, lambda draft: pq.write_table(table, draft, compression="zstd"), durable=True)


def _now() -> datetime:
    return datetime.now(timezone.utc)
