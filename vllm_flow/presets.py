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

        A stage that ranks by the layer before is never moved to layer 0, where there is none.
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


def _visionzip(dominant: int, contextual: int) -> Preset:
    keep = dominant + contextual
    split = (
        "all"
        if keep == 64
        else "the split is in the proportion of its README's 54 and 10, all else"
    )
    return Preset(
        f"visionzip-{keep}",
        (Stage(0, _share(keep), "visionzip"),),
        f"{keep} of 576 tokens before the decoder: {dominant} dominant ones by the class token's attention, and of "
        f"the others, in reading order, {contextual} contextual ones at equal steps; each token that goes is "
        "assigned to the contextual one with the likest key (cosine, keys averaged over heads), and before the "
        "projector their mean is added to that one; attention and keys of the layer whose output the decoder gets; "
        f"{split} as in the released code",
        f"one of the {dominant} is the class token itself there, and here one more patch; kept tokens keep their "
        "positions, where that code puts the contextual ones last and numbers all anew; LLaVA-NeXT's tiles are one "
        "picture here, and each keeps so many there",
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467), section 3; code: "
        "dvlab-research/VisionZip",
    )


def _prumerge(name: str, rank: str, keep: int, same: str, counted: str) -> Preset:
    return Preset(
        name,
        (Stage(0, _share(keep), rank),),
        f"{keep} of 576 tokens before the decoder, {same}; to each, before the projector, the 32 others with the "
        "likest keys (cosine) are added, times what the class token gives them, whether they stay or go; as in the "
        "released code",
        f"how many stay is the policy's, where {counted} the outliers of the picture's attention; attention and keys "
        "are of the layer whose output the decoder gets, averaged over heads, and there of the tower's last, which is "
        "not built here, all heads as one; the one more token there, the sum of all that go, has no place in the "
        "picture and is left out; kept tokens keep their positions, where that code numbers them anew",
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388), section 3; "
        "code: 42Shawn/LLaVA-PruMerge",
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
            "fastervlm",
            (Stage(0, _share(29), "cls_attention"),),
            "29 of 576 tokens before the decoder, the abstract's 95 % reduction: those that the tower's class token "
            "attends to most, averaged over heads, in the layer whose output the decoder gets, as in the released code",
            "kept tokens keep their positions, where the released code numbers them anew; of LLaVA-NeXT's tiles the "
            "code keeps 29 each and every end of a row besides, here the best of the whole picture stay, ends of rows "
            "first",
            "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster (arXiv "
            "2412.01818, version 1), section 3; code: Theia-4869/FasterVLM",
        ),
        Preset(
            "vispruner",
            (Stage(0, _share(64), "cls_diverse"),),
            "64 of 576 tokens before the decoder, one of the released README's two examples: half by the class token's "
            "attention; of the others, eight a round, those of every second token go that are most like one between",
            "how alike tokens are is told by the embeddings that enter the decoder, where the released code takes the "
            "tower's features; kept tokens keep their positions, where that code numbers them anew; LLaVA-NeXT's tiles "
            "are one picture here, each a picture of its own there",
            "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (arXiv "
            "2412.01818, version 2), section 3; code: Theia-4869/VisPruner",
        ),
        Preset(
            "scope",
            (Stage(0, _share(64), "scope"),),
            "64 of 576 tokens before the decoder, as in the released README: one after the other the token that adds "
            "most to how far all are covered by the likest one that stays (cosine), times what the class token gives "
            "it, over all heads, in the layer whose output the decoder gets, with the exponent 1 of its script",
            "how alike tokens are is told by the embeddings that enter the decoder, where the released code takes the "
            "tower's features; kept tokens keep their positions, where that code numbers them anew; LLaVA-NeXT's tiles "
            "are one picture here, and each keeps so many there",
            "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs (arXiv 2510.24214); code: "
            "kinredon/SCOPE",
        ),
        Preset(
            "holov",
            (Stage(0, _share(64), "holov"),),
            "64 of 576 tokens before the decoder, in 16 crops, the released code's: runs of 36 tokens in reading "
            "order, each with its mean attention's share of the 64, rounded down, the rest one each to those with "
            "most; in each what the class token attends to most, over all heads, in the layer whose output the decoder "
            "gets",
            "the variance of how like a crop's tokens are is left out: the released code scales it to the crop's own "
            "attention, so that all shares grow alike; where a crop has fewer tokens than its share that code fills up "
            "with zeros, and here the best of all others stay; kept tokens keep their positions, where that code "
            "numbers them anew; ends of rows in LLaVA-NeXT's pictures stay, and go there",
            "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention (arXiv "
            "2510.02912); code: obananas/HoloV",
        ),
        Preset(
            "hired",
            (Stage(0, Fraction(1, 5), "hired"),),
            "20 % of the tokens before the decoder, the released scripts' budget with alpha 0.5: half for the whole "
            "picture, half for its tiles, by how many of the half of the whole picture's tokens that the class token "
            "attends to most in the tower's first layer lie in each (in the i-th stretch in reading order for the i-th "
            "tile, as in that code); of all of them those stay that it attends to most in the layer whose output the "
            "decoder gets; LLaVA-1.5's pictures are one tile, with all of the budget",
            "budgets are of tokens without padding, where the released code drops padding that it has spent some on; "
            "what rounding leaves over goes to the best of all others, and there to nobody; ends of rows count as "
            "tokens that stay; kept tokens keep their positions, where that code numbers them anew",
            "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models "
            "in Resource-Constrained Environments (arXiv 2408.10945), section 3; code: hasanar1f/HiRED",
        ),
        Preset(
            "dycoke",
            (Stage(0, Fraction(196 + 3 * 58, 4 * 196), "dycoke"),),
            "of every four frames of a video the first stays whole, and of each other 58 tokens of 196, 30 % as in the "
            "README's dycoke_k of 0.7: those whose embeddings are least like (cosine) the token at the same place of "
            "the first frame, and of the fourth frame the third's",
            "the token behind LLaVA-OneVision's frames counts, so one less stays; in the last four frames the released "
            "code lets the third stay whole, and drops a last frame of an odd number, neither is done here; what is "
            "dropped and taken back while the answer is generated, the paper's second part, is not here; kept tokens "
            "keep their positions, where that code numbers them anew; of Qwen's line a frame is two of the video's",
            "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (arXiv 2411.15024), section 3; "
            "code: KD-TAO/DyCoke",
        ),
        *(_visionzip(54, 10), _visionzip(108, 20), _visionzip(162, 30)),
        _prumerge(
            "prumerge",
            "prumerge",
            40,
            "the abstract's 14.4 times fewer on average: those that the class token attends to most",
            "that code counts",
        ),
        _prumerge(
            "prumerge-plus",
            "prumerge_plus",
            144,
            "a quarter of them: one of four by the class token's attention, the others evenly spaced, in the "
            "proportion in which that code answers",
            "that code counts, and spaces the others by,",
        ),
        Preset(
            "sparsevlm-192",
            (
                Stage(3, _share(300), "raters"),
                Stage(7, _share(200), "raters"),
                Stage(16, _share(118), "raters"),
            ),
            "300, 200 and 118 of 576 tokens behind the layers 2, 6 and 15, the released code's counts for 192 where "
            "it merges nothing (version 2.0); ranked by the mean attention of the text raters, heads averaged, "
            "in the layer just run; raters are found once, by the embeddings; kept tokens keep their positions",
            "nothing is merged or recycled, where versions before 2.0 do; that version also divides attention by "
            "what rotary positions alone would give, and takes half of the heads, neither is done here; counts are "
            "fixed, none adapts to the rank of a matrix; 206.8 tokens a layer, since layers 2, 6 and 15 run on "
            "all that they rank, as they do in the code",
            "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (arXiv "
            "2410.04417), section 3; code: Gumpest/SparseVLMs",
        ),
        Preset(
            "feather",
            (Stage(8, Fraction(17, 45), "feather"), Stage(16, Fraction(34, 1000), "unrotated")),
            "at layer 8 every third token of every third row stays, and those that the prompt's last token attends "
            "to most in the layer before without rotary positions, by the softmax over image tokens alone; at layer "
            "16 9 % of those left, by the same criterion alone",
            "the released code keeps 30 % by attention and the grid, 30 to 41 % in all by how far they coincide; "
            "here 17/45 (37.8 %) stay, as many as if attention took no notice of the grid; an image that is no "
            "square of tokens has evenly spaced ones for a grid",
            "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration (arXiv "
            "2412.13180); code: markendo/FEATHER",
        ),
        Preset(
            "dart",
            (Stage(2, _share(132), "dart"),),
            "132 of 576 tokens from layer 2 on, the released script's: pivots are the 4 tokens of the image and "
            "the 4 of the text behind it whose keys in the layer before have the largest L1 norms; each in turn "
            "keeps the 16 tokens left whose hidden states, past the final norm, have the smallest cosine with its own; "
            "kept tokens keep their positions",
            "pivots take turns by kind, image first, and size, where the code leaves their order to a Python set; "
            "the text is that behind the last image",
            "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (arXiv "
            "2502.11494); code: ZichenWen1/DART, read in a copy that has its history",
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
