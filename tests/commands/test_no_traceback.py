"""No input ends in a traceback: every command on spoilt files and with odd arguments.

Exit status and last line are always ours. `make test` tries a fixed selection; `make fuzz` goes on with new seeds
for ``VLLM_FLOW_FUZZ_SECONDS``, from ``VLLM_FLOW_FUZZ_SEED`` on.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.mutations import fresh_copy, spoil
from tests.commands.subjects import SUBJECTS, Subject
from vllm_flow import cli

FUZZ_SECONDS = float(os.environ.get("VLLM_FLOW_FUZZ_SECONDS", "0"))
FUZZ_SEED = int(os.environ.get("VLLM_FLOW_FUZZ_SEED", "0"))
TRIALS = 4
"""Files spoilt at least, per weight of a subject; an hour of `make fuzz` spoils thousands."""
PATIENCE = 60
"""Seconds after which a command is held to hang."""
STATUSES = {0, 1, 2}


class Hangs(BaseException):
    """Raised where a command takes too long; nothing catches it."""


def ending(argv: list[str]) -> tuple[Any, str, str]:
    """How a command ends: its status, or a traceback; the last line of its errors."""

    def hangs(*_: Any) -> None:
        raise Hangs

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status: Any = cli.main(argv)
            except SystemExit as error:  # argparse
                status = error.code
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "traceback", "".join(traceback.format_exception(error)[-2:]), place_of(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # What doctor finds is its result, and not an error of its own.
    lines = (out if argv[0] == "doctor" else err).getvalue().strip().splitlines()
    return status, lines[-1] if lines else "", ""


def place_of(error: BaseException) -> str:
    """The deepest line of ours, and the error: what tells one fault from another."""
    root = str(Path(cli.__file__).parents[1])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    ours = [f for f in frames if "/tests/" not in f.filename and "/.venv/" not in f.filename]
    where = f"{Path(ours[-1].filename).relative_to(root)}:{ours[-1].lineno}" if ours else "?"
    return f"{where} {type(error).__name__}: {str(error)[:120]}"


def fault(argv: list[str]) -> tuple[str, str] | None:
    """What is wrong with how a command ends, and where; None if nothing is."""
    status, said, place = ending(argv)
    if status == "traceback":
        return place, said
    if status not in STATUSES:
        return f"status {status}", said
    if status and not ours(argv[0], said):
        return "last line", f"status {status}: {said!r}"
    return None


def ours(name: str, line: str) -> bool:
    begins = "Serving would not work: " if name == "doctor" else rf"vllm-flow {name}( \w+)?: "
    return bool(re.match(begins, line)) and len(line) < 3000


@contextlib.contextmanager
def prepared(subject: Subject, folder: Path) -> Iterator[tuple[Path, Path]]:
    """The subject's files, and the place of their copies."""
    # Made where the copies will lie: some files say where others are.
    pristine, spoilt = folder / "pristine", folder / "spoilt"
    spoilt.mkdir()
    subject.make(spoilt)
    shutil.copytree(spoilt, pristine)
    with pytest.MonkeyPatch.context() as patch:
        subject.prepare(patch)
        yield pristine, spoilt


def trial(subject: Subject, pristine: Path, spoilt: Path, seed: int) -> tuple[str, str] | None:
    """Spoil one file, call the command; the fault, with what was done."""
    rng = random.Random(f"{subject.name} {seed}")
    fresh_copy(pristine, spoilt)
    names = sorted({p for pattern in subject.spoilt for p in spoilt.glob(pattern) if p.is_file()})
    path = rng.choice(names)
    done = spoil(path, rng)
    found = fault(subject.argv(spoilt))
    if found is None:
        return None
    return found[0], f"seed {seed}, {path.relative_to(spoilt)} {done}: {found[1][:1500]}"


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.timeout(FUZZ_SECONDS + 600)
def test_spoilt_files(subject: Subject, tmp_path: Path) -> None:
    found: dict[str, str] = {}
    end = time.monotonic() + FUZZ_SECONDS / len(SUBJECTS)
    with prepared(subject, tmp_path) as (pristine, spoilt):
        fresh_copy(pristine, spoilt)
        # Where the files are as they should be, the command does its work (or is stopped on purpose).
        status, said, _ = ending(subject.argv(spoilt))
        assert status == (1 if subject.name == "profile" else 0), said
        seed = FUZZ_SEED
        while seed < FUZZ_SEED + TRIALS * subject.weight or time.monotonic() < end:
            fault_found = trial(subject, pristine, spoilt, seed)
            if fault_found is not None:
                found.setdefault(*fault_found)
            seed += 1
    if found:
        told = "\n\n".join(f"{place}\n{text}" for place, text in found.items())
        pytest.fail(f"{len(found)} ends that are not ours:\n\n{told}", pytrace=False)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
