"""Aria: a Llama with a mixture of experts in every layer, behind an Idefics tower and queries that read it."""

from __future__ import annotations

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

SIDE, PATCH, QUERIES = 980, 140, 32
"""The processor makes every picture 980 pixels wide and high."""


def aria() -> Checkpoint:
    made, vocab = tokenizer(("<|img|>",), dict(image_token="<|img|>"))
    config = hf.AriaConfig(
        vision_config=tower_settings(
            image_size=SIDE, patch_size=PATCH, num_hidden_layers=3, model_type="idefics3_vision"
        ),
        text_config=hf.AriaTextConfig(
            **text_settings(vocab, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
        ),
        projector_patch_to_query_dict={(SIDE // PATCH) ** 2: QUERIES},
        image_token_index=vocab["<|img|>"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return Checkpoint(
        model=hf.AriaForConditionalGeneration(config),
        processor=None,
        saved=hf.AriaProcessor(
            image_processor=hf.AriaImageProcessor(max_image_size=SIDE, split_image=False),
            tokenizer=made,
            size_conversion={SIDE: QUERIES},
        ),
        vocab=vocab,
        image="<|img|>",
        image_ids=(vocab["<|img|>"],),
        sizes=((140, 210), (210, 210)),
        decoder=lambda model: model.model.language_model,
        unused=("num_crops",),
    )
