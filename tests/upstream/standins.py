"""The hub models that vLLM's tests name, as far as they look: configurations, a tokenizer, a processor.

Written in the form of the hub's cache, where transformers and vLLM find them offline. No weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen3Config,
)

from tests.word_tokenizer import word_tokenizer

REVISION = "0" * 40
IMAGE = "<image>"
QWEN_VISION = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")


def write_hub(home: Path) -> None:
    """Write every stand-in under ``home``, a folder for ``HF_HOME``."""
    _write(home, "facebook/opt-125m", OPTConfig(), "OPTForCausalLM")
    larger = OPTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=512
    )
    _write(home, "facebook/opt-350m", larger, "OPTForCausalLM")
    _write(home, "Qwen/Qwen1.5-7B", Qwen2Config(), "Qwen2ForCausalLM")
    _write(home, "Qwen/Qwen3-0.6B", Qwen3Config(num_hidden_layers=28), "Qwen3ForCausalLM")
    _write_llava(_write(home, "llava-hf/llava-1.5-7b-hf", *_llava()))
    _write_qwen_vl(_write(home, "Qwen/Qwen2.5-VL-3B-Instruct", *_qwen_vl()))


def _write(home: Path, name: str, config: PretrainedConfig, architecture: str) -> Path:
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    where = model / "snapshots" / REVISION
    where.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(REVISION)
    config.architectures = [architecture]
    config.dtype = "float16"
    config.save_pretrained(where)
    return where


def _llava() -> tuple[PretrainedConfig, str]:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=32000, image_seq_length=576
    )
    return config, "LlavaForConditionalGeneration"


def _write_llava(where: Path) -> None:
    _write_tokenizer(where, {IMAGE: 32000}, {"image_token": IMAGE})
    CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ).save_pretrained(where)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    (where / "processor_config.json").write_text(json.dumps(processor))


def _qwen_vl() -> tuple[PretrainedConfig, str]:
    first = 151652
    config = Qwen2_5_VLConfig(
        text_config={"num_hidden_layers": 36, "vocab_size": 151936},
        vision_start_token_id=first,
        image_token_id=first + 1,
        video_token_id=first + 2,
        vision_end_token_id=first + 3,
    )
    return config, "Qwen2_5_VLForConditionalGeneration"


def _write_qwen_vl(where: Path) -> None:
    ids = {token: 151652 + i for i, token in enumerate(QWEN_VISION)}
    _write_tokenizer(where, ids, {"image_token": QWEN_VISION[1], "video_token": QWEN_VISION[2]})
    Qwen2VLImageProcessor().save_pretrained(where)


def _write_tokenizer(where: Path, special: dict[str, int], named: dict[str, Any]) -> None:
    """A tokenizer of a few words, with the special tokens under the ids that the model's own has."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **special}
    word_tokenizer(vocab, special, named).save_pretrained(where)
