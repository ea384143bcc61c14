"""Models that bring code: it runs when the user says so, and the sentence without it comes before an engine."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.families.chats import PARTS, PRINTED, STRING, give_template
from tests.families.making import Checkpoint
from vllm_flow.cli import main
from vllm_flow.eval.sweep.command import json_object
from vllm_flow.eval.sweep.conversation import choose, takes_parts
from vllm_flow.eval.sweep.model_facts import ModelError, read_facts, read_processor
from vllm_flow.remote_code import OPTION, refusal

ASKED = ("--data", "nowhere", "--out", "out")
COMMANDS = {
    "eval": ("eval", "--tasks", "pope", "--policies", "baseline", *ASKED, "--model"),
    "cliff": ("cliff", "--task", "pope", *ASKED, "--model"),
    "demo": ("demo", "--out", "out", "--model"),
    "profile": ("profile", "--parts", "prefill", "--dtype", "float32", "--out", "out", "--model"),
    "models": ("models",),
    "doctor": ("doctor", "--model"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_option_before_anything_starts(
    command: str,
    checkpoint_of: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = str(checkpoint_of("internvl_chat_qwen2").where)
    monkeypatch.chdir(tmp_path)
    with (
        mock.patch("vllm.LLM", side_effect=AssertionError("an engine starts")),
        mock.patch("ray.init", side_effect=AssertionError("Ray starts")),
    ):
        assert main([*COMMANDS[command], where]) in (1, 2)
    shown = capsys.readouterr()
    said = shown.out + shown.err
    assert said.count("it brings code of its own") == (2 if command == "doctor" else 1), said
    assert f"then add {OPTION}" in said
    assert "Traceback" not in said
    assert "Error" not in said, "the sentence alone, not the class of what was raised"


def test_code_runs_when_the_user_says_so(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    checkpoint = checkpoint_of("internvl_chat_qwen2")
    give_template(checkpoint.where, STRING)
    with pytest.raises(ModelError, match=OPTION):
        read_facts(str(checkpoint.where))
    facts = read_facts(str(checkpoint.where), trust_remote_code=True)
    assert (facts.num_layers, facts.dtype) == (checkpoint.num_layers, "float32")
    assert facts.conversation.mark == "<image>"
    assert facts.conversation.prompt("w5", image=True) == "w1 user w2 <image>\nw5 w3"
    assert facts.conversation.prompt("w5", image=False) == "w1 user w2 w5 w3"
    assert facts.no_downsampling is not None


PROCESSOR = """
class Mine:
    chat_template = "as it likes"

    @classmethod
    def register_for_auto_class(cls, *args):
        pass

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()

    def apply_chat_template(self, messages, **kwargs):
        return "|".join(part.get("text", "<mine>") for part in messages[0]["content"])
"""


def test_a_processor_alone_may_be_code(tmp_path: Path) -> None:
    config = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], num_hidden_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = {"processor_class": "Mine", "auto_map": {"AutoProcessor": "processing_mine.Mine"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(own))
    (tmp_path / "processing_mine.py").write_text(PROCESSOR)
    with pytest.raises(ModelError, match=f"brings code of its own.*{OPTION}"):
        read_facts(str(tmp_path))
    facts = read_facts(str(tmp_path), trust_remote_code=True)
    assert facts.conversation.prompt("w5", image=True) == "<mine>|w5"


def test_code_that_was_allowed_and_is_damaged_is_no_missing_option(tmp_path: Path) -> None:
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "configuration_mine.py").write_text("raise KeyError('broken')\n")
    with pytest.raises(ModelError, match="cannot be read: 'broken'"):
        read_facts(str(tmp_path), trust_remote_code=True)


def test_the_cause_behind_an_error_counts() -> None:
    def loading() -> None:
        try:
            raise ValueError("The repository x contains custom code which must be executed")
        except ValueError as error:
            raise RuntimeError("consider setting `trust_remote_code=True`") from error

    with pytest.raises(RuntimeError) as found:
        loading()
    assert refusal(found.value) is not None
    assert refusal(RuntimeError("consider setting `trust_remote_code=True`")) is None
    assert refusal(None) is None


def test_there_is_one_way_to_say_it() -> None:
    with pytest.raises(ArgumentTypeError, match="'trust_remote_code' has an option of its own"):
        json_object('{"trust_remote_code": true}')


@pytest.mark.parametrize(("template", "parts"), [(STRING, False), (PRINTED, False), (PARTS, True)])
def test_a_template_of_texts_or_of_parts_is_told_as_vllm_tells_it(
    template: str, parts: bool, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    from vllm.renderers.hf import _detect_content_format

    where = checkpoint_of("internvl_chat_qwen2").where
    give_template(where, template)
    processor = read_processor(str(where), trust_remote_code=True)
    assert takes_parts(processor) == parts
    assert (_detect_content_format(template, default="string") == "openai") == parts
    found = choose("auto", "m", processor, lambda: "<image>")
    expected = {
        STRING: "w1 user w2 <image>\nw5 w3",
        PRINTED: "w1 <image>\nw5 w2",
        PARTS: "w1 <image> w5 w2",
    }
    assert found.prompt("w5", image=True) == expected[template]
    alone = choose("auto", "m", processor, lambda: None)
    # The processor adds the picture by itself.
    assert alone.prompt("w5", image=True) == expected[template].replace("<image>\n", "")
