"""MiniCPM-V 2.6, 4.0 and 4.5, MiniCPM-o 2.6 and 4.5: slices of a picture, each a fixed number of queries of a
resampler; MiniCPM-o has a tower for speech beside it.

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
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.families.making import (
    Checkpoint,
    drawn,
    fill,
    linear,
    text_settings,
    tokenizer,
    tower_settings,
    write_weights,
)

PATCH, SIDE, QUERIES, WIDTH = 14, 56, 16, 128
MARKS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>", "(", ")", "./")
PLACE = "(<image>./</image>)"
"""What stands for a picture in a prompt, here made of special tokens."""

CONFIGURATION = """
from transformers import {base}Config, SiglipVisionConfig, WhisperConfig


class MiniCPM{letter}Config({base}Config):
    model_type = "{kind}"

    def __init__(self, vision_config=None, audio_config=None, **others):
        super().__init__(**others)
        self.vision_config = SiglipVisionConfig(**(vision_config or {{}}))
        if audio_config is not None:
            self.audio_config = WhisperConfig(**audio_config)
"""

SPEECH = dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=128)
"""MiniCPM-o's encoder; its output is a fourth of the last number."""
SPOKEN = ("<|audio_start|>", "<|audio_end|>", "<|spk_bos|>", "<|spk_eos|>")

TOKENIZER = """
from transformers import PreTrainedTokenizerFast

IDS = {
    "im_start_id": "<image>",
    "im_end_id": "</image>",
    "slice_start_id": "<slice>",
    "slice_end_id": "</slice>",
    "audio_start_id": "<|audio_start|>",
    "audio_end_id": "<|audio_end|>",
    "spk_start_id": "<|spk_bos|>",
    "spk_end_id": "<|spk_eos|>",
}


class MiniCPMOTokenizerFast(PreTrainedTokenizerFast):
    audio_start, audio_end = "<|audio_start|>", "<|audio_end|>"

    def __getattr__(self, name):
        if name in IDS:
            return self.convert_tokens_to_ids(IDS[name])
        return super().__getattr__(name)
"""
"""MiniCPM-o's processor asks its tokenizer for these."""

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


class MiniCPMOProcessor(ProcessorMixin):
    """Its tokenizer is used, and its features of speech."""

    attributes = ["image_processor", "feature_extractor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    feature_extractor_class = "WhisperFeatureExtractor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, feature_extractor=None, tokenizer=None, **others):
        super().__init__(image_processor, feature_extractor, tokenizer)


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


def _speech() -> dict[str, torch.Tensor]:
    """The encoder of speech and its projector, under the names of the layout."""
    encoder = WhisperEncoder(hf.WhisperConfig(**SPEECH))
    fill(encoder, 6)
    parts = {"apm." + name: value for name, value in encoder.state_dict().items()}
    shapes = linear("linear1", WIDTH, SPEECH["d_model"]) | linear("linear2", WIDTH, WIDTH)
    projector = {f"audio_projection_layer.{name}": size for name, size in shapes.items()}
    return parts | drawn(projector, 7)


def _write(made: Any, base: str, version: str, speech: bool, model: Any, where: Path) -> None:
    tower = tower_settings(image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    weights = _tower(tower) | {f"llm.{name}": value for name, value in model.state_dict().items()}
    if speech:
        weights |= _speech()
    write_weights(weights, where / "model.safetensors")
    letter = "O" if speech else "V"
    kind = f"minicpm{letter.lower()}"
    config = model.config.to_dict() | dict(
        architectures=[f"MiniCPM{letter}"],
        model_type=kind,
        auto_map={"AutoConfig": f"configuration_minicpm.MiniCPM{letter}Config"},
        version=version,
        vision_config=tower,
        query_num=QUERIES,
        image_size=SIDE,
        max_slice_num=2,
        drop_vision_last_layer=False,
        torch_dtype="float32",
    )
    if speech:
        config |= dict(audio_config=SPEECH, audio_pool_step=2, audio_chunk_length=1.0)
    (where / "config.json").write_text(json.dumps(config, indent=1))
    code = CONFIGURATION.format(base=base, letter=letter, kind=kind)
    (where / "configuration_minicpm.py").write_text(code)
    (where / "processing_minicpm.py").write_text(PROCESSING)
    made.save_pretrained(where)
    if speech:
        (where / "tokenization_minicpmo_fast.py").write_text(TOKENIZER)
        file, name = where / "tokenizer_config.json", "MiniCPMOTokenizerFast"
        own = {"AutoTokenizer": [None, f"tokenization_minicpmo_fast.{name}"]}
        told = json.loads(file.read_text()) | {"tokenizer_class": name, "auto_map": own}
        file.write_text(json.dumps(told, indent=1))
    auto = {
        "AutoProcessor": f"processing_minicpm.MiniCPM{letter}Processor",
        "AutoImageProcessor": "processing_minicpm.MiniCPMVImageProcessor",
    }
    image = dict(
        image_processor_type="MiniCPMVImageProcessor",
        processor_class=f"MiniCPM{letter}Processor",
        auto_map=auto,
        side=SIDE,
        patch_size=PATCH,
        image_feature_size=QUERIES,
    )
    if speech:
        image["feature_extractor_type"] = "WhisperFeatureExtractor"
    (where / "preprocessor_config.json").write_text(json.dumps(image, indent=1))


def _minicpm(base: str, version: str, speech: bool = False, **text: Any) -> Checkpoint:
    made, vocab = tokenizer((*MARKS, *(SPOKEN if speech else ())))
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
        write=partial(_write, made, base, version, speech),
    )


def minicpm_v_2_6() -> Checkpoint:
    return _minicpm("Qwen2", "2.6")


def minicpm_v_4_0() -> Checkpoint:
    return _minicpm("Llama", "4.0", head_dim=32)


def minicpm_v_4_5() -> Checkpoint:
    return _minicpm("Qwen3", "4.5", head_dim=32)


def minicpm_o_2_6() -> Checkpoint:
    return _minicpm("Qwen2", "2.6", speech=True)


def minicpm_o_4_5() -> Checkpoint:
    return _minicpm("Qwen3", "4.5", speech=True, head_dim=32)
