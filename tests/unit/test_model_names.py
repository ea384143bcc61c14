"""What is said of a model that cannot be read: that there is none, before what a library made of its name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_flow import doctor
from vllm_flow.demo import command as demo_command
from vllm_flow.demo_model.naming import DEMO_MODELS
from vllm_flow.eval.sweep.model_facts import ModelError, read_facts
from vllm_flow.exits import CommandError
from vllm_flow.model_names import absence, why_unread
from vllm_flow.models_command import about
from vllm_flow.profile import command as profile_command
from vllm_flow.profile import session
from vllm_flow.profile.subject import subject_of

ODD = ValueError("Repo id must use alphanumeric chars, '-', '_' or '.'\nand more")


@pytest.mark.parametrize("name", ["/nope", "./nope", "../nope", "~/nope", "a/b/c", "nope/at/läufe"])
def test_a_path_that_leads_nowhere_is_called_that(name: str) -> None:
    assert why_unread(name, ODD) == "there is no such folder"


def arguments(command: Any, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_what_is_there_and_no_model(tmp_path: Path) -> None:
    assert why_unread(str(tmp_path), ODD) == "there is no config.json in this folder"
    (tmp_path / "config.json").write_text("{")
    assert why_unread(str(tmp_path), ODD) == ODD.args[0].splitlines()[0]
    assert (
        absence(str(tmp_path / "config.json"), ODD) is None
    )  # a file: for vLLM to say whether it takes it


def test_a_name_of_the_hub() -> None:
    offline = OSError("Cannot find ... and outgoing traffic has been disabled. To enable ...")
    assert "HF_HUB_OFFLINE=0" in why_unread("org/model", offline)
    behind = OSError("We couldn't connect")
    behind.__cause__ = offline
    assert "HF_HUB_OFFLINE=0" in why_unread("org/model", behind)
    assert why_unread("org/model", ODD) == ODD.args[0].splitlines()[0]
    assert why_unread("org/model", KeyError()) == "KeyError()"


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_every_command_takes_a_demo_model_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One place knows the names; what each command hands on is a folder that is there."""
    import vllm_flow.demo_model.assemble as assembling
    from vllm_flow.analysis.loading import load

    def none() -> None:
        raise assembling.AssemblyError(f"no {name} can be made")

    monkeypatch.setattr(assembling, "assemble", none)
    monkeypatch.setattr(assembling, "assemble_small", none)
    for command in (
        lambda: read_facts(name),
        lambda: list(about(name)),
        lambda: doctor.run(arguments(doctor, "--model", name)),
        lambda: session.settle(arguments(profile_command, "--model", name), Path()),
        lambda: load(name),
        lambda: demo_command.engine_options(arguments(demo_command, "--model", name), Console()),
        lambda: demo_command.engine_options(arguments(demo_command), Console()),
    ):
        with pytest.raises((ValueError, CommandError), match=f"no {name} can be made"):
            command()


def test_models_and_doctor_look_at_the_small_demo_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "flow_cliff 0 to 6" in "".join(about("demo-small"))
    assert doctor.run(arguments(doctor, "--model", "demo-small")) == 0
    assert "LlavaForConditionalGeneration is supported: 6 decoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    "read",
    [
        lambda model: read_facts(model, trust_remote_code=False),
        lambda model: list(about(model)),
        lambda model: subject_of(model, "float32"),
    ],
    ids=["eval, demo and cliff", "models", "profile"],
)
def test_commands_say_it(tmp_path: Path, read: object) -> None:
    with pytest.raises((ModelError, ValueError), match="there is no such folder"):
        read(str(tmp_path / "nope"))
