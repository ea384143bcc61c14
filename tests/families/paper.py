"""Families of the paper that vLLM lacks: InstructBLIP, and Shikra from a made-up published delta.

Whatever their configurations can say differs from transformers' defaults, so that what is not read is seen.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import decoders

from tests.families.making import UNUSUAL, Checkpoint, text_settings, tokenizer, tower_settings


def instructblip() -> Checkpoint:
    """32 tokens before everything else, which depend on the instruction."""
    made, vocab = tokenizer(("<image>",))
    # The instruction goes through the tokenizer and back, so words must stay apart.
    made.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    reader, words = tokenizer(())
    config = hf.InstructBlipConfig(
        vision_config=tower_settings(
            image_size=56, patch_size=14, hidden_act="quick_gelu", layer_norm_eps=0.05
        ),
        qformer_config=tower_settings(
            vocab_size=len(words),
            encoder_hidden_size=64,
            cross_attention_frequency=1,
            max_position_embeddings=512,
            hidden_act="relu",
            layer_norm_eps=0.05,
        ),
        text_config=dict(
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            **text_settings(vocab, **UNUSUAL),
        ),
        num_query_tokens=32,
        image_token_index=vocab["<image>"],
        image_token_id=vocab["<image>"],
    )
    return Checkpoint(
        model=hf.InstructBlipForConditionalGeneration(config),
        processor=hf.InstructBlipProcessor(
            image_processor=hf.BlipImageProcessor(size={"height": 56, "width": 56}),
            tokenizer=made,
            qformer_tokenizer=reader,
            num_query_tokens=32,
        ),
        vocab=vocab,
        image="",
        image_ids=(vocab["<image>"],),
        sizes=((56, 56), (56, 56)),
        single=True,
        options={"limit_mm_per_prompt": {"image": 1}},
        decoder=lambda model: model.language_model.model,
    )


class OneLayer(torch.nn.Module):
    """Shikra's projector."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 128)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)


SHIKRA = ("<im_patch>", "<im_start>", "<im_end>")
SIDE = 64


def publish(made: Any, images: Any, model: Any, root: Path) -> tuple[Path, Path, Path]:
    """Folders of a delta, of the LLaMA it belongs to and of a CLIP, that add up to ``model``."""
    delta, base, tower = (root / name for name in ("delta", "base", "tower"))
    generator = torch.Generator().manual_seed(7)
    published, llama, clip = {}, {}, {}
    for name, value in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            clip["vision_model." + name.removeprefix("model.vision_tower.")] = value.clone()
        elif name.startswith("model.multi_modal_projector.linear."):
            published["model.mm_projector." + name.rsplit(".", 1)[1]] = value.clone()
        else:
            name = name.replace("model.language_model.", "model.")
            rows = value.shape[0] - (len(SHIKRA) if value.shape[0] == len(made) else 0)
            llama[name] = torch.randn(rows, *value.shape[1:], generator=generator)
            published[name] = value.clone()
            published[name][:rows] -= llama[name]
    text = model.config.text_config.to_dict() | {"architectures": ["ShikraLlamaForCausalLM"]}
    shikra = text | {"model_type": "shikra", "mm_vision_select_layer": -2, "mm_hidden_size": 64}
    vision = {"model_type": "clip", "vision_config": model.config.vision_config.to_dict()}
    for where, weights, config in (
        (delta, published, shikra),
        (base, llama, text),
        (tower, clip, vision),
    ):
        where.mkdir(parents=True)
        (where / "config.json").write_text(json.dumps(config))
        if where is base:  # LLaMA's were published in torch's own format
            torch.save(weights, where / "pytorch_model-00001-of-00001.bin")
        else:
            save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    made.save_pretrained(delta)
    images.save_pretrained(tower)
    return delta, base, tower


def _converted(made: Any, images: Any, model: Any, where: Path) -> None:
    from vllm_flow.models.shikra_convert import main

    folders = publish(made, images, model, where / "published")
    names = zip(("--delta", "--base", "--tower"), map(str, folders), strict=True)
    assert main([*(part for pair in names for part in pair), "--out", str(where)]) == 0


def shikra() -> Checkpoint:
    """256 tokens between two markers; what vLLM loads went through the converter."""
    made, vocab = tokenizer(SHIKRA)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            **tower_settings(num_hidden_layers=3, projection_dim=64, image_size=SIDE, patch_size=4),
            hidden_act="gelu",
            layer_norm_eps=0.05,
        ),
        text_config=hf.LlamaConfig(**text_settings(vocab, **UNUSUAL)),
        image_token_index=vocab["<im_patch>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    model = hf.LlavaForConditionalGeneration(config)
    model.model.multi_modal_projector = OneLayer()
    images = hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return Checkpoint(
        model=model,
        processor=hf.LlavaProcessor(
            image_processor=images,
            tokenizer=made,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<im_patch>",
        ),
        vocab=vocab,
        image="<im_start> <im_patch> <im_end>",
        image_ids=(vocab["<im_patch>"],),
        sizes=((SIDE, SIDE), (SIDE, SIDE)),
        single=True,
        decoder=lambda model: model.model.language_model,
        write=partial(_converted, made, images),
    )
