"""Ovis 1.6, 2 and 2.5: a picture's embeddings are mixtures from a table of visual words.

Marks around the picture and between its parts are rows of that table too. transformers has no class for
these layouts: the tower is drawn here under the checkpoint's names, and the language model alone is the
reference, from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.families.making import (
    Checkpoint,
    drawn,
    fill,
    linear,
    norm,
    text_settings,
    tokenizer,
    tower_settings,
    write_weights,
)

SIDE, PATCH, WIDTH, LAYERS, WORDS = 56, 14, 64, 2, 64
"""Visual words: more than a tower of this size tells apart."""
TOWER = tower_settings(image_size=SIDE, patch_size=PATCH)
NAVIT = tower_settings(image_size=112, patch_size=28)
"""vLLM's processor makes no picture of less than 448 x 448 pixels: 64 tokens then."""
Weights = dict[str, torch.Tensor]


def _siglip(**settings: Any) -> Weights:
    tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(**settings, vision_use_head=False))
    fill(tower, 3)
    return {
        "vision_model." + name.removeprefix("vision_model."): value
        for name, value in tower.state_dict().items()
        if "head." not in name and "position_ids" not in name
    }


def _aimv2() -> Weights:
    """The layout's own names: transformers' class has others."""
    shapes: dict[str, tuple[int, ...]] = {
        "preprocessor.patchifier.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "preprocessor.patchifier.proj.bias": (WIDTH,),
        "preprocessor.patchifier.norm.weight": (WIDTH,),
        "preprocessor.pos_embed": (1, (SIDE // PATCH) ** 2, WIDTH),
    }
    for layer in range(LAYERS):
        name = f"trunk.blocks.{layer}."
        shapes |= linear(f"{name}attn.qkv", 3 * WIDTH, WIDTH, bias=False)
        shapes |= linear(f"{name}attn.proj", WIDTH, WIDTH, bias=False)
        shapes |= {f"{name}norm_{number}.weight": (WIDTH,) for number in (1, 2)}
        for part, rows, columns in (("fc1", 128, WIDTH), ("fc3", 128, WIDTH), ("fc2", WIDTH, 128)):
            shapes |= linear(f"{name}mlp.{part}", rows, columns, bias=False)
    return drawn(shapes, 3)


def _navit() -> Weights:
    weights = _siglip(**NAVIT)
    conv = "vision_model.embeddings.patch_embedding.weight"
    weights[conv] = weights[conv].flatten(1)  # this tower takes patches, not pictures
    return weights


def _head(hidden: int, marks: int) -> Weights:
    """From 2 x 2 patches to visual words, and the table that they mix; all but the marks."""
    shapes = {
        **linear("visual_tokenizer.head.0", WORDS - marks, 4 * WIDTH, bias=False),
        **norm("visual_tokenizer.head.1", WORDS - marks),
        "vte.weight": (WORDS, hidden),
    }
    found = drawn(shapes, 4)
    # A picture is a mean of embeddings: far from uniform, or all of its tokens are alike.
    found["visual_tokenizer.head.1.weight"] *= 4
    found["vte.weight"] *= hidden**0.5
    return found


def _save(weights: Weights, model: Any, config: dict[str, Any], where: Path) -> None:
    weights = weights | {f"llm.{name}": value for name, value in model.state_dict().items()}
    write_weights(weights, where / "model.safetensors")
    text = model.config.to_dict() | {"torch_dtype": "float32"}
    text.pop("dtype", None)
    config = config | dict(
        llm_config=text,
        hidden_size=model.config.hidden_size,
        torch_dtype="float32",
        tie_word_embeddings=False,
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))


def _write(made: Any, backbone: str, model: Any, where: Path) -> None:
    tower = _siglip(**TOWER) if backbone == "siglip" else _aimv2()
    weights = {f"visual_tokenizer.backbone.{name}": value for name, value in tower.items()}
    kind = "siglip_vision_model" if backbone == "siglip" else "aimv2"
    visual = dict(
        model_type=f"{backbone}_visual_tokenizer",
        vocab_size=WORDS,
        tokenize_function="softmax",
        hidden_stride=2,
        backbone_config=TOWER | dict(model_type=kind),
    )
    config = dict(architectures=["Ovis"], model_type="ovis", visual_tokenizer_config=visual)
    _save(weights | _head(model.config.hidden_size, 5), model, config, where)
    made.save_pretrained(where)
    images = hf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.save_pretrained(where)


def _ovis(kind: str, pad: str, backbone: str) -> Checkpoint:
    made, vocab = tokenizer(("<image>", pad))
    config = getattr(hf, f"{kind}Config")(
        architectures=[f"{kind}ForCausalLM"], **text_settings(vocab)
    )
    return Checkpoint(
        model=getattr(hf, f"{kind}ForCausalLM")(config),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab[pad],),
        sizes=((SIDE, 2 * SIDE), (SIDE, 2 * SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, backbone),
    )


def ovis1_6() -> Checkpoint:
    return _ovis("Llama", "<|reserved_special_token_0|>", "siglip")


def ovis2() -> Checkpoint:
    return _ovis("Qwen2", "<|image_pad|>", "aimv2")


CONFIGURATION = '''
from transformers import AutoConfig, PretrainedConfig


class Siglip2NavitConfig(PretrainedConfig):
    model_type = "siglip2_navit"


class Ovis2_5_Config(PretrainedConfig):
    """The fields that vLLM reads of the layout's own configuration class."""

    model_type = "ovis2_5"
    sub_configs = {"llm_config": AutoConfig, "vit_config": Siglip2NavitConfig}

    def __init__(self, llm_config=None, vit_config=None, **others):
        text = dict(llm_config or {"model_type": "qwen3"})
        self.llm_config = AutoConfig.for_model(text.pop("model_type"), **text)
        self.vit_config = Siglip2NavitConfig(**(vit_config or {}))
        super().__init__(**others)
'''

INDICATORS = (
    "<ovis_image_start>",
    "<ovis_image_end>",
    "<ovis_video_start>",
    "<ovis_video_end>",
)


def _write_2_5(made: Any, architecture: str, model: Any, where: Path) -> None:
    weights = {f"visual_tokenizer.vit.{name}": value for name, value in _navit().items()}
    vit = NAVIT | dict(
        model_type="siglip2_navit",
        attention_dropout=0.0,
        fullatt_block_indexes=None,
        hidden_act="gelu_pytorch_tanh",
        hidden_stride=2,
        layer_norm_eps=1e-6,
        num_channels=3,
        num_patches=16,
        preserve_original_pe=True,
        temporal_patch_size=1,
        use_rope=True,
        window_size=112,
    )
    config = dict(
        architectures=[architecture],
        model_type="ovis2_5",
        auto_map={"AutoConfig": "configuration_ovis2_5.Ovis2_5_Config"},
        vit_config=vit,
        visual_vocab_size=WORDS,
    )
    _save(weights | _head(model.config.hidden_size, 4), model, config, where)
    (where / "configuration_ovis2_5.py").write_text(CONFIGURATION)
    made.save_pretrained(where)
    hf.SiglipImageProcessor().save_pretrained(where)


def _ovis2_5(kind: str, architecture: str, **text: Any) -> Checkpoint:
    marks = ("<image>", "<video>", "<ovis_visual_atom>", "<|image_pad|>", *INDICATORS)
    made, vocab = tokenizer(marks)
    config = getattr(hf, f"{kind}Config")(
        architectures=[f"{kind}ForCausalLM"], **text_settings(vocab, head_dim=32, **text)
    )
    return Checkpoint(
        model=getattr(hf, f"{kind}ForCausalLM")(config),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((448, 448), (448, 560)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write_2_5, made, architecture),
        shrunk={"ovis2_5.INDICATOR_IDS": lambda _: [vocab[mark] for mark in INDICATORS]},
    )


def ovis2_5() -> Checkpoint:
    """Pictures of their own size, 2 x 2 patches a token."""
    return _ovis2_5("Qwen3", "Ovis2_5")


def ovis2_6_moe() -> Checkpoint:
    return _ovis2_5(
        "Qwen3Moe",
        "Ovis2_6_MoeForCausalLM",
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
