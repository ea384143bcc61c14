"""MiniCPM-V 2.6, 4.0 and 4.5: slices of a picture, each a fixed number of queries of a resampler.

transformers has no class for them: tower and resampler are drawn here under the layout's names, and the
language model alone is the reference, asked from the embeddings that vLLM made. Such a checkpoint brings
its configuration, processor and image processor as code; these are ours, as small as vLLM allows.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file

from tests.families.making import Checkpoint, fill, text_settings, tokenizer, tower_settings

PATCH, SIDE, QUERIES, WIDTH = 14, 56, 16, 128
MARKS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>", "(", ")", "./")
PLACE = "(<image>./</image>)"
"""What stands for a picture in a prompt, here made of special tokens."""

CONFIGURATION = """
from transformers import {base}Config, SiglipVisionConfig


class MiniCPMVConfig({base}Config):
    model_type = "minicpmv"

    def __init__(self, vision_config=None, **others):
        super().__init__(**others)
        self.vision_config = SiglipVisionConfig(**(vision_config or {{}}))
"""

PROCESSING = '''
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


class MiniCPMVProcessor(ProcessorMixin):
    """Only its tokenizer is used."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)


class MiniCPMVImageProcessor(BaseImageProcessor):
    """A picture, and two slices of it where one side is twice the other."""

    model_input_names = ["pixel_values"]
    im_id_start, im_id_end = "<image_id>", "</image_id>"

    def __init__(self, max_slice_nums=2, side=56, patch_size=14, image_feature_size=16, **others):
        super().__init__(**others)
        self.max_slice_nums, self.side, self.patch_size = max_slice_nums, side, patch_size
        self.image_feature_size = image_feature_size

    def get_sliced_grid(self, image_size, max_slice_nums=None, never_split=False):
        width, height = image_size
        if (self.max_slice_nums if max_slice_nums is None else max_slice_nums) < 2:
            return None
        return (2, 1) if width >= 2 * height else (1, 2) if height >= 2 * width else None

    def get_slice_image_placeholder(
        self, image_size, image_idx=0, max_slice_nums=None, use_image_id=True
    ):
        queries = "<unk>" * self.image_feature_size
        text = f"<image>{queries}</image>"
        if use_image_id:
            text = f"<image_id>w{image_idx}</image_id>{text}"
        grid = self.get_sliced_grid(image_size, max_slice_nums)
        return text + f"<slice>{queries}</slice>" * (grid[0] * grid[1] if grid else 0)

    def _pixels(self, image):
        image = image.resize((self.side, self.side))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        size = self.patch_size
        patches = torch.nn.functional.unfold(pixels[None], size, stride=size)[0]
        return patches.view(3, size, size, -1).permute(0, 1, 3, 2).reshape(3, size, -1)

    def preprocess(self, images, **_):
        rows, sizes, grids = [], [], []
        for group in images:
            parts = []
            for image in group:
                columns, lines = self.get_sliced_grid(image.size) or (0, 0)
                parts.append(image)
                for number in range(columns * lines):
                    width, height = image.width // columns, image.height // lines
                    left, top = width * (number % columns), height * (number // columns)
                    parts.append(image.crop((left, top, left + width, top + height)))
            side = self.side // self.patch_size
            rows.append([self._pixels(part) for part in parts])
            sizes.append([image.size for image in group])
            grids.append(torch.tensor([[side, side]] * len(parts)))
        return BatchFeature({"pixel_values": rows, "image_sizes": sizes, "tgt_sizes": grids})
'''


def _tower(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tower and resampler, under the names of the layout."""
    tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(**config))
    fill(tower, 3)
    weights = {
        "vpm." + name.removeprefix("vision_model."): value
        for name, value in tower.state_dict().items()
        if "head." not in name
    }
    resampler = torch.nn.ParameterDict(
        {
            "query": torch.empty(QUERIES, WIDTH),
            "proj": torch.empty(WIDTH, WIDTH),
            "kv_proj": torch.empty(WIDTH, config["hidden_size"]),
        }
    )
    fill(resampler, 4)
    attention = torch.nn.MultiheadAttention(WIDTH, 1)
    fill(attention, 5)
    weights |= {f"resampler.attn.{name}": value for name, value in attention.state_dict().items()}
    weights["resampler.query"], weights["resampler.proj"] = resampler["query"], resampler["proj"]
    weights["resampler.kv_proj.weight"] = resampler["kv_proj"]
    for name in ("ln_q", "ln_kv", "ln_post"):
        weights[f"resampler.{name}.weight"] = torch.ones(WIDTH)
        weights[f"resampler.{name}.bias"] = torch.zeros(WIDTH)
    return weights


def _write(made: Any, base: str, version: str, model: Any, where: Path) -> None:
    tower = tower_settings(image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    weights = _tower(tower) | {f"llm.{name}": value for name, value in model.state_dict().items()}
    weights = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | dict(
        architectures=["MiniCPMV"],
        model_type="minicpmv",
        auto_map={"AutoConfig": "configuration_minicpm.MiniCPMVConfig"},
        version=version,
        vision_config=tower,
        query_num=QUERIES,
        image_size=SIDE,
        max_slice_num=2,
        drop_vision_last_layer=False,
        torch_dtype="float32",
    )
    (where / "config.json").write_text(json.dumps(config, indent=1))
    (where / "configuration_minicpm.py").write_text(CONFIGURATION.format(base=base))
    (where / "processing_minicpmv.py").write_text(PROCESSING)
    made.save_pretrained(where)
    auto = {
        "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
        "AutoImageProcessor": "processing_minicpmv.MiniCPMVImageProcessor",
    }
    image = dict(
        image_processor_type="MiniCPMVImageProcessor",
        processor_class="MiniCPMVProcessor",
        auto_map=auto,
        side=SIDE,
        patch_size=PATCH,
        image_feature_size=QUERIES,
    )
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def _minicpm(base: str, version: str, **text: Any) -> Checkpoint:
    made, vocab = tokenizer(MARKS)
    config = getattr(hf, f"{base}Config")(**text_settings(vocab, **text))
    return Checkpoint(
        model=getattr(hf, f"{base}ForCausalLM")(config),
        processor=None,
        vocab=vocab,
        image=PLACE,
        image_ids=(vocab["<unk>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model,
        options={"trust_remote_code": True},
        write=partial(_write, made, base, version),
    )


def minicpm_v_2_6() -> Checkpoint:
    return _minicpm("Qwen2", "2.6")


def minicpm_v_4_0() -> Checkpoint:
    return _minicpm("Llama", "4.0", head_dim=32)


def minicpm_v_4_5() -> Checkpoint:
    return _minicpm("Qwen3", "4.5", head_dim=32)
