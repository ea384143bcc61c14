"""Builds tiny random LLaVA checkpoints that transformers and vLLM both load.

Tokenizer and image processor included. Knows nothing of cliffs or engines. Names on disk are those
of the hub's LLaVA-1.5 checkpoints, the only ones that both libraries read (vLLM 0.32 misses the
vision tower under the names transformers 5 writes).

Every weight is drawn at a gain relative to its fan-in, not at transformers' 0.02: at 0.02 attention
is uniform, the image hardly matters, and an engine that ignored the cliff would pass.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.word_tokenizer import word_tokenizer

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
IMAGE_TOKEN_ID = SPECIALS.index("<image>")
WORDS = tuple(f"w{i}" for i in range(123))
VOCAB_SIZE = len(SPECIALS) + len(WORDS)
MAX_POSITIONS = 2048

# Gain of a weight matrix: the standard deviation of its output for inputs of unit variance. Query
# and key above one make attention pick rather than average; the head's makes the greedy token lead
# by far more than float error.
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 4.0, "embed_tokens": 1.0}


@dataclass(frozen=True)
class Shape:
    """A checkpoint's shape; equal shapes have equal weights."""

    family: str = "llama"
    """Decoder: ``llama``, ``mistral`` or ``qwen2``."""
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    grid: int = 4
    """Patches per image side; an image is ``grid ** 2`` tokens."""
    patch: int = 4
    """Pixels per patch side."""
    seed: int = 0
    tiles: bool = False
    """LLaVA-NeXT: a picture is seen whole and in tiles, so its number of tokens depends on its size."""
    siglip: bool = False
    """A SigLIP tower, which has no class token, in the place of CLIP's."""

    @property
    def image_tokens(self) -> int:
        """Tokens of an image (with tiles, of one tile)."""
        return self.grid**2

    @property
    def name(self) -> str:
        return "-".join(f"{key}{value}" for key, value in asdict(self).items())


def _text_config(shape: Shape) -> PretrainedConfig:
    common = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.heads * shape.head_dim,
        intermediate_size=2 * shape.heads * shape.head_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=SPECIALS.index("<s>"),
        eos_token_id=SPECIALS.index("</s>"),
        pad_token_id=SPECIALS.index("<pad>"),
    )
    if shape.family == "llama":
        config = LlamaConfig(head_dim=shape.head_dim, **common)
        config.architectures = ["LlamaForCausalLM"]
    elif shape.family == "mistral":
        # Mistral's default window would turn the layers into sliding-window ones.
        config = MistralConfig(head_dim=shape.head_dim, sliding_window=None, **common)
        config.architectures = ["MistralForCausalLM"]
    elif shape.family == "qwen2":
        config = Qwen2Config(**common)
        config.architectures = ["Qwen2ForCausalLM"]
    else:
        raise ValueError(f"unknown decoder family {shape.family!r}")
    return config


def config_of(shape: Shape) -> LlavaConfig | LlavaNextConfig:
    """The LLaVA configuration of a shape: CLIP tower, second-last feature layer, CLS dropped, as LLaVA-1.5."""
    sizes = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=shape.grid * shape.patch,
        patch_size=shape.patch,
    )
    vision: PretrainedConfig = CLIPVisionConfig(projection_dim=64, **sizes)
    if shape.siglip:
        vision = SiglipVisionConfig(vision_use_head=False, **sizes)
    common = dict(
        vision_config=vision,
        text_config=_text_config(shape),
        image_token_id=IMAGE_TOKEN_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy=_strategy(shape),
        image_seq_length=shape.image_tokens,
        tie_word_embeddings=False,
    )
    config: LlavaConfig | LlavaNextConfig
    if shape.tiles:
        config = LlavaNextConfig(image_grid_pinpoints=_pinpoints(shape), **common)
        config.architectures = ["LlavaNextForConditionalGeneration"]
    else:
        config = LlavaConfig(**common)
        config.architectures = ["LlavaForConditionalGeneration"]
    config.torch_dtype = "float32"
    return config


def _strategy(shape: Shape) -> str:
    """Whether the tower's first row is dropped."""
    return "full" if shape.siglip else "default"


def _pinpoints(shape: Shape) -> list[list[int]]:
    """Heights and widths into which pictures are tiled."""
    side = shape.grid * shape.patch
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


def _fill(
    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration, seed: int
) -> None:
    """Draw every parameter anew; the order is that of sorted names, so it does not depend on module order."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        key = name.split(".")[-2]
        if "norm" in key or "layrnorm" in key:
            noise = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        elif weight.dim() == 1:
            noise = noise * 0.3
        elif key == "embed_tokens":
            noise = noise * GAINS[key]
        else:
            noise = noise * GAINS.get(key, 1.0) / weight[0].numel() ** 0.5
        weight.data.copy_(noise)


def hub_name(name: str) -> str:
    """A parameter's name in transformers 5 -> in the hub's LLaVA checkpoints."""
    for now, hub in (
        ("model.image_newline", "image_newline"),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(now):
            return hub + name.removeprefix(now)
    raise ValueError(f"no hub name for {name}")


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word ``w0`` ... and ``<s>`` in front, as LLaVA-1.5 has it."""
    vocab = {word: i for i, word in enumerate((*SPECIALS, *WORDS))}
    made = word_tokenizer(
        vocab,
        SPECIALS,
        {"image_token": "<image>"},
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    return made


def _write_processor(shape: Shape, where: Path) -> None:
    """The hub's two processor files; one of transformers 5 alone would not do for vLLM's older readers."""
    side = shape.grid * shape.patch
    kind = "LlavaNextProcessor" if shape.tiles else "LlavaProcessor"
    tiling = {"image_grid_pinpoints": _pinpoints(shape)} if shape.tiles else {}
    image = dict(
        image_processor_type="LlavaNextImageProcessor" if shape.tiles else "CLIPImageProcessor",
        processor_class=kind,
        **tiling,
        do_resize=True,
        size={"shortest_edge": side},
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        do_convert_rgb=True,
        resample=3,
    )
    processor = dict(
        processor_class=kind,
        image_token="<image>",
        patch_size=shape.patch,
        vision_feature_select_strategy=_strategy(shape),
        num_additional_image_tokens=0 if shape.siglip else 1,
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    (where / "processor_config.json").write_text(json.dumps(processor, indent=1))


def build(shape: Shape, root: Path) -> Path:
    """Write the checkpoint of ``shape`` under ``root`` unless it is there; return its directory."""
    where = root / shape.name
    if (where / "model.safetensors").exists():
        return where
    where.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    kind = LlavaNextForConditionalGeneration if shape.tiles else LlavaForConditionalGeneration
    model = kind(config).to(torch.float32)
    _fill(model, shape.seed)
    config.save_pretrained(where)
    _tokenizer().save_pretrained(where)
    _write_processor(shape, where)
    weights = {hub_name(name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return where


def picture(shape: Shape, seed: int) -> Image.Image:
    """A random RGB image of the model's own size, so that no resampling is involved.

    With tiles it is wide or tall, and not quite a multiple of a tile, so that padding comes off.
    """
    side = shape.grid * shape.patch
    size = (side, side)
    if shape.tiles:
        size = (2 * side - shape.patch, side) if seed % 2 else (side, 2 * side)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words(count: int, seed: int) -> str:
    """``count`` random words of the vocabulary, one token each."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))
