"""Methods that rank by what the decoder's layers have worked out: attention, queries and keys, hidden states."""

from fractions import Fraction

from vllm_flow.policy import Stage
from vllm_flow.presets.base import POSITIONS, Paper, Preset, share

FASTV = Preset(
    "fastv",
    "FastV",
    (Stage(2, Fraction(1, 2), "last_prompt"),),
    (
        "Half of the tokens leave at layer 2: K = 2, R = 50 %.",
        "They are ranked by the attention that the prompt's last token gives them in the layer before, averaged over "
        "heads, as in the released code.",
        "Kept tokens keep their positions, as in that code.",
    ),
    (
        "The paper's text averages over the attention of all tokens; its released code takes the last one's, as here.",
        "A share is rounded down; the released code rounds to the nearest.",
    ),
    Paper(
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
        "Models",
        "2403.06764",
        where="section 4",
        code="pkunlp-icler/FastV",
    ),
)
PYRAMIDDROP = Preset(
    "pyramiddrop",
    "PyramidDrop",
    (
        Stage(8, Fraction(1, 2), "last_prompt"),
        Stage(16, Fraction(1, 4), "last_prompt"),
        Stage(24, Fraction(1, 8), "last_prompt"),
    ),
    (
        "A half, a quarter and an eighth of the tokens are left from layers 8, 16 and 24 of 32 on, rounded down.",
        "They are ranked by the attention of the prompt's last token, averaged over heads.",
    ),
    (
        "The attention is that of the layer before; the released code works out queries and keys of the layer that "
        "follows.",
        POSITIONS,
    ),
    Paper(
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        "2410.17247",
        where="section 3",
        code="Cooperx521/PyramidDrop",
    ),
)
SPARSEVLM = Preset(
    "sparsevlm-192",
    "SparseVLM",
    (
        Stage(3, share(300), "raters"),
        Stage(7, share(200), "raters"),
        Stage(16, share(118), "raters"),
    ),
    (
        "300, 200 and 118 of 576 tokens are left behind layers 2, 6 and 15: the counts for 192 in version 2.0 of the "
        "released code, which merges nothing.",
        "They are ranked by the mean attention of the text raters in the layer just run, averaged over heads.",
        "The raters are found once, by the embeddings.",
        "Kept tokens keep their positions.",
    ),
    (
        "Nothing is merged or recycled; versions before 2.0 do both.",
        "Version 2.0 also divides attention by what rotary positions alone would give, and takes half of the heads. "
        "Neither is done here.",
        "Counts are fixed. The paper adapts them to the rank of the attention matrix.",
        "That is 206.8 tokens a layer, since layers 2, 6 and 15 run on all that they rank, as they do in the code.",
    ),
    Paper(
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        "2410.04417",
        where="section 3",
        code="Gumpest/SparseVLMs",
    ),
)
FEATHER = Preset(
    "feather",
    "FEATHER",
    (Stage(8, Fraction(17, 45), "feather"), Stage(16, Fraction(34, 1000), "unrotated")),
    (
        "At layer 8 every third token of every third row stays. So do those that the prompt's last token would attend "
        "to most in the layer before without rotary positions, by a softmax over image tokens alone.",
        "At layer 16, 9 % of those left stay, by that attention alone.",
    ),
    (
        "The released code keeps 30 % by attention and the grid besides: 30 to 41 % in all, depending on how far they "
        "coincide. Here 17/45 (37.8 %) stay, as many as if attention took no notice of the grid.",
        "An image that is no square of tokens has evenly spaced ones for a grid.",
    ),
    Paper(
        "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration",
        "2412.13180",
        code="markendo/FEATHER",
    ),
)
DART = Preset(
    "dart",
    "DART",
    (Stage(2, share(132), "dart"),),
    (
        "132 of 576 tokens are left from layer 2 on, as in the released script.",
        "Pivots are the four tokens of the image and the four of the text behind it whose keys in the layer before "
        "have the largest L1 norms.",
        "Each pivot in turn keeps the 16 tokens left whose hidden states, past the final norm, have the smallest "
        "cosine with its own.",
        "Kept tokens keep their positions.",
    ),
    (
        "Pivots take turns in a fixed order: the image's first, larger keys before smaller. The released code leaves "
        "their order to a Python set.",
        "The text is that behind the last image.",
        "The code was read in a copy of its repository that has the history.",
    ),
    Paper(
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
        "2502.11494",
        code="ZichenWen1/DART",
    ),
)
