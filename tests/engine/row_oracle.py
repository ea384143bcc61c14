"""What ranks that look at many rows of a layer must choose: by Hugging Face's modules, one row or token at a time.

Each choice comes with its gap: how far, relative to the scores, the nearest decision was from going the other way.
Knows nothing of vLLM or the extension. R rows alive, T tokens, H heads, K key heads, D width or head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

RANKS = ("question", "raters", "unrotated", "feather", "dart")


@dataclass(frozen=True)
class LayerBefore:
    """What the layer before a stage saw and made."""

    question: Sequence[int]
    """Positions of the prompt behind its last image."""
    place: dict[int, int]
    """Position -> row."""
    embeddings_TD: np.ndarray
    attention_RR: torch.Tensor
    """Averaged over heads."""
    states_RD: torch.Tensor
    """What comes out, past the model's final norm."""
    query_HRD: torch.Tensor
    key_KRD: torch.Tensor
    """As they are projected, without positions."""
    tables: tuple[torch.Tensor, torch.Tensor]
    """Cosines and sines, 1 x R x D."""

    def rows(self, positions: Sequence[int]) -> list[int]:
        return [self.place[position] for position in positions]


def noted(attention: Any, note: Callable[[torch.Tensor, torch.Tensor], None]) -> list[Any]:
    """Hooks that hand a layer's queries and keys over, heads x rows x head size, each time it has projected both.

    Behind their norms, where a layer has some.
    """
    made: list[torch.Tensor] = []

    def hook(_module: Any, _args: Any, result: torch.Tensor) -> None:
        rows = result[0]
        made.append(
            (rows if rows.dim() == 3 else rows.unflatten(-1, (-1, attention.head_dim))).transpose(
                0, 1
            )
        )
        if len(made) == 2:
            note(*made)
            made.clear()

    normed = hasattr(attention, "q_norm")
    names = ("q_norm", "k_norm") if normed else ("q_proj", "k_proj")
    return [getattr(attention, name).register_forward_hook(hook) for name in names]


@contextmanager
def projections(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Queries and keys of each decoder layer, heads x rows x head size, in the order of the layers."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = []
    for layer in model.model.language_model.layers:
        hooks += noted(layer.self_attn, lambda query, key: found.append((query, key)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def choose(
    rank: str, alive: Sequence[int], image: Sequence[int], keep: int, before: LayerBefore
) -> tuple[list[int], float]:
    """The positions that stay of those alive, and the gap."""
    if rank == "dart":
        return _dart(alive, keep, before)
    first: set[int] = set()
    gap = 1.0
    if rank == "question":
        scores = _asked(alive, before, before.question)
    elif rank == "raters":
        rating, gap = _raters(image, before)
        scores = _asked(alive, before, rating)
    else:
        scores = _unrotated(alive, before)
        first = set(_grid(image)) if rank == "feather" else set()
    order = sorted(range(len(alive)), key=lambda at: (alive[at] not in first, -scores[at]))
    last, next_one = order[keep - 1], order[keep]
    if (alive[last] in first) == (alive[next_one] in first):
        gap = min(gap, (scores[last] - scores[next_one]) / scores[last])
    return sorted(alive[at] for at in order[:keep]), gap


def _asked(alive: Sequence[int], before: LayerBefore, asking: Sequence[int]) -> list[float]:
    total = sum(before.attention_RR[before.place[position]] for position in asking)
    return [float(total[row]) / len(asking) for row in before.rows(alive)]


def _raters(image: Sequence[int], before: LayerBefore) -> tuple[list[int], float]:
    shares = []
    for token in image:
        logits = [before.embeddings_TD[token] @ before.embeddings_TD[q] for q in before.question]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        shares.append([weight / sum(weights) for weight in weights])
    relevance = [sum(column) / len(image) for column in zip(*shares, strict=True)]
    if len(relevance) == 1:
        return list(before.question), 1.0
    mean = sum(relevance) / len(relevance)
    rating = [q for q, value in zip(before.question, relevance, strict=True) if value > mean]
    return rating, min(abs(value - mean) / mean for value in relevance)


def _unrotated(alive: Sequence[int], before: LayerBefore) -> list[float]:
    heads, keys = len(before.query_HRD), len(before.key_KRD)
    last = before.place[before.question[-1]]
    shares = []
    for head in range(heads):
        query, key_RD = before.query_HRD[head, last], before.key_KRD[head * keys // heads]
        logits = torch.stack([query @ key_RD[row] for row in before.rows(alive)])
        shares.append((logits.double() / math.sqrt(len(query))).softmax(0))
    return torch.stack(shares).mean(0).tolist()


def _grid(image: Sequence[int]) -> list[int]:
    total = len(image)
    side = math.isqrt(total)
    if side * side != total:
        sampled = -(-total // 9)
        return [image[(2 * index + 1) * total // (2 * sampled)] for index in range(sampled)]
    return [image[row * side + column] for row in range(0, side, 3) for column in range(0, side, 3)]


def _dart(alive: Sequence[int], keep: int, before: LayerBefore) -> tuple[list[int], float]:
    """Pivots by the L1 norm of their turned keys; each in turn takes what is least like it."""
    turned_KRD = apply_rotary_pos_emb(before.key_KRD[None], before.key_KRD[None], *before.tables)[1][0]  # fmt: skip
    size_R = turned_KRD.double().abs().sum((0, 2)).tolist()
    gap = 1.0

    def largest(positions: Sequence[int], count: int) -> list[int]:
        nonlocal gap
        order = sorted(positions, key=lambda position: -size_R[before.place[position]])
        sizes = [size_R[before.place[position]] for position in order[: count + 1]]
        gap = min([gap, *((a - b) / a for a, b in zip(sizes, sizes[1:], strict=False))])
        return order[:count]

    own = largest(alive, min(4, keep))
    pivots = own + largest(before.question, 4)
    stay, left = set(own), keep - len(own)
    for index, pivot in enumerate(pivots):
        count = left // len(pivots) + (index < left % len(pivots))
        state = before.states_RD[before.place[pivot]].double()
        others = [position for position in alive if position not in stay]
        alike = [
            float(torch.nn.functional.cosine_similarity(state, before.states_RD[before.place[p]].double(), dim=0))
            for p in others
        ]  # fmt: skip
        order = sorted(range(len(others)), key=lambda at: alike[at])
        if 0 < count < len(others):
            gap = min(gap, alike[order[count]] - alike[order[count - 1]])
        stay |= {others[at] for at in order[:count]}
    assert len(stay) == keep
    return sorted(stay), gap
