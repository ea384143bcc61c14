"""Muse Glimmer: three in four layers with a sliding window, the others without positions; gates behind attention.

transformers and vLLM prepare pictures differently, and vLLM has a configuration class of its own: the language model is
the reference, from the embeddings that vLLM made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.families.gemma import SEEN
from tests.families.making import Checkpoint, text_settings, tokenizer, tower_settings

WIDTH, ADAPTER, PATCH = 64, 96, 14
MARKS = (
    "<|patch|>",
    "<|image|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|video|>",
    "<|vid_start|>",
    "<|vid_end|>",
    "<|vid_frame_separator|>",
)


class _Scores(torch.nn.Module):
    """The head, and what follows it: transformers keeps that in the whole model's forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.head, self.config = model.lm_head, model.config.text_config

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        cap = self.config.final_logit_softcapping
        logits_TV: torch.Tensor = self.head(hidden_TH) * self.config.output_multiplier
        return cap * torch.tanh(logits_TV / cap)


def _write(made: Any, model: Any, where: Path) -> None:
    model.model.language_model.norm.weight.data.add_(1)  # the others have an offset of one
    model.config.dtype = torch.float32
    model.save_pretrained(where)
    made.save_pretrained(where)
    model.get_output_embeddings = lambda: _Scores(model)
    file = where / "config.json"
    config = json.loads(file.read_text()) | {
        "architectures": ["MuseGlimmerForConditionalGeneration"]
    }
    config["vision_config"] |= dict(merge_kernel_size=2, output_dim=4 * WIDTH, adapter_dim=ADAPTER)
    file.write_text(json.dumps(config, indent=1))


def muse_glimmer() -> Checkpoint:
    made, vocab = tokenizer(MARKS)
    config = hf.MuseGlimmerConfig(
        text_config=text_settings(
            vocab, head_dim=32, sliding_window=SEEN, output_multiplier=0.5, qk_scale_factor=2.0
        ),
        vision_config=tower_settings(
            patch_size=PATCH,
            pos_emb_height=8,
            pos_emb_width=8,
            max_position_embeddings=64,
            layer_types=["window_attention", "full_attention"],
        ),
        image_token_id=vocab["<|patch|>"],
        video_token_id=vocab["<|video|>"],
        out_hidden_size=4 * WIDTH,
        projector_hidden_size=ADAPTER,
        tie_word_embeddings=False,
    )
    return Checkpoint(
        model=hf.MuseGlimmerForConditionalGeneration(config),
        processor=None,
        vocab=vocab,
        image="<|patch|>",
        image_ids=(vocab["<|patch|>"],),
        sizes=((140, 224), (168, 112)),
        decoder=lambda model: model.model.language_model,
        write=lambda model, where: _write(made, model, where),
        unit_offset=True,
        windows=dict.fromkeys(range(3), SEEN),
    )
