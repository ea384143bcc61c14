"""InstructBLIP: BLIP-2 whose Q-Former also reads the instruction, so a picture's 32 tokens depend on it.

Stands on vLLM's BLIP-2 (``vllm/model_executor/models/blip2.py``); checkpoints are those of
transformers with a Vicuna (Llama) language model. Image tokens stand before everything else.

vLLM's processors no longer see the prompt's text when they process a picture. It is handed on as an
option of the processor: options are part of a picture's hash, so the processor's cache, the encoder's
cache and the prefix cache all tell one picture under two instructions apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import InstructBlipConfig, InstructBlipQFormerModel
from vllm.config import VllmConfig
from vllm.model_executor.models.blip2 import (
    Blip2DummyInputsBuilder,
    Blip2ForConditionalGeneration,
    Blip2MultiModalProcessor,
    Blip2ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from vllm_flow.models import replace_tower_part

INSTRUCTION = "instruction"
"""The processor's option that carries the prompt's text."""


class InstructBlipProcessingInfo(Blip2ProcessingInfo):
    """vLLM's facts about BLIP-2, read from InstructBLIP's configuration."""

    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config(InstructBlipConfig)


class InstructBlipMultiModalProcessor(Blip2MultiModalProcessor):
    """Gives transformers' processor the instruction beside the picture."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        text = self.info.get_tokenizer().decode(inputs.prompt, skip_special_tokens=True)
        options = {**inputs.hf_processor_mm_kwargs, INSTRUCTION: text}
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        options = dict(hf_kwargs)
        text = options.pop(INSTRUCTION, "")
        found = super()._get_hf_mm_inputs(mm_items, options)
        data, *others = found
        if not data:
            return found
        texts = [text] * mm_items.get_count("image", strict=False)
        return type(found)({**data, "text": texts}, *others)

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        names = ("pixel_values", "image_embeds", "qformer_input_ids", "qformer_attention_mask")
        return {name: MultiModalFieldConfig.batched("image") for name in names}


@MULTIMODAL_REGISTRY.register_processor(
    InstructBlipMultiModalProcessor,
    info=InstructBlipProcessingInfo,
    dummy_inputs=Blip2DummyInputsBuilder,
)
class InstructBlipForConditionalGeneration(Blip2ForConditionalGeneration):
    """vLLM's BLIP-2 with transformers' Q-Former in its place.

    Raises:
        ValueError: the language model is an encoder-decoder (Flan-T5), whose prompt holds no picture.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if config.text_config.is_encoder_decoder:
            raise ValueError(
                "InstructBLIP is served with a Vicuna language model, not with an encoder-decoder "
                f"({config.text_config.model_type}); use a checkpoint such as "
                "Salesforce/instructblip-vicuna-7b."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # A few small layers, run once per picture: transformers' own, named as those on disk.
        replace_tower_part(
            self, "qformer", lambda: InstructBlipQFormerModel(config.qformer_config).eval()
        )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings of the pictures, ``num_query_tokens`` x H each."""
        if kwargs.get("image_embeds") is not None:
            return kwargs["image_embeds"]
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return []
        features = self.vision_model(pixels if torch.is_tensor(pixels) else torch.stack(pixels))
        texts = zip(kwargs["qformer_input_ids"], kwargs["qformer_attention_mask"], strict=True)
        return [
            self._query(feature, ids, mask)
            for feature, (ids, mask) in zip(features, texts, strict=True)
        ]

    def _query(self, picture: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One picture's patches [P, W] under one instruction [T] -> its tokens [Q, H]."""
        queries = self.query_tokens.shape[1]
        output = self.qformer(
            input_ids=ids[None],
            attention_mask=torch.cat([mask.new_ones(queries), mask])[None],
            query_embeds=self.query_tokens,
            encoder_hidden_states=picture[None],
            encoder_attention_mask=mask.new_ones(1, picture.shape[0]),
        )[0]
        return self.language_projection(output[0, :queries])
