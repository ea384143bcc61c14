"""Shikra, and the first LLaVA: a CLIP tower, one linear layer as projector, 256 tokens per picture.

Stands on vLLM's LLaVA (``vllm/model_executor/models/llava.py``), in the hub's LLaVA layout with
``multi_modal_projector.linear``; the published delta is turned into that by
``vllm_flow/models/shikra_convert.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_flow.models import replace_tower_part


class LinearProjector(nn.Module):
    """Patch features [P, W] -> embeddings [P, H]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class ShikraForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with the one linear layer in the place of its two."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return "<im_start><im_patch><im_end>"
        raise ValueError("Shikra takes pictures only")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: Any = vllm_config.model_config.hf_config
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        replace_tower_part(self, "multi_modal_projector", lambda: LinearProjector(width, hidden))
