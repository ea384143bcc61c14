"""`vllm-flow eval` again on a run that is there: what it takes over, refuses, or adds. No engine is asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

pytest.importorskip("ray")

from tests.commands.subjects import no_engines
from tests.eval.demo_pope import write_pope
from vllm_flow import cli
from vllm_flow.eval.sweep import run as sweep
from vllm_flow.eval.sweep.records import Run


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    write_pope(tmp_path / "data" / "pope", 40)
    no_engines(monkeypatch)

    def command(*more: str, answers: bool = True, data: str = "data") -> int:
        def stream(run: Run, batches: Any, *_: Any) -> None:
            for batch in batches if answers else ():
                rows = [
                    {
                        "task": row["task"],
                        "item_id": row["item_id"],
                        "policy": policy,
                        "answer": "Yes",
                    }
                    for row in batch.to_pylist()
                    for policy in row["policies"]
                ]
                run.append(rows)

        monkeypatch.setattr(sweep, "stream", stream)
        given = ["eval", "--model", "demo-small", "--tasks", "pope", "--policies", "baseline"]
        places = ["--data", str(tmp_path / data), "--out", str(tmp_path / "run")]
        return cli.main([*given, *places, *more])

    return command


def test_what_a_command_would_not_read_is_refused_before_it_asks(
    ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one policy nothing is compared, until others are in the run; a seed draws a sample."""
    assert ask("--tolerance", "2%") == 2
    assert "--tolerance has no effect without a baseline and another policy" in (
        capsys.readouterr().err
    )
    assert ask("--seed", "3") == 2
    assert "--seed has no effect without --limit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert ask("--limit", "5", "--policies", "baseline,cliff=4", "--tolerance", "2%") == 0
    told = capsys.readouterr().out
    assert "can rule out a loss of more than" in told
    assert ask("--limit", "8", "--tolerance", "3%") == 0, "beside cliff=4 of the run"
    assert "3 points would take" in capsys.readouterr().out
    assert Run.open(tmp_path / "run").meta["tolerance"] == 0.03


def test_groups_that_no_engine_has_are_refused_before_a_cluster_is_joined(
    ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's 6 layers, where the configuration says how they are stored. Without the option the engine divides
    them, which alone knows a model whose layers differ."""
    assert ask("--engine-args", '{"speculative_config": {}}', "--group-layers", "4") == 0
    assert (
        ask(answers=False) == 2
        and "group_layers is 4 there and null here" in capsys.readouterr().err
    )
    monkeypatch.setattr(sweep.connection, "connected", lambda *_: pytest.fail("a cluster"))
    for size in ("4", "7"):
        assert ask("--group-layers", size) == 2
        assert f"group_layers={size} leaves the last of the model's 6" in capsys.readouterr().err
    known = sweep.read_facts()
    monkeypatch.setattr(sweep, "read_facts", lambda *_: replace(known, all_attend=False))
    with pytest.raises(pytest.fail.Exception, match="a cluster"):
        ask("--group-layers", "4")


def test_a_corrected_command_goes_on(
    ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--dtype", "bfloat16", "--limit", "5", answers=False) == 0
    assert ask("--dtype", "float32", "--limit", "8") == 0
    assert ask("--dtype", "bfloat16", "--limit", "8") == 2
    assert 'dtype is "float32" there and "bfloat16" here' in capsys.readouterr().err
    assert Run.open(tmp_path / "run").meta["tolerance"] == 0.01
    more = ["--policies", "baseline,cliff=4", "--tolerance", "2%"]
    assert ask("--limit", "20", *more, "--engine-args", '{"gpu_memory_utilization": 0.5}') == 0
    assert Run.open(tmp_path / "run").meta["tolerance"] == 0.02
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    assert ask(data="elsewhere") == 0
    run = Run.open(tmp_path / "run")
    answers = run.answers()
    assert answers.filter(pc.field("policy") == "baseline").num_rows == len(run.items("pope")) == 40
    assert run.meta["tolerance"] == 0.01, "the last command's"
    assert all(Path(item.image or "").exists() for item in run.items("pope"))


def test_the_preparation_is_recorded(
    ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--limit", "5") == 0
    assert Run.open(tmp_path / "run").meta["image_preparation"] == {"pope": "plain"}
    capsys.readouterr()
    assert ask("--limit", "5", "--image-preparation", "pad") == 2
    assert "(--image-preparation plain)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("conversation", "expected"), [("llava-1.5", "pad"), ("chat-template", "plain")]
)
def test_the_conversation_decides_what_is_done_to_pictures(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversation: str, expected: str
) -> None:
    asked: list[str] = []
    read = sweep.read_facts

    def facts(*given: Any) -> Any:
        from dataclasses import replace

        found = read(*given)
        return replace(found, conversation=replace(found.conversation, name=conversation))

    monkeypatch.setattr(sweep, "read_facts", facts)
    monkeypatch.setattr(
        sweep, "plan_work", lambda tasks, *_: asked.extend(t.preparation for t in tasks) or []
    )
    assert ask() == 0
    assert asked == [expected]
    assert Run.open(tmp_path / "run").meta["image_preparation"] == {"pope": expected}


def test_a_run_from_before_is_refused_with_the_remedy(
    ask: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that padded for a model of another conversation; with the option it goes on."""
    assert ask("--limit", "5") == 0
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_preparation": "task"}))
    capsys.readouterr()
    assert ask("--limit", "5") == 2
    assert "of pope are prepared as 'pad' there and 'plain' here" in capsys.readouterr().err
    assert ask("--limit", "5", "--image-preparation", "pad") == 0
    assert Run.open(tmp_path / "run").meta["image_preparation"] == {"pope": "pad"}
