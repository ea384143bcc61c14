"""dots.ocr: Qwen2 behind a tower of its own, which takes pictures of their own size.

transformers has no class for the layout: the tower is drawn here under the checkpoint's names, and the language
model alone is the reference, from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf

from tests.families.making import (
    Checkpoint,
    drawn,
    linear,
    norm,
    text_settings,
    tokenizer,
    write_weights,
)

WIDTH, PATCH, LAYERS, FEED = 64, 14, 2, 128
IMAGE = "<|imgpad|>"
CONFIGURATION = "from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig\n"
"""Such a checkpoint brings its configuration class; vLLM has a copy of it."""


def _tower(hidden: int) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.patchifier.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.patchifier.proj.bias": (WIDTH,),
        "patch_embed.patchifier.norm.weight": (WIDTH,),
        "post_trunk_norm.weight": (WIDTH,),
        **norm("merger.ln_q", WIDTH),
        **linear("merger.mlp.0", 4 * WIDTH, 4 * WIDTH),
        **linear("merger.mlp.2", hidden, 4 * WIDTH),
    }
    for layer in range(LAYERS):
        name = f"blocks.{layer}."
        shapes |= linear(f"{name}attn.qkv", 3 * WIDTH, WIDTH, bias=False)
        shapes |= linear(f"{name}attn.proj", WIDTH, WIDTH, bias=False)
        shapes |= {f"{name}norm{number}.weight": (WIDTH,) for number in (1, 2)}
        for part, rows, columns in (
            ("fc1", FEED, WIDTH),
            ("fc3", FEED, WIDTH),
            ("fc2", WIDTH, FEED),
        ):
            shapes |= linear(f"{name}mlp.{part}", rows, columns, bias=False)
    return {f"vision_tower.{name}": value for name, value in drawn(shapes, 3).items()}


def _write(processor: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    weights = model.state_dict() | _tower(model.config.hidden_size)
    write_weights(weights, where / "model.safetensors")
    config = model.config.to_dict() | dict(
        architectures=["DotsOCRForCausalLM"],
        model_type="dots_ocr",
        auto_map={"AutoConfig": "configuration_dots.DotsOCRConfig"},
        image_token_id=vocab[IMAGE],
        video_token_id=vocab["<|video_pad|>"],
        vision_config=dict(
            embed_dim=WIDTH,
            hidden_size=model.config.hidden_size,
            intermediate_size=FEED,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            patch_size=PATCH,
        ),
        torch_dtype="float32",
    )
    config.pop("dtype", None)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_dots.py").write_text(CONFIGURATION)
    processor.save_pretrained(where)


def dots_ocr() -> Checkpoint:
    named = dict(image_token=IMAGE, video_token="<|video_pad|>")
    made, vocab = tokenizer(("<|img|>", "<|endofimg|>", *named.values()), named)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    images = dict(patch_size=PATCH, temporal_patch_size=1, size=size)
    processor = hf.Qwen2VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**images),
        tokenizer=made,
        video_processor=hf.Qwen2VLVideoProcessor(**images),
    )
    return Checkpoint(
        model=hf.Qwen2ForCausalLM(hf.Qwen2Config(**text_settings(vocab))),
        processor=None,
        vocab=vocab,
        image=f"<|img|>{IMAGE}<|endofimg|>",
        image_ids=(vocab[IMAGE],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, processor, vocab),
    )
