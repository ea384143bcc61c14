"""What a worker's state does for a step, whoever's requests are in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flow.engine.worker.step_inputs import StepInputs
from vllm_flow.engine.worker.step_planner import WorkersStep
from vllm_flow.engine.worker.worker_state import WorkerState
from vllm_flow.handing_on import NOTHING, Handing, Part, What
from vllm_flow.step import StepShares

SHARES = StepShares(["a", "b"], [0, 9], [5, 1])
TABLES: list[Any] = ["a table"]
TOLD = Part(What.ORDER, (0, 0, "diversity"), 3)


@pytest.mark.parametrize("plan", [None, "a plan"])
@pytest.mark.parametrize("readings", [[], ["a reading"]], ids=["", "readings"])
@pytest.mark.parametrize("handing", [NOTHING, Handing(tells=(TOLD,))], ids=["", "handing"])
@pytest.mark.parametrize("logged", [None, {}, {"b": "a log"}], ids=["off", "on", "logged"])
def test_only_what_a_step_needs_is_gathered(
    plan: Any, readings: list[Any], handing: Handing, logged: dict[str, str] | None
) -> None:
    calls: list[tuple[Any, ...]] = []

    def noted(name: str, answer: Any = None) -> Any:
        return lambda *args: (calls.append((name, *args)), answer)[1]

    state: Any = WorkerState.__new__(WorkerState)
    ours = WorkersStep(plan, readings, handing)
    state.planner = SimpleNamespace(plan=noted("plan", ours))
    state.builder = SimpleNamespace(late=noted("late", "late ones"), build=noted("build", "a step"))
    state.tap = None if logged is None else SimpleNamespace(requests=logged, arm=noted("arm"))
    given = StepInputs(TABLES)
    step = state.plan(SHARES, noted("inputs", given))
    expected = [("plan", SHARES)]
    goes_on = bool(plan or readings or handing)
    if goes_on or logged:
        expected.append(("inputs",))
    if logged:
        expected.append(("arm", plan, SHARES, TABLES))
    if goes_on:
        expected.append(("late", readings, SHARES.request_ids, TABLES))
        expected.append(("build", plan, given, "late ones", handing))
    assert calls == expected
    assert step == ("a step" if goes_on else None)


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("evicts", [False, True])
def test_steps_are_planned_while_someone_evicts_or_is_logged(logs: bool, evicts: bool) -> None:
    state: Any = WorkerState.__new__(WorkerState)
    state.book = SimpleNamespace(layouts={"a": "a layout"} if evicts else {})
    state.tap = SimpleNamespace(requests={"b": "a log"} if logs else {})
    assert state.plans == (logs or evicts)
    state.tap = None
    assert state.plans == evicts
