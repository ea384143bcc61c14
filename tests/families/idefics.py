"""Idefics 3 and SmolVLM: a picture as tiles and a thumbnail, each between markers that are text."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

NAMED = dict(
    image_token="<image>",
    fake_image_token="<fake_token_around_image>",
    global_image_token="<global-img>",
    end_of_utterance_token="<end_of_utterance>",
)
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def _idefics(kind: str, **processors: Any) -> Checkpoint:
    made, vocab = tokenizer((*NAMED.values(), *TILES), NAMED)
    config = getattr(hf, f"{kind}Config")(
        vision_config=tower_settings(image_size=64, patch_size=8),
        text_config=hf.LlamaConfig(architectures=["LlamaForCausalLM"], **text_settings(vocab)),
        image_token_id=vocab["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=3,
    )
    return Checkpoint(
        model=getattr(hf, f"{kind}ForConditionalGeneration")(config),
        processor=getattr(hf, f"{kind}Processor")(
            image_processor=getattr(hf, f"{kind}ImageProcessor")(
                size={"longest_edge": 128}, max_image_size={"longest_edge": 64}
            ),
            tokenizer=made,
            image_seq_len=16,
            **processors,
        ),
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=((64, 128), (128, 64)),
        decoder=lambda model: model.model.text_model,
        nested=True,
    )


def idefics3() -> Checkpoint:
    return _idefics("Idefics3")


def smolvlm() -> Checkpoint:
    edges = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 64})
    return _idefics("SmolVLM", video_processor=hf.SmolVLMVideoProcessor(**edges))
