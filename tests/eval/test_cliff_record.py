"""A finder that is killed goes on where it was: nothing that was answered is asked again, and it finds the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.eval import fake_cliff
from tests.eval.demo_pope import write_pope
from vllm_flow.eval.sweep.records import Run

NEVER = 10**9
QUESTIONS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    write_pope(folder / "pope", QUESTIONS)
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["--model", "demo-small", "--data", str(data), "--out", str(out / "cliff.json"), *more]


LABELLED = ("--tolerance", "13%", "--exhaustive")
UNLABELLED = ("--unlabelled", "--limit", "12")


def asked(out: Path) -> Counter[str]:
    return Counter((out / "asked").read_text().splitlines()) if (out / "asked").exists() else {}


def entry(out: Path) -> dict[str, Any]:
    return json.loads((out / "cliff.json").read_text())["tasks"]["pope"]


def killed(data: Path, out: Path, at: int, *more: str) -> None:
    """Run the command in a process of its own until it is killed."""
    command = [sys.executable, "-m", "tests.eval.fake_cliff", str(out / "asked"), str(at)]
    done = subprocess.run([*command, *arguments(data, out, *more)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "cliff.json").exists()


def finished(data: Path, out: Path, *more: str) -> int:
    return fake_cliff.run(out / "asked", NEVER, arguments(data, out, *more))


@pytest.mark.parametrize(
    ("more", "at"),
    [(LABELLED, 3), pytest.param(UNLABELLED, 14, marks=pytest.mark.long)],
    ids=["labelled", "unlabelled"],
)
def test_killed_it_goes_on(
    data: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    at: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    assert finished(data, whole, *more) == 0
    killed(data, stopped, at, *more)
    before = asked(stopped)
    assert 0 < before.total() < asked(whole).total()
    assert finished(data, stopped, *more) == 0
    assert f"answers and measurements: {before.total()}." in capsys.readouterr().out
    # Killed between two batches: everything asked had been answered, and is asked no second time.
    assert asked(stopped) == asked(whole) and set(asked(stopped).values()) == {1}
    assert entry(stopped) == entry(whole)
    how = ("conversation", "image_preparation", "image_reading")
    assert [entry(whole)["evidence"][one] for one in how] == ["chat-template", "plain", "server"]
    # Once more, for its own sake: there is nothing left to ask.
    assert finished(data, stopped, *more) == 0
    assert asked(stopped) == asked(whole) and entry(stopped) == entry(whole)


def test_before_an_answer_everything_may_change(data: Path, tmp_path: Path) -> None:
    """As after an engine argument that no engine starts with."""
    folder = tmp_path / "cliff-pope-run"
    assert finished(data, tmp_path, *LABELLED, "--dtype", "bfloat16") == 0
    for part in (folder / "answers").iterdir():
        part.unlink()
    (folder / "measured.jsonl").unlink()
    assert finished(data, tmp_path, *LABELLED) == 0
    assert Run.open(folder).meta["dtype"] == "float32"


def test_another_tolerance_reads_the_same_answers(data: Path, tmp_path: Path) -> None:
    assert finished(data, tmp_path, *LABELLED) == 0
    before = asked(tmp_path)
    assert finished(data, tmp_path, "--tolerance", "20%") == 0
    assert asked(tmp_path) == before and entry(tmp_path)["evidence"]["tolerance"] == 0.2


def test_a_torn_line_is_measured_again(data: Path, tmp_path: Path) -> None:
    assert finished(data, tmp_path, *UNLABELLED) == 0
    first, file = entry(tmp_path), tmp_path / "cliff-pope-unlabelled-run" / "measured.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:20])
    assert finished(data, tmp_path, *UNLABELLED) == 0
    assert sorted(asked(tmp_path).values())[-3:] == [1, 2, 2]
    assert (
        entry(tmp_path) == first
        and file.read_text().splitlines() == "".join(lines).split("\n")[:-1]
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--seed", "1"), "seed is 0 there and 1 here"),
        (("--limit", "110"), "limit is null there and 110 here"),
        (("--dtype", "bfloat16"), 'dtype is "float32" there and "bfloat16" here'),
    ],
)
def test_what_was_asked_otherwise_is_refused(
    data: Path, tmp_path: Path, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished(data, tmp_path, "--tolerance", "13%") == 0
    before = asked(tmp_path)
    assert finished(data, tmp_path, "--tolerance", "13%", *more) == 2
    said = capsys.readouterr().err
    assert says in said and "--answers" in said and "cliff-pope-run" in said
    assert asked(tmp_path) == before
    elsewhere = ("--answers", str(tmp_path / "other"))
    assert finished(data, tmp_path, "--tolerance", "13%", *more, *elsewhere) == 0
    assert len(Run.open(tmp_path / "other").items("pope")) in (110, QUESTIONS)


def test_two_do_not_write_at_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished(data, tmp_path, "--tolerance", "13%") == 0
    with Run.open(tmp_path / "cliff-pope-run").writing():
        assert finished(data, tmp_path, "--tolerance", "13%") == 2
    assert "another process is writing" in capsys.readouterr().err
