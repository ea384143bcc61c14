"""The driver on Ray: what survives kills, what resumes, what stops a run and with which words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fixtures import prepare_process

prepare_process()
pytest.importorskip("ray")

from tests.eval import fake_engine  # noqa: E402
from tests.eval.demo_pope import write_pope  # noqa: E402
from vllm_flow import cli  # noqa: E402
from vllm_flow.eval.sweep import driver, engine_args, machines  # noqa: E402
from vllm_flow.eval.sweep.machines import Machine  # noqa: E402
from vllm_flow.eval.sweep.records import Run  # noqa: E402
from vllm_flow.eval.tasks import get_task  # noqa: E402

QUESTIONS = 28


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pope(tmp_path / "data" / "pope", QUESTIONS)
    return tmp_path / "data"


def command(data: Path, out: Path, policies: str, *more: str) -> list[str]:
    return [
        "eval", "--model", "demo-small", "--tasks", "pope", "--data", str(data), "--out", str(out),
        "--policies", policies, "--group-layers", "2", "--max-model-len", "256",
        "--kv-cache-gib", "0.06", "--batch", "4", *more,
    ]  # fmt: skip


def rows_of(out: Path) -> list[dict[str, Any]]:
    return Run.open(out).answers().to_pylist()


def written(out: Path) -> list[Path]:
    return list((out / "answers").glob("part-*.parquet"))


def wait_for(what: Callable[[], Any], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.long)])
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module that runs the command; its fake engines work in this process's commands, too."""
    if request.param == "real":
        return "vllm_flow.cli"
    monkeypatch.setattr(driver, "answers", fake_engine.fake_answers)
    monkeypatch.setattr(engine_args, "known_names", fake_engine.any_name)
    return fake_engine.__name__


