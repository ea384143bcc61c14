"""What ranks that share a budget out, or cover a picture, must choose: token by token, in float64, as published.

Each choice comes with whether rounding decides nothing of it: the same tokens stay where all numbers differ by ten
times the rounding of float32. Knows nothing of vLLM or the extension. N tokens of a picture, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

RANKS = ("hired", "holov", "holov_received", "scope")
"""Those that go by scores of the tower."""


def chosen(
    rank: str,
    scores: Sequence[float],
    early: Sequence[float],
    tiles: Sequence[int],
    embeddings_ND: np.ndarray,
    left: Sequence[int],
    keep: int,
) -> tuple[list[int], bool]:
    """The tokens that stay of those left of a picture, and whether that is clear."""
    if rank == "hired":
        return settled(lambda a, b: hired(a, b, tiles, keep), scores, early)
    if rank == "scope":  # in the order of the whole picture
        return settled(
            lambda a, rows: list(islice((n for n in scope(a, rows) if n in left), keep)),
            scores,
            embeddings_ND,
        )
    return settled(lambda a, rows: holov(a, rows, keep), scores, embeddings_ND)


def settled(
    choose: Callable[..., list[int]], *numbers: Any, noise: float = 1e-6
) -> tuple[list[int], bool]:
    """A choice by numbers, and whether noise changes nothing of it. What is equal stays so."""
    given = [np.asarray(one, dtype=np.float64) for one in numbers]
    found = sorted(choose(*given))
    draw = np.random.default_rng(0)
    for _ in range(4):
        noisy = []
        for one in given:
            _, equal = np.unique(one, axis=0, return_inverse=True)
            parts = draw.standard_normal((len(one), *one.shape[1:]))[equal.ravel()]
            noisy.append(one * (1 + noise * parts))
        if sorted(choose(*noisy)) != found:
            return found, False
    return found, True


def _best(tokens: Sequence[int], scores: np.ndarray) -> list[int]:
    return sorted(tokens, key=lambda token: (-scores[token], token))


def _filled(stay: list[int], ends: list[int], scores: np.ndarray, keep: int) -> list[int]:
    """The ends of rows, what stays, and the best of the others."""
    others = [token for token in range(len(scores)) if token not in stay and token not in ends]
    return [*ends, *_best(stay, scores), *_best(others, scores)][:keep]


def hired(scores: np.ndarray, early: np.ndarray, tiles: Sequence[int], keep: int) -> list[int]:
    """A half for the whole picture; the rest by what of the early layer's better half lies in each stretch."""
    of = {tile: [n for n, one in enumerate(tiles) if one == tile] for tile in range(max(tiles) + 1)}
    ends, whole, parts = [n for n, one in enumerate(tiles) if one < 0], of.get(0, []), max(tiles)
    wanted = max(0, keep - len(ends))
    own = min(int(wanted * 0.5), len(whole))
    stay = _best(whole, scores)[:own]
    top = _best(whole, early)[: int(len(whole) * 0.5)]
    for tile in range(1, parts + 1):
        stretch = [n for at, n in enumerate(whole) if at * parts // len(whole) == tile - 1]
        budget = math.floor(
            len(set(stretch) & set(top)) * (wanted - own) / max(1, len(top)) + 1e-12
        )
        stay += _best(of.get(tile, []), scores)[:budget]
    return _filled(stay, ends, scores, keep)


def holov(scores: np.ndarray, embeddings_ND: np.ndarray, keep: int) -> list[int]:
    """Crops by attention and by the variance of how like their tokens are, in the released code's scales."""
    total = len(scores)
    ends = [n for n in range(total) if math.isinf(scores[n])]
    count = min(total, max(1, int((1024 / 576) * total / keep + 1e-9)))
    size, more = total // count, total % count
    starts = [n * size + min(n, more) for n in range(count + 1)]
    crops = [
        [n for n in range(a, b) if n not in ends] for a, b in zip(starts, starts[1:], strict=False)
    ]
    weights = np.array([_of_crop(scores[crop], embeddings_ND[crop]) for crop in crops])
    wanted = max(0, keep - len(ends))
    shares = weights / max(weights.sum(), 1e-30) * wanted
    budgets = np.floor(shares).astype(int)
    left = wanted - budgets.sum()
    for crop in sorted(range(count), key=lambda crop: (-weights[crop], crop))[:left]:
        budgets[crop] += 1
    stay = [n for crop, b in zip(crops, budgets, strict=True) for n in _best(crop, scores)[:b]]
    return _filled(stay, ends, scores, keep)


def _of_crop(scores: np.ndarray, rows: np.ndarray) -> float:
    if len(scores) == 0:
        return 0.0
    attention = scores.mean() * 1e3
    if len(scores) == 1:
        return float(attention * 1.09)
    unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)
    alike = unit @ unit.T * (1 - np.eye(len(rows)))
    mean = alike.sum(1) / (len(rows) - 1)
    variance = ((alike - mean[:, None]) ** 2).sum(1) / (len(rows) - 1)
    scaled = variance * attention / (variance.mean() + 1e-6)
    return float(attention + 0.09 * scaled.mean())


def scope(scores: np.ndarray, embeddings_ND: np.ndarray) -> Iterator[int]:
    """One after the other the token that adds most to what is covered, times its score."""
    ends = np.isinf(scores)
    yield from np.flatnonzero(ends).tolist()
    unit = embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    open_ = np.flatnonzero(~ends)
    alike, worth = np.round(unit @ unit.T, 9)[np.ix_(open_, open_)], scores[open_]
    covered, left = np.zeros(len(open_)), np.ones(len(open_), dtype=bool)
    while left.any():
        gains = np.maximum(alike - covered, 0).sum(axis=1) * worth
        best = int(np.where(left, gains, -np.inf).argmax())
        yield int(open_[best])
        left[best] = False
        covered = np.maximum(covered, alike[best])


def dycoke(embeddings_ND: np.ndarray, frames: Sequence[int], keep: int) -> list[int]:
    """The first frame of every four; of the others, as many of each, what repeats the frame before least."""
    unit = embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    of = [[n for n, one in enumerate(frames) if one == f] for f in range(max(frames) + 1)]
    order = [n for n, one in enumerate(frames) if one < 0]
    for later in (False, True):
        lists = []
        for frame, tokens in enumerate(of):
            if (frame % 4 > 0) != later:
                continue
            before = frame - {0: 4, 1: 1, 2: 2, 3: 1}[frame % 4]
            if before < 0:
                lists.append(tokens)
                continue
            alike = {
                n: round(float(unit[n] @ unit[m]), 9)
                for n, m in zip(tokens, of[before], strict=True)
            }
            lists.append(sorted(tokens, key=lambda n, alike=alike: (alike[n], n)))
        order += [one[n] for n in range(max(map(len, lists), default=0)) for one in lists]
    return order[:keep]
