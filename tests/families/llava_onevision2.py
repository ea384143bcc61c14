"""LLaVA-OneVision 2: Qwen3 behind a tower that takes pictures of their own size.

transformers has no class for the layout: the tower is drawn here under the checkpoint's names, and the language
model alone is the reference, from the embeddings that vLLM made. Such a checkpoint brings its configuration and
processor as code; these are ours.
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
    tower_settings,
    write_weights,
)

PATCH, WIDTH, LAYERS, FEED = 14, 64, 2, 128
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "\n")
CONFIGURATION = """
from transformers import PretrainedConfig, Qwen3Config


class LlavaOnevision2Config(PretrainedConfig):
    model_type = "llava_onevision2"

    def __init__(self, vision_config=None, text_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = Qwen3Config(**(text_config or {}))
        super().__init__(**others)
"""
PROCESSING = '''
import torch
from transformers import BatchFeature, ProcessorMixin


class LlavaOnevision2Processor(ProcessorMixin):
    """Qwen2-VL's patches, and beside them where each is: frame, row, column."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "Qwen2VLImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text=None, images=None, return_tensors=None, **_):
        found = dict(self.tokenizer(text, return_tensors="pt"))
        if images:
            found |= self.image_processor(images, return_tensors="pt")
            places, side = [], self.image_processor.merge_size
            for _, high, wide in found["image_grid_thw"].tolist():
                grid = torch.stack(torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"), -1)
                grid = grid.view(high // side, side, wide // side, side, 2).transpose(1, 2).reshape(-1, 2)
                places.append(torch.nn.functional.pad(grid, (1, 0)))
            found["patch_positions"] = torch.cat(places)
        return BatchFeature(found)
'''

VIDEOS = """
class LlavaOnevision2VideoProcessor:
    def __init__(self, **others):
        pass
"""
"""vLLM asks for one beside it."""


def _tower(hidden: int) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        **norm("layernorm_pre", WIDTH),
        **norm("merger.ln_q", WIDTH),
        **linear("merger.mlp.0", 4 * WIDTH, 4 * WIDTH),
        **linear("merger.mlp.2", hidden, 4 * WIDTH),
    }
    for layer in range(LAYERS):
        name = f"encoder.layers.{layer}."
        shapes |= norm(f"{name}layer_norm1", WIDTH) | norm(f"{name}layer_norm2", WIDTH)
        shapes |= linear(f"{name}self_attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{name}self_attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{name}mlp.fc1", FEED, WIDTH) | linear(f"{name}mlp.fc2", WIDTH, FEED)
    return {f"model.visual.{name}": value for name, value in drawn(shapes, 3).items()}


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    weights = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in model.state_dict().items()
    }
    weights |= _tower(model.config.hidden_size)
    write_weights(weights, where / "model.safetensors")
    text = model.config.to_dict() | {"torch_dtype": "float32"}
    text.pop("dtype", None)
    config = dict(
        architectures=["LlavaOnevision2ForConditionalGeneration"],
        model_type="llava_onevision2",
        auto_map={"AutoConfig": "configuration_llava_onevision2.LlavaOnevision2Config"},
        text_config=text,
        vision_config=tower_settings(
            patch_size=PATCH, spatial_merge_size=2, num_channels=3, layer_norm_eps=1e-6
        ),
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        torch_dtype="float32",
        tie_word_embeddings=False,
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_llava_onevision2.py").write_text(CONFIGURATION)
    (where / "processing_llava_onevision2.py").write_text(PROCESSING)
    (where / "video_processing_llava_onevision2.py").write_text(VIDEOS)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    images = hf.Qwen2VLImageProcessor(patch_size=PATCH, temporal_patch_size=1, size=size)
    images.save_pretrained(where)
    made.save_pretrained(where)


def llava_onevision2() -> Checkpoint:
    made, vocab = tokenizer(MARKS)
    config = hf.Qwen3Config(architectures=["Qwen3ForCausalLM"], **text_settings(vocab, head_dim=32))
    return Checkpoint(
        model=hf.Qwen3ForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, vocab),
    )
