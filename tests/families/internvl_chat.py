"""InternVL in OpenGVLab's own layout, ``InternVLChatModel``, around several language models, and its kin.

transformers has no class for it: the tower's weights are drawn here under the layout's names, and the
language model alone is the reference, asked from the embeddings that vLLM made.
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

from tests.families.making import Checkpoint, fill, text_settings, tokenizer, tower_settings

WIDTH, PATCH, SIDE, LAYERS = 64, 8, 64, 2
MARKS = ("<img>", "</img>", "<IMG_CONTEXT>")

CONFIGURATION = '''
from transformers import AutoConfig, PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"


class InternVLChatConfig(PretrainedConfig):
    """The fields that vLLM reads of the layout's own configuration class."""

    model_type = "internvl_chat"
    is_composition = True

    def __init__(self, vision_config=None, llm_config=None, **others):
        super().__init__(**others)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        text = dict(llm_config or {"model_type": "qwen2"})
        kind = text.pop("model_type")
        if kind == "internlm2":
            self.llm_config = InternLM2Config(**text)
        else:
            self.llm_config = AutoConfig.for_model(kind, **text)
'''
"""Such a checkpoint brings its configuration class; this one is ours."""


def tower_weights() -> dict[str, torch.Tensor]:
    """A tower and its projector, under the names of the layout."""
    generator = torch.Generator().manual_seed(3)

    def near(mean: float, *shape: int) -> torch.Tensor:
        return mean + 0.3 * torch.randn(shape, generator=generator)

    def matrix(rows: int, *columns: int, gain: float = 1.0) -> torch.Tensor:
        fan_in = torch.Size(columns).numel()
        return torch.randn(rows, *columns, generator=generator) * gain / fan_in**0.5

    patches = (SIDE // PATCH) ** 2
    embeddings = "vision_model.embeddings."
    weights = {
        embeddings + "class_embedding": near(0, 1, 1, WIDTH),
        embeddings + "position_embedding": near(0, 1, patches + 1, WIDTH),
        embeddings + "patch_embedding.weight": matrix(WIDTH, 3, PATCH, PATCH),
        embeddings + "patch_embedding.bias": near(0, WIDTH),
        "mlp1.0.weight": near(1, 4 * WIDTH),
        "mlp1.0.bias": near(0, 4 * WIDTH),
        "mlp1.1.weight": matrix(128, 4 * WIDTH),
        "mlp1.1.bias": near(0, 128),
        "mlp1.3.weight": matrix(128, 128, gain=2),
        "mlp1.3.bias": near(0, 128),
    }
    for layer in range(LAYERS):
        name = f"vision_model.encoder.layers.{layer}."
        for key, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 128, WIDTH),
            ("mlp.fc2", WIDTH, 128),
        ):
            weights[f"{name}{key}.weight"] = matrix(rows, columns)
            weights[f"{name}{key}.bias"] = near(0, rows)
        for key in ("norm1", "norm2"):
            weights[f"{name}{key}.weight"] = near(1, WIDTH)
            weights[f"{name}{key}.bias"] = near(0, WIDTH)
        weights[name + "ls1"], weights[name + "ls2"] = near(1, WIDTH), near(1, WIDTH)
    return weights


def config_of(text: Any) -> dict[str, Any]:
    """``config.json`` around a language model's configuration."""
    llm = text.to_dict() | {"torch_dtype": "float32"}
    llm.pop("dtype", None)
    return dict(
        model_type="internvl_chat",
        auto_map={"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        vision_config=dict(
            architectures=["InternVisionModel"],
            model_type="intern_vit_6b",
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_channels=3,
            image_size=SIDE,
            patch_size=PATCH,
            qkv_bias=True,
            qk_normalization=False,
            norm_type="layer_norm",
            layer_norm_eps=1e-6,
            initializer_factor=1.0,
            use_flash_attn=False,
            hidden_act="gelu",
        ),
        llm_config=llm,
        select_layer=-1,
        force_image_size=SIDE,
        downsample_ratio=0.5,
        ps_version="v2",
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=4,
        torch_dtype="float32",
        tie_word_embeddings=False,
    )


INTERNLM2 = {
    "lm_head": "output",
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_internlm2(model: Any) -> dict[str, torch.Tensor]:
    """Llama's weights in InternLM2's layout: the same computation, other names, one matrix per head group."""
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if ".self_attn.q_proj." in name:
            parts = [
                model.state_dict()[name.replace("q_proj", f"{part}_proj")].view(heads, -1, dim, 128)
                for part in "qkv"
            ]
            key = name.replace("self_attn.q_proj", "attention.wqkv")
            found[key] = torch.cat(parts, 1).reshape(-1, 128)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            for theirs, ours in INTERNLM2.items():
                name = name.replace(theirs, ours)
            found[name] = value
    return found


def write(made: Any, internlm2: bool, architecture: str, model: Any, where: Path) -> None:
    weights = tower_weights()
    text = as_internlm2(model) if internlm2 else model.state_dict()
    for name, value in text.items():
        weights[f"language_model.{name}"] = value.contiguous().clone()
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    config = config_of(model.config) | {"architectures": [architecture]}
    if internlm2:
        config["llm_config"] |= {
            "model_type": "internlm2",
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
        }
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_internvl_chat.py").write_text(CONFIGURATION)
    made.save_pretrained(where)


def chat(
    kind: str, internlm2: bool = False, architecture: str = "InternVLChatModel", **text: Any
) -> Checkpoint:
    made, vocab = tokenizer(MARKS)
    config = getattr(hf, f"{kind}Config")(
        architectures=[f"{kind}ForCausalLM"], **text_settings(vocab, **text)
    )
    return Checkpoint(
        model=getattr(hf, f"{kind}ForCausalLM")(config),
        processor=None,
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<IMG_CONTEXT>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        saved=made,
        write=partial(write, made, internlm2, architecture),
    )


def internvl_chat_qwen2() -> Checkpoint:
    return chat("Qwen2")


def internvl_chat_qwen3() -> Checkpoint:
    return chat("Qwen3", head_dim=32)


def internvl_chat_llama() -> Checkpoint:
    return chat("Llama")


def internvl_chat_internlm2() -> Checkpoint:
    """Most checkpoints of InternVL 2 and 2.5."""
    return chat("Llama", internlm2=True)


def _write_eagle(made: Any, model: Any, where: Path) -> None:
    """SigLIP in the place of InternViT; the projector is the same."""
    write(made, False, "Eagle2_5_VLForConditionalGeneration", model, where)
    vision = hf.SiglipVisionConfig(
        **tower_settings(image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    )
    tower = hf.SiglipVisionModel(vision)
    fill(tower, 3)
    file = where / "model.safetensors"
    weights = {
        name: value
        for name, value in load_file(file).items()
        if not name.startswith("vision_model.")
    }
    for name, value in tower.state_dict().items():
        name = "vision_model.vision_model." + name.removeprefix("vision_model.")
        weights[name] = value.contiguous().clone()
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((where / "config.json").read_text())
    config["vision_config"] = vision.to_dict()
    (where / "config.json").write_text(json.dumps(config, indent=1))


def eagle2_5() -> Checkpoint:
    made = chat("Qwen2")
    return replace(made, write=partial(_write_eagle, made.saved))


def skywork_r1v() -> Checkpoint:
    """The same layout under another name."""
    return chat("Qwen2", architecture="SkyworkR1VChatModel")


def _write_qianfan(made: Any, model: Any, where: Path) -> None:
    """The same layout, with a configuration that vLLM has a class for."""
    write(made, False, "QianfanOCRForConditionalGeneration", model, where)
    config = json.loads((where / "config.json").read_text())
    del config["auto_map"]
    config |= {"model_type": "qianfan_ocr", "text_config": config.pop("llm_config")}
    (where / "config.json").write_text(json.dumps(config, indent=1))


def qianfan_ocr() -> Checkpoint:
    made = chat("Qwen3", head_dim=32)
    return replace(made, write=partial(_write_qianfan, made.saved))
