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
    "When Token Pruning is Worse than Random: Understanding Visual Token Information in VLLMs (arXiv "
    "2512.07580; version 1: All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs)"
)
_HORIZON_DIFFERENT = (
    "counts and layer are as cited from the paper, whose code was not released when this was written, so "
    "nothing could be compared with it; its abstract speaks of random tokens in deep layers, here none are "
    "left; kept tokens keep their positions"
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
            "K = 2, R = 50 %; ranked by the head-averaged attention of the prompt's last token in the layer "
            "before, and kept tokens keep their positions, both as in the released code",
            "the paper's text averages over all tokens' attention, its released code and this take the last one's; "
            "a share rounds down, the code's to the nearest",
            "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
            "Vision-Language Models (arXiv 2403.06764), section 4; code: pkunlp-icler/FastV",
        ),
        Preset(
            "vtw",
            (Stage(15),),
            "all image tokens leave at layer 15 of 32, K = 15 of the released evaluation of LLaVA-1.5-7B, and "
            "text keeps its positions",
            "K is not searched for per task: `vllm-flow cliff --unlabelled` does that; the released chat takes 16",
            "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference (arXiv "
            "2405.05803), section 3; code: lzhxmu/VTW",
        ),
        Preset(
            "pyramiddrop",
            (
                Stage(8, Fraction(1, 2), "last_prompt"),
                Stage(16, Fraction(1, 4), "last_prompt"),
                Stage(24, Fraction(1, 8), "last_prompt"),
            ),
            "1/2, 1/4 and 1/8 of the image's tokens from layers 8, 16 and 24 of 32 on, rounded down, chosen by "
            "the prompt's last token, averaged over heads",
            "ranked by the attention of the layer before, where the released code looks ahead with queries and "
            "keys of the layer that comes; kept tokens keep their positions, where that code numbers them anew",
            "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
            "Reduction (arXiv 2410.17247), section 3; code: Cooperx521/PyramidDrop",
        ),
        Preset(
            "divprune",
            (Stage(0, Fraction(98, 1000), "diversity"),),
            "9.8 % of the tokens (56 of 576), the released code's ratio, before the decoder: farthest first in "
            "cosine distance of the embeddings that enter it, beginning with the one whose nearest is farthest",
            "kept tokens keep their positions, where the released code numbers them anew; a share rounds down, "
            "the code's to the nearest",
            "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175), "
            "section 3; code: vbdi/divprune",
        ),
        Preset(
            "horizon-192",
            (Stage(0, _share(284), "diversity"), Stage(20)),
            "284 of 576 diverse tokens up to layer 20: 177.5 a layer on average",
            _HORIZON_DIFFERENT,
            f"{_HORIZON}, DivPrune with withdrawal at a budget of 192",
        ),
        Preset(
            "horizon-64",
            (Stage(0, _share(98), "diversity"), Stage(21)),
            "98 of 576 diverse tokens up to layer 21: 64.3 a layer on average",
            _HORIZON_DIFFERENT,
            f"{_HORIZON}, DivPrune with withdrawal at a budget of 64",
        ),
    )
}
"""Every preset this version knows, by the name that a request sends."""