@pytest.mark.slow
def test_a_killed_engine_costs_nothing(
    cluster: str, engines: str, data: Path, tmp_path: Path
) -> None:
    """Two engines, three policies, two bad pictures; one engine is killed on the way."""
    out = tmp_path / "run"
    pictures = sorted(path for path in (data / "pope").iterdir() if path.suffix != ".json")
    pictures[0].unlink()
    pictures[1].write_bytes(b"no picture")
    victim: list[int] = []

    def kill() -> None:
        wait_for(lambda: (out / "run.json").exists() and written(out))
        victim.append(int(rows_of(out)[0]["engine"].rpartition(":")[2]))
        os.kill(victim[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    policies = "baseline,cliff=2,text-only"
    asked = command(data, out, policies, "--engines", "2", "--batch", "2")
    assert cli.main(asked) == 3, "some rows are errors"
    killer.join()
    assert cli.main([*asked, "--errors-ok"]) == 0

    run, rows = Run.open(out), rows_of(out)
    items = {item.id: item for item in run.items("pope")}
    expected = {(i, p) for i in items for p in policies.split(",")}
    assert {(row["item_id"], row["policy"]) for row in rows} == expected
    assert len(rows) == len(expected) == 3 * QUESTIONS
    bad = {
        i for i, item in items.items() if Path(item.image).name in {p.name for p in pictures[:2]}
    }
    assert {row["item_id"] for row in rows if row["error"]} == bad != set()
    answered = {int(row["engine"].rpartition(":")[2]) for row in rows}
    assert len(answered) >= 2 and answered - set(victim)
    assert not alive(victim[0])
    assert run.meta["engines"] == 2
    assert [p["name"] for p in run.meta["policies"]] == policies.split(",")

    if engines == fake_engine.__name__:
        return
    task = get_task("pope")
    scores = [
        task.score(items[row["item_id"]], row["answer"]).score
        for row in rows
        if row["policy"] == "baseline" and row["answer"] is not None
    ]
    assert sum(scores) / len(scores) > 0.8


@pytest.mark.slow
def test_a_killed_driver_resumes_with_the_same_command(
    cluster: str, engines: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    slowly = (
        "--engine-args",
        '{"max_num_seqs": 4}',
    )  # so that there is something left when it is killed
    first = command(data, out, "baseline,cliff=2", "--engines", "1", *slowly)
    child = subprocess.Popen(
        [sys.executable, "-m", engines, *first, "--ray-address", cluster],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(lambda: child.poll() is not None or len(written(out)) >= 2)
    finally:
        child.kill()
    said = child.communicate()[0].decode()
    assert child.returncode == -signal.SIGKILL, said
    before = rows_of(out)
    assert 0 < len(before) < 2 * QUESTIONS, "killed too late to show anything"

    # The same command goes on, here with another policy.
    assert cli.main([part.replace("cliff=2", "cliff=2,downsample=2") for part in first]) == 0
    after = rows_of(out)
    assert len(after) == len({(row["item_id"], row["policy"]) for row in after}) == 3 * QUESTIONS
    assert not [row for row in after if row["error"]]
    kept = {(row["item_id"], row["policy"]): row for row in after}
    assert all(kept[row["item_id"], row["policy"]] == row for row in before)
    if engines != fake_engine.__name__:
        assert {row["image_tokens"] for row in after if row["policy"] == "downsample=2"} == {25}
    assert len(written(out)) == 1  # compacted

    # Nothing is left, so no engine starts.
    capsys.readouterr()
    began = time.monotonic()
    assert cli.main(first) == 0
    assert "Nothing left to ask" in capsys.readouterr().out
    assert time.monotonic() - began < 10
    assert rows_of(out) == after

    # Other settings are another run.
    for change, says in (
        (["--dtype", "bfloat16"], 'dtype is "float32" there and "bfloat16" here'),
        (["--conversation", "llava-1.5"], "prompt is"),
        (["--limit", "3"], "limit is null there and 3 here"),
        (["--engine-args", '{"kv_cache_dtype": "fp8"}'], "engine argument kv_cache_dtype is null"),
    ):
        assert cli.main([*first, *change]) == 2
        assert says in capsys.readouterr().err
    assert rows_of(out) == after


def test_machines_that_go_end_the_wait_for_them(
    cluster: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both go; which are there is made up, the engines are Ray's. One that stays, one that comes, and the same
    command afterwards: test_cluster_nodes.py."""
    out = tmp_path / "run"
    monkeypatch.setattr(driver, "answers", fake_engine.fake_answers)
    monkeypatch.setattr(engine_args, "known_names", fake_engine.any_name)
    monkeypatch.setattr(machines, "INTERVAL", 0.1)
    monkeypatch.setattr(machines, "PATIENCE", 0.3)
    both = [Machine("first", 0, 1), Machine("second", 0, 1)]
    monkeypatch.setattr(machines, "alive", lambda: [] if len(written(out)) > 1 else both)
    slowly = ("--engine-args", '{"seconds": 0.3}', "--batch", "2")
    assert cli.main(command(data, out, "baseline,cliff=2", "--engines", "2", *slowly)) == 1
    said = capsys.readouterr()
    assert "starting 2 engines" in said.out
    assert said.out.count("A machine of the cluster is gone.") == 1
    assert said.err.splitlines()[-1] == (
        "vllm-flow eval: no machine of the cluster has room for an engine (1 CPU) any more; the "
        f"answers so far are in {out}, and the same command goes on."
    )
    rows = rows_of(out)
    assert len(rows) == len({(row["item_id"], row["policy"]) for row in rows}) < 2 * QUESTIONS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--policies", "cliff=99"], "6 decoder layers"),
        (["--tasks", "pop"], "no task 'pop'"),
        (["--data", "nowhere"], "no such directory"),
        (
            ["--engine-args", '{"media_io_kwargs": {"image": {"rgba_background_color": "red"}}}'],
            "'red' is no colour",
        ),
        (["--model", "nowhere"], "cannot be read"),
        (["--engines", "99999"], "CPUs"),
    ],
)
def test_a_command_that_cannot_be_run_says_why(
    cluster: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    says: str,
) -> None:
    out = tmp_path / "run"
    assert cli.main([*command(data, out, "baseline"), *change]) in (1, 2)
    assert says in capsys.readouterr().err
    assert not out.exists()
