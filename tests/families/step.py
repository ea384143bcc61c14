"""Step3-VL: Qwen3 behind a perception encoder; the picture whole, and crops of a long or large one.

transformers has no class for the layout: the tower is drawn here under the checkpoint's names, and the language
model alone is the reference, from the embeddings that vLLM made.
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
    linear,
    norm,
    text_settings,
    tokenizer,
    write_weights,
)

WIDTH, PATCH, LAYERS, HEADS, FEED = 64, 14, 2, 2, 128
SIDE, CROP = 224, 112
"""Of the picture whole, and of its crops: in tokens, side by side, a 56th."""
SIZES = dict(
    image_size=SIDE,
    patch_size=CROP,
    num_image_feature_size=(SIDE // 56) ** 2,
    num_patch_feature_size=(CROP // 56) ** 2,
)
MARKS = ("<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>", "<im_patch>")
VISION = dict(
    image_size=SIDE,
    patch_size=PATCH,
    width=WIDTH,
    layers=LAYERS,
    heads=HEADS,
    mlp_ratio=FEED / WIDTH,
    hidden_act="quick_gelu",
    output_dim=None,
    use_abs_posemb=True,
    use_cls_token=False,
    use_ln_post=False,
    use_ln_pre=True,
    use_rope2d=True,
    ls_init_value=0.1,
)

CONFIGURATION = """
from transformers import AutoConfig, PretrainedConfig


class StepConfig(PretrainedConfig):
    model_type = "step_robotics"

    def __init__(self, vision_config=None, text_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        text = dict(text_config or {"model_type": "qwen3"})
        self.text_config = AutoConfig.for_model(text.pop("model_type"), **text)
        super().__init__(**others)
"""


def tower(hidden: int) -> dict[str, torch.Tensor]:
    patches = (SIDE // PATCH) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "positional_embedding": (patches, WIDTH),
        **norm("ln_pre", WIDTH),
        "vit_downsampler1.weight": (2 * WIDTH, WIDTH, 3, 3),
        "vit_downsampler1.bias": (2 * WIDTH,),
        "vit_downsampler2.weight": (4 * WIDTH, 2 * WIDTH, 3, 3),
        "vit_downsampler2.bias": (4 * WIDTH,),
    }
    for layer in range(LAYERS):
        name = f"transformer.resblocks.{layer}."
        shapes |= {f"{name}attn.in_proj_weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"{name}attn.in_proj_bias": (3 * WIDTH,)}
        shapes |= linear(f"{name}attn.out_proj", WIDTH, WIDTH)
        shapes |= norm(f"{name}ln_1", WIDTH) | norm(f"{name}ln_2", WIDTH)
        shapes |= {f"{name}ls_1.gamma": (WIDTH,), f"{name}ls_2.gamma": (WIDTH,)}
        shapes |= linear(f"{name}mlp.c_fc", FEED, WIDTH)
        shapes |= linear(f"{name}mlp.c_proj", WIDTH, FEED)
    shapes = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    return drawn(shapes | linear("vit_large_projector", hidden, 4 * WIDTH, bias=False), 3)


def settings(architecture: str, text: dict[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    """What the published configurations of Step's layouts have in common, given that of the language model."""
    return dict(
        architectures=[architecture],
        text_config=text,
        vision_config=VISION,
        hidden_size=text["hidden_size"],
        image_token_id=vocab["<im_patch>"],
        projector_bias=False,
        understand_projector_stride=2,
        torch_dtype="float32",
        tie_word_embeddings=False,
    )


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    weights = model.state_dict() | tower(model.config.hidden_size)
    write_weights(weights, where / "model.safetensors")
    text = model.config.to_dict() | {"torch_dtype": "float32"}
    text.pop("dtype", None)
    config = settings("StepVLForConditionalGeneration", text, vocab) | dict(
        model_type="step_robotics", auto_map={"AutoConfig": "configuration_step.StepConfig"}
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_step.py").write_text(CONFIGURATION)
    made.save_pretrained(where)


def _on_cpu(encoder: Any) -> Any:
    """vLLM's tower; what it gives is a view that the matrix product of a CPU does not take in vLLM 0.32."""

    class OnCpu(encoder):  # type: ignore[misc]
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels).contiguous()

    return OnCpu


SHRUNK = {
    "step3_vl.Step3VLImageProcessor": lambda made: partial(made, **SIZES),
    "step_vl.PerceptionEncoder": _on_cpu,
}


def step3_vl() -> Checkpoint:
    """The first picture is long, and cut in two; a second one is not."""
    made, vocab = tokenizer(MARKS)
    config = hf.Qwen3Config(architectures=["Qwen3ForCausalLM"], **text_settings(vocab, head_dim=32))
    return Checkpoint(
        model=hf.Qwen3ForCausalLM(config),
        processor=None,
        vocab=vocab,
        image="<im_patch>",
        image_ids=(vocab["<im_patch>"],),
        sizes=((60, 120), (80, 80)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, vocab),
        shrunk=SHRUNK,
    )
