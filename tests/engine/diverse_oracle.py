"""Which tokens are unlike one another, as `kept_oracle` chooses them: one at a time, in float64."""

from __future__ import annotations

import numpy as np


def farthest_first(tokens_ND: np.ndarray) -> list[int]:
    """Token indices, each the farthest from all before it in cosine distance; one at a time, in float64.

    Of equals, the first one wins: what is behind the ninth digit is how rows of a product are rounded.
    """
    unit = tokens_ND / np.linalg.norm(tokens_ND, axis=1, keepdims=True)
    distance = np.round(1 - unit @ unit.T, 9)
    nearest = [min(np.delete(row, at), default=0) for at, row in enumerate(distance)]
    order = [int(np.argmax(nearest))]
    apart = distance[order[0]].copy()
    while len(order) < len(unit):
        apart[order] = -np.inf
        order.append(int(np.argmax(apart)))
        apart = np.minimum(apart, distance[order[-1]])
    return order


def important_then_diverse(order: list[int], tokens_TD: np.ndarray, keep: int) -> set[int]:
    """The first half of ``keep``, and the rest without those most like another one; one pair at a time, in float64."""
    unit = tokens_TD / np.linalg.norm(tokens_TD, axis=1, keepdims=True)
    stay, left = order[: keep // 2], order[keep // 2 :]
    while len(left) + len(stay) > keep:
        odd = left[1::2]
        alike = [(max(float(unit[a] @ unit[b]) for b in odd), a) for a in left[::2]]
        alike = sorted(alike, key=lambda pair: -pair[0])[min(8, len(left) + len(stay) - keep) :]
        left = [token for _, token in alike] + odd
    return {*stay, *left}


def settled(tokens_ND: np.ndarray, there: set[int], keep: int) -> bool:
    """Whether rounding decides nothing of which of the tokens that are still there stay, farthest first: the same ones
    do, of embeddings that differ by ten times the rounding of float32. What is equal stays so."""

    def kept(tokens_ND: np.ndarray) -> list[int]:
        return sorted([token for token in farthest_first(tokens_ND) if token in there][:keep])

    _, equal = np.unique(tokens_ND, axis=0, return_inverse=True)
    noise = np.random.default_rng(0).standard_normal((3, *tokens_ND.shape)) * 1e-6
    return all(kept(tokens_ND * (1 + part[equal.ravel()])) == kept(tokens_ND) for part in noise)
