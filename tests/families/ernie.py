"""ERNIE 4.5-VL: a picture's rows and its markers go to experts of their own, M-RoPE.

Such a checkpoint brings its configuration and processor as code, flat and under names of their own; these are ours.
transformers' own classes are the reference, tower included.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import transformers as hf
from safetensors.torch import load_file, save_file

from tests.families.making import Checkpoint, text_settings, tokenizer

PATCH, WIDTH, DEPTH, HEADS, FEED = 14, 64, 2, 2, 128
EXPERTS, CHOSEN, INNER = 4, 2, (64, 32)
"""Of either kind; the widths of text's and of a picture's."""
NAMED = dict(
    image_token="<|IMAGE_PLACEHOLDER|>",
    image_start_token="<|IMAGE_START|>",
    image_end_token="<|IMAGE_END|>",
    video_token="<|VIDEO_PLACEHOLDER|>",
    video_start_token="<|VIDEO_START|>",
    video_end_token="<|VIDEO_END|>",
)
ASKED = ("<|image@placeholder|>", "<|video@placeholder|>")
"""What stands for pictures in a prompt of vLLM's; transformers writes the picture's token there."""
ROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 6, 4])

CONFIGURATION = """
from transformers import PretrainedConfig


class VisionConfig(PretrainedConfig):
    model_type = "DFNRope_vision_transformer"
    base_config_key = "vision_config"


class ErnieConfig(PretrainedConfig):
    model_type = "ernie4_5_moe_vl"
    sub_configs = {"vision_config": VisionConfig}

    def __init__(self, vision_config=None, **others):
        self.vision_config = VisionConfig(**(vision_config or {}))
        super().__init__(**others)
"""

PROCESSING = """
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


class ErnieProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    spatial_conv_size = temporal_conv_size = 2

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text=None, images=None, videos=None, **others):
        return self.image_processor.preprocess(images)


class ErnieImageProcessor(BaseImageProcessor):
    model_input_names = ["images", "grid_thw"]
    rescale_factor = 1 / 255
    image_mean = [0.48145466, 0.4578275, 0.40821073]
    image_std = [0.26862954, 0.26130258, 0.27577711]

    def __init__(self, patch_size=14, size=None, **others):
        super().__init__(**others)
        self.patch_size, self.size = patch_size, size

    def preprocess(self, images, **others):
        patches, grids, patch = [], [], self.patch_size
        for image in images:
            rows, columns = image.height // patch, image.width // patch
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            cut = pixels.reshape(3, rows // 2, 2, patch, columns // 2, 2, patch)
            patches.append(cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, -1))
            grids.append([1, rows, columns])
        return BatchFeature({"images": torch.cat(patches), "grid_thw": torch.tensor(grids)})
"""


def _config(vocab: dict[str, int]) -> hf.Ernie4_5_VLMoeConfig:
    text = text_settings(
        vocab,
        rope_parameters=ROPE,
        moe_num_experts=EXPERTS,
        moe_k=CHOSEN,
        moe_intermediate_size=list(INNER),
        moe_num_shared_experts=1,
        rms_norm_eps=1e-6,  # vLLM gives the tower the language model's
    )
    return hf.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=dict(
            depth=DEPTH,
            hidden_size=WIDTH,
            num_heads=HEADS,
            intermediate_size=FEED,
            patch_size=PATCH,
        ),
        tie_word_embeddings=False,
        **{f"{name}_id": vocab[token] for name, token in NAMED.items()},
    )


def _published(config: Any, vocab: dict[str, int]) -> dict[str, Any]:
    """``config.json`` as it is published: the language model's settings on top."""
    text, last = config.text_config, config.text_config.num_hidden_layers - 1
    return text.to_dict() | dict(
        architectures=["Ernie4_5_VLMoeForConditionalGeneration"],
        model_type="ernie4_5_moe_vl",
        auto_map={"AutoConfig": "configuration_ernie.ErnieConfig"},
        im_patch_id=config.image_token_id,
        **{name: getattr(config, name) for name in ("image_start_token_id", "image_end_token_id")},
        **{name: getattr(config, name) for name in ("video_start_token_id", "video_end_token_id")},
        rope_parameters=ROPE,
        freq_allocation=ROPE["mrope_section"][2],
        moe_num_experts=[EXPERTS, EXPERTS],
        moe_layer_start_index=[1, 1],
        moe_layer_end_index=[last, last],
        moe_layer_interval=1,
        pixel_hidden_size=WIDTH,
        spatial_conv_size=2,
        temporal_conv_size=2,
        use_temporal_conv=True,
        vision_config=dict(
            depth=DEPTH,
            embed_dim=WIDTH,
            hidden_size=WIDTH,
            num_heads=HEADS,
            mlp_ratio=FEED / WIDTH,
            hidden_act="quick_gelu",
            in_channels=3,
            patch_size=PATCH,
            spatial_merge_size=2,
        ),
        torch_dtype="float32",
    )


def _write(made: Any, vocab: dict[str, int], model: Any, where: Path) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("e_score_correction_bias"):  # which vLLM 0.32 leaves out on a CPU
            weight.data.zero_()
    model.save_pretrained(where)
    file = where / "model.safetensors"
    weights = {
        name.replace("model.vision_model.", "vision_model."): value.contiguous()
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    config = _published(model.config, vocab)
    config.pop("dtype", None)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_ernie.py").write_text(CONFIGURATION)
    (where / "processing_ernie.py").write_text(PROCESSING)
    made.save_pretrained(where)
    image = dict(
        image_processor_type="ErnieImageProcessor",
        processor_class="ErnieProcessor",
        auto_map={
            "AutoProcessor": "processing_ernie.ErnieProcessor",
            "AutoImageProcessor": "processing_ernie.ErnieImageProcessor",
        },
        patch_size=PATCH,
        size={"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 200},
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def _on_cpu(rotary: Any) -> Any:
    """vLLM's rotary embedding of this family; on a CPU vLLM 0.32 calls it with an argument that it does not take."""

    class OnCpu(rotary):  # type: ignore[misc]
        def forward_cpu(self, positions: Any, query: Any, key: Any = None) -> Any:
            return self.forward_native(positions, query, key)

    return OnCpu


def _encode(processor: Any, text: list[str], **others: Any) -> Any:
    shown = [part.replace(ASKED[0], NAMED["image_token"]) for part in text]
    return processor(text=shown, **others)


def ernie4_5_vl() -> Checkpoint:
    """The first layer dense, the others with four experts of either kind and a shared one."""
    made, vocab = tokenizer((*NAMED.values(), *ASKED), NAMED)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    processor = hf.Ernie4_5_VLMoeProcessor(
        image_processor=hf.Ernie4_5_VLMoeImageProcessor(patch_size=PATCH, size=size),
        tokenizer=made,
        video_processor=hf.Ernie4_5_VLMoeVideoProcessor(patch_size=PATCH, size=size),
    )
    return Checkpoint(
        model=hf.Ernie4_5_VLMoeForConditionalGeneration(_config(vocab)),
        processor=partial(_encode, processor),
        vocab=vocab,
        image=f"<|IMAGE_START|>{ASKED[0]}<|IMAGE_END|>",
        image_ids=(vocab[NAMED["image_token"]],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model.language_model,
        options={"trust_remote_code": True},
        write=partial(_write, made, vocab),
        shrunk={"ernie45_vl_moe.Ernie4_5_VLRotaryEmbedding": _on_cpu},
    )
