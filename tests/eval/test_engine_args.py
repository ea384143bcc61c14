"""`--engine-args` are checked before anything starts: against vLLM's own names, and the values that are read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.commands.subjects import no_engines
from tests.eval.demo_pope import write_pope
from vllm_flow import cli
from vllm_flow.eval.sweep import connection, engine_args
from vllm_flow.eval.sweep.engine_actor import executor_of
from vllm_flow.eval.sweep.engine_args import (
    EngineArgsError,
    check_engine_args,
    known_names,
    workers_of,
)
from vllm_flow.eval.sweep.engine_options import EngineOptions


def test_the_names_are_vllms() -> None:
    """Read from its source as its classes have them: an upgrade that moves them fails here."""
    arguments = pytest.importorskip("vllm.engine.arg_utils").EngineArgs
    import dataclasses
    import inspect

    from vllm import LLM

    fields = {field.name for field in dataclasses.fields(arguments)}
    offline = set(inspect.signature(LLM.__init__).parameters) - {"self", "kwargs"}
    assert known_names() == {name for name in fields | offline if not name.startswith("_")}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_num_seqs": 64, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5},
        {"max_num_seqs": None, "chat_template": "x", "distributed_executor_backend": "mp"},
    ],
)
def test_what_vllm_takes(given: dict[str, Any]) -> None:
    check_engine_args(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_num_seq": 64}, "no argument 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"xyzzy": 1}, "no argument 'xyzzy'; `vllm serve --help=all` lists them"),
        ({"max_num_seqs": "64"}, "'max_num_seqs' is '64'; write a whole number above 0"),
        ({"max_num_seqs": 0}, "'max_num_seqs' is 0"),
        ({"max_num_seqs": True}, "'max_num_seqs' is true"),
        ({"tensor_parallel_size": 1.5}, "'tensor_parallel_size' is 1.5"),
        ({"pipeline_parallel_size": 0}, "'pipeline_parallel_size' is 0"),
        ({"distributed_executor_backend": "ray"}, "leave it out"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "cliff"])
def test_what_it_does_not_is_refused_before_anything_starts(
    given: dict[str, Any],
    says: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_pope(tmp_path / "data" / "pope", 4)
    no_engines(monkeypatch)
    monkeypatch.setattr(connection, "connected", None)
    asked = [
        command,
        "--model",
        "demo-small",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    ]
    asked += (
        ["--tasks", "pope", "--policies", "baseline"] if command == "eval" else ["--unlabelled"]
    )
    assert cli.main([*asked, "--engine-args", json.dumps(given)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_vllms_source_names_are_the_engines_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_args, "known_names", lambda: None)
    check_engine_args({"anything": 1})
    with pytest.raises(EngineArgsError, match="max_num_seqs"):
        check_engine_args({"max_num_seqs": "64"})


@pytest.mark.parametrize(
    ("given", "workers", "executor"),
    [
        ({}, 1, {}),
        ({"tensor_parallel_size": None}, 1, {}),
        ({"tensor_parallel_size": 1}, 1, {}),
        ({"tensor_parallel_size": 4}, 4, {"distributed_executor_backend": "mp"}),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 3},
            6,
            {"distributed_executor_backend": "mp"},
        ),
    ],
)
def test_workers_are_processes_of_the_engines_machine(
    given: dict[str, Any], workers: int, executor: dict[str, str]
) -> None:
    options = EngineOptions("m", "float32", 1, 16, "llava-1.5", (), engine_args=given)
    assert workers_of(given) == workers and executor_of(options) == executor
