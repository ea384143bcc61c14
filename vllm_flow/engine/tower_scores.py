"""What the vision tower's class token attends to in each picture, for ranks that look inside the tower.

Seams: ``embed_multimodal`` of the loaded model, which both runners call with every batch of pictures that
they encode; ``forward`` of the attention of the tower's last layer, hidden for that call; and the runners'
encoder caches, which keep the tensors that it returns. Scores are an attribute of those tensors, where vLLM
has their modality: whoever finds a picture encoded finds its scores, and they go when it goes. vLLM builds
a LLaVA's tower up to the layer whose output the decoder gets, so the last layer is the one to read.

Every picture is scored, whoever asks first: it costs one row of one layer's attention, and the next
request on the picture, which finds it encoded, may be one that ranks by it.

Legend: P pictures of a call, L rows of the tower (its class token first, then N patches), Q heads of this
worker, D their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from vllm.logger import init_logger

from vllm_flow.engine.attention.row_mass import mean_over_workers
from vllm_flow.engine.hiding import hidden

logger = init_logger("vllm.vllm_flow.tower_scores")

Encoded: TypeAlias = "Mapping[str, torch.Tensor]"
"""A runner's encoder cache: a picture's name -> what it was encoded to."""
MERGE = "_merge_image_patch_embeddings"
"""Of LLaVA-NeXT: puts a picture's tokens together from those of its tiles, without those of padding."""
SCORES_FIELD = "flow_scores"
"""Of an encoded picture: [N] scores of its tokens."""


class Tower:
    """The tower of a model whose pictures can be scored, or why they cannot.

    Args:
        attention: vLLM's ``MMEncoderAttention`` of the layer to read; None where nobody reads it.
        unreadable: why not.
        tiled: the model, where it puts the tokens of a picture together from tiles.
    """

    def __init__(
        self,
        attention: Any = None,
        unreadable: str | None = "which nobody looked for",
        tiled: Any = None,
    ) -> None:
        self._attention, self._tiled = attention, tiled
        self.unreadable = unreadable

    def encode(self, embed: Callable[..., Any], pictures: Mapping[str, Any]) -> Sequence[Any]:
        """What ``embed`` makes of pictures, each with its scores."""
        attention, scored = self._attention, []
        forward = attention.forward

        def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            scored.append(class_attention(attention, query, key))
            return forward(query, key, *args, **kwargs)

        with hidden("forward", [(attention, watched)]), merging(self._tiled) as merges:
            encoded = tuple(embed(**pictures))
        if not scored:
            return encoded
        scores_PN = mean_over_workers(torch.cat(scored))
        scores = scores_PN if self._tiled is None else merged(self._tiled, merges, scores_PN)
        for picture, scores_N in zip(encoded, scores, strict=True):
            setattr(picture, SCORES_FIELD, scores_N)
        return encoded


@dataclass(frozen=True)
class Merge:
    """How a picture's tokens were put together."""

    size: Any
    """Of the picture."""
    tiles: int
    """That the tower saw of it."""
    options: Mapping[str, Any]


@contextmanager
def merging(model: Any) -> Iterator[list[Merge]]:
    """Note how a model that sees pictures in tiles merges them; nothing of another (None)."""
    noted: list[Merge] = []
    if model is None:
        yield noted
        return
    merge = getattr(model, MERGE)

    def noting(size: Any, tiles: torch.Tensor, **options: Any) -> Any:
        noted.append(Merge(size, len(tiles), options))
        return merge(size, tiles, **options)

    with hidden(MERGE, [(model, noting)]):
        yield noted


def merged(model: Any, merges: Sequence[Merge], scores: torch.Tensor) -> Iterator[torch.Tensor]:
    """Per picture [N] scores of its tokens, put together as the tokens were.

    The ends of rows, which the model adds, are no patches: they stay before all else.

    Args:
        scores: [tiles of all pictures, patches of a tile].
    """
    merge = getattr(model, MERGE)
    ends = [(model, scores.new_tensor([float("inf")]))]
    with hidden("image_newline", ends):
        parts = scores[..., None].split([one.tiles for one in merges])
        for one, part in zip(merges, parts, strict=True):
            yield merge(one.size, part, **one.options)[:, 0]


def class_attention(attention: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[P, N] probability that the class token gives each patch, averaged over this worker's heads.

    Args:
        attention: has the size of a head, and the scale.
        query, key: [P, L, Q x D].
    """
    class_PQ1D = query[:, :1].unflatten(-1, (-1, attention.head_size)).transpose(1, 2).float()
    key_PQLD = key.unflatten(-1, (-1, attention.head_size)).transpose(1, 2).float()
    logits_PQ1L = (class_PQ1D * attention.scale) @ key_PQLD.transpose(-1, -2)
    mass_PL = logits_PQ1L[:, :, 0].softmax(-1).mean(1)
    return mass_PL[:, 1:].contiguous()


class ScoringModel:
    """Mixed in before the loaded model's own class with :class:`vllm_flow.engine.model_call.FlowModel`."""

    flow_tower: Tower

    def embed_multimodal(self, **pictures: Any) -> Any:
        return self.flow_tower.encode(super().embed_multimodal, pictures)  # type: ignore[misc]


def tower_of(model: Any, vllm_config: Any) -> Tower:
    """The tower of a loaded model; see :class:`Tower`."""
    unreadable = _unreadable(model, vllm_config)
    if unreadable is not None:
        return Tower(unreadable=unreadable)
    attention = model.vision_tower.vision_model.encoder.layers[-1].self_attn.attn
    return Tower(attention, None, model if hasattr(model, MERGE) else None)


def _unreadable(model: Any, vllm_config: Any) -> str | None:
    from vllm.model_executor.models.clip import CLIPVisionModel
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

    if not isinstance(model, (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)):
        name = vllm_config.model_config.architecture
        return f"which is known of LLaVA-1.5, LLaVA-NeXT and Shikra, and not of {name}"
    if not isinstance(model.vision_tower, CLIPVisionModel):
        return f"and this model's tower, a {type(model.vision_tower).__name__}, has no such token"
    strategy = model.config.vision_feature_select_strategy
    if strategy != "default":
        return f"which with vision_feature_select_strategy {strategy!r} is one of the image's tokens itself"
    if vllm_config.model_config.multimodal_config.mm_encoder_tp_mode == "data":
        return "and workers encode different pictures (mm_encoder_tp_mode='data')"
    if vllm_config.ec_transfer_config is not None:
        return "and pictures may be encoded in another engine (ec_transfer_config)"
    return None


def encoded(runner: Any) -> Encoded:
    """The encoder cache of a runner of either version; empty where a model has no encoder."""
    cache = getattr(runner, "encoder_cache", None)
    found: Encoded = {} if cache is None else getattr(cache, "encoder_outputs", cache)
    return found


def scores_of(cache: Encoded, picture: str) -> torch.Tensor:
    """[N] of a picture whose tokens a step computes, which is therefore encoded.

    The front end refuses the rank where a picture comes as embeddings. But clients may name their pictures, and
    one may have sent embeddings under the name of another's pixels: vLLM then goes by what came first. Of that
    nothing is known, so all tokens are alike, and the first ones stay.
    """
    found = cache[picture]
    scores_N: torch.Tensor | None = getattr(found, SCORES_FIELD, None)
    if scores_N is not None:
        return scores_N
    logger.warning_once(
        "A picture is to be ranked by the vision tower's attention that came as embeddings under the same name "
        "before: its first tokens stay. Give every picture a name (uuid) of its own, or none."
    )
    return found.new_zeros(len(found), dtype=torch.float32)
