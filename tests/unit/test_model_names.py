"""What is said of a model that cannot be read: that there is none, before what a library made of its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_flow.eval.sweep.model_facts import ModelError, read_facts
from vllm_flow.model_names import absence, why_unread
from vllm_flow.models_command import about
from vllm_flow.profile.subject import subject_of

ODD = ValueError("Repo id must use alphanumeric chars, '-', '_' or '.'\nand more")


@pytest.mark.parametrize("name", ["/nope", "./nope", "../nope", "~/nope", "a/b/c", "nope/at/läufe"])
def test_a_path_that_leads_nowhere_is_called_that(name: str) -> None:
    assert why_unread(name, ODD) == "there is no such folder"


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
