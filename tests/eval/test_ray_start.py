"""A start of Ray that hangs is told with the remedy; one that answers says nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from vllm_flow.eval.sweep import connection, machines  # noqa: E402

LATE = "The current node timed out during startup. This could happen because"


@pytest.mark.parametrize("seconds", [0.0, 0.6])
@pytest.mark.parametrize("fails", [False, True])
def test_a_silent_start_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    fails: bool,
) -> None:
    def init(**_: Any) -> None:
        time.sleep(seconds)
        if fails:
            raise Exception("no raylet")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # others' tests have a cluster
    monkeypatch.setattr(machines, "alive", list)
    monkeypatch.setattr(connection, "pool_of", lambda *_: "a pool")
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.2)
    monkeypatch.setenv("RAY_TMPDIR", "/elsewhere")
    if fails:
        with pytest.raises(machines.SweepError, match="Ray cannot start here: no raylet"):
            connection.connect("local", None)
    else:
        assert connection.connect("local", None) == "a pool"
    time.sleep(0.3)
    said = capsys.readouterr().err
    if not seconds:
        assert not said
        return
    [line] = said.splitlines()
    assert line.startswith(
        "Ray has not answered for 0.2 s; its logs are in /elsewhere/ray/session_latest/logs."
    )
    assert "`ray stop`" in line and "again" in line


@pytest.mark.parametrize(
    ("errors", "starts"), [([LATE], 2), ([LATE, LATE], 2), (["no raylet"], 1)], ids=str
)
def test_a_start_that_took_too_long_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, errors: list[str], starts: int
) -> None:
    tried, left = [], errors[:]

    def init(**_: Any) -> None:
        tried.append(len(ended))
        if left:
            raise Exception(left.pop(0))

    ended: list[None] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(None))
    monkeypatch.setattr(machines, "alive", list)
    monkeypatch.setattr(connection, "pool_of", lambda *_: "a pool")
    if len(errors) < starts:
        assert connection.connect("local", None) == "a pool"
    else:
        with pytest.raises(machines.SweepError, match=f"Ray cannot start here: .*{errors[-1]}"):
            connection.connect("local", None)
    assert tried == list(range(starts)), "what is there of the first is ended before the second"
