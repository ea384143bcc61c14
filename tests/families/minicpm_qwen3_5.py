"""MiniCPM-V 4.6 and 4.7: slices of a picture in front of Qwen3.5's decoder, in transformers' layout.

4.7 gives the slices positions on one canvas (M-RoPE), 4.6 counts them as it counts words.
"""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings
from tests.families.qwen import linear_text

PATCH, SIDE = 14, 224
"""A token is 4 x 4 patches, a slice 16 tokens."""
NAMED = dict(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    image_start_token="<image>",
    image_end_token="</image>",
    slice_start_token="<slice>",
    slice_end_token="</slice>",
    image_id_start_token="<image_id>",
    image_id_end_token="</image_id>",
)


def _minicpm(kind: str, **changes: Any) -> Checkpoint:
    made, vocab = tokenizer((*NAMED.values(), "\n"), NAMED)
    made.image_token_id, made.video_token_id = vocab["<|image_pad|>"], vocab["<|video_pad|>"]
    ids = {name: vocab[token] for name, token in changes.pop("ids", {}).items()}
    config = getattr(hf, f"{kind}Config")(
        text_config=hf.Qwen3_5TextConfig(**text_settings(vocab, **linear_text())),
        vision_config=tower_settings(
            image_size=SIDE, patch_size=PATCH, num_hidden_layers=3, insert_layer_id=0
        ),
        insert_layer_id=0,
        image_size=SIDE,
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        tie_word_embeddings=False,
        **ids,
        **changes,
    )
    pictures = dict(max_slice_nums=2, scale_resolution=SIDE, patch_size=PATCH)
    return Checkpoint(
        model=getattr(hf, f"{kind}ForConditionalGeneration")(config),
        processor=getattr(hf, f"{kind}Processor")(
            image_processor=hf.MiniCPMV4_6ImageProcessor(**pictures),
            video_processor=hf.MiniCPMV4_6VideoProcessor(**pictures),
            tokenizer=made,
        ),
        vocab=vocab,
        image="<|image_pad|>",
        image_ids=(vocab["<|image_pad|>"],),
        sizes=((SIDE, 2 * SIDE), (SIDE, SIDE)),
        decoder=lambda model: model.model.language_model,
        recurrent=True,
        unit_offset=True,
        write_ids=lambda text, _: made.encode(text),
    )


def minicpm_v_4_6() -> Checkpoint:
    return _minicpm("MiniCPMV4_6")


def minicpm_v_4_7() -> Checkpoint:
    return _minicpm(
        "MiniCPMV4_7",
        uses_mrope_canvas=True,
        ids=dict(
            image_start_id="<image>",
            image_end_id="</image>",
            slice_start_id="<slice>",
            slice_end_id="</slice>",
            newline_id="\n",
        ),
    )
