"""Cosmos3: Qwen3-VL, in a checkpoint that holds what generates pictures beside it, under other names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file

from tests.families import qwen
from tests.families.making import Checkpoint

RENAMED = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}


def _published(name: str) -> str:
    name = name.removeprefix("model.").removeprefix("language_model.").removeprefix("visual.")
    return re.sub(r"(?<=self_attn\.)\w+", lambda found: RENAMED[found[0]], name)


def _write(processor: Any, model: Any, where: Path) -> None:
    parts: dict[str, dict[str, torch.Tensor]] = {"transformer": {}, "vision_encoder": {}}
    for name, value in model.state_dict().items():
        part = "vision_encoder" if ".visual." in name else "transformer"
        parts[part][_published(name)] = value.detach().contiguous().clone()
    parts["transformer"]["time_embedder.weight"] = torch.zeros(2)  # of what generates
    for part, weights in parts.items():
        (where / part).mkdir()
        save_file(weights, where / part / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["Cosmos3ForConditionalGeneration"]}
    config |= {"torch_dtype": "float32"}
    (where / "config.json").write_text(json.dumps(config, indent=1))
    processor.save_pretrained(where)


def cosmos3() -> Checkpoint:
    made = qwen.qwen3_vl()
    own = made.model.config
    config = hf.Cosmos3OmniConfig(
        text_config=own.text_config,
        vision_config=own.vision_config,
        image_token_id=own.image_token_id,
        video_token_id=own.video_token_id,
        vision_start_token_id=own.vision_start_token_id,
        vision_end_token_id=own.vision_end_token_id,
    )
    return replace(
        made,
        model=hf.Cosmos3OmniForConditionalGeneration(config),
        write=partial(_write, made.processor),
    )
