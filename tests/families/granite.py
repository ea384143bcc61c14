"""Granite 4 Vision: features of several tower layers are added before layers of the language model."""

from __future__ import annotations

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

SIDE, PATCH, RATE = 64, 8, "1/2"
PINPOINTS = [[64, 64], [64, 128], [128, 64], [128, 128]]
MULTIPLIERS = dict(
    embedding_multiplier=1.5,
    logits_scaling=0.7,
    residual_multiplier=0.6,
    attention_multiplier=0.2,
)


def granite4_vision() -> Checkpoint:
    """Eight layers, features before seven of them: cliffs lie before, between and after."""
    made, vocab = tokenizer(("<image>",), dict(image_token="<image>"))
    tower = tower_settings(image_size=SIDE, patch_size=PATCH, num_hidden_layers=4)
    config = hf.Granite4VisionConfig(
        text_config=text_settings(
            vocab,
            model_type="granite4_vision_text",
            num_hidden_layers=8,
            **MULTIPLIERS,
        ),
        vision_config=hf.SiglipVisionConfig(**tower, vision_use_head=False),
        image_token_index=vocab["<image>"],
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_rate=RATE,
        deepstack_layer_map=[[-1, 3], [-2, 2], [1, 0]],
        spatial_vision_layer=-1,
        spatial_target_layers=[4, 5, 6, 1],
        projector_dropout=0.0,
        tie_word_embeddings=False,
    )
    return Checkpoint(
        model=hf.Granite4VisionForConditionalGeneration(config),
        processor=hf.Granite4VisionProcessor(
            image_processor=hf.LlavaNextImageProcessor(
                size={"height": SIDE, "width": SIDE},
                crop_size={"height": SIDE, "width": SIDE},
                image_grid_pinpoints=PINPOINTS,
            ),
            tokenizer=made,
            patch_size=PATCH,
            vision_feature_select_strategy="full",
            downsample_rate=RATE,
        ),
        vocab=vocab,
        image="<image>",
        image_ids=(vocab["<image>"],),
        sizes=((64, 128), (100, 60)),
        decoder=lambda model: model.model.language_model,
        rename=lambda name: name.replace("vision_tower.", "vision_tower.vision_model.", 1),
    )
