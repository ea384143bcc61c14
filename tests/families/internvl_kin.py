"""H2OVL-Mississippi, NVLM-D and Llama Nemotron Nano VL: InternVL's layout with tiles or towers of their own.

As in `internvl_chat`, the language model alone is the reference, from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.families import internvl_chat
from tests.families.internvl_chat import LAYERS, PATCH, SIDE, WIDTH
from tests.families.making import Checkpoint, drawn, linear, norm, text_settings, tokenizer

SPARE_HEADS = 7
"""vLLM gives NVLM-D's tower so many more heads than the configuration says, as the checkpoint has them."""
TILES = tuple(f"<tile_{number}>" for number in range(1, 7))
NVLM_MARKS = ("<Image>", "</Image>", "<|vision_pad|>", "<tile_global_thumbnail>", *TILES)

RADIO = """
from types import SimpleNamespace

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Radio(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        size = config.patch_size
        self.patches = nn.Conv2d(3, config.hidden_size, size, stride=size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return SimpleNamespace(features=(patches + self.mix(patches).tanh()).contiguous())
"""
"""Such a checkpoint brings its tower as code, too: this one stands for C-RADIO."""
TILING = """
from transformers.image_processing_utils import BaseImageProcessor


class TileProcessor(BaseImageProcessor):
    def __init__(self, image_size=64, max_num_tiles=4, use_thumbnail=True, **others):
        super().__init__(**others)
        self.image_size, self.max_num_tiles = image_size, max_num_tiles
        self.use_thumbnail = use_thumbnail
"""
"""What vLLM reads of the image processor."""


def _write(made: Any, architecture: str, model: Any, where: Path) -> None:
    internvl_chat.write(made, False, architecture, model, where)
    config = json.loads((where / "config.json").read_text()) | {"use_msac": True}
    if architecture == "NVLM_D":
        file = where / "model.safetensors"
        rows = (2 + SPARE_HEADS) * WIDTH // 2
        hidden, inner = model.config.hidden_size, model.config.intermediate_size
        shapes = (
            norm("mlp1.0", 4 * WIDTH)
            | linear("mlp1.1", inner, 4 * WIDTH, bias=False)
            | linear("mlp1.3", hidden, inner, bias=False)
        )
        for layer in range(LAYERS):
            attention = f"vision_model.encoder.layers.{layer}.attn."
            shapes |= linear(f"{attention}qkv", 3 * rows, WIDTH)
            shapes |= {f"{attention}proj.weight": (WIDTH, rows)}
        kept = {key: value for key, value in load_file(file).items() if "mlp1." not in key}
        save_file(kept | drawn(shapes, 5), file, metadata={"format": "pt"})
    (where / "config.json").write_text(json.dumps(config, indent=1))


def h2ovl() -> Checkpoint:
    """Two sets of tiles of one picture, and one of each where there are more."""
    made = internvl_chat.chat("Llama")
    return replace(made, write=partial(_write, made.saved, "H2OVLChatModel"))


def nvlm_d() -> Checkpoint:
    made, vocab = tokenizer((*NVLM_MARKS, "<image>", "\n"))
    config = hf.Qwen2Config(architectures=["Qwen2ForCausalLM"], **text_settings(vocab))
    return Checkpoint(
        model=hf.Qwen2ForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<image>\n",
        image_ids=(vocab["<|vision_pad|>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, "NVLM_D"),
    )


def _write_nemotron(made: Any, model: Any, where: Path) -> None:
    internvl_chat.write(made, False, "Llama_Nemotron_Nano_VL", model, where)
    file = where / "model.safetensors"
    kept = {
        key: value for key, value in load_file(file).items() if not key.startswith("vision_model.")
    }
    shapes = {
        "patches.weight": (WIDTH, 3, PATCH, PATCH),
        "patches.bias": (WIDTH,),
        **linear("mix", WIDTH, WIDTH),
    }
    tower = drawn({f"vision_model.{name}": shape for name, shape in shapes.items()}, 7)
    save_file(kept | tower, file, metadata={"format": "pt"})
    config = json.loads((where / "config.json").read_text())
    config |= dict(vit_hidden_size=WIDTH, projector_hidden_size=model.config.hidden_size)
    config["vision_config"] = dict(
        auto_map={"AutoModel": f"{where}--modeling_radio.Radio"},
        hidden_size=WIDTH,
        patch_size=PATCH,
        image_size=SIDE,
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "modeling_radio.py").write_text(RADIO)
    (where / "image_processing_tiles.py").write_text(TILING)
    image = dict(
        image_processor_type="TileProcessor",
        auto_map={"AutoImageProcessor": "image_processing_tiles.TileProcessor"},
        image_size=SIDE,
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def _in_float32(model: Any) -> Any:
    """vLLM's model; what its tower gives is bfloat16 whatever the projector is."""

    class InFloat32(model):  # type: ignore[misc]
        def _call_vision_model(self, pixels: torch.Tensor) -> torch.Tensor:
            return super()._call_vision_model(pixels).float()

    return InFloat32


def nemotron_nano_vl() -> Checkpoint:
    made, vocab = tokenizer(("<img>", "</img>", "<image>"))
    config = hf.LlamaConfig(architectures=["LlamaForCausalLM"], **text_settings(vocab))
    return Checkpoint(
        model=hf.LlamaForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write_nemotron, made),
        shrunk={"nemotron_vl.LlamaNemotronVLChatModel": _in_float32},
    )
