"""BLIP-2: OPT behind a Q-Former, whose tokens stand before everything else."""

from __future__ import annotations

import transformers as hf

from tests.families.making import MAX_POSITIONS, Checkpoint, tokenizer, tower_settings

TOKENS = 32


def blip2() -> Checkpoint:
    made, vocab = tokenizer(("<image>",))
    text = dict(
        model_type="opt",
        architectures=["OPTForCausalLM"],
        vocab_size=len(vocab),
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    config = hf.Blip2Config(
        vision_config=tower_settings(
            image_size=56, patch_size=14, hidden_act="quick_gelu", layer_norm_eps=0.05
        ),
        qformer_config=tower_settings(
            vocab_size=len(vocab),
            encoder_hidden_size=64,
            cross_attention_frequency=1,
            hidden_act="relu",
            layer_norm_eps=0.05,
        ),
        text_config=text,
        num_query_tokens=TOKENS,
        image_token_index=vocab["<image>"],
        image_token_id=vocab["<image>"],
        tie_word_embeddings=False,
    )
    return Checkpoint(
        model=hf.Blip2ForConditionalGeneration(config),
        processor=hf.Blip2Processor(
            image_processor=hf.BlipImageProcessor(size={"height": 56, "width": 56}),
            tokenizer=made,
            num_query_tokens=TOKENS,
        ),
        vocab=vocab,
        image="",
        image_ids=(vocab["<image>"],),
        sizes=((56, 56), (56, 56)),
        single=True,
        options={"limit_mm_per_prompt": {"image": 1}},
        decoder=lambda model: model.language_model.model.decoder,
    )
