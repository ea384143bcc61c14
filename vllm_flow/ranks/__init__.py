"""Ways to choose which tokens of an image stay: a registry, one short file each.

A rank chooses at a stage of a policy, among the tokens of one image that are left by then. *How many*
stay is known from the policy; only *which* is a rank's. Positions of kept tokens never change.

A new rank is a file here and a line in :data:`OWN` (the recipe is in docs/ranks.md), or a package of its own that
registers it under the entry-point group :data:`GROUP` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_flow.ranks.added import admitted
from vllm_flow.ranks.base import (
    AttentionRank,
    FrameRank,
    PictureRank,
    PositionRank,
    Rank,
    TileRank,
    TowerRank,
    TowerRows,
    TowerScore,
    TowerTiles,
    merges,
)
from vllm_flow.ranks.cls_attention import CLS_ATTENTION
from vllm_flow.ranks.cls_diverse import CLS_DIVERSE
from vllm_flow.ranks.dart import DART
from vllm_flow.ranks.diversity import DIVERSITY
from vllm_flow.ranks.dycoke import DYCOKE
from vllm_flow.ranks.feather import FEATHER
from vllm_flow.ranks.hired import HIRED
from vllm_flow.ranks.holov import HOLOV, HOLOV_RECEIVED
from vllm_flow.ranks.last_image import LAST_IMAGE
from vllm_flow.ranks.last_prompt import LAST_PROMPT
from vllm_flow.ranks.prumerge import PRUMERGE, PRUMERGE_PLUS
from vllm_flow.ranks.question import QUESTION
from vllm_flow.ranks.random import RANDOM
from vllm_flow.ranks.raters import RATERS
from vllm_flow.ranks.received_attention import RECEIVED_ATTENTION
from vllm_flow.ranks.rows import HiddenRank, QuestionRank, UnrotatedRank
from vllm_flow.ranks.scope import SCOPE
from vllm_flow.ranks.uniform import UNIFORM
from vllm_flow.ranks.unrotated import UNROTATED
from vllm_flow.ranks.visionzip import VISIONZIP, VISIONZIP_RECEIVED
from vllm_flow.registry import Registry

OWN: Mapping[str, Rank] = {
    rank.name: rank
    for rank in (
        *(UNIFORM, RANDOM, DIVERSITY, CLS_ATTENTION, CLS_DIVERSE, RECEIVED_ATTENTION),
        *(SCOPE, HOLOV, HOLOV_RECEIVED, HIRED, DYCOKE),
        *(VISIONZIP, VISIONZIP_RECEIVED, PRUMERGE, PRUMERGE_PLUS),
        *(LAST_IMAGE, LAST_PROMPT, QUESTION, RATERS, UNROTATED, FEATHER, DART),
    )
}
"""The ranks of this package."""
GROUP = "vllm_flow.ranks"
"""Entry points by which other packages add theirs."""
RESERVED = frozenset({"cliff", "horizon", "downsample"})
"""Words that stand beside names of ranks in an evaluation's budgets."""
RANKS: Registry[Rank] = Registry(GROUP, "rank", lambda: OWN, admitted, lambda: RESERVED)
"""Every rank there is, by the name that a request sends: those of this package, then those of others."""

__all__ = [
    "RANKS",
    "AttentionRank",
    "FrameRank",
    "HiddenRank",
    "PictureRank",
    "PositionRank",
    "QuestionRank",
    "Rank",
    "TileRank",
    "TowerRank",
    "TowerRows",
    "TowerScore",
    "TowerTiles",
    "UnrotatedRank",
    "merges",
]
