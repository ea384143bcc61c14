"""What ranks that merge must choose and make of the tokens that stay: token by token, in float64.

The tower's features and keys are taken from Hugging Face's modules, and what was merged goes through Hugging Face's
projector. Each decision comes with its gap: how far it was from going the other way. Knows nothing of vLLM or the
extension. N tokens of a picture, C width of the tower, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SCORED_BY = {
    "visionzip": "cls_attention",
    "visionzip_received": "received_attention",
    "prumerge": "cls_attention",
    "prumerge_plus": "cls_attention",
    "blur": "far_from_mean",  # of tests/plugins: merges embeddings, and needs no tower
}
"""Rank that merges -> the one that scores as it does."""
IN_TOWER = tuple(rank for rank in SCORED_BY if rank != "blur")
CLEAR = 1e-2
"""Cosines that differ by this much are far apart: by less than a ten thousandth of it, float error may swap them."""


@dataclass(frozen=True)
class Picture:
    """What the tower makes of one: N x C before the projector, N x D keys averaged over heads."""

    features: np.ndarray
    keys: np.ndarray


@contextmanager
def looking(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Note what the projector is given, and keys of the layer before it, averaged over heads: tiles x rows x width."""
    config, inner = model.config, model.model
    noted: dict[str, list[torch.Tensor]] = {"features": [], "keys": []}
    attention = inner.vision_tower.encoder.layers[config.vision_feature_layer].self_attn
    first = int(config.vision_feature_select_strategy == "default")

    def keys(_module: Any, _args: Any, result: torch.Tensor) -> None:
        noted["keys"].append(result.unflatten(-1, (attention.num_heads, -1)).mean(-2)[:, first:])

    def features(_module: Any, args: Any) -> None:
        noted["features"].append(args[0])

    hooks = [
        attention.k_proj.register_forward_hook(keys),
        inner.multi_modal_projector.register_forward_pre_hook(features),
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


def pictures(model: Any, prompt: Any) -> list[Picture]:
    """Per image of a prompt; the ends of a picture's rows, which have no patch, are zero."""
    config = model.config
    with looking(model) as noted:
        model.get_image_features(
            prompt.pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            **({} if prompt.sizes is None else {"image_sizes": prompt.sizes}),
        )
    features, keys = (torch.cat(noted[name]) for name in ("features", "keys"))
    if prompt.sizes is None:
        return [Picture(*pair) for pair in zip(_plain(features), _plain(keys), strict=True)]
    tiles = [len(picture) for picture in prompt.pixels]
    packed = [
        model.model.pack_image_features(
            list(rows.split(tiles)),
            prompt.sizes,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=torch.zeros(rows.shape[-1]),
        )[0]
        for rows in (features, keys)
    ]
    return [Picture(_plain(f), _plain(k)) for f, k in zip(*packed, strict=True)]


def _plain(rows: torch.Tensor) -> np.ndarray:
    return rows.detach().double().numpy()


def chosen(rank: str, scores: Sequence[float], keep: int) -> tuple[list[int], float]:
    """The tokens that stay, in the order in which `taken_in` wants them, and the gap."""
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    best = {"prumerge": keep, "prumerge_plus": keep // 4, "blur": keep}.get(rank)
    if best is None:
        best = keep - int(keep * 10 / 64)
    gap = 1.0
    if 0 < best < len(order) and np.isfinite(scores[order[best - 1]]):
        last, following = scores[order[best - 1]], scores[order[best]]
        gap = (last - following) / last
    stay, rest = order[:best], sorted(order[best:])
    more = keep - best
    if rank.startswith("visionzip") and more:
        stay += rest[:: max(1, len(rest) // more)][:more]
    elif more:
        stay += [rest[int((place + 0.5) * len(rest) / more)] for place in range(more)]
    return stay, gap


def taken_in(
    rank: str, scores: Sequence[float], picture: Picture, stay: Sequence[int]
) -> tuple[np.ndarray, float]:
    """Rows of the tokens that stay, K x C, and the gap."""
    if rank.startswith("visionzip"):
        return _clusters(scores, picture, stay)
    rows, gap = [], 1.0
    for token in stay:
        row = picture.features[token].copy()
        if np.isfinite(scores[token]):
            alike = {
                other: _cosine(picture.keys[token], picture.keys[other])
                for other in range(len(scores))
                if other != token and np.isfinite(scores[other])
            }
            near = sorted(alike, key=lambda other: -alike[other])
            if len(near) > 32:
                gap = min(gap, (alike[near[31]] - alike[near[32]]) / CLEAR)
            for other in near[:32]:
                row += scores[other] * picture.features[other]
        rows.append(row)
    return np.array(rows), gap


def _clusters(
    scores: Sequence[float], picture: Picture, stay: Sequence[int]
) -> tuple[np.ndarray, float]:
    contextual = stay[len(stay) - int(len(stay) * 10 / 64) :]
    targets = [token for token in contextual if np.isfinite(scores[token])]
    taken: dict[int, list[int]] = {target: [] for target in targets}
    gap = 1.0
    for token in range(len(scores)):
        if token in stay or not np.isfinite(scores[token]) or not targets:
            continue
        alike = [_cosine(picture.keys[token], picture.keys[target]) for target in targets]
        if len(alike) > 1:
            second, first = sorted(alike)[-2:]
            gap = min(gap, (first - second) / CLEAR)
        taken[targets[int(np.argmax(alike))]].append(token)
    rows = [
        picture.features[token]
        + (picture.features[taken[token]].mean(0) if taken.get(token) else 0)
        for token in stay
    ]
    return np.array(rows), gap


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def blurred(embeddings: np.ndarray, stay: Sequence[int]) -> np.ndarray:
    """Of tests/plugins: a quarter of what stays is the mean of all."""
    return 0.75 * embeddings[list(stay)] + 0.25 * embeddings.mean(0)


def projected(model: Any, rows: np.ndarray) -> torch.Tensor:
    """K x H embeddings of K x C features."""
    return model.model.multi_modal_projector(torch.tensor(rows[None], dtype=torch.float32))[0]
