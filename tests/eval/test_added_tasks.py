"""Tasks of other packages: found by name, scored, reported, searched for a cliff; refused in words where broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eval import files
from tests.eval.conftest import Command
from tests.plugins.installing import RANK_PACKAGE, TASK_PACKAGE, lay_out, visible, write_package
from vllm_flow.cli import main
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.sweep.versions import brought, of_brought
from vllm_flow.eval.tasks import GROUP, TASKS, get_task, task_names
from vllm_flow.eval.tasks.reading import DataError
from vllm_flow.registry import PluginError

SOUND = """
    from vllm_flow.eval.tasks.base import Scored, Task

    class Empty(Task):
        name, max_tokens, headline = "empty", 4, "accuracy"
        def read(self, data): return []
        def score(self, item, text): return Scored(item.id, text, 1.0)
        def metrics(self, totals): return {"accuracy": 1.0}

    TASK = Empty()
"""


@pytest.fixture
def capitals(tmp_path: Path) -> Iterator[Path]:
    """The package, and a folder with its data, of which every other answer of "A" is right."""
    rows = [{"id": str(n), "image": f"{n}.png", "letter": "AB"[n % 2]} for n in range(8)]
    files.json_lines(tmp_path / "data/capitals/letters.jsonl", rows)
    with visible(lay_out(TASK_PACKAGE, tmp_path / "site")):
        yield tmp_path / "data/capitals"


def test_a_packages_task_is_a_task_like_any_other(capitals: Path) -> None:
    assert "capitals" in task_names()
    assert [item.truth["letter"] for item in get_task("capitals").read(capitals)] == [*"ABABABAB"]
    with pytest.raises(DataError, match="capitals-steps: the question 0 does not end in a request"):
        get_task("capitals-steps").read(capitals)


def test_names_are_listed_and_nothing_is_imported(capitals: Path) -> None:
    for command in ("eval", "cliff", "score"):
        code = (
            "import sys; from vllm_flow.cli import build_parser\n"
            f"print(build_parser(['{command}'])._subparsers._group_actions[0].choices['{command}'].format_help())\n"
            "assert 'flow_capitals_task' not in sys.modules"
        )
        env = {"PYTHONPATH": f"{capitals.parents[1] / 'site'}:{Path(__file__).parents[2]}"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert "capitals" in done.stdout, done.stderr
    assert "of the package flow_capitals_task 1.0" in done.stdout


def test_answers_are_scored(capitals: Path, command: Command, tmp_path: Path) -> None:
    answers = files.json_lines(
        tmp_path / "answers.jsonl", [{"id": str(n), "text": "A."} for n in range(6)]
    )
    found = command.scores("capitals", "--data", capitals, "--answers", answers)
    assert found["metrics"] == {"accuracy": 0.5} and len(found["items"]) == 6
    assert "questions without an answer: 2 of 8" in command.errors


def test_a_run_says_of_which_packages_its_ranks_and_tasks_are(tmp_path: Path) -> None:
    site = lay_out(RANK_PACKAGE, lay_out(TASK_PACKAGE, tmp_path / "site"))
    with visible(site):
        policies = parse_policies("baseline,fastv,cliff=2,2:9 center;3:4 uniform,downsample=2", 6)
        named = brought(policies, ["pope", "capitals-steps"])
    assert named == {
        "rank center": "flow_center_rank 1.0",
        "task capitals": "flow_capitals_task 1.0",
    }
    assert of_brought({"vllm": "1", **named}) == named


def test_a_run_is_reported_while_the_package_is_there(capitals: Path, tmp_path: Path) -> None:
    parsed = parse_policies("baseline,cliff=2", 6)
    run = Run.create(
        tmp_path / "run",
        {
            **{"command": "vllm-flow eval", "model": "made up", "num_layers": 6, "group_layers": 2},
            **{"block_size": 32, "dtype": "float32", "data": str(capitals.parent), "seed": 0},
            **{"engines": 1, "tasks": ["capitals"], "versions": {}, "hardware": "none"},
            "policies": [policy.as_json() for policy in parsed],
        },
    )
    items = get_task("capitals").read(capitals)
    run.write_items("capitals", items)
    run.append(
        [
            {"task": "capitals", "item_id": item.id, "policy": policy.name, "engine": "none"}
            | {"answer": item.truth["letter"] if policy.name == "baseline" else "A"}
            for item in items
            for policy in parsed
        ]
    )
    assert main(["report", str(tmp_path / "run")]) == 0
    scores = (tmp_path / "run/report/scores.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in scores[1:]] == [
        ["capitals", "baseline"],
        ["capitals", "cliff=2"],
    ]
    assert "100" in scores[1] or "1.0" in scores[1]


def test_a_cliff_is_found_for_it(capitals: Path, tmp_path: Path) -> None:
    """By the command's own search, on an engine that says the same at every layer."""
    arguments = [
        *("--model", "demo-small", "--data", str(capitals.parent), "--task", "capitals"),
        *("--tolerance", "50%", "--no-attention", "--out", str(tmp_path / "cliff.json")),
    ]
    env = {"PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).parents[2]}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.eval.fake_cliff", tmp_path / "asked", "0", *arguments],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "cliff.json").read_text())["tasks"]["capitals"]["flow_cliff"] == 0


