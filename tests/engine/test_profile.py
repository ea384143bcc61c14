"""A profile of cliffs: each request gets its task's, settled before the engine sees the request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.cases import GQA, one_image, text_only
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact, params_of
from vllm_flow.cliff_file import FORMAT, write_profile

TASKS = {"yes-no": 1, "reading": 3, "everything": GQA.layers}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "cliff.json"
    tasks = {name: {"flow_cliff": cliff, "evidence": {}} for name, cliff in TASKS.items()}
    content = {"format": FORMAT, "model": "m", "num_layers": GQA.layers, "tasks": tasks}
    write_profile(path, {**content, "default": {"flow_cliff": 2}})
    return path


@pytest.fixture
def engine(open_engine: OpenEngine, path: Path) -> Engine:
    flow = {"group_layers": 2, "default_policy": {"profile": str(path)}}
    return open_engine(GQA, 2, additional_config={"vllm_flow": flow})


def run(engine: Engine, asks: list[Any], keys: list[dict[str, Any]], **more: Any) -> Any:
    params = []
    for ask, extra in zip(asks, keys, strict=True):
        params.append(params_of(ask, **more))
        params[-1].extra_args = {**(params[-1].extra_args or {}), **extra} or None
    return engine.llm.generate([engine.prompt(ask) for ask in asks], params, use_tqdm=False)


def test_every_request_gets_its_tasks_cliff(engine: Engine) -> None:
    asks = [one_image(601 + n) for n in range(5)]
    keys = [{"flow_task": name} for name in TASKS] + [{}, {"flow_cliff": 0}]
    cliffs = [*TASKS.values(), 2, 0]
    expected = [replace(ask, cliff=cliff) for ask, cliff in zip(asks, cliffs, strict=True)]
    outputs = run(engine, asks, keys)
    assert_exact(engine, expected, outputs)
    reports = [(output.kv_transfer_params or {}).get("vllm_flow") for output in outputs]
    assert [None if r is None else r["cliff"] for r in reports] == [1, 3, None, 2, 0]


def test_parameters_may_be_used_again(engine: Engine) -> None:
    ask = one_image(611)
    params = params_of(ask)
    params.extra_args = {"flow_task": "yes-no"}
    for _ in range(2):
        outputs = engine.llm.generate(engine.prompt(ask), params, use_tqdm=False)
        assert_exact(engine, [replace(ask, cliff=1)], outputs)
    assert params.extra_args == {"flow_task": "yes-no"}


def test_a_tasks_cliff_stays_away_from_requests_it_does_not_fit(engine: Engine) -> None:
    text = text_only(612)
    assert_exact(engine, [text], run(engine, [text], [{"flow_task": "yes-no"}]))
    at_the_end = one_image(613, after=0)
    assert_exact(engine, [at_the_end], run(engine, [at_the_end], [{"flow_task": "yes-no"}]))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"flow_task": "vqa"}, "known tasks: 'everything', 'reading', 'yes-no'"),
        ({"flow_task": 3}, "no such task"),
        ({"flow_task": "reading", "flow_cliff": 1}, "flow_cliff is there as well"),
        ({"flow_tsk": "reading"}, "did you mean 'flow_task'"),
    ],
)
def test_other_tasks_are_refused(engine: Engine, keys: dict[str, Any], says: str) -> None:
    ask = one_image(614)
    with pytest.raises(ValueError, match=says):
        run(engine, [ask], [keys])
    assert_exact(engine, [replace(ask, cliff=2)], run(engine, [ask], [{}]))


def test_without_a_profile_a_task_is_refused(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 2)
    with pytest.raises(ValueError, match="flow_task='reading': this engine has no profile"):
        run(engine, [one_image(615)], [{"flow_task": "reading"}])


def test_scheduler_and_workers_need_no_file(engine: Engine, path: Path) -> None:
    """What was read at start-up is what every process has; the evidence is not carried along."""
    keys = engine.llm.llm_engine.vllm_config.additional_config["vllm_flow"]["default_policy"]
    assert keys["profile"]["tasks"] == {
        name: {"flow_cliff": cliff} for name, cliff in TASKS.items()
    }
    path.unlink()
    ask = one_image(616)
    expected = replace(ask, cliff=3)
    assert_exact(engine, [expected], run(engine, [ask], [{"flow_task": "reading"}]))
