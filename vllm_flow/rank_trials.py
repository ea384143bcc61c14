"""Tries a rank on made-up pictures: whether it keeps what its kind promises, before an engine relies on it.

In an engine a rank's choice is not looked at, since that would wait for the device, and what it raises ends the
engine. So the front end tries a package's rank before the first request that names it goes on, and its authors can
do so in their tests::

    from vllm_flow import rank_trials
    rank_trials.check(CENTER)

Legend: N tokens of an image, K of them kept, Q rows of a question, H their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_flow.counts import counted
from vllm_flow.ranks import (
    FrameRank,
    HiddenRank,
    PictureRank,
    PositionRank,
    QuestionRank,
    Rank,
    TileRank,
    TowerRank,
    UnrotatedRank,
    merges,
)
from vllm_flow.ranks.added import CHECKS, FUNCTIONS, MERGE, merged_rows
from vllm_flow.ranks.base import Draw

if TYPE_CHECKING:
    import torch

SIZES = ((1, 1), (2, 1), (7, 3), (16, 16), (37, 12), (144, 36))
"""(N, K)"""
WIDTH, QUESTION, TILES = 16, 5, 3


@lru_cache(maxsize=256)
def check(rank: Rank) -> None:
    """Try a rank on pictures of several sizes, in several precisions, alike in all their tokens and not.

    Raises:
        ValueError: it does not keep what its kind promises; says what it was given and what it gave.
    """
    field = FUNCTIONS.get(type(rank))
    if field is None or getattr(rank, field) is None:
        return
    for total, keep in SIZES:
        if isinstance(rank, PositionRank):
            _check_places(rank, total, keep)
        elif isinstance(rank, UnrotatedRank):
            _call(rank, field, (total,))
        else:
            for dtype, values in _pictures(total):
                given = f"a picture of {counted(total, 'token')}, {values}, in {dtype}"
                _check_tensors(rank, field, total, keep, dtype, values, given)


def _check_places(rank: PositionRank, total: int, keep: int) -> None:
    draws = [Draw(0, 0, 0), Draw(7, 1, 3)]
    chosen = [_call(rank, "choose", (total, keep, draw)) for draw in draws]
    if not rank.draws and not np.array_equal(*chosen):
        raise ValueError(
            f"rank {rank.name!r} chooses by seed, image or layer: of {counted(total, 'token')} "
            f"{chosen[0].tolist()}, or {chosen[1].tolist()}; say draws=True, or leave the draw alone"
        )


def _check_tensors(
    rank: Any, field: str, total: int, keep: int, dtype: Any, values: str, given: str
) -> None:
    """One call on tensors, and what is promised of its result."""

    def arguments(kept: int) -> tuple[Any, ...]:
        return _arguments(rank, total, kept, dtype, values)

    result = _call(rank, field, arguments(keep), given)
    if isinstance(rank, PictureRank | TowerRank):
        _check_order(rank, field, result, total, keep, arguments, given)
        if merges(rank):
            *scores, rows, _ = arguments(keep)
            seen = (*scores, rows[:, : WIDTH // 2].float()) if scores else ()
            merged = _call(rank, MERGE, (rows, result, *seen), given)
            if not bool(merged.isfinite().all()):
                raise ValueError(f"what rank {rank.name!r} merges of {given} is not finite")
    elif isinstance(rank, HiddenRank) and int(result.sum()) != keep:
        raise ValueError(
            f"rank {rank.name!r} keeps {int(result.sum())} of {given}, and {keep} must stay"
        )
    elif isinstance(rank, QuestionRank) and not (
        bool((result >= 0).all()) and 0 < float(result.sum()) < float("inf")
    ):
        raise ValueError(
            f"rank {rank.name!r} weighs the rows of a question {result.tolist()} beside {given}; weights are at least "
            "0, and not all of them 0"
        )


def _check_order(
    rank: PictureRank | TowerRank,
    field: str,
    order: torch.Tensor,
    total: int,
    keep: int,
    arguments: Callable[[int], tuple[Any, ...]],
    given: str,
) -> None:
    found = order.tolist()
    if len(set(found)) != keep or min(found) < 0 or max(found) >= total:
        raise ValueError(
            f"rank {rank.name!r} orders {found} of {given}; it must be {keep} indices, each once"
        )
    if rank.nested:
        more = _call(rank, field, arguments(total), given).tolist()
        if more[:keep] != found:
            raise ValueError(
                f"rank {rank.name!r} orders {given} as {found} where {keep} are kept, and as {more} where all are: the "
                "order of fewer must be the beginning of the order of more, or a TowerRank say nested=False"
            )


def _pictures(total: int) -> Iterator[tuple[Any, str]]:
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        yield dtype, "no two alike"
        yield dtype, "all alike"


def _arguments(rank: Any, total: int, keep: int, dtype: Any, values: str) -> tuple[Any, ...]:
    """What a rank of this kind is called with, the same for the same arguments."""
    import torch

    draw = torch.Generator().manual_seed(total)

    def rows(count: int, *width: int) -> torch.Tensor:
        made = torch.randn(count, *width, generator=draw)
        return (made if values != "all alike" else torch.ones_like(made)).to(dtype)

    picture = rows(total, WIDTH)
    places = torch.arange(total)
    if isinstance(rank, TileRank):
        tiles = places * TILES // total
        return rows(total).float().softmax(0), rows(total).float().softmax(0), tiles, keep
    if isinstance(rank, FrameRank):
        return picture, (places // max(1, total // TILES)).clamp_max(TILES - 1), keep
    if isinstance(rank, TowerRank):
        return rows(total).float().softmax(0), picture, keep
    if isinstance(rank, QuestionRank):
        return picture, rows(QUESTION, WIDTH)
    if isinstance(rank, HiddenRank):
        keys, asking = rows(total).float().abs(), rows(QUESTION).float().abs()
        return picture, keys, rows(QUESTION, WIDTH), asking, keep
    return picture, keep


def _call(rank: Any, field: str, args: tuple[Any, ...], given: str = "") -> Any:
    """Call a rank's function twice, the second time on copies: it must give the same, and leave what it is given."""
    function = getattr(rank, field)
    before = [arg.clone() if hasattr(arg, "clone") else arg for arg in args]
    told = given or str(args)
    result = function(*args)
    if not all(np.array_equal(_plain(a), _plain(b)) for a, b in zip(args, before, strict=True)):
        raise ValueError(f"{field} of rank {rank.name!r} changes what it is given, of {told}")
    again = function(*before)
    wanted = (merged_rows if field == MERGE else CHECKS[type(rank)])(result, args)
    if wanted is not None:
        raise ValueError(f"{field} of rank {rank.name!r} gave {result!r} for {told}, not {wanted}")
    if not np.array_equal(_plain(result), _plain(again)):
        raise ValueError(f"{field} of rank {rank.name!r} gave two results for {told}")
    return result


def _plain(value: Any) -> Any:
    """Something that numpy compares."""
    return value.float().numpy() if hasattr(value, "numpy") else value
