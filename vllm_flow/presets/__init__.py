"""Published methods by name, each with what is as published and what is not.

A preset is nothing but stages: the front end writes them in its place, and nothing behind it knows presets. Papers give
layers of a decoder with 32; others get the nearest of their own, in proportion. Where the authors have released code it
was read: which layer's attention ranks, which layers drop tokens, which ratios it takes, and whether kept tokens keep
their positions.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_flow.presets.base import PUBLISHED_LAYERS, PUBLISHED_TOKENS, Paper, Preset
from vllm_flow.presets.by_decoder import DART, FASTV, FEATHER, PYRAMIDDROP, SPARSEVLM
from vllm_flow.presets.by_picture import (
    DIVPRUNE,
    DYCOKE,
    FASTERVLM,
    HIRED,
    HOLOV,
    SCOPE,
    VISPRUNER,
)
from vllm_flow.presets.merging import PRUMERGES, VISIONZIPS
from vllm_flow.presets.withdrawal import HORIZONS, PAPER, VTW

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        *(PAPER, VTW, *HORIZONS),
        *(FASTV, PYRAMIDDROP, SPARSEVLM, FEATHER, DART),
        *(DIVPRUNE, FASTERVLM, VISPRUNER, SCOPE, HOLOV, HIRED, DYCOKE),
        *(*VISIONZIPS, *PRUMERGES),
    )
}
"""Every preset this version knows, by the name that a request sends."""

__all__ = ["PRESETS", "PUBLISHED_LAYERS", "PUBLISHED_TOKENS", "Paper", "Preset"]