def test_an_own_task_cannot_be_taken(tmp_path: Path, command: Command) -> None:
    places = {"docvqa": "taker:TASK", "empty": "taker:TASK"}
    with visible(write_package(tmp_path, "taker", GROUP, places, SOUND)):
        told = r"task 'docvqa' is one of vllm-flow's own, and taker 1\.0 \(taker:TASK\) registers another"
        with pytest.raises(PluginError, match=told):
            get_task("docvqa")
        assert get_task("infovqa") and get_task("empty").name == "empty"
        said = command.refuses("docvqa", "--data", tmp_path, "--answers", tmp_path / "no")
        assert "vllm-flow's own, and taker 1.0" in said


BROKEN = {
    "missing": ("", "cannot be imported: ModuleNotFoundError"),
    "no task": ("TASK = 1", "int is no task; it must be an object derived from vllm_flow.eval.tasks.base.Task"),
    "a class": (f"{SOUND}\n    TASK = Empty", "Empty is a class, not an object"),
    "another name": (SOUND, "it calls itself 'empty'; its name must be that of its entry point"),
    "abstract": ("from vllm_flow.eval.tasks.base import Task\nTASK = Task()", "cannot be imported: TypeError"),
    "no headline": (
        SOUND.replace('name, max_tokens, headline = "empty", 4, "accuracy"', 'name, max_tokens = "broken", 4'),
        "it does not say its headline",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_task_is_told_of_when_it_is_named(
    fault: str, tmp_path: Path, command: Command
) -> None:
    code, told = BROKEN[fault]
    with visible(write_package(tmp_path, "broken", GROUP, {"broken": "broken:TASK"}, code)):
        assert "broken" in task_names() and get_task("pope").name == "pope"
        with pytest.raises(ValueError, match="no task 'x'; there are: .*broken"):
            get_task("x")
        with pytest.raises(PluginError) as caught:
            get_task("broken")
        assert "task 'broken' of broken 1.0 (broken:TASK) cannot be" in str(caught.value)
        assert told in str(caught.value)
        said = command.refuses("broken", "--data", tmp_path, "--answers", tmp_path / "no")
        assert told.split(":")[0] in said
        data = ["--data", str(tmp_path), "--policies", "baseline", "--out", str(tmp_path / "run")]
        assert main(["eval", "--model", "demo-small", "--tasks", "broken", *data]) == 2
        assert "task 'broken' of broken 1.0" in command.capsys.readouterr().err
    assert "broken" not in TASKS
