"""`vllm-flow models MODEL`: supported or not, and what a picture becomes; no engine starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import oracle
from tests.families.making import Checkpoint, picture
from vllm_flow.cli import main
from vllm_flow.eval.sweep.model_facts import ModelError, read_facts


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
def test_a_picture_becomes_as_many_tokens_as_the_processor_makes(
    name: str, checkpoint_of: Callable[[str], Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(name)
    height, width = checkpoint.sizes[0]
    assert main(["models", str(checkpoint.where), "--picture", f"{width}x{height}"]) == 0
    shown = capsys.readouterr().out
    prompt = oracle.encode(checkpoint, checkpoint.image, (picture(1, checkpoint.sizes[0]),))
    leave = int(prompt.is_image_T.sum())
    assert f"{leave} tokens leave" in shown
    assert "LLaVA-CAM        yes" in shown
    assert f"4 layers: flow_cliff 0 to {checkpoint.num_layers}" in shown
    share = leave / (leave + 64)
    assert f"{share:6.1%}" in shown.splitlines()[-5], "cliff 0 saves the picture's KV bytes"


def test_what_states_need_is_said(
    checkpoint_of: Callable[[str], Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of("qwen3_5")
    assert main(["models", str(checkpoint.where), "--picture", "256x160"]) == 0
    shown = capsys.readouterr().out
    groups = (
        "2 storage groups of 4 layers, with keys in 1 of each and a state per request in the others"
    )
    assert groups in shown
    assert "40 tokens leave" in shown and "layers that keep states" in shown.splitlines()[-1]


def test_layers_whose_keys_differ_have_a_storage_group_each(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the engine's settings have it, where sixteen alike would be eight groups of two."""
    where = checkpoint_of("mimo_v2_omni").where
    config = json.loads((where / "config.json").read_text())
    for name in ("hybrid_layer_pattern", "moe_layer_freq"):
        config[name] *= 4
    config["num_hidden_layers"] *= 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = "configuration_mimo.py"
    (tmp_path / code).write_text((where / code).read_text())
    assert main(["models", str(tmp_path), "--trust-remote-code"]) == 0
    assert "16 storage groups of 1 layer," in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "leave", "stay"),
    [
        ("molmo_qwen2", 12, 8),
        ("ovis2", 16, 0),
        ("pixtral_mistral", 64, 8),
        ("kimi_k2_5", 8, 0),
        ("deepseek_vl2", 17, 0),
    ],
)
def test_so_it_does_where_that_is_code_or_mistrals(
    name: str,
    leave: int,
    stay: int,
    checkpoint_of: Callable[[str], Checkpoint],
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = checkpoint_of(name)
    height, width = checkpoint.sizes[0]
    picture_of = ("--picture", f"{width}x{height}", "--trust-remote-code")
    assert main(["models", str(checkpoint.where), *picture_of]) == 0
    shown = capsys.readouterr().out
    assert f"{leave} tokens leave at the cliff, {stay} around them stay" in shown


def test_the_doctor_names_the_backend_of_latent_attention(
    checkpoint_of: Callable[[str], Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    where = str(checkpoint_of("kimi_vl").where)
    assert main(["doctor", "--json", "--trust-remote-code", "--model", where]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    (said,) = [finding["text"] for finding in found if finding["topic"] == "attention"]
    assert said.startswith("CPU_MLA (head size 576")


@pytest.mark.parametrize("kind", ["kimi_k2_5"])
def test_an_evaluation_of_chunks_is_refused(
    kind: str, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    with pytest.raises(ModelError, match="modality of their own, which chats with a server carry"):
        read_facts(str(checkpoint_of(kind).where))


@pytest.mark.long
@pytest.mark.parametrize("command", [("models",), ("doctor", "--model")])
def test_what_vllm_logs_does_not_drown_it(
    command: tuple[str, ...], checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    """In a process of its own: vLLM reads the level when it is imported."""
    asked = [sys.executable, "-m", "vllm_flow.cli", *command, str(checkpoint_of("idefics3").where)]
    hidden = {key: value for key, value in os.environ.items() if key != "VLLM_LOGGING_LEVEL"}
    found = subprocess.run(asked, capture_output=True, text=True, env=hidden)
    assert found.returncode == 0
    assert "is supported" in found.stdout
    assert "INFO" not in found.stdout + found.stderr
    assert "WARNING" not in found.stdout + found.stderr


def test_what_is_refused_says_why(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of("idefics3")
    for file in checkpoint.where.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_text(file.read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["models", str(tmp_path)]) == 1
    assert "is of the type 'gemma'" in capsys.readouterr().err
