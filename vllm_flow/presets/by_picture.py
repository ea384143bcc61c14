"""Methods that drop tokens before the decoder, by the vision tower's attention or by how unlike the embeddings are."""

from fractions import Fraction

from vllm_flow.policy import Stage
from vllm_flow.presets.base import POSITIONS, TILES, TOWER_LAYER, Paper, Preset, share

_EMBEDDINGS = (
    "How alike tokens are is told by the embeddings that enter the decoder; the released code takes the tower's "
    "features."
)

DIVPRUNE = Preset(
    "divprune",
    "DivPrune",
    (Stage(0, Fraction(98, 1000), "diversity"),),
    (
        "9.8 % of the tokens (56 of 576) stay, the released code's ratio.",
        "They are chosen farthest first, by the cosine distance of the embeddings that enter the decoder. The first is "
        "the one whose nearest neighbour is farthest.",
    ),
    (POSITIONS, "A share is rounded down; the released code rounds to the nearest."),
    Paper(
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        "2503.02175",
        where="section 3",
        code="vbdi/divprune",
    ),
)
FASTERVLM = Preset(
    "fastervlm",
    "FasterVLM",
    (Stage(0, share(29), "cls_attention"),),
    (
        "29 of 576 tokens stay, the abstract's reduction by 95 %: those that the tower's class token attends to most.",
        TOWER_LAYER,
    ),
    (
        POSITIONS,
        "Of LLaVA-NeXT's pictures the best 29/576 of all tokens stay, ends of rows first; the released code keeps 29 "
        "of each tile, and every end of a row besides.",
    ),
    Paper(
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
        "2412.01818",
        where="version 1, section 3",
        code="Theia-4869/FasterVLM",
    ),
)
VISPRUNER = Preset(
    "vispruner",
    "VisPruner",
    (Stage(0, share(64), "cls_diverse"),),
    (
        "64 of 576 tokens stay, one of the two examples of the released README.",
        "Half of them are those that the tower's class token attends to most.",
        "The others are what is left after rounds of eight: in each round the tokens left are split into every second "
        "one and those between, and the eight of the former that are most like one of the latter go.",
    ),
    (
        _EMBEDDINGS,
        POSITIONS,
        TILES,
    ),
    Paper(
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
        "2412.01818",
        where="version 2, section 3",
        code="Theia-4869/VisPruner",
    ),
)
SCOPE = Preset(
    "scope",
    "SCOPE",
    (Stage(0, share(64), "scope"),),
    (
        "64 of 576 tokens stay, as in the released README.",
        "A token is covered as far as the likest one that stays is like it (cosine). One after the other that token "
        "stays which adds most to what is covered, times what the tower's class token gives it, with the exponent 1 "
        "of the released script.",
        TOWER_LAYER,
    ),
    (
        _EMBEDDINGS,
        POSITIONS,
        "LLaVA-NeXT's tiles are one picture here; the released code keeps so many tokens of each.",
    ),
    Paper(
        "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs",
        "2510.24214",
        code="kinredon/SCOPE",
    ),
)
HOLOV = Preset(
    "holov",
    "HoloV",
    (Stage(0, share(64), "holov"),),
    (
        "64 of 576 tokens stay, of 16 crops, as in the released code. A crop is 36 tokens in reading order.",
        "A crop's share of the 64 is that of its mean attention, rounded down; what rounding leaves goes, one each, to "
        "the crops with most attention.",
        "In each crop those tokens stay that the tower's class token attends to most.",
        TOWER_LAYER,
    ),
    (
        "How much a crop's tokens differ does not count: the released code scales that term to the crop's own "
        "attention, so that all shares grow alike.",
        "Where a crop's share exceeds its tokens, the best of all others stay; the released code fills up with zeros.",
        POSITIONS,
        "The ends of rows in LLaVA-NeXT's pictures stay; in the released code they go.",
    ),
    Paper(
        "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
        "2510.02912",
        code="obananas/HoloV",
    ),
)
HIRED = Preset(
    "hired",
    "HiRED",
    (Stage(0, Fraction(1, 5), "hired"),),
    (
        "20 % of the tokens stay, the budget of the released scripts, with alpha = 0.5: half of it for the whole "
        "picture, half for its tiles.",
        "The tiles share their half by the tower's first layer. The better half of the whole picture's tokens there, "
        "by what the class token gives them, is cut into stretches in reading order, one per tile; a tile's share is "
        "how many of those tokens lie in its stretch.",
        "In each of them those tokens stay that the class token attends to most in the layer whose output the decoder "
        "gets.",
        "LLaVA-1.5's pictures are one tile, which has all of the budget.",
    ),
    (
        "Budgets are of tokens without padding; the released code spends some of its budget on padding, and then drops "
        "it.",
        "What rounding leaves goes to the best of all others; in the released code nobody gets it.",
        "Ends of rows count as tokens that stay.",
        POSITIONS,
    ),
    Paper(
        "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models in "
        "Resource-Constrained Environments",
        "2408.10945",
        where="section 3",
        code="hasanar1f/HiRED",
    ),
)
DYCOKE = Preset(
    "dycoke",
    "DyCoke",
    (Stage(0, Fraction(196 + 3 * 58, 4 * 196), "dycoke"),),
    (
        "For videos. Of every four frames the first stays whole. Of each other one 58 of 196 tokens stay: 30 %, as "
        "with the README's dycoke_k = 0.7.",
        "Those stay whose embeddings are least like (cosine) those at the same place of an earlier frame: the first "
        "one for the second and third frame, the third one for the fourth.",
    ),
    (
        "The paper's second part, which drops tokens and takes them back while the answer is generated, is not here.",
        "In the last four frames the released code leaves the third whole, and it drops the last of an odd number of "
        "frames. Neither is done here.",
        "The token behind LLaVA-OneVision's frames counts as one that stays, so that one less of the others does.",
        "A frame of Qwen's models is two of the video's.",
        POSITIONS,
    ),
    Paper(
        "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
        "2411.15024",
        where="section 3",
        code="KD-TAO/DyCoke",
    ),
)
