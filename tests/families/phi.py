"""Phi-3-vision and Phi-4-multimodal: tiles of a padded picture and the picture whole, with an embedding per row.

transformers has neither layout: the tower is drawn here under the checkpoint's names, and the language model,
Phi-3's, is the reference, from the embeddings that vLLM made. Such a checkpoint brings its configuration,
processor and image processor as code; these are ours, as small as vLLM allows. vLLM fixes the towers' sizes
and the picture's token, which are made small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import decoders

from tests.families.making import (
    MAX_POSITIONS,
    Checkpoint,
    drawn,
    fill,
    linear,
    text_settings,
    tokenizer,
    tower_settings,
    write_weights,
)
from tests.families.phi_code import CONFIGURATION, PHI3, PHI4, PROCESSING

Weights = dict[str, torch.Tensor]


def _tower(model: Any, prefix: str) -> Weights:
    """A tower of transformers', its weights under the hub's names."""
    fill(model, 3)
    return {
        prefix + name.removeprefix("vision_model."): value
        for name, value in model.state_dict().items()
        if "head." not in name and "position_ids" not in name
    }


def _projection(prefix: str, width: int, hidden: int) -> Weights:
    """Separators between rows and parts, and the projector behind them."""
    shapes = {
        f"{prefix}glb_GN": (1, 1, width),
        f"{prefix}sub_GN": (1, 1, 1, width),
        **linear(f"{prefix}img_projection.0", hidden, width),
        **linear(f"{prefix}img_projection.2", hidden, hidden),
    }
    return drawn(shapes, 4)


def _write(
    made: Any,
    name: str,
    code: str,
    weights_of: Callable[[Any], Weights],
    settings: Mapping[str, Any],
    model: Any,
    where: Path,
) -> None:
    kind = settings["model_type"]
    write_weights(weights_of(model), where / "model.safetensors")
    auto = {"AutoConfig": f"configuration_{kind}.{name}Config"}
    config = model.config.to_dict() | dict(settings, auto_map=auto, torch_dtype="float32")
    config.pop("dtype", None)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / f"configuration_{kind}.py").write_text(CONFIGURATION.format(name=name, kind=kind))
    code = PROCESSING.format(name=name, rest=code)
    (where / f"processing_{kind}.py").write_text(code)
    made.save_pretrained(where)
    image = dict(
        image_processor_type=f"{name}ImageProcessor",
        processor_class=f"{name}Processor",
        auto_map={
            "AutoProcessor": f"processing_{kind}.{name}Processor",
            "AutoImageProcessor": f"processing_{kind}.{name}ImageProcessor",
        },
        side=settings["side"],
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def _phi(
    mark: str,
    rope: Mapping[str, Any],
    write: Callable[[Any], Callable[[Any, Path], None]],
    sizes: Any,
    shrunk: Callable[[Mapping[str, int]], Mapping[str, Any]],
    **options: Any,
) -> Checkpoint:
    made, vocab = tokenizer(("<|image_1|>", "<|image_2|>", mark))
    # The prompt goes through the tokenizer and back, so words must stay apart.
    made.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    config = hf.Phi3Config(
        **text_settings(
            vocab,
            rope_parameters=dict(rope),
            original_max_position_embeddings=MAX_POSITIONS // 2,
        )
    )
    return Checkpoint(
        model=hf.Phi3ForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<|image_1|>",
        second="<|image_2|>",
        image_ids=(vocab[mark],),
        sizes=sizes,
        decoder=lambda model: model.model,
        options={
            "trust_remote_code": True,
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 64 << 20,
            **options,
        },
        write=write(made),
        shrunk=shrunk(vocab),
    )


def phi3v() -> Checkpoint:
    """24 x 24 patches of a tile, 1024 wide, is what vLLM's code asserts; one layer of the tower runs."""
    tower = hf.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    prefix = "model.vision_embed_tokens."

    def weights(model: Any) -> Weights:
        parts = _tower(hf.CLIPVisionModel(tower), f"{prefix}img_processor.vision_model.")
        return model.state_dict() | parts | _projection(prefix, 4 * 1024, model.config.hidden_size)

    settings = dict(
        architectures=["Phi3VForCausalLM"],
        model_type="phi3_v",
        side=336,
        img_processor=dict(
            name="clip_vision_model", image_dim_out=1024, num_img_tokens=144, layer_idx=-2
        ),
        embd_layer=dict(
            embedding_cls="image",
            use_hd_transform=True,
            with_learnable_separator=True,
            hd_transform_order="sub_glb",
        ),
    )
    factors = [1 + 0.1 * index for index in range(16)]
    rope = dict(
        rope_type="longrope",
        rope_theta=10000.0,
        short_factor=factors,
        long_factor=[4 * factor for factor in factors],
        original_max_position_embeddings=MAX_POSITIONS // 2,
    )
    return _phi(
        "<|image|>",
        rope,
        lambda made: partial(_write, made, "Phi3V", PHI3, weights, settings),
        ((200, 300), (120, 240)),
        lambda vocab: {
            "phi3v.CLIP_VIT_LARGE_PATCH14_336_CONFIG": lambda _: tower,
            "phi3v._IMAGE_TOKEN_ID": lambda _: vocab["<|image|>"],
        },
    )


AUDIO = dict(
    attention_dim=64,
    attention_heads=2,
    chunk_size=-1,
    encoder_embedding_config={"input_size": 80},
    input_size=80,
    left_chunk=18,
    linear_units=64,
    nemo_conv_settings={"conv_channels": 64},
    num_blocks=1,
    relative_attention_bias_args={"type": "t5"},
    time_reduction=8,
)


def phi4mm() -> Checkpoint:
    """32 x 32 patches of a tile are halved to 16 x 16; rows and columns of padding leave before that."""
    small = tower_settings(num_hidden_layers=3)
    prefix = "model.embed_tokens_extend.image_embed."

    def weights(model: Any) -> Weights:
        tower = hf.SiglipVisionConfig(**small, image_size=448, patch_size=14, vision_use_head=False)
        text = {
            # as published: beside each matrix the adapters for pictures and speech, which vLLM takes as LoRA
            name.replace("_proj.", "_proj.base_layer.") if ".layers." in name else name: value
            for name, value in model.state_dict().items()
        }
        text |= {"model.layers.0.mlp.down_proj.lora_A.vision.weight": torch.zeros(4, 256)}
        parts = _tower(hf.SiglipVisionModel(tower), f"{prefix}img_processor.")
        return text | parts | _projection(prefix, small["hidden_size"], model.config.hidden_size)

    settings = dict(
        architectures=["Phi4MMForCausalLM"],
        model_type="phi4mm",
        side=448,
        img_processor=None,
        audio_processor=dict(name="cascades", config=AUDIO),
        embd_layer=dict(
            embedding_cls="image_audio",
            image_embd_layer=dict(embedding_cls="tune_image", use_hd_transform=True),
            audio_embd_layer=dict(
                embedding_cls="audio", compression_rate=8, downsample_rate=1, projection_cls="mlp"
            ),
        ),
    )

    def tower(**given: Any) -> Any:
        return hf.SiglipVisionConfig(**given | small)

    return _phi(
        "<|endoftext10|>",
        dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75),
        lambda made: partial(_write, made, "Phi4MM", PHI4, weights, settings),
        ((56, 448), (448, 112)),
        lambda vocab: {
            "phi4mm.SiglipVisionConfig": lambda _: tower,
            "phi4mm._IMAGE_PLACEHOLDER_TOKEN_ID": lambda _: vocab["<|endoftext10|>"],
        },
        limit_mm_per_prompt={"image": 2, "audio": 0},
    )
