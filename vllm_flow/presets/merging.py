"""Methods whose kept tokens take in what goes, before the decoder."""

from vllm_flow.policy import Stage
from vllm_flow.presets.base import TOWER_LAYER, Paper, Preset, share

_VISIONZIP = Paper(
    "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    "2412.04467",
    where="section 3",
    code="dvlab-research/VisionZip",
)
_PRUMERGE = Paper(
    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    "2403.15388",
    where="section 3",
    code="42Shawn/LLaVA-PruMerge",
)


def _visionzip(dominant: int, contextual: int) -> Preset:
    keep = dominant + contextual
    split = "as in" if keep == 64 else "in the proportion of the 54 and 10 in"
    return Preset(
        f"visionzip-{keep}",
        "VisionZip",
        (Stage(0, share(keep), "visionzip"),),
        (
            f"{keep} of 576 tokens stay, {dominant} dominant and {contextual} contextual ones, {split} the released "
            "README.",
            "The dominant ones are those that the tower's class token attends to most. The contextual ones are taken "
            "from the others in reading order, at equal steps.",
            "Each token that goes is assigned to the contextual one with the likest key (cosine of the keys, averaged "
            "over heads). Before the projector the mean of those assigned is added to it, as in the released code.",
            TOWER_LAYER,
        ),
        (
            f"One of the {dominant} is the class token itself in the released code, and one more patch here.",
            "Kept tokens keep their positions and their order; the released code puts the contextual ones last, and "
            "numbers all anew.",
            "LLaVA-NeXT's tiles are one picture here; the released code keeps so many tokens of each.",
        ),
        _VISIONZIP,
    )


def _prumerge(name: str, method: str, rank: str, keep: int, chosen: str, counted: str) -> Preset:
    return Preset(
        name,
        method,
        (Stage(0, share(keep), rank),),
        (
            chosen,
            "Before the projector the 32 others with the likest keys (cosine) are added to each token that stays, "
            "times what the class token gives them, whether they stay or go; as in the released code.",
        ),
        (
            f"How many tokens stay is the policy's. The released code counts the outliers of the picture's attention"
            f"{counted}.",
            "Attention and keys are those of the layer whose output the decoder gets, averaged over heads. The "
            "released code takes the tower's last layer, which is not built here, and all heads as one.",
            "One more token of the released code, the sum of all that go, has no place in the picture and is left out.",
            "Kept tokens keep their positions; the released code numbers them anew.",
        ),
        _PRUMERGE,
    )


VISIONZIPS = (_visionzip(54, 10), _visionzip(108, 20), _visionzip(162, 30))
PRUMERGES = (
    _prumerge(
        "prumerge",
        "PruMerge",
        "prumerge",
        40,
        "40 of 576 tokens stay, the abstract's 14.4 times fewer on average: those that the tower's class token attends "
        "to most.",
        "",
    ),
    _prumerge(
        "prumerge-plus",
        "PruMerge+",
        "prumerge_plus",
        144,
        "A quarter of the tokens stay: one of four by the class token's attention, the others evenly spaced, in the "
        "proportion in which the released code answers.",
        ", and spaces the other tokens by them",
    ),
)
