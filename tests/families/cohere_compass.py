"""North Micro Vision: Cohere's parallel layers with M-RoPE, and Qwen3-VL's features injected between them.

transformers 5.19 orders the frequencies of its M-RoPE otherwise than vLLM 0.32, where they are Qwen3-VL's: they are in
the reference, too.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from tests.families.making import Checkpoint, text_settings, tokenizer
from tests.families.qwen import DEEPSTACK_TOWER, INTERLEAVED

SEEN = 24
"""How many tokens a layer with a window sees, the row's own included: fewer than a picture has."""
NAMED = dict(
    image_token="<|IMAGE_PAD|>",
    video_token="<|VIDEO_PAD|>",
    vision_start_token="<|VISION_START|>",
    vision_end_token="<|VISION_END|>",
)
TYPES = ["sliding_attention", "full_attention"] * 3


class _Rotary(torch.nn.Module):
    """Qwen3-VL's, the same in layers of either type."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inner = Qwen3VLTextRotaryEmbedding(config)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, layer_type: str) -> Any:
        return self.inner(hidden, positions.expand(3, -1, -1))


def cohere_compass() -> Checkpoint:
    made, vocab = tokenizer(tuple(NAMED.values()), NAMED)
    config = hf.CohereCompassConfig(
        text_config=text_settings(
            vocab,
            num_hidden_layers=len(TYPES),
            layer_types=TYPES,
            sliding_window=SEEN,
            rope_parameters=dict.fromkeys(sorted(set(TYPES)), INTERLEAVED),
            tie_word_embeddings=True,
        ),
        vision_config=dict(DEEPSTACK_TOWER, patch_size=16),
        image_token_id=vocab["<|IMAGE_PAD|>"],
        video_token_id=vocab["<|VIDEO_PAD|>"],
        vision_start_token_id=vocab["<|VISION_START|>"],
        vision_end_token_id=vocab["<|VISION_END|>"],
        tie_word_embeddings=True,
    )
    sizes = dict(patch_size=16, min_pixels=32 * 32, max_pixels=32 * 32 * 200)
    model = hf.CohereCompassForConditionalGeneration(config)
    qwen = hf.Qwen3VLTextConfig(**text_settings(vocab, head_dim=32, rope_parameters=INTERLEAVED))
    model.model.language_model.rotary_emb = _Rotary(qwen)
    return Checkpoint(
        model=model,
        processor=hf.CohereCompassProcessor(
            image_processor=hf.CohereCompassImageProcessor(**sizes),
            tokenizer=made,
            video_processor=hf.CohereCompassVideoProcessor(patch_size=16),
        ),
        vocab=vocab,
        image="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        image_ids=(vocab["<|IMAGE_PAD|>"],),
        sizes=((160, 256), (192, 128)),
        decoder=lambda model: model.model.language_model,
        windows={layer: SEEN for layer, kind in enumerate(TYPES) if kind == "sliding_attention"},
    )
