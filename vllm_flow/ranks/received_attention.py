"""Tokens that the vision tower's patches attend to: VisionZip's choice where there is no class token.

"VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467), section 3, of
which this is what it calls dominant tokens; what is left out is not merged into others.
"""

from vllm_flow.ranks.base import TowerRank, TowerScore
from vllm_flow.ranks.cls_attention import most_attended

RECEIVED_ATTENTION = TowerRank(
    "received_attention",
    "what the vision tower's patches attend to most, on average",
    most_attended,
    score=TowerScore.RECEIVED,
)
"""Sees the picture alone, as `cls_attention` does."""
