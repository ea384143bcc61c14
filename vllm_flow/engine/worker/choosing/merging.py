"""Lets tokens that stay take in those that go: what the embeddings of a picture's kept tokens become.

Seam: ``inputs_embeds`` of the loaded model's call, which both runners fill anew for every step. So neither what a
picture was encoded to, which other requests share, nor anything that is cached is written to; and whatever a decoder
does to embeddings before its first layer, it does to these.

Legend: N tokens of an image, K of them kept, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vllm_flow.engine import obstacles
from vllm_flow.engine.worker.tower.scores import Encoded, noted
from vllm_flow.ranks import PictureRank, TowerRank, TowerRows

if TYPE_CHECKING:
    from vllm_flow.engine.families.decoder_parts import Decoder


class Merger:
    """What becomes of kept tokens, rank by rank.

    Args:
        encoded: the runner's encoder cache.
        project: see :class:`vllm_flow.engine.worker.tower.scores.View`.
    """

    def __init__(
        self, encoded: Encoded, project: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        self._encoded, self._project = encoded, project

    def merged(
        self, rank: Any, picture: str, embeddings_NH: torch.Tensor, kept_K: torch.Tensor
    ) -> torch.Tensor:
        """[K, H] new embeddings of kept tokens. Those that take in nothing keep theirs to the last bit."""
        if isinstance(rank, PictureRank):
            assert rank.merge is not None
            return rank.merge(embeddings_NH, kept_K)
        assert isinstance(rank, TowerRank) and rank.merge is not None
        own_KH, seen = embeddings_NH[kept_K], noted(self._encoded, picture)
        scores_N, keys_ND = seen.get(rank.score), seen.get(TowerRows.KEYS)
        if scores_N is None or keys_ND is None:
            return own_KH  # nothing is known of the picture; see `tower_scores.scores_of`, which says so
        features_NC = seen.get(TowerRows.FEATURES)
        if features_NC is None:
            return rank.merge(embeddings_NH, kept_K, scores_N, keys_ND)
        assert self._project is not None
        merged_KC = rank.merge(features_NC, kept_K, scores_N, keys_ND)
        changed_K = (merged_KC != features_NC[kept_K]).any(-1)
        return torch.where(changed_K[:, None], self._project(merged_KC).to(own_KH.dtype), own_KH)


def unmergeable(decoder: Decoder, lora_config: Any) -> dict[str, str]:
    """Why embeddings cannot be merged in an engine: obstacle -> reason; empty where they can."""
    if decoder.injected is not None:
        reason = (
            "whose pictures have more embeddings, which are added between its layers (deepstack)"
        )
    elif getattr(lora_config, "enable_tower_connector_lora", False):
        reason = "whose projector has adapters (enable_tower_connector_lora)"
    else:
        return {}
    return {obstacles.MERGING: f"which nobody does in a model {reason}"}
