"""EXAONE 4.5: three layers in four see a sliding window, and only those turn queries and keys by position.

vLLM's tower and transformers' do not agree on these weights, so the reference begins at the embeddings that vLLM made.
"""

from __future__ import annotations

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer

SEEN = 24
"""Tokens that a layer with a window sees, the row's own included: fewer than a picture has."""
SLIDING = (0, 1, 2)


def exaone4_5() -> Checkpoint:
    named = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    made, vocab = tokenizer(("<vision>", "</vision>", *named.values()), named)
    config = hf.Exaone4_5_Config(
        text_config=text_settings(
            vocab,
            model_type="exaone4",
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            sliding_window=SEEN,
            sliding_window_pattern=4,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            num_key_value_heads=2,
            out_hidden_size=128,
            window_size=112,
            fullatt_block_indexes=[1],
        ),
        image_token_id=vocab[named["image_token"]],
        video_token_id=vocab[named["video_token"]],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    return Checkpoint(
        model=hf.Exaone4_5_ForConditionalGeneration(config),
        processor=None,
        saved=hf.Exaone4_5_Processor(
            image_processor=hf.Qwen2VLImageProcessor(patch_size=14, size=size),
            tokenizer=made,
            video_processor=hf.Qwen2VLVideoProcessor(patch_size=14, size=size),
        ),
        vocab=vocab,
        image="<vision><|image_pad|></vision>",
        image_ids=(vocab[named["image_token"]],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model.language_model,
        windows=dict.fromkeys(SLIDING, SEEN),
    )
