"""A start of Ray that hangs is told with the remedy; one that answers says nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from vllm_flow.eval.sweep import connection, machines  # noqa: E402


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
