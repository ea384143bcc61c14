"""The first Step3-VL: layers whose queries come from a narrower vector and share one key, with experts behind a tower.

transformers has no class for it: its Llama, with such queries and experts in the place of its own, is the reference,
from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tests.families import step
from tests.families.making import (
    Checkpoint,
    drawn,
    linear,
    norm,
    text_settings,
    tokenizer,
    write_weights,
)

WIDTH, OUT, LAYERS = step.WIDTH, 96, 2
HEADS, HEAD, SHARED, EPSILON = 4, 32, 64, 0.01
EXPERTS, CHOSEN, INNER = 4, 2, 64
WITH_EXPERTS = (1, 2)
PUBLISHED = {
    "self_attn.q_proj.narrow.": "self_attn.q_proj.",
    "self_attn.q_proj.inter_norm.": "self_attn.inter_norm.",
    "self_attn.q_proj.wq.": "self_attn.wq.",
    "mlp.gate.": "moe.gate.",
    "mlp.experts_gate": "moe.gate_proj.weight",
    "mlp.experts_up": "moe.up_proj.weight",
    "mlp.experts_down": "moe.down_proj.weight",
    "mlp.share.": "share_expert.",
}
"""Part of a name of the reference's -> as the hub has it."""


class Query(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(hidden, SHARED, bias=False)
        self.inter_norm = LlamaRMSNorm(SHARED, EPSILON)
        self.wq = nn.Linear(SHARED, HEADS * HEAD, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.wq(self.inter_norm(self.narrow(hidden_states)))
        return found


class Experts(nn.Module):
    """The best by a softmax of all, and one that is shared."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts_gate = nn.Parameter(torch.empty(EXPERTS, INNER, hidden))
        self.experts_up = nn.Parameter(torch.empty(EXPERTS, INNER, hidden))
        self.experts_down = nn.Parameter(torch.empty(EXPERTS, hidden, INNER))
        self.share = LlamaMLP(hf.LlamaConfig(hidden_size=hidden, intermediate_size=INNER))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        best = self.gate(hidden_states).softmax(-1).topk(CHOSEN, -1)
        found: torch.Tensor = self.share(hidden_states)
        for expert in range(EXPERTS):
            weight = (best.values * (best.indices == expert)).sum(-1, keepdim=True)
            inner = nn.functional.silu(hidden_states @ self.experts_gate[expert].T)
            inner = inner * (hidden_states @ self.experts_up[expert].T)
            found = found + weight * (inner @ self.experts_down[expert].T)
        return found


def _tower(hidden: int) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, WIDTH),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, step.PATCH, step.PATCH),
        "vision_model.embeddings.patch_embedding.bias": (WIDTH,),
        "vision_model.embeddings.position_embedding.weight": (
            (step.SIDE // step.PATCH) ** 2 + 1,
            WIDTH,
        ),
        "vit_downsampler.weight": (OUT, WIDTH, 2, 2),
        "vit_downsampler.bias": (OUT,),
        "vit_downsampler2.weight": (2 * OUT, OUT, 3, 3),
        "vit_downsampler2.bias": (2 * OUT,),
        **linear("vit_large_projector", hidden, 2 * OUT, bias=False),
    }
    for layer in range(LAYERS):
        front = f"vision_model.transformer.layers.{layer}."
        shapes |= linear(f"{front}self_attn.qkv_proj", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{front}self_attn.out_proj", WIDTH, WIDTH)
        shapes |= norm(f"{front}layer_norm1", WIDTH) | norm(f"{front}layer_norm2", WIDTH)
        shapes |= linear(f"{front}mlp.fc1", step.FEED, WIDTH)
        shapes |= linear(f"{front}mlp.fc2", WIDTH, step.FEED)
    return drawn(shapes, 3)


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    weights = _tower(model.config.hidden_size)
    for name, value in model.state_dict().items():
        for part, published in PUBLISHED.items():
            name = name.replace(part, published)
        weights[name] = value
    write_weights(weights, where / "model.safetensors")
    text = dict(
        model_type="step3_text",
        architectures=["Step3TextForCausalLM"],
        hidden_size=model.config.hidden_size,
        intermediate_size=model.config.intermediate_size,
        num_attention_heads=HEADS,
        num_attention_groups=1,
        num_hidden_layers=model.config.num_hidden_layers,
        vocab_size=len(vocab),
        rms_norm_eps=EPSILON,
        moe_intermediate_size=INNER,
        moe_num_experts=EXPERTS,
        moe_top_k=CHOSEN,
        share_expert_dim=INNER,
        share_q_dim=SHARED,
        head_dim=HEAD,
        max_position_embedding=model.config.max_position_embeddings,
        moe_layers_enum=",".join(map(str, WITH_EXPERTS)),
        rope_theta=5000.0,
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    config = step.settings("Step3VLForConditionalGeneration", text, vocab) | dict(
        model_type="step3_vl",
        vision_config=dict(
            hidden_size=WIDTH,
            intermediate_size=step.FEED,
            output_hidden_size=OUT,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_channels=3,
            image_size=step.SIDE,
            patch_size=step.PATCH,
        ),
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    made.save_pretrained(where)


def step3_321b() -> Checkpoint:
    made, vocab = tokenizer(step.MARKS)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    own = dict(num_key_value_heads=1, head_dim=HEAD, rms_norm_eps=EPSILON, rope_parameters=rope)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**text_settings(vocab, **own)))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj = Query(model.config.hidden_size)
        if index in WITH_EXPERTS:
            layer.mlp = Experts(model.config)
    return Checkpoint(
        model=model,
        processor=None,
        vocab=vocab,
        image="<im_patch>",
        image_ids=(vocab["<im_patch>"],),
        sizes=((60, 120), (80, 80)),
        decoder=lambda model: model.model,
        write=partial(_write, made, vocab),
        shrunk={key: value for key, value in step.SHRUNK.items() if "Processor" in key},
    )
