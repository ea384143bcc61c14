"""What the cliff finder has asked so far, on disk: the same command goes on where an earlier one was killed.

A run directory (`records.py`) for the answers, and beside them `measured.jsonl`: what was measured of the first
answer token, a question per line. A search asks what its plan and the answers so far make it ask, so answers
that are read instead of asked lead it the same way. Knows no engine.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from vllm_flow.eval.cliff.evidence import CliffError
from vllm_flow.eval.sweep.model_facts import ModelFacts
from vllm_flow.eval.sweep.records import Run, RunError
from vllm_flow.eval.sweep.resuming import opened_run
from vllm_flow.eval.sweep.settings import run_settings
from vllm_flow.eval.sweep.work import TaskWork
from vllm_flow.outputs import OutputError
from vllm_flow.user_text import parse_json

MEASURED = "measured.jsonl"


class Record:
    """The answers and measurements of one task's questions; open for one writer."""

    def __init__(self, run: Run, task: str) -> None:
        self.run, self.task = run, task
        rows = run.answers().select(["task", "item_id", "policy", "answer"]).to_pylist()
        # Failed requests are asked again: what failed may have been the engine's fault.
        self._answers = {
            (row["item_id"], row["policy"]): row["answer"]
            for row in rows
            if row["task"] == task and row["answer"] is not None
        }
        self._path = run.path / MEASURED
        self._measured = {(row["what"], row["item_id"]): row["values"] for row in self._read()}

    def __len__(self) -> int:
        """Answers and measurements in it."""
        return len(self._answers) + len(self._measured)

    def answer(self, item_id: str, policy: str) -> str | None:
        """An earlier answer."""
        return self._answers.get((item_id, policy))

    def add(self, table: pa.Table) -> None:
        """Keep a batch's answers, all of them or after a crash none."""
        self.run.append(table)

    def measured(self, what: str, item_id: str) -> Any:
        """An earlier measurement; None if there is none."""
        return self._measured.get((what, item_id))

    def measure(self, what: str, item_id: str, values: Any) -> None:
        """Keep a measurement."""
        self._measured[what, item_id] = values
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"what": what, "item_id": item_id, "values": values}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(str(self._path), error) from None

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        whole, newline, torn = self._path.read_bytes().rpartition(b"\n")
        if torn:  # by a crash: what comes next begins a line
            self._path.write_bytes(whole + newline)
        rows = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = parse_json(line.decode())
                row["what"], row["item_id"], row["values"]
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
                    f"{self._path}, line {number}, is damaged ({error!r}); delete the line, whose measurement is "
                    "taken again."
                ) from None
            rows.append(row)
        return rows


def folder_of(args: Namespace) -> Path:
    """Where a command keeps its answers: beside the profile, unless told."""
    if args.answers is not None:
        return args.answers
    kind = "-unlabelled" if args.unlabelled else ""
    return args.out.with_name(f"{args.out.stem}-{args.task}{kind}-run")


@contextmanager
def recording(
    args: Namespace,
    facts: ModelFacts,
    work: TaskWork,
    policies: Sequence[Any],
    on_gpu: bool,
    begun: Callable[[], None] = lambda: None,
) -> Iterator[Record]:
    """The record that a command's arguments name, begun or continued; `begun` is called when it is open.

    Raises:
        CliffError: what is there was asked otherwise, or is being written; says what differs.
    """
    folder = folder_of(args)
    meta = run_settings(args, facts, [work], policies, on_gpu=on_gpu, limit=args.limit, engines=1)
    try:
        with opened_run(folder, meta, [work], beside=(MEASURED,)) as run:
            run.extend([work.task], [policy.as_json() for policy in policies])
            record = Record(run, work.task)
            begun()
            yield record
            run.compact()
    except RunError as error:
        raise CliffError(
            f"the answers of an earlier run cannot be gone on from: {error} Delete {folder}, or name "
            "another folder with --answers."
        ) from None
