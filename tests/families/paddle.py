"""PaddleOCR-VL: Ernie 4.5 behind a tower that takes pictures of their own size, M-RoPE.

Where a picture is not of the tower's own size, transformers stretches the table of positions from corner to
corner and vLLM does not, so the reference begins at the embeddings that vLLM made.
"""

from __future__ import annotations

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

MARKS = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|video|>")
IMAGE = "<|IMAGE_PLACEHOLDER|>"


def paddleocr_vl() -> Checkpoint:
    made, vocab = tokenizer((*MARKS, IMAGE), dict(image_token=IMAGE))
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    config = hf.PaddleOCRVLConfig(
        text_config=text_settings(vocab, head_dim=32, rope_parameters=rope),
        vision_config=tower_settings(image_size=112, patch_size=14),
        image_token_id=vocab[IMAGE],
        video_token_id=vocab["<|video|>"],
        vision_start_token_id=vocab["<|IMAGE_START|>"],
        vision_end_token_id=vocab["<|IMAGE_END|>"],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    return Checkpoint(
        model=hf.PaddleOCRVLForConditionalGeneration(config),
        processor=None,
        saved=hf.PaddleOCRVLProcessor(
            image_processor=hf.PaddleOCRVLImageProcessor(patch_size=14, size=size),
            tokenizer=made,
        ),
        vocab=vocab,
        image=f"<|IMAGE_START|>{IMAGE}<|IMAGE_END|>",
        image_ids=(vocab[IMAGE],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model.language_model,
    )
