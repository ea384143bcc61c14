"""How `vllm-flow demo` starts its engine: with the user's arguments, and only for what can be asked of the model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vllm_flow.demo import command, serving
from vllm_flow.demo.next_steps import flag, serve_flags
from vllm_flow.exits import CommandError, Refused

MODEL = "demo-small"


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def engine(*words: str) -> serving.EngineOptions:
    return command.engine_options(options(*words), Console())


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[serving.EngineOptions]:
    """The engines that would have been started."""
    found: list[serving.EngineOptions] = []

    def start(options: serving.EngineOptions) -> Any:
        found.append(options)
        raise ValueError("no engine here")

    monkeypatch.setattr(command, "start_engine", start)
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--cliffs", "99"),
            "--cliffs 99: this model has 6 decoder layers; write numbers from 0 to 6",
        ),
        (("--policies", "nonsense"), "--policies: .*nonsense"),
        (("--policies", "cliff=99"), "--policies: .*99"),
        (("--policies", "downsample=2"), "--policies: .*leave downsample out"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_an_engine_starts(
    tmp_path: Path, started: list[Any], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        command.run(options("--model", MODEL, "--out", str(tmp_path / "out"), *words))
    assert not started and not list(tmp_path.glob("out/questions/*"))


def test_what_fits_starts_one(tmp_path: Path, started: list[Any]) -> None:
    words = ("--cliffs", "6", "--policies", "0:50% uniform", "--out", str(tmp_path))
    with pytest.raises(CommandError, match="cannot be served: no engine here"):
        command.run(options("--model", MODEL, *words))
    assert len(started) == 1


def test_an_engine_is_started_with_the_users_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def start(**arguments: Any) -> Any:
        seen.update(arguments)
        raise ValueError

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    given = engine(
        *("--model", MODEL, "--max-model-len", "4096", "--block-size", "64", "--group-layers", "2"),
        *("--engine-args", '{"tensor_parallel_size": 2, "enforce_eager": false}'),
    )
    with pytest.raises(ValueError):
        serving.start_engine(given)
    assert seen["max_model_len"] == 4096 and seen["block_size"] == 64
    assert seen["tensor_parallel_size"] == 2 and seen["enforce_eager"] is False
    assert seen["additional_config"] == {"vllm_flow": {"group_layers": 2}}
    assert seen["limit_mm_per_prompt"] == {"image": 1} and seen["dtype"] == "auto"


def test_the_demo_models_engine_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "resolve_model", lambda name: f"/cache/{name}")
    assert engine() == serving.EngineOptions(
        model="/cache/demo",
        dtype="float32",
        group_layers=3,
        max_model_len=512,
        kv_cache_bytes=2**30,
        block_size=32,
    )


def test_the_flags_of_a_server_are_the_engines_arguments() -> None:
    found = serving.EngineOptions("m", "auto", None, 1024, None, 16, engine_args={"swap": 1})
    assert serve_flags(found) == "--dtype auto --max-model-len 1024 --block-size 16 --swap 1"
    assert flag("enforce_eager", False) == "--no-enforce-eager"
    assert flag("trust_remote_code", True) == "--trust-remote-code"
    assert flag("media_io_kwargs", {"a": "b c"}) == """--media-io-kwargs '{"a": "b c"}'"""


def test_a_prompt_that_is_too_long_names_the_option() -> None:
    from vllm.exceptions import VLLMValidationError

    def generate(*_: Any, **__: Any) -> None:
        raise VLLMValidationError("The decoder prompt is longer.")

    asker = serving.Asker(SimpleNamespace(generate=generate), SimpleNamespace(), str)
    with pytest.raises(Refused, match="is longer. .*--max-model-len"):
        asker.generate([], None)
