"""Qwen-VL's pictures on their way to the model: pixels, and their place in the prompt.

A prompt has ``Picture 1: <img></img>`` for each picture; between the two marks ``<imgpad>`` tokens take
the place of its embeddings. A URL or a path there, as the published prompts have it, is left out: which
picture it is, the request says.

Seam: vLLM's ``BaseMultiModalProcessor``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_transforms import to_pil_image
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from vllm_flow.counts import counted
from vllm_flow.models.qwen_vl_config import QwenVLConfig, check

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pixels, between 0 and 1."""


def without_content(prompt: Sequence[int], start: int, end: int) -> tuple[list[int], int]:
    """A prompt with nothing between each ``start`` and the ``end`` after it, and how many pairs there are."""
    left: list[int] = []
    pairs, at = 0, 0
    while at < len(prompt):
        left.append(prompt[at])
        if prompt[at] == start:
            close = next((i for i in range(at, len(prompt)) if prompt[i] == end), None)
            if close is not None:
                left.append(end)
                pairs, at = pairs + 1, close
        at += 1
    return left, pairs


class QwenVLImages:
    """What transformers calls an image processor: each picture at the tower's size, whatever its own."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, images: Sequence[Any], return_tensors: str | None = None) -> BatchFeature:
        return BatchFeature({"pixel_values": torch.stack(list(self._pixels(images)))})

    def _pixels(self, images: Sequence[Any]) -> Iterator[torch.Tensor]:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        for image in images:
            picture = to_pil_image(image).convert("RGB")
            picture = picture.resize((self.image_size,) * 2, Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
            yield (pixels - mean) / std


class QwenVLProcessingInfo(BaseProcessingInfo):
    """Facts about the model's pictures.

    Raises:
        ValueError: the model, or its ``--max-model-len``, cannot be served.
    """

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        check(self.get_hf_config(), ctx.model_config.max_model_len)

    def get_hf_config(self) -> QwenVLConfig:
        return self.ctx.get_hf_config(QwenVLConfig)

    def get_hf_processor(self, **kwargs: object) -> Any:
        options = self.ctx.get_merged_mm_kwargs(kwargs)
        if options:
            raise ValueError(
                "Qwen-VL's pictures have one size and one form: leave out mm_processor_kwargs, it has "
                f"{', '.join(sorted(options))}."
            )
        return QwenVLImages(self.get_hf_config().visual["image_size"])  # type: ignore[index]

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.get_hf_config().image_tokens}


class QwenVLDummyInputs(BaseDummyInputsBuilder[QwenVLProcessingInfo]):
    """A prompt with pictures, for profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        count = mm_counts.get("image", 0)
        return "".join(f"Picture {number}: <img></img>\n" for number in range(1, count + 1))

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> Any:
        side = self.info.get_hf_processor().image_size
        count = mm_counts.get("image", 0)
        options = mm_options.get("image")
        return {
            "image": self._get_dummy_images(
                width=side, height=side, num_images=count, overrides=options
            )
        }


class QwenVLMultiModalProcessor(BaseMultiModalProcessor[QwenVLProcessingInfo]):
    """Puts each picture between its marks."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        start = self.info.get_hf_config().image_start_id
        places = without_content(inputs.prompt, start, start + 1)[1]
        pictures = inputs.mm_data_items.get_count("image", strict=False)
        if places != pictures:
            raise ValueError(
                f"Qwen-VL's prompt has a place for each picture, <img></img>: this one has {places}, "
                f"and {counted(pictures, 'picture was', 'pictures were')} sent."
            )
        return super().apply(inputs, timing_ctx)

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        start = self.info.get_hf_config().image_start_id
        return without_content(prompt, start, start + 1)[0]

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        names = ("pixel_values", "image_embeds")
        return {name: MultiModalFieldConfig.batched("image") for name in names}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        start, pad = config.image_start_id, config.image_token_id
        tokens = [start, *[pad] * config.image_tokens, start + 1]
        return [
            PromptReplacement(
                modality="image",
                target=[start, start + 1],
                replacement=PromptUpdateDetails.select_token_id(tokens, embed_token_id=pad),
            )
        ]
