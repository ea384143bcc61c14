"""Nemotron Nano V2 VL: Nemotron-H, whose layers are each Mamba 2, attention or a perceptron, behind C-RADIO.

transformers' language model is the reference, from the embeddings that vLLM made. Such a checkpoint brings its
configuration class as code; this one is ours.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers as hf
from torch import nn

from tests.families.making import (
    Checkpoint,
    drawn,
    linear,
    norm,
    text_settings,
    tokenizer,
    write_weights,
)

SIDE, PATCH, WIDTH, LAYERS = 128, 16, 64, 2
PATTERN = "M-M*M*-M"
WITH_EXPERTS = "MEM*M*EM"
REGISTERS = 4
Size: TypeAlias = tuple[int, int]
MARKS = ("<img>", "</img>", "<image>")
CONFIGURATION = """
from transformers import NemotronHConfig, PretrainedConfig


class NanoConfig(PretrainedConfig):
    model_type = "NemotronH_Nano_VL_V2"

    def __init__(self, vision_config=None, text_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = NemotronHConfig(**(text_config or {}))
        super().__init__(**others)
"""


def _tower(hidden: int) -> dict[str, torch.Tensor]:
    """C-RADIO and its projector, as vLLM reads them."""
    front, rows = "vision_model.radio_model.model.", (SIDE // PATCH) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        f"{front}patch_generator.embedder.weight": (WIDTH, 3 * PATCH**2),
        f"{front}patch_generator.pos_embed": (1, rows, WIDTH),
        f"{front}patch_generator.cls_token.token": (REGISTERS, WIDTH),
        "mlp1.0.weight": (4 * WIDTH,),
        **linear("mlp1.1", 2 * WIDTH, 4 * WIDTH, bias=False),
        **linear("mlp1.3", hidden, 2 * WIDTH, bias=False),
    }
    for layer in range(LAYERS):
        block = f"{front}blocks.{layer}."
        shapes |= norm(f"{block}norm1", WIDTH) | norm(f"{block}norm2", WIDTH)
        shapes |= linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{block}attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}mlp.fc1", 2 * WIDTH, WIDTH)
        shapes |= linear(f"{block}mlp.fc2", WIDTH, 2 * WIDTH)
    return drawn(shapes, 3)


def _language(model: Any) -> dict[str, torch.Tensor]:
    """Of the language model, under the hub's names: an expert's matrices are two."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        inner = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        if ".experts." not in name:
            found[f"language_model.{inner}"] = value
            continue
        front, matrix = inner.rsplit(".", 1)
        for number, weight in enumerate(value):
            found[f"language_model.{front}.{number}.{matrix}.weight"] = weight
    return found


def _write(made: Any, own: dict[str, Any], args: dict[str, Any], model: Any, where: Path) -> None:
    """``own`` and ``args``: what else the configuration, and its tower's, say."""
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.tensor([0.2, -0.1, 0.1, 0.0]))
    weights = _tower(model.config.hidden_size) | _language(model)
    write_weights(weights, where / "model.safetensors")
    text = model.config.to_dict() | {"architectures": ["NemotronHForCausalLM"], "dtype": "float32"}
    config = dict(
        architectures=["NemotronH_Nano_VL_V2"],
        model_type="NemotronH_Nano_VL_V2",
        auto_map={"AutoConfig": "configuration_nano.NanoConfig"},
        torch_dtype="float32",
        text_config=text,
        vision_config=dict(
            args=dict(
                model="vit_small_patch16_224",
                cpe_max_size=SIDE,
                register_multiple=REGISTERS,
                teachers=[{"name": "one"}],
                cls_token_per_teacher=True,
                **args,
            ),
            patch_size=PATCH,
            preferred_resolution=[SIDE, SIDE],
        ),
        force_image_size=SIDE,
        patch_size=PATCH,
        downsample_ratio=0.5,
        ps_version="v2",
        template="none",
        image_tag_type="internal",
        use_thumbnail=True,
        vit_hidden_size=WIDTH,
        projector_hidden_size=2 * WIDTH,
        norm_mean=[0.5, 0.5, 0.5],
        norm_std=[0.5, 0.5, 0.5],
    )
    config |= own
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_nano.py").write_text(CONFIGURATION)
    made.save_pretrained(where)


