"""OpenCUA: Qwen2 behind Qwen2.5-VL's tower, with positions that count every token.

transformers has both and no class for the layout: the language model alone is the reference, from the embeddings
that vLLM made. Such a checkpoint brings its configuration class; this one is ours.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from tests.families.making import Checkpoint, fill, text_settings, tokenizer, write_weights

IMAGE = "<|media_placeholder|>"
TOWER = dict(
    depth=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=2,
    out_hidden_size=128,
    window_size=112,
    fullatt_block_indexes=[1],
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
)
CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig


class OpenCUAConfig(PretrainedConfig):
    model_type = "opencua"

    def __init__(self, vision_config=None, text_config=None, **others):
        self.vision_config = Qwen2_5_VLVisionConfig(**(vision_config or {}))
        self.text_config = Qwen2Config(**(text_config or {}))
        super().__init__(**others)
"""


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    tower = Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VisionTransformerPretrainedModel.config_class(**TOWER)
    )
    fill(tower, 3)
    weights = {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}
    weights |= model.state_dict()
    write_weights(weights, where / "model.safetensors")
    text = model.config.to_dict() | {"torch_dtype": "float32"}
    text.pop("dtype", None)
    config = dict(
        architectures=["OpenCUAForConditionalGeneration"],
        model_type="opencua",
        auto_map={"AutoConfig": "configuration_opencua.OpenCUAConfig"},
        text_config=text,
        vision_config=TOWER,
        media_placeholder_token_id=vocab[IMAGE],
        torch_dtype="float32",
        tie_word_embeddings=False,
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_opencua.py").write_text(CONFIGURATION)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    images = dict(patch_size=14, temporal_patch_size=2, merge_size=2, size=size)
    (where / "preprocessor_config.json").write_text(json.dumps(images, indent=1))
    made.save_pretrained(where)


def _with_all_parts(processor: Any) -> Any:
    """vLLM 0.32's processor, of which transformers 5 takes the tokenizer alone for a part."""

    class WithAllParts(processor):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer", "video_processor"]

    return WithAllParts


def opencua() -> Checkpoint:
    marks = ("<|media_begin|>", "<|media_end|>", IMAGE, "<|image_pad|>", "<|video_pad|>")
    made, vocab = tokenizer(marks)
    return Checkpoint(
        model=hf.Qwen2ForCausalLM(
            hf.Qwen2Config(architectures=["Qwen2ForCausalLM"], **text_settings(vocab))
        ),
        processor=None,
        vocab=vocab,
        image=f"<|media_begin|>{IMAGE}<|media_end|>",
        image_ids=(vocab[IMAGE],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, vocab),
        shrunk={"opencua.OpenCUAProcessor": _with_all_parts},
    )
