"""What is said of a model that cannot be read: that there is none, before what a library made of its name."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from vllm_flow import doctor, model_names
from vllm_flow.demo import command as demo_command
from vllm_flow.demo_model.naming import DEMO_MODELS
from vllm_flow.eval.sweep.model_facts import ModelError, read_facts
from vllm_flow.exits import CommandError
from vllm_flow.model_names import UnreadModel, absence, check_hub, why_unread
from vllm_flow.models_command import about
from vllm_flow.profile import attention_cost, session
from vllm_flow.profile import command as profile_command
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


NOWHERE = "http://127.0.0.1:9"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that may ask a hub, which is not there, with an empty cache."""
    import huggingface_hub.constants as constants

    for name in OFFLINE:
        monkeypatch.setenv(name, "0")  # and what a test leaves there is taken back
    monkeypatch.setenv("HF_HUB_CACHE", "")
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = model_names._unreached
    asked.cache_clear()
    yield monkeypatch
    asked.cache_clear()


def test_a_hub_that_is_not_reached_is_told_at_once(hub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By every command that reads a model by its name, before the hub's library tries again and again."""
    from vllm_flow.analysis.loading import load

    for command in (
        lambda: read_facts("org/model"),
        lambda: list(about("org/model")),
        lambda: doctor.run(arguments(doctor, "--model", "org/model")),
        lambda: session.settle(arguments(profile_command, "--model", "org/model"), Path()),
        lambda: load("org/model"),
        lambda: demo_command.engine_options(
            arguments(demo_command, "--model", "org/model"), Console()
        ),
        lambda: attention_cost.measure(argparse.Namespace(model="org/model"), str(tmp_path)),
    ):
        with pytest.raises((ModelError, CommandError, UnreadModel)) as said:
            command()
        assert f"'org/model' is no folder and not in the hub's cache ({tmp_path}/home/hub)" in str(
            said.value
        )
        assert f"and {NOWHERE} is not reached (" in str(said.value)
    hub.setattr(model_names, "_unreached", lambda hub: pytest.fail("nobody need ask"))
    for name in (str(tmp_path), "/nope", "./nope", "~/nope", "a/b/c"):
        check_hub(name)
    for name in OFFLINE:
        hub.setenv(name, "1")
        check_hub("org/model")
        hub.setenv(name, "0")


def test_what_the_hubs_cache_has_is_used_where_the_hub_is_not_reached(
    hub: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.constants import is_offline_mode

    folder = tmp_path / "home" / "hub" / "models--org--model" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    with pytest.raises(UnreadModel):
        check_hub("org/model")
    (folder / "config.json").write_text("{}")
    assert not is_offline_mode()
    check_hub("org/model")
    assert is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
    assert f"{NOWHERE} is not reached" in capsys.readouterr().err
    check_hub("org/other")  # for the library to say, which is offline now
    assert capsys.readouterr().err == ""


def test_a_hub_that_answers_anything_is_reached(hub: pytest.MonkeyPatch) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(401)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        hub.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        check_hub("org/model")
        server.shutdown()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_hub_that_never_answers_is_not_waited_for(hub: pytest.MonkeyPatch) -> None:
    def late(*args: Any, **options: Any) -> None:
        time.sleep(1)
        raise OSError("late")

    hub.setattr(model_names, "HUB_SECONDS", 0.2)
    hub.setattr(model_names, "urlopen", late)
    with pytest.raises(UnreadModel, match="no answer within 0.2 seconds"):
        check_hub("org/model")


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
