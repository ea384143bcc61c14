"""Cosmos3-Edge: Nemotron-H without states, so that attention and perceptron are a layer each.

transformers' language model is the reference, from the embeddings that vLLM made; its layers are parted as vLLM's are.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from tests.families.making import Checkpoint, drawn, linear, norm, text_settings, tokenizer
from tests.families.qwen import SPECIALS

LAYERS, HEAD, EPSILON = 4, 32, 0.01
WIDTH, FEED, PATCH, SIDE, TOWER, PROJECTED = 64, 128, 16, 8, 2, 96
"""Of the tower: numbers of a patch, of its perceptron, pixels and patches of a side, layers, and of the projector."""
RENAMED = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out",
    "fc1": "up_proj",
    "fc2": "down_proj",
}


class Attending(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)
        return hidden_states + attended


class Perceptron(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _published(name: str) -> str:
    """Attention and perceptron are one layer there."""
    parts = name.removeprefix("model.").removeprefix("language_model.").split(".")
    if parts[0] == "layers":
        parts[1] = str(int(parts[1]) // 2)
    return ".".join(RENAMED.get(part, part) for part in parts)


def _tower(hidden: int) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        **linear("model.visual.embeddings.patch_embedding", WIDTH, 3 * PATCH**2),
        "model.visual.embeddings.position_embedding.weight": (SIDE**2, WIDTH),
        **norm("model.visual.post_layernorm", WIDTH),
        **norm("model.projector.norm", WIDTH),
        **linear("model.projector.linear_fc1", PROJECTED, 4 * WIDTH),
        **linear("model.projector.linear_fc2", hidden, PROJECTED),
    }
    for layer in range(TOWER):
        front = f"model.visual.encoder.layers.{layer}."
        shapes |= norm(f"{front}layer_norm1", WIDTH) | norm(f"{front}layer_norm2", WIDTH)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{front}self_attn.{part}", WIDTH, WIDTH)
        shapes |= linear(f"{front}mlp.fc1", FEED, WIDTH) | linear(f"{front}mlp.fc2", WIDTH, FEED)
    return drawn(shapes, 3)


def _write(processor: Any, text: dict[str, Any], model: Any, where: Path) -> None:
    words = {
        _published(name): value for name, value in model.state_dict().items() if "layers" in name
    }
    words |= {
        "embed_tokens.weight": model.get_input_embeddings().weight,
        "norm.weight": model.model.language_model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
        "time_embedder.weight": torch.zeros(2),  # of what generates
    }
    words = {name: value for name, value in words.items() if "visual" not in name}
    parts = {"transformer": words, "vision_encoder": _tower(text["hidden_size"])}
    for part, weights in parts.items():
        (where / part).mkdir()
        copies = {name: value.detach().contiguous().clone() for name, value in weights.items()}
        save_file(copies, where / part / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=["Cosmos3EdgeForConditionalGeneration"],
        model_type="cosmos3_edge",
        torch_dtype="float32",
        text_config=text | {"dtype": "float32"},
        vision_config=dict(
            hidden_size=WIDTH,
            intermediate_size=FEED,
            num_hidden_layers=TOWER,
            num_attention_heads=2,
            num_patches=SIDE**2,
            patch_size=PATCH,
        ),
        projector_config=dict(
            input_hidden_size=WIDTH,
            merger_intermediate_size=PROJECTED,
            out_hidden_size=text["hidden_size"],
        ),
        **{name: getattr(model.config, name) for name in ("image_token_id", "video_token_id")},
        **{
            f"vision_{end}_token_id": getattr(model.config, f"vision_{end}_token_id")
            for end in ("start", "end")
        },
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    processor.save_pretrained(where)


def cosmos3_edge() -> Checkpoint:
    made, vocab = tokenizer(
        SPECIALS, dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    )
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5])
    text = text_settings(
        vocab, num_hidden_layers=LAYERS, head_dim=HEAD, rms_norm_eps=EPSILON, rope_parameters=rope
    )
    ids = dict(
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
    )
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    config = hf.Cosmos3EdgeConfig(text_config=dict(text), vision_config=tower, **ids)
    model = hf.Cosmos3EdgeForConditionalGeneration(config)
    language = model.model.language_model
    halves = [half(layer) for layer in language.layers for half in (Attending, Perceptron)]
    language.layers = nn.ModuleList(halves)
    language.config.num_hidden_layers = len(halves)
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 200}
    processor = hf.Cosmos3EdgeProcessor(
        image_processor=hf.Cosmos3EdgeImageProcessor(size=size),
        tokenizer=made,
        video_processor=hf.Cosmos3EdgeVideoProcessor(size=size),
    )
    return Checkpoint(
        model=model,
        processor=None,
        vocab=vocab,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((160, 256), (192, 128)),
        decoder=lambda model: model.model.language_model,
        write=partial(_write, processor, text | {"model_type": "cosmos3_edge_text"}),
        perceptron_last=True,
        options={"limit_mm_per_prompt": {"image": 2, "video": 0}},
    )
