"""Ctrl-C ends real commands with one sentence and 130, while they load and while they work; nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.eval.demo_pope import write_pope
from vllm_flow.eval.sweep.records import Run

PATIENCE = 240


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pope(tmp_path / "data" / "pope", 200)
    return tmp_path / "data"


def start(*argv: str, module: str = "vllm_flow.cli") -> subprocess.Popen[str]:
    """The command in a session of its own, as a terminal would run it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", module, *argv], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def eval_argv(data: Path, out: Path) -> list[str]:
    return [
        "eval", "--model", "demo-small", "--tasks", "pope", "--data", str(data), "--out", str(out),
        "--policies", "baseline,cliff=2", "--group-layers", "2", "--max-model-len", "256",
        "--kv-cache-gib", "0.06", "--batch", "2", "--engines", "1",
    ]  # fmt: skip


def interrupt(child: subprocess.Popen[str], when: Callable[[], object]) -> str:
    """Ctrl-C, which reaches the whole group, once `when` is true; what the command said of it."""
    end = time.monotonic() + PATIENCE
    while not when():
        assert child.poll() is None, f"ended before: {child.communicate()}"
        if time.monotonic() > end:
            os.killpg(
                child.pid, signal.SIGKILL
            )  # what it started would stay beside all later tests
            raise AssertionError(f"it did not happen in time: {child.communicate()}")
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    return end_of(child)


def end_of(child: subprocess.Popen[str]) -> str:
    try:
        said = child.communicate(timeout=PATIENCE)[1]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    # Ray's own processes end a moment after the one that started them.
    end = time.monotonic() + 30
    while left(child.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left(child.pid)
    assert "Traceback" not in said
    return said


def left(session: int) -> list[str]:
    """Command lines of the processes of a session that are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(rest[2]) == session and state != "Z":
                found.append((entry / "cmdline").read_text().replace("\0", " ")[:200])
        except (OSError, ValueError):
            continue
    return found


def loads(child: subprocess.Popen[str], library: str) -> Callable[[], bool]:
    """Whether the process has mapped a library by now."""
    return lambda: library in Path(f"/proc/{child.pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("demo", ["demo", "--quick"]),
        ("cam", ["cam", "--image", "PICTURE", "--prompt", "What is it?"]),
        ("profile", ["profile", "--shape", "layers=2,hidden=64,heads=2,kv_heads=2,mlp=64"]),
        ("doctor", ["doctor", "--probe"]),
    ],
)
def test_while_it_loads(name: str, argv: list[str], data: Path, tmp_path: Path) -> None:
    picture = next(p for p in (data / "pope").iterdir() if p.suffix != ".json")
    argv = [str(picture) if part == "PICTURE" else part for part in argv]
    out = [] if name == "doctor" else ["--out", str(tmp_path / "out")]
    child = start(*argv, *out)
    said = interrupt(child, loads(child, "libtorch_cpu"))
    assert said == f"vllm-flow {name}: interrupted.\n"
    assert child.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        pytest.param("tests.eval.fake_engine", id="fake"),
        pytest.param("tests.eval.slow_engine", id="real", marks=pytest.mark.long),
    ],
)
def test_an_evaluation_keeps_its_answers(module: str, data: Path, tmp_path: Path) -> None:
    """Interrupted at work. That the same command goes on: tests/eval/test_driver.py."""
    out = tmp_path / "run"
    child = start(*eval_argv(data, out), module=module)
    said = interrupt(child, lambda: len(list(out.glob("answers/part-*.parquet"))) > 2)
    assert said.splitlines()[-1] == (
        f"vllm-flow eval: interrupted; the answers so far are in {out}, and the same command goes on."
    )
    assert child.returncode == 130
    assert 0 < Run.open(out).answers().num_rows < 400


@pytest.mark.slow
def test_a_search_for_a_cliff_keeps_its_answers(data: Path, tmp_path: Path) -> None:
    """With an engine that answers at once, so that it is interrupted at work."""
    asked = tmp_path / "asked"
    code = (
        "import sys; from tests.eval import fake_cliff as f; from vllm_flow.exits import leave; import time\n"
        "answer = f.FakeEngine._answer\n"
        "f.FakeEngine._answer = lambda *a: (time.sleep(0.2), answer(*a))[1]\n"
        "from pathlib import Path; leave(f.run(Path(sys.argv[1]), -1, sys.argv[2:]))"
    )
    argv = ["--model", "demo-small", "--data", str(data), "--task", "pope", "--tolerance", "10%"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(asked), *argv, "--out", str(tmp_path / "cliff.json")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    folder = tmp_path / "cliff-pope-run"
    said = interrupt(child, lambda: list(folder.glob("answers/part-*.parquet")))
    assert said.splitlines()[-1] == (
        f"vllm-flow cliff: interrupted; the same command goes on from what is in {folder}."
    )
    assert child.returncode == 130
    assert Run.open(folder).answers().num_rows
