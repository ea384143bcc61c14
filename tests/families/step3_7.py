"""Step-3.7: Step3-VL's tower in front of Step-3.5: experts, windows, more heads there, a norm with the logits.

transformers' language model is the reference, from the embeddings that vLLM made. Such a checkpoint brings its
configuration class; this one is ours.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.families import step
from tests.families.making import MAX_POSITIONS, Checkpoint, tokenizer, write_weights

SEEN, HEADS, GROUPS, HEAD = 24, 4, 2, 32
"""How many tokens a layer with a window sees, the row's own included: fewer than a picture has."""
ONE_GROUP = dict(use_grouped_topk=True, num_expert_group=1, topk_group=1)
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CONFIGURATION = """
from transformers import PretrainedConfig
from vllm.transformers_utils.configs.step3p5 import Step3p5Config


class Step37Config(PretrainedConfig):
    model_type = "step3p7"

    def __init__(self, vision_config=None, text_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = Step3p5Config(**(text_config or {}))
        super().__init__(**others)
"""


def _text(vocab: dict[str, int]) -> dict[str, Any]:
    """As the hub has it; transformers takes it, too."""
    return dict(
        model_type="step3p5",
        architectures=["Step3p5ForCausalLM"],
        vocab_size=len(vocab),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(TYPES),
        num_attention_heads=HEADS,
        num_attention_groups=GROUPS,
        head_dim=HEAD,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        layer_types=TYPES,
        sliding_window=SEEN,
        attention_other_setting=dict(
            attention_type="sliding_attention",
            num_attention_heads=2 * HEADS,
            num_attention_groups=GROUPS,
            head_dim=HEAD,
        ),
        use_head_wise_attn_gate=True,
        rope_theta=[5000.0, 10000.0, 10000.0, 5000.0],
        partial_rotary_factors=[0.5, 1.0, 1.0, 0.5],
        use_moe=True,
        moe_layers_enum="1,2,3",
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=64,
        share_expert_dim=64,
        moe_router_activation="sigmoid",
        moe_router_scaling_factor=1.5,
        use_moe_router_bias=True,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def _published(name: str) -> str:
    name = name.replace("model.language_model.", "model.")
    return re.sub(r"mlp\.shared_experts\.", "share_expert.", name)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Of the language model, under the hub's names."""
    found = {}
    for name, value in model.state_dict().items():
        if not name.startswith(("model.language_model.", "lm_head.")):
            continue
        name = _published(name)
        layer = name.rsplit(".mlp.", 1)[0]
        if name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, 1)
            found[f"{layer}.moe.gate_proj.weight"] = gate
            found[f"{layer}.moe.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            found[f"{layer}.moe.down_proj.weight"] = value
        elif name.endswith("mlp.gate.weight"):
            found[f"{layer}.moe.gate.weight"] = value
        elif name.endswith("e_score_correction_bias"):
            found[f"{layer}.moe.router_bias"] = value
        else:
            found[name] = value
    return found


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.tensor([0.2, -0.1, 0.1, 0.0]))
    weights = _weights(model) | step.tower(model.config.text_config.hidden_size)
    write_weights(weights, where / "model.safetensors")
    text = _text(vocab) | {"torch_dtype": "float32"}
    config = step.settings("Step3p7ForConditionalGeneration", text, vocab) | dict(
        model_type="step3p7", auto_map={"AutoConfig": "configuration_step3_7.Step37Config"}
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_step3_7.py").write_text(CONFIGURATION)
    made.save_pretrained(where)


def step3_7() -> Checkpoint:
    made, vocab = tokenizer(step.MARKS)
    config = hf.Step3p7Config(
        text_config=_text(vocab),
        vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1),
        image_token_id=vocab["<im_patch>"],
    )
    return Checkpoint(
        model=hf.Step3p7ForConditionalGeneration(config),
        processor=None,
        vocab=vocab,
        image="<im_patch>",
        image_ids=(vocab["<im_patch>"],),
        sizes=((60, 120), (80, 80)),
        decoder=lambda model: model.model.language_model,
        options={"trust_remote_code": True},
        write=partial(_write, made, vocab),
        # On a CPU vLLM 0.32 routes by a sigmoid among groups alone: one group is none.
        shrunk=step.SHRUNK | {"step3p5.FusedMoEFactory": lambda made: partial(made, **ONE_GROUP)},
        unit_offset=True,
        windows={layer: SEEN for layer, kind in enumerate(TYPES) if kind == "sliding_attention"},
    )
