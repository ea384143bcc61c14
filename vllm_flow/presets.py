"""Published recipes by name: what of the paper is the same here, and what is not.

A preset is nothing but stages; the front end writes them in its place, and nothing behind knows presets.
Papers give layers of a decoder with 32: others get the nearest of their own, in proportion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from vllm_flow.policy import Keep, Stage

PUBLISHED_LAYERS = 32
"""Decoder layers of the models that the papers give their layers for (LLaVA-1.5-7B)."""
PUBLISHED_TOKENS = 576
"""Image tokens of the same models: counts become shares of an image."""


@dataclass(frozen=True)
class Preset:
    """A published recipe."""

    name: str
    published: tuple[Stage, ...]
    """With layers of a decoder with 32."""
    same: str
    different: str
    source: str

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """The stages for a decoder of ``num_layers`` layers, none of them at its end or past it.

        A stage that ranks by attention is never moved to layer 0, where nothing has attended yet.
        """
        found: dict[int, Stage] = {}
        for stage in self.published:
            layer = round(Fraction(stage.layer * num_layers, PUBLISHED_LAYERS))
            layer = max(layer, min(stage.layer, 1))
            found[layer] = Stage(layer, stage.keep, stage.rank)  # of two at one layer, the later
        return tuple(stage for stage in found.values() if stage.layer < num_layers)


def _share(tokens: int) -> Keep:
    return Fraction(tokens, PUBLISHED_TOKENS)


_FLOW = "From Redundancy to Relevance: Information Flow in LVLMs Across Reasoning Tasks"
_HORIZON = (
    "DivPrune's choice before the decoder, then withdrawal where a paper on the information horizon of "
    "visual tokens puts it"
)

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper",
            (Stage(22),),
            "all image tokens leave at layer 22 of 32, where section 4.2 puts POPE's cliff",
            "the paper masks keys; here rows leave, which gives the same answers for less work",
            f"{_FLOW}, section 4.2",
        ),
        Preset(
            "fastv",
            (Stage(2, Fraction(1, 2), "last_prompt"),),
            "K = 2, R = 50 %, ranked by the head-averaged attention of the prompt's last token in the "
            "layer before",
            "kept tokens keep their positions",
            "An Image is Worth 1/2 Tokens After Layer 2 (FastV), section 4",
        ),
        Preset(
            "vtw",
            (Stage(16),),
            "all image tokens leave at half the depth, the layer found for LLaVA-1.5-7B",
            "the layer is not searched for per task: `vllm-flow cliff` does that",
            "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal (VTW), section 3.3",
        ),
        Preset(
            "pyramiddrop",
            (
                Stage(8, Fraction(1, 2), "last_prompt"),
                Stage(16, Fraction(1, 4), "last_prompt"),
                Stage(24, Fraction(1, 8), "last_prompt"),
            ),
            "half of the tokens left stay at each quarter of the depth, chosen by the prompt's last token",
            "ranked by the attention of the layer before, where the released code looks ahead with the "
            "queries and keys of the layer that comes",
            "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
            "Reduction, section 3.2",
        ),
        Preset(
            "divprune",
            (Stage(0, _share(64), "diversity"),),
            "64 of 576 tokens, farthest first in cosine distance, before the decoder",
            "kept tokens keep their positions",
            "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, section 3.2",
        ),
        Preset(
            "horizon-192",
            (Stage(0, _share(284), "diversity"), Stage(20)),
            "284 of 576 diverse tokens up to layer 20: 178 a layer on average",
            "kept tokens keep their positions",
            f"{_HORIZON} (a budget of 192)",
        ),
        Preset(
            "horizon-64",
            (Stage(0, _share(98), "diversity"), Stage(21)),
            "98 of 576 diverse tokens up to layer 21: 64 a layer on average",
            "kept tokens keep their positions",
            f"{_HORIZON} (a budget of 64)",
        ),
    )
}
"""Every preset this version knows, by the name that a request sends."""
