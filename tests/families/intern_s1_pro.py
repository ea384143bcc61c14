"""Intern-S1-Pro: Qwen3-VL with experts, without M-RoPE and without features from deeper tower layers.

Queries and keys are turned by Fourier series of their positions (FoPE), and the best experts are chosen group by group.
transformers has no class for it: its Qwen3-VL is the reference, with such an embedding and such routers in the place of
its own. The checkpoint brings its configuration class as code; this one is ours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextRMSNorm,
    Qwen3VLMoeTextTopKRouter,
    rotate_half,
)

from tests.families import qwen
from tests.families.making import MAX_POSITIONS, Checkpoint, matrix_per_expert, write_weights

HEAD, KEY_HEADS, THETA = 32, 2, 10000.0
EXPERTS, CHOSEN, GROUPS = 8, 4, 2
SERIES = dict(fope_init_factor=0.5, fope_sep_head=True)
CONFIGURATION = """
from transformers import PretrainedConfig
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig


class InternS1ProTextConfig(Qwen3VLMoeTextConfig):
    model_type = "interns1_pro_text"
    ignore_keys_at_rope_validation = {"fope_init_factor", "fope_sep_head"}


class InternS1ProVisionConfig(PretrainedConfig):
    model_type = "interns1_pro_vision"


class InternS1ProConfig(PretrainedConfig):
    model_type = "interns1_pro"
    sub_configs = {"text_config": InternS1ProTextConfig, "vision_config": InternS1ProVisionConfig}

    def __init__(self, text_config=None, vision_config=None, **others):
        self.text_config = InternS1ProTextConfig(**(text_config or {}))
        self.vision_config = InternS1ProVisionConfig(**(vision_config or {}))
        super().__init__(**others)
"""


class Series(nn.Module):
    """Cosines and sines of a position, mixed per key head; where a turn is longer than any prompt, ones."""

    def __init__(self) -> None:
        super().__init__()
        turns = 1 / THETA ** (torch.arange(0, HEAD, 2) / HEAD)
        self.turns_F = turns[turns > 2 * torch.pi / MAX_POSITIONS]
        shape = KEY_HEADS, len(self.turns_F), len(self.turns_F)
        self.cos_coef, self.sin_coef = (nn.Parameter(torch.empty(shape)) for _ in range(2))
        self.now: tuple[torch.Tensor, torch.Tensor]
        """Cosines and sines [1, T, key heads, 1, D] of the forward that runs."""

    def forward(
        self, hidden_1TH: torch.Tensor, _positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What turns nothing, for layers in which :class:`Turned` has done so."""
        angles_TF = torch.arange(hidden_1TH.shape[1])[:, None] * self.turns_F
        parts = []
        for waves_TF, mix_KFF in (
            (angles_TF.cos(), self.cos_coef),
            (angles_TF.sin(), self.sin_coef),
        ):
            mixed_TKF = torch.einsum("tf,kfg->tkg", waves_TF, mix_KFF)
            half = nn.functional.pad(mixed_TKF, (0, HEAD // 2 - mixed_TKF.shape[-1]), value=1.0)
            parts.append(torch.cat([half, half], -1)[None, :, :, None])
        self.now = parts[0], parts[1]
        still_1TD = hidden_1TH.new_ones(1, hidden_1TH.shape[1], HEAD)
        return still_1TD, torch.zeros_like(still_1TD)


class Turned(Qwen3VLMoeTextRMSNorm):
    """The norm of queries or keys, and behind it their turn."""

    def __init__(self, series: Series, eps: float) -> None:
        super().__init__(HEAD, eps)
        self._now = lambda: series.now  # no part of this module: its weights have one name

    def forward(self, heads_1TND: torch.Tensor) -> torch.Tensor:
        cos, sin = self._now()
        grouped = super().forward(heads_1TND).unflatten(2, (KEY_HEADS, -1))
        return (grouped * cos + rotate_half(grouped) * sin).flatten(2, 3)


class Router(Qwen3VLMoeTextTopKRouter):
    """As many experts of each group, weighted by what all of them together have."""

    def forward(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_TE = nn.functional.linear(hidden_TH, self.weight)
        best = logits_TE.softmax(-1).unflatten(-1, (GROUPS, -1)).topk(self.top_k // GROUPS, -1)
        first_G1 = torch.arange(GROUPS)[:, None] * (EXPERTS // GROUPS)
        weights = best.values.flatten(1)
        return (
            logits_TE,
            weights / weights.sum(-1, keepdim=True),
            (best.indices + first_G1).flatten(1),
        )


def _write(processor: Any, model: Any, where: Path) -> None:
    series = model.model.language_model.rotary_emb
    for mix in (series.cos_coef, series.sin_coef):  # little beside the position's own wave
        mix.data.copy_(torch.eye(mix.shape[-1]) + mix)
    write_weights(matrix_per_expert(model), where / "model.safetensors")
    processor.save_pretrained(where)
    own = model.config.to_dict()
    text = own["text_config"] | dict(
        model_type="interns1_pro_text",
        router_n_groups=GROUPS,
        rope_parameters=dict(rope_type="default", rope_theta=THETA, **SERIES),
    )
    vision = own["vision_config"] | {"model_type": "interns1_pro_vision"}
    vision.pop("deepstack_visual_indexes")
    config = own | dict(
        architectures=["InternS1ProForConditionalGeneration"],
        model_type="interns1_pro",
        auto_map={"AutoConfig": "configuration_interns1_pro.InternS1ProConfig"},
        torch_dtype="float32",
        text_config=text,
        vision_config=vision,
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_interns1_pro.py").write_text(CONFIGURATION)


def _told(model: Any) -> Any:
    """vLLM's model; it asks itself for its configuration before it has been told."""

    class Told(model):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            self.model_config = vllm_config.model_config
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    return Told


def interns1_pro() -> Checkpoint:
    made = qwen.qwen3_vl_moe(
        {"deepstack_visual_indexes": []}, num_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    text = made.model.model.language_model
    text.rotary_emb = series = Series()
    for layer in text.layers:
        attention = layer.self_attn
        attention.q_norm, attention.k_norm = (
            Turned(series, norm.variance_epsilon) for norm in (attention.q_norm, attention.k_norm)
        )
        layer.mlp.gate = Router(text.config)
    return replace(
        made,
        experts_transposed=False,
        options={"trust_remote_code": True},
        write=partial(_write, made.processor),
        shrunk={"interns1_pro.InternS1ProForConditionalGeneration": _told},
    )
