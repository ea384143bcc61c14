"""``python -m tests.families``: the checkpoints' names; with a folder of results, their table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def table(folder: Path) -> Iterator[str]:
    """A Markdown row per family: cliffs, and the largest logprob error under each model runner that ran."""
    rows = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())]
    runners = sorted({row["runner"] for row in rows})
    yield f"| Checkpoint | Cliffs | Answers | Largest logprob error, {' | '.join(runners)} |"
    yield "| --- " * (3 + len(runners)) + "|"
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        cliffs = sorted({cliff for row in own for cliff in row["cliffs"]})
        errors = [
            max((row["error"] for row in own if row["runner"] == runner), default=None)
            for runner in runners
        ]
        shown = ["not run" if error is None else f"{error:.1e}" for error in errors]
        answers = sum(row["answers"] for row in own)
        yield f"| {family} | {cliffs[0]} to {cliffs[-1]} | {answers} | {' | '.join(shown)} |"


def main(arguments: Sequence[str]) -> None:
    if arguments:
        print("\n".join(table(Path(arguments[0]))))
        return
    from tests.families.checkpoints import BUILDERS

    print(",".join(BUILDERS))


if __name__ == "__main__":
    main(sys.argv[1:])
