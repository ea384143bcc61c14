"""Qwen-VL, the first one: a ViT of 448 pixels a side, 256 tokens a picture by cross-attention, Qwen's decoder.

vLLM served it until version 0.23. Its decoder computes what Qwen2's does (RMS norms, biases on queries,
keys and values, SwiGLU, rotary embedding), so it is vLLM's Qwen2 with the published names mapped:
``mlp.w2`` is the gate and ``mlp.w1`` what it gates. What the published code does past the length it was
trained on is not done: ``qwen_vl_config.check`` refuses such lengths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_flow.models.qwen_vl_config import QwenVLConfig, check
from vllm_flow.models.qwen_vl_processing import (
    QwenVLDummyInputs,
    QwenVLMultiModalProcessor,
    QwenVLProcessingInfo,
)
from vllm_flow.models.qwen_vl_tower import QwenVLTower

LAYER_NAMES = {
    "ln_1": "input_layernorm",
    "attn.c_attn": "self_attn.qkv_proj",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
"""Published names within a layer -> Qwen2's."""

NAMES = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^transformer\.wte\.": "language_model.model.embed_tokens.",
    r"^transformer\.ln_f\.": "language_model.model.norm.",
    r"^transformer\.visual\.": "visual.",
    **{
        rf"^transformer\.h\.(\d+)\.{re.escape(theirs)}\.": rf"language_model.model.layers.\1.{ours}."
        for theirs, ours in LAYER_NAMES.items()
    },
}


@MULTIMODAL_REGISTRY.register_processor(
    QwenVLMultiModalProcessor, info=QwenVLProcessingInfo, dummy_inputs=QwenVLDummyInputs
)
class QwenVLForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """Qwen-VL and Qwen-VL-Chat.

    Raises:
        ValueError: the model, or its ``--max-model-len``, cannot be served.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={re.compile(theirs): ours for theirs, ours in NAMES.items()}
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return f"Picture {i}: <img></img>"
        raise ValueError("Qwen-VL takes pictures only")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: QwenVLConfig = vllm_config.model_config.hf_config
        check(config, vllm_config.model_config.max_model_len)
        assert config.visual is not None
        self.config = config
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self.visual = QwenVLTower(**config.visual)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings of the pictures, ``n_queries`` x H each."""
        if kwargs.get("image_embeds") is not None:
            return kwargs["image_embeds"]
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return []
        return self.visual(pixels if torch.is_tensor(pixels) else torch.stack(pixels))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states of the last layer, T x H, or what the next pipeline stage needs."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
