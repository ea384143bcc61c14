"""What is profiled of which family: tokens of a picture, the decoder's shape, and whom it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families.checkpoints import build
from vllm_flow.cli import main
from vllm_flow.profile.shape import LlavaShape, write_folder
from vllm_flow.profile.subject import PICTURE, subject_of


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def test_a_llava_is_read_from_its_config(tmp_path: Path) -> None:
    folder = write_folder(LlavaShape.parse("layers=3,image_tokens=64"), tmp_path, "float32")
    subject = subject_of(str(folder), "float32")
    assert (subject.picture, subject.image_tokens) == ((112, 112), 64)
    assert subject.shape.tower is not None and subject.shape.tower.tokens == 64
    assert subject_of(str(folder), "float32", (50, 70)).picture == (50, 70)
    with pytest.raises(ValueError, match="65 image tokens: one image has 64"):
        subject.images_of(65)


def test_another_familys_pictures_are_what_its_processor_makes_of_them(checkpoints: Path) -> None:
    model = build("qwen2_5_vl", checkpoints)
    subject = subject_of(str(model.where), "float32", (224, 140))
    assert subject.image_tokens == (224 // 28) * (140 // 28)
    text = model.model.config.text_config
    shape = subject.shape
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.mlp) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.intermediate_size,
    )
    assert shape.tower is None and shape.value_bytes == 4
    assert subject_of(str(model.where), "float32").picture == PICTURE


def test_whom_it_cannot_is_told(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a mixture of experts, whose FLOPs are not counted"):
        subject_of(str(build("qwen3_vl_moe", checkpoints).where), "float32")
    with pytest.raises(ValueError, match="has sliding windows, whose costs are not counted"):
        subject_of(str(build("cohere2_vision", checkpoints).where), "float32")
    with pytest.raises(ValueError, match="has layers that keep states, whose costs"):
        subject_of(str(build("qwen3_5", checkpoints).where), "float32")
    with pytest.raises(ValueError, match="no model at"):
        subject_of(str(tmp_path / "nothing"), "float32")
    folder = build("qwen2_5_vl", checkpoints).where
    config = json.loads((folder / "config.json").read_text())["text_config"]
    text = tmp_path / "text"
    text.mkdir()
    for file in folder.iterdir():
        (text / file.name).write_bytes(file.read_bytes())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config.pop("rope_parameters", None)
    (text / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="takes no pictures; profile a vision-language model"):
        subject_of(str(text), "float32")


@pytest.mark.long
def test_another_family_is_profiled(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pictures of 40 tokens each; blocks are counted in the engine and as predicted, whichever words are drawn."""
    model = build("qwen2_5_vl", checkpoints).where
    line = (
        f"profile --model {model} --load-format dummy --picture 224x140 --image-tokens 80 --dtype float32 "
        "--output-tokens 8 --parts prefill,load --concurrency 2 --requests 4 --rounds 1 --batch 2 --block-size 32 "
        f"--kv-cache-gib 0.02 --policies baseline,cliff=2 --out {tmp_path}"
    )
    assert main(line.split()) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["workload"]["image_tokens"] == 80 and found["workload"]["images"] == 2
    assert all(row["blocks_exact"] for row in found["load"])
    assert "without the vision tower" in capsys.readouterr().out