def _small(made: Any) -> Any:
    """C-RADIO's configuration; its sizes go by a name, of which vLLM knows four."""

    def build(**settings: Any) -> Any:
        config = made(**settings)
        config.hidden_size, config.intermediate_size = WIDTH, 2 * WIDTH
        config.num_hidden_layers, config.num_attention_heads = LAYERS, 2
        return config

    return build


def _in_float32(model: Any) -> Any:
    """vLLM's model; what its tower gives is bfloat16 whatever the projector is."""

    class InFloat32(model):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.mlp1.register_forward_pre_hook(lambda _, args: (args[0].float(),))

    return InFloat32


class Matrices(nn.Module):
    """A perceptron without a gate, and without biases."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(self.up_proj(rows).relu().square())
        return found


class Experts(nn.Module):
    """In the place of vLLM's experts, which have a gate wherever it runs them on a CPU; one group of them."""

    def __init__(self, config: Any, **_settings: Any) -> None:
        super().__init__()
        number, hidden = config.n_routed_experts, config.hidden_size
        self.gate = nn.Linear(hidden, number, bias=False)
        self.gate.e_score_correction_bias = nn.Parameter(torch.empty(number))
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList([Matrices(hidden, inner) for _ in range(number)])
        self.shared_experts = Matrices(hidden, config.moe_shared_expert_intermediate_size)
        self.chosen, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.n_logical_experts = self.n_physical_experts = self.n_routed_experts = number
        self.n_local_physical_experts, self.n_redundant_experts = number, 0
        self.n_shared_experts = config.n_shared_experts

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        scores = self.gate(rows).sigmoid()
        best = (scores + self.gate.e_score_correction_bias).topk(self.chosen, -1).indices
        weights = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
        weights = self.scale * weights / weights.sum(-1, keepdim=True)
        parts = [weights[:, [i]] * expert(rows) for i, expert in enumerate(self.experts)]
        return sum(parts, self.shared_experts(rows))


def nemotron_nano_v2_vl() -> Checkpoint:
    return _nemotron(PATTERN, {}, {}, ((SIDE, 2 * SIDE), (SIDE, SIDE)))


def nemotron_3_omni() -> Checkpoint:
    """Experts, and pictures of their own size."""
    own = {"architectures": ["NemotronH_Nano_Omni_Reasoning_V3"]}
    patches = dict(min_num_patches=4, max_num_patches=512)
    return _nemotron(WITH_EXPERTS, own, patches, ((96, 160), (160, 96)))


def _nemotron(
    pattern: str, own: dict[str, Any], args: dict[str, Any], sizes: tuple[Size, Size]
) -> Checkpoint:
    made, vocab = tokenizer(MARKS)
    text = text_settings(
        vocab,
        head_dim=32,
        hybrid_override_pattern=pattern,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=2,
        conv_kernel=4,
        chunk_size=16,
        layer_norm_epsilon=0.01,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        routed_scaling_factor=1.5,
    )
    text.pop("num_hidden_layers")
    return Checkpoint(
        model=hf.NemotronHForCausalLM(hf.NemotronHConfig(**text)),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=sizes,
        decoder=lambda model: model.model,
        options={"trust_remote_code": True, "limit_mm_per_prompt": {"image": 2, "video": 0}},
        write=partial(_write, made, own, args),
        shrunk={
            "nano_nemotron_vl.RadioConfig": _small,
            "nano_nemotron_vl.NemotronH_Nano_VL_V2": _in_float32,
            "nemotron_h.NemotronHMoE": lambda _: Experts,
        },
        recurrent=True,
    )
