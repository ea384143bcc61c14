"""Writes a LLaVA checkpoint directory that both transformers and vLLM load. Knows no cache.

Weights take the hub's older LLaVA names (``language_model.model.*``, ``vision_tower.vision_model.*``,
``multi_modal_projector.*``): transformers 5 converts them while loading, vLLM 0.32 expects them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_flow.demo_model.prompt import ANSWER_END, CHAT_TEMPLATE, IMAGE_TOKEN, IMAGE_TOKEN_ID
from vllm_flow.demo_model.vision import (
    FEATURE_LAYER,
    PIXEL_MEAN,
    PIXEL_STD,
    TOWER_CONFIG,
)

Tensors = Mapping[str, torch.Tensor]


def merge_lora(weights: Tensors, adapters: Tensors, alpha: int) -> dict[str, torch.Tensor]:
    """Decoder weights with W + (alpha / r) B A in place of each adapted W; float32.

    Summed in float64, so that the rounded result does not depend on the machine's BLAS.
    """
    merged = dict(weights)
    for name, a in adapters.items():
        if not name.endswith(".lora_a"):
            continue
        stem = name.removesuffix(".lora_a")
        b = adapters[f"{stem}.lora_b"].double()
        update = (b @ a.double()) * (alpha / a.shape[0])
        merged[f"{stem}.weight"] = (weights[f"{stem}.weight"].double() + update).float()
    return merged


def llava_weights(tower: Tensors, projector: Tensors, decoder: Tensors) -> dict[str, torch.Tensor]:
    """All tensors in bfloat16 under the hub's names; the output head is tied and left out."""
    named = {
        f"vision_tower.vision_model.{k.removeprefix('vision_model.')}": v for k, v in tower.items()
    }
    named |= {f"multi_modal_projector.{k}": v for k, v in projector.items()}
    named |= {f"language_model.model.{k}": v for k, v in decoder.items()}
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in named.items()}


def llava_config(
    text_config: Mapping[str, Any], tower: Mapping[str, Any] = TOWER_CONFIG
) -> dict[str, Any]:
    """The checkpoint's ``config.json``."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "bfloat16",
        "image_token_index": IMAGE_TOKEN_ID,
        "image_seq_length": (tower["image_size"] // tower["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "text_config": {**text_config, "dtype": "bfloat16"},
        "vision_config": {**tower, "dtype": "bfloat16"},
    }


def _processor_files(context: int, tower: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    size = tower["image_size"]
    return {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(PIXEL_MEAN),
            "image_std": list(PIXEL_STD),
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": tower["patch_size"],
            "vision_feature_select_strategy": "default",
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "bos_token": "<|im_start|>",
            "eos_token": ANSWER_END,
            "pad_token": ANSWER_END,
            "unk_token": "<|endoftext|>",
            "image_token": IMAGE_TOKEN,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
            "model_max_length": context,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "do_sample": False,
        },
    }


def write_checkpoint(
    folder: Path,
    weights: Tensors,
    text_config: Mapping[str, Any],
    tokenizer: Any,
    tower: Mapping[str, Any] = TOWER_CONFIG,
) -> None:
    """Write every file of the checkpoint into an existing, empty ``folder``."""
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    files = {
        "config.json": llava_config(text_config, tower),
        **_processor_files(text_config["max_position_embeddings"], tower),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
