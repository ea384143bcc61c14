"""DeepSeek's language models in small: with latent attention and without, dense layers and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as ocr2

from tests.families.making import text_settings

LATENT = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=16, v_head_dim=16)
"""Of one head; what is stored per token is of the one size that vLLM's kernels on a CPU are compiled for."""
EXPERTS = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
)
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})

ON_CPU: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""vLLM 0.32's operator for CPUs takes the heads of a query for tokens where they are not contiguous."""


def v3(vocab: Mapping[str, int], **changes: Any) -> hf.DeepseekV3Config:
    """DeepSeek-V3: experts by a sigmoid, among groups, with a bias of their own."""
    own = dict(
        q_lora_rank=None,
        num_key_value_heads=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
    )
    settings = text_settings(vocab, **(LATENT | EXPERTS | ROPE | own | changes))
    return hf.DeepseekV3Config(**settings)


def v2(vocab: Mapping[str, int]) -> hf.DeepseekV2Config:
    """DeepSeek-V2: experts by a softmax."""
    own = dict(q_lora_rank=None, num_key_value_heads=4, n_group=1, topk_group=1)
    settings = text_settings(vocab, **(LATENT | EXPERTS | ROPE | own))
    return hf.DeepseekV2Config(**settings, topk_method="greedy", routed_scaling_factor=1.5)


class Plain(ocr2.DeepseekOcr2TextPreTrainedModel):
    """DeepSeek-V2's experts behind keys and values of each head; transformers has its layers alone."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        experts = {
            name: value for name, value in EXPERTS.items() if name != "first_k_dense_replace"
        }
        settings = text_settings(vocab, **(experts | ROPE), n_group=1, topk_group=1)
        kinds = ["dense", *["sparse"] * (settings["num_hidden_layers"] - 1)]
        super().__init__(ocr2.DeepseekOcr2TextConfig(**settings, mlp_layer_types=kinds))
        self.model = ocr2.DeepseekOcr2TextModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, len(vocab), bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def settings_of(model: Any) -> dict[str, Any]:
    """The language model's configuration as published, with what transformers takes for granted of V3."""
    found: dict[str, Any] = model.config.to_dict()
    found.pop("dtype", None)
    if model.config.model_type == "deepseek_v3":
        found |= dict(topk_method="noaux_tc", scoring_func="sigmoid")
    if isinstance(model, Plain):
        found |= dict(model_type="deepseek_v2", first_k_dense_replace=1, use_mla=False)
        found |= dict(kv_lora_rank=None, q_lora_rank=None)
        found |= dict(qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0)
    return found | dict(architectures=["DeepseekV2ForCausalLM"], moe_layer_freq=1)


def published(model: Any) -> dict[str, torch.Tensor]:
    """The language model's weights as published: a matrix per expert."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        if ".experts." not in name:
            found[name] = value
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(value):
            parts = {"down_proj": matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            found |= {f"{prefix}.{expert}.{part}.weight": one for part, one in parts.items()}
    return found
