"""The small model's tokenizer: SmolLM2's, cut to the commonest merges and the demo's own words."""

from __future__ import annotations

from typing import Any

from vllm_flow.demo_model.prompt import SYSTEM_TEXT
from vllm_flow.demo_model.questions import ANSWER_SUFFIX, CAPTION_REQUEST, listing, presence
from vllm_flow.demo_model.smollm2 import read_tokenizer
from vllm_flow.demo_model.vocabulary import CLASSES

FIRST = 768
"""Ids kept as they are: 17 special tokens, 256 bytes, the first merges."""


def small_tokenizer() -> Any:
    """A tokenizer that cuts the demo's questions as SmolLM2's does: most words are one token, so that few
    layers suffice."""
    asked = " ".join(presence(name) + ANSWER_SUFFIX for name in CLASSES)
    captions = " ".join(listing([name]) for name in CLASSES)
    chat = f"system\nuser\nassistant\n{SYSTEM_TEXT} Yes No"
    return read_tokenizer(
        first=FIRST, text=f"{chat}\n{asked}\n{captions}\n{CAPTION_REQUEST}\nYes\nNo"
    )
