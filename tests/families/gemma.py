"""Gemma 3: the tokens of a picture see one another in both directions; most layers see a sliding window."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

SIDE, TOKENS, SEEN = 32, 16, 24
"""Pixels and tokens of a picture; how many tokens a layer with a window sees, the row's own included: more than a
picture has, or its tokens would see each other in one direction, and fewer than a prompt has."""
NEWLINES = tuple("\n" * count for count in range(1, 5))
NAMED = dict(
    image_token="<image_soft_token>",
    boi_token="<start_of_image>",
    eoi_token="<end_of_image>",
)


def gemma3(head_dim: int = 32, **text: Any) -> Checkpoint:
    made, vocab = tokenizer((*NAMED.values(), *NEWLINES), NAMED)
    settings = text_settings(vocab, tie_word_embeddings=True, head_dim=head_dim) | text
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            architectures=["Gemma3ForCausalLM"],
            **settings,
            sliding_window=SEEN,
            query_pre_attn_scalar=head_dim,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        vision_config=hf.SiglipVisionConfig(
            **tower_settings(image_size=SIDE, patch_size=4, vision_use_head=False)
        ),
        mm_tokens_per_image=TOKENS,
        boi_token_index=vocab["<start_of_image>"],
        eoi_token_index=vocab["<end_of_image>"],
        image_token_index=vocab["<image_soft_token>"],
    )
    return Checkpoint(
        model=hf.Gemma3ForConditionalGeneration(config),
        processor=hf.Gemma3Processor(
            image_processor=hf.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
            tokenizer=made,
            image_seq_length=TOKENS,
        ),
        vocab=vocab,
        image="<start_of_image>",
        image_ids=(vocab["<image_soft_token>"],),
        sizes=((SIDE, SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model.language_model,
        options={"disable_chunked_mm_input": True},
        nested=True,
        rename=lambda name: name.replace("vision_tower.", "vision_tower.vision_model.", 1),
        attention="TRITON_ATTN",
        windows={0: SEEN, 2: SEEN},
        unit_offset=True,
        embeddings=0.3,  # the model makes them larger
    )
