"""Shapes nobody has the weights of: a LLaVA checkpoint folder from a line of numbers.

Writes config, tokenizer and processor, enough for ``load_format="dummy"``, and on request random
weights, which transformers and vLLM both load. Knows no cliff.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flow.outputs import OutputError
from vllm_flow.profile.dimensions import ModelShape, TowerShape
from vllm_flow.user_text import whole_number

if TYPE_CHECKING:
    from transformers import LlavaConfig

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
PREFIX = "shape:"
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


MOST = 10**6
"""Of any of a shape's numbers: beyond it, a slip would fill the memory."""


@dataclass(frozen=True)
class LlavaShape:
    """A LLaVA of any size, as ``layers=16,hidden=1024,...`` writes it.

    The default tower is tiny, so that the decoder, where eviction acts, is what is measured;
    LLaVA-1.5's own is ``tower_layers=24,tower_hidden=1024``.
    """

    layers: int = 16
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 16
    mlp: int = 2816
    image_tokens: int = 576
    """Tokens of one image: a square number."""
    vocab: int = 32000
    patch: int = 14
    """Pixels per patch side."""
    tower_layers: int = 2
    tower_hidden: int = 64
    context: int = 16384

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
            if value > MOST:
                raise ValueError(f"{name}={value}: it must be at most {MOST}.")
        if math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise ValueError(
                f"image_tokens={self.image_tokens}: one image is a square grid; use 576 (24 x 24) "
                "or another square, and --image-tokens for more tokens per request."
            )
        for whole, part in (("hidden", "heads"), ("heads", "kv_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part}={getattr(self, part)} does not divide {whole}={getattr(self, whole)}."
                )
        if self.vocab <= len(SPECIALS):
            raise ValueError(f"vocab={self.vocab}: it must exceed {len(SPECIALS)}.")

    @classmethod
    def parse(cls, text: str) -> LlavaShape:
        """Read ``layers=16,hidden=1024``; what is not named keeps its default.

        Raises:
            ValueError: an unknown name or a value that is no number, with what is known.
        """
        known = [f.name for f in fields(cls)]
        values = {}
        for pair in filter(None, text.removeprefix(PREFIX).split(",")):
            name, _, number = pair.partition("=")
            value = whole_number(number.strip())
            if name.strip() not in known or value is None:
                raise ValueError(
                    f"{pair!r} in the shape: write NAME=NUMBER with {', '.join(known)}."
                )
            values[name.strip()] = value
        return cls(**values)

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @property
    def side(self) -> int:
        """Pixels per image side."""
        return math.isqrt(self.image_tokens) * self.patch


def shape_of(config: Any, dtype: str) -> ModelShape:
    """The shape of a model from its Hugging Face config.

    Args:
        config: of a LLaVA-like model (``text_config``, ``vision_config``) or of a plain decoder.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
    """
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", None)
    tower = None
    if vision is not None:
        layers = vision.num_hidden_layers
        # LLaVA takes the features before the last layer, and neither library runs the rest.
        layer = getattr(config, "vision_feature_layer", None)
        if isinstance(layer, int):
            layers = layer if layer >= 0 else layers + 1 + layer
        tower = TowerShape(
            layers=layers,
            hidden=vision.hidden_size,
            mlp=vision.intermediate_size,
            patches=(vision.image_size // vision.patch_size) ** 2,
            patch_values=3 * vision.patch_size**2,
        )
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
        tower=tower,
        value_bytes=DTYPE_BYTES[dtype],
    )


def llava_config(shape: LlavaShape, dtype: str) -> LlavaConfig:
    """The checkpoint's configuration: CLIP tower, its second-last layer's features, a Llama decoder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        bos_token_id=SPECIALS.index("<s>"),
        eos_token_id=SPECIALS.index("</s>"),
        pad_token_id=SPECIALS.index("<pad>"),
    )
    text.architectures = ["LlamaForCausalLM"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_hidden,
            intermediate_size=4 * shape.tower_hidden,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=max(1, shape.tower_hidden // 64),
            projection_dim=shape.tower_hidden,
            image_size=shape.side,
            patch_size=shape.patch,
        ),
        text_config=text,
        image_token_id=SPECIALS.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=shape.image_tokens,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.torch_dtype = dtype
    return config


def write_folder(shape: LlavaShape, where: Path, dtype: str) -> Path:
    """Write config, tokenizer (one token per word ``w0`` ...) and processor; return ``where``."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    where.mkdir(parents=True, exist_ok=True)
    llava_config(shape, dtype).save_pretrained(where)
    words = [*SPECIALS, *(f"w{i}" for i in range(shape.vocab - len(SPECIALS)))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIALS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=shape.context,
    ).save_pretrained(where)
    image = dict(
        image_processor_type="CLIPImageProcessor",
        processor_class="LlavaProcessor",
        size={"shortest_edge": shape.side},
        crop_size={"height": shape.side, "width": shape.side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        resample=3,
        rescale_factor=1 / 255,
        **{
            f"do_{step}": True
            for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")
        },
    )
    processor = dict(
        processor_class="LlavaProcessor",
        image_token="<image>",
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    (where / "processor_config.json").write_text(json.dumps(processor, indent=1))
    return where


# A parameter's name in transformers 5 begins so; in the hub's LLaVA checkpoints, which vLLM 0.32 reads, so.
_HUB_NAMES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Standard deviation of a matrix's output for unit input. Query and key above one make attention pick
# rather than average, and the head's lets the greedy token lead by more than rounding.
_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 4.0}


def write_weights(shape: LlavaShape, where: Path, dtype: str, seed: int = 0) -> Path:
    """Write the folder with random weights, so that two libraries can be asked the same question."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    write_folder(shape, where, dtype)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config(shape, dtype))
    generator, target = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    weights = {}
    for name, parameter in sorted(model.state_dict().items()):
        if not parameter.is_floating_point():
            continue
        key = name.split(".")[-2]
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in key or "layrnorm" in key:
            noise = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        elif noise.dim() == 1:
            noise *= 0.3
        elif key != "embed_tokens":
            noise *= _GAINS.get(key, 1.0) / noise[0].numel() ** 0.5
        now, hub = next(pair for pair in _HUB_NAMES if name.startswith(pair[0]))
        weights[hub + name.removeprefix(now)] = noise.to(target).contiguous()
    try:
        save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"the checkpoint in {where}", str(error)) from error
    return where
