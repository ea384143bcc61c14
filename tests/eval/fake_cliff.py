"""`vllm-flow cliff` on an engine that knows the answers, in a process that may be killed while it asks.

    python -m tests.eval.fake_cliff ASKED KILLED_AT ARGUMENTS...

writes what is asked to the file ASKED, a line each, and ends by SIGKILL when it is asked for the KILLED_AT-th
time. Everything but the engine is the command's own; the figure is left out.
"""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vllm_flow import cli
from vllm_flow.eval.cliff import figure, find
from vllm_flow.eval.cliff.engine import CliffEngine
from vllm_flow.eval.sweep.schema import answers_table

VOCABULARY = 7
GOOD_FROM = 3
"""The first layer that answers nearly as the baseline does."""


class FakeEngine(CliffEngine):
    """Answers from the labels: wrong in a third of the cases below `GOOD_FROM`."""

    def __init__(self, work: Any, policies: Sequence[Any], asked: Path, killed_at: int) -> None:
        super().__init__(self._answer, work, policies)  # type: ignore[arg-type]
        self.asked, self.killed_at, self.calls = asked, killed_at, 0

    def _answer(self, batch: pa.Table) -> pa.Table:
        layer_of = {policy.name: layer for layer, policy in enumerate(self.policies)}
        truth = {item.id: item.truth.get("label", "yes") for item in self.work.items}
        rows = []
        for row in batch.to_pylist():
            for policy in row["policies"]:
                wrong = layer_of[policy] < GOOD_FROM and draw(row["item_id"], policy) % 3 == 0
                says = truth[row["item_id"]] if not wrong else "perhaps"
                key = {"task": row["task"], "item_id": row["item_id"], "policy": policy}
                rows.append({**key, "answer": says, "written_at": datetime.now(timezone.utc)})
        self._note([f"{row['item_id']} {row['policy']}" for row in rows])
        return answers_table(rows)

    def distributions(self, index: int) -> np.ndarray:
        name = self.work.items[index].id
        self._note([f"{name} first-token"])
        self.requests += len(self.policies)
        rng = np.random.default_rng(draw(name, "first token"))
        moved = np.linspace(1, 0, len(self.policies))[:, None] * rng.normal(size=VOCABULARY)
        table = rng.normal(size=VOCABULARY) + moved
        return table - np.log(np.exp(table).sum(axis=1, keepdims=True))

    def image_masses(self, indices: Sequence[int], folder: Path) -> np.ndarray:
        names = [self.work.items[index].id for index in indices]
        self._note([f"{name} attention" for name in names])
        self.requests += len(indices)
        layers = len(self.policies) - 1
        return np.array([[draw(n, str(at)) % 100 / 100 for at in range(layers)] for n in names])

    def _note(self, lines: Sequence[str]) -> None:
        self.calls += 1
        if self.calls == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.asked.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)


def draw(*names: str) -> int:
    """A number that belongs to these names."""
    return zlib.crc32("/".join(names).encode())


def run(asked: Path, killed_at: int, arguments: Sequence[str]) -> int:
    """The command's exit status."""
    before = find.started, figure.draw

    @contextmanager
    def started(args: Any, facts: Any, work: Any) -> Iterator[Any]:
        policies = find.ladder_of(args, facts.num_layers).policies
        yield FakeEngine(work, policies, asked, killed_at), Path("unused")

    find.started = started
    figure.draw = lambda *args: []  # seconds each
    try:
        return cli.main(["cliff", *arguments])
    finally:
        find.started, figure.draw = before


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
