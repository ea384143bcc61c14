"""Llama 4: three layers in four see a chunk of the tokens, the fourth everything, without positions; experts."""

from __future__ import annotations

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

SIDE, PATCH, SEEN = 112, 14, 32
"""Pixels of a tile and of a patch; tokens of a chunk: a block, and fewer than the tiles of a picture have."""
MARKS = (
    "<|image|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)


def llama4(**changes: object) -> Checkpoint:
    """The scales of queries without positions grow within a prompt; every other layer has experts."""
    made, vocab = tokenizer(MARKS)
    text = text_settings(
        vocab,
        head_dim=32,
        intermediate_size_mlp=256,
        intermediate_size=64,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=SEEN,
        floor_scale=16,
        attn_scale=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = hf.Llama4Config(
        text_config=hf.Llama4TextConfig(architectures=["Llama4ForCausalLM"], **(text | changes)),
        vision_config=hf.Llama4VisionConfig(
            **tower_settings(
                image_size=SIDE,
                patch_size=PATCH,
                intermediate_size=256,
                vision_output_dim=96,
                projector_input_dim=96,
                projector_output_dim=96,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        ),
        boi_token_index=vocab["<|image_start|>"],
        eoi_token_index=vocab["<|image_end|>"],
        image_token_index=vocab["<|patch|>"],
    )
    images = hf.Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=4)
    return Checkpoint(
        model=hf.Llama4ForConditionalGeneration(config),
        processor=hf.Llama4Processor(image_processor=images, tokenizer=made, patch_size=PATCH),
        vocab=vocab,
        image="<|image|>",
        image_ids=(vocab["<|patch|>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.language_model.model,
        # Else vLLM scales queries by their position from 32K tokens on alone.
        options={"override_generation_config": {"attn_temperature_tuning": True}},
        views=True,
        local=dict.fromkeys(range(3), SEEN),
    )
