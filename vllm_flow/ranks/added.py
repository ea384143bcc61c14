"""Ranks that other packages bring: which kinds they may be, and what their functions must give.

A rank's kind says what the engine hands its function, and with it what must be computed in one step and what the
prefix cache may share. So a package's rank is one of these kinds and nothing derived from them. What the function
gives is checked at every call, as far as that can be done without waiting for a device; the rest is tried
beforehand (:mod:`vllm_flow.rank_trials`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from vllm_flow.ranks.base import (
    AttentionRank,
    FrameRank,
    Needs,
    PictureRank,
    PositionRank,
    Rank,
    TileRank,
    TowerRank,
)
from vllm_flow.ranks.rows import HiddenRank, QuestionRank, UnrotatedRank
from vllm_flow.registry import Added, PluginError

FUNCTIONS = {
    PositionRank: "choose",
    PictureRank: "order",
    TowerRank: "order",
    TileRank: "order",
    FrameRank: "order",
    QuestionRank: "weights",
    UnrotatedRank: "sample",
    HiddenRank: "choose",
}
"""Kind of rank -> its field with the function that packages bring."""
MERGE = "merge"
"""A further one, of those that merge."""

Check: TypeAlias = "Callable[[Any, tuple[Any, ...]], str | None]"
"""``check(result, arguments)``: what the result should have been; None if it is that."""


def admitted(added: Added, brought: object) -> Rank:
    """A package's rank, its function checked at every call.

    Raises:
        ValueError: it is none, or of no kind that packages may bring.
    """
    kind = type(brought)
    kinds = ", ".join(one.__name__ for one in FUNCTIONS)
    if kind is AttentionRank:
        raise ValueError(
            "an AttentionRank has no function that a package could bring, and both that there can be are there: "
            f"'last_image' and 'last_prompt'; it must be one of {kinds}"
        )
    if kind not in FUNCTIONS:
        named = brought.__name__ if isinstance(brought, type) else kind.__name__
        what = "a class, not an object" if isinstance(brought, type) else "of no such kind"
        raise ValueError(
            f"{named} is {what}; it must be an object of one of vllm_flow.ranks's kinds {kinds}, itself and not of a "
            "class derived from it"
        )
    rank: Any = brought
    _check_fields(added.name, rank)
    checked = {}
    for field, check in ((FUNCTIONS[kind], CHECKS[kind]), (MERGE, merged_rows)):
        function = getattr(rank, field, None)
        if function is None:  # of kinds that have one besides, or that do not merge
            continue
        if not callable(function):
            raise ValueError(f"its {field} is no function, but {type(function).__name__}")
        checked[field] = _checked(f"{field} of rank {added.name!r} of {added}", function, check)
    return replace(rank, **checked)  # type: ignore[no-any-return]


def _check_fields(name: str, rank: Any) -> None:
    if rank.name != name:
        raise ValueError(f"it calls itself {rank.name!r}; its name must be that of its entry point")
    title = rank.title
    if not isinstance(title, str) or not title.strip() or not title.isprintable() or "|" in title:
        raise ValueError(
            f"its title {title!r} cannot be a cell of a table; say in a line what is kept"
        )
    if isinstance(rank, QuestionRank) and rank.needs != Needs.PROMPT:
        raise ValueError("a QuestionRank looks at the prompt's end, so it needs Needs.PROMPT")
    if isinstance(rank, TileRank | FrameRank) and rank.merge is not None:
        raise ValueError(
            f"a {type(rank).__name__} does not merge; leave its merge out, or bring a TowerRank or PictureRank"
        )
    flags = [
        field for field in ("draws", "nested") if not isinstance(getattr(rank, field, True), bool)
    ]
    if flags:
        raise ValueError(f"its {flags[0]} must be True or False")


def _checked(what: str, function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """The function, whose faults name it."""

    def called(*args: Any) -> Any:
        try:
            result = function(*args)
        except Exception as error:
            raise PluginError(f"{what} failed: {type(error).__name__}: {error}") from error
        wanted = check(result, args)
        if wanted is not None:
            raise PluginError(f"{what} gave {_described(result)} and must give {wanted}")
        return result

    called.__wrapped__ = function  # type: ignore[attr-defined]
    return called


def _described(result: Any) -> str:
    """A result in few words; of a tensor nothing that a device would have to be asked for."""
    if hasattr(result, "shape") and hasattr(result, "dtype"):
        values = (
            f" {result.tolist()}" if isinstance(result, np.ndarray) and result.size <= 8 else ""
        )
        return f"{type(result).__name__} {tuple(result.shape)} of {result.dtype}{values}"
    return type(result).__name__


def _places(result: Any, total: int) -> bool:
    return (
        isinstance(result, np.ndarray)
        and result.ndim == 1
        and result.dtype == np.int64
        and bool(((result >= 0) & (result < total)).all())
    )


def _chosen_places(result: Any, args: tuple[Any, ...]) -> str | None:
    total, keep, *_ = args
    if _places(result, total) and len(result) == keep and bool((np.diff(result) > 0).all()):
        return None
    return f"a numpy array of {keep} int64 indices from 0 to {total - 1}, ascending, each once"


def _sampled_places(result: Any, args: tuple[Any, ...]) -> str | None:
    (total,) = args
    if _places(result, total) and len(np.unique(result)) == len(result):
        return None
    return f"a numpy array of int64 indices from 0 to {total - 1}, each once at most"


def _shaped(result: Any, count: int, dtype: str, like: Any) -> bool:
    return (
        tuple(getattr(result, "shape", ())) == (count,)
        and str(getattr(result, "dtype", "")) == dtype
        and getattr(result, "device", None) == like.device
    )


def _order(result: Any, args: tuple[Any, ...]) -> str | None:
    *given, keep = args
    if _shaped(result, keep, "torch.int64", given[0]):
        return None
    return f"a tensor ({keep},) of torch.int64 on {given[0].device}"


def merged_rows(result: Any, args: tuple[Any, ...]) -> str | None:
    """A check, of what ``merge`` gives."""
    rows, kept, *_ = args
    shape = (len(kept), rows.shape[1])
    if (
        tuple(getattr(result, "shape", ())) == shape
        and getattr(result, "dtype", None) == rows.dtype
        and getattr(result, "device", None) == rows.device
    ):
        return None
    return f"a tensor {shape} of {rows.dtype} on {rows.device}"


def _weights(result: Any, args: tuple[Any, ...]) -> str | None:
    question = args[1]
    if _shaped(result, len(question), "torch.float32", question):
        return None
    return f"a tensor ({len(question)},) of torch.float32 on {question.device}"


def _stays(result: Any, args: tuple[Any, ...]) -> str | None:
    states = args[0]
    if _shaped(result, len(states), "torch.bool", states):
        return None
    return f"a tensor ({len(states)},) of torch.bool on {states.device}"


CHECKS: dict[type, Check] = {
    PositionRank: _chosen_places,
    PictureRank: _order,
    TowerRank: _order,
    TileRank: _order,
    FrameRank: _order,
    QuestionRank: _weights,
    UnrotatedRank: _sampled_places,
    HiddenRank: _stays,
}
