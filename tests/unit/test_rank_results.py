"""What other packages' ranks may be and give: each way to be wrong is refused, and nothing that is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.ranks import (
    FrameRank,
    PictureRank,
    PositionRank,
    QuestionRank,
    TileRank,
    TowerRank,
    UnrotatedRank,
)
from vllm_flow.ranks.added import CHECKS, admitted, merged_rows
from vllm_flow.ranks.base import Draw, Needs
from vllm_flow.ranks.rows import HiddenRank
from vllm_flow.registry import Added, PluginError

N, Q, K = 6, 5, 3
ROWS, ASKING = torch.zeros(N, 4), torch.zeros(Q, 4)
ARGUMENTS: dict[type, tuple[Any, ...]] = {
    PictureRank: (ROWS, K),
    TowerRank: (torch.zeros(N), ROWS, K),
    TileRank: (torch.zeros(N), torch.zeros(N), torch.zeros(N).long(), K),
    FrameRank: (ROWS, torch.zeros(N).long(), K),
    QuestionRank: (ROWS, ASKING),
    HiddenRank: (ROWS, torch.zeros(N), ASKING, torch.zeros(Q), K),
}
SOUND: dict[type, torch.Tensor] = {
    PictureRank: torch.tensor([4, 0, 5]),
    TowerRank: torch.tensor([4, 0, 5]),
    TileRank: torch.tensor([4, 0, 5]),
    FrameRank: torch.tensor([4, 0, 5]),
    QuestionRank: torch.ones(Q),
    HiddenRank: torch.tensor([True, False, True, False, False, True]),
}


@given(st.integers(1, 5), st.lists(st.integers(-1, 5), max_size=5), st.integers(0, 5))
def test_places_are_told_from_what_is_none(total: int, found: list[int], keep: int) -> None:
    result, inside = np.array(found, dtype=np.int64), all(0 <= place < total for place in found)
    chosen = inside and found == sorted(set(found)) and len(found) == keep
    assert (CHECKS[PositionRank](result, (total, keep, Draw(0, 0, 0))) is None) == chosen
    sampled = inside and len(set(found)) == len(found)
    assert (CHECKS[UnrotatedRank](result, (total,)) is None) == sampled


@pytest.mark.parametrize("kind", [PositionRank, UnrotatedRank])
def test_places_are_one_array_of_long_integers(kind: type) -> None:
    arguments = (4, 2, Draw(0, 0, 0)) if kind is PositionRank else (4,)
    sound = np.array([1, 3])
    assert CHECKS[kind](sound, arguments) is None
    wrong: list[Any] = [sound.tolist(), sound.reshape(1, 2), sound.astype(np.int32), None]
    wrong += [torch.from_numpy(sound), sound.astype(np.float64)]
    for result in wrong:
        told = CHECKS[kind](result, arguments)
        assert told is not None and "numpy array of" in told and "from 0 to 3" in told


@pytest.mark.parametrize("kind", SOUND)
def test_tensors_are_of_one_size_and_type_where_the_others_are(kind: type) -> None:
    sound, arguments = SOUND[kind], ARGUMENTS[kind]
    assert CHECKS[kind](sound, arguments) is None
    wrong: list[Any] = [sound[:-1], torch.cat([sound, sound]), sound[None], sound[0]]
    wrong += [sound.half(), sound.to("meta"), sound.tolist(), sound.numpy(), None]
    for result in wrong:
        told = CHECKS[kind](result, arguments)
        assert told is not None and f"a tensor ({len(sound)},) of {sound.dtype} on cpu" in told


def brought(rank: Any) -> Any:
    """What becomes of it as the rank ``mine`` of a package."""
    return admitted(Added("mine", "package 1.0", "package:MINE", None), rank)  # type: ignore[arg-type]


PLACES = PositionRank("mine", "the first ones", lambda total, keep, draw: np.arange(keep))


@pytest.mark.parametrize("title", ["", "  ", "two\nlines", "a | b", 7, None])
def test_a_title_is_a_cell_of_a_table(title: Any) -> None:
    with pytest.raises(ValueError, match="cannot be a cell of a table"):
        brought(replace(PLACES, title=title))


def test_what_asks_the_question_needs_the_prompt() -> None:
    weights = SOUND[QuestionRank]
    rank = QuestionRank("mine", "x", weights=lambda image, question: weights)
    assert torch.equal(brought(rank).weights(*ARGUMENTS[QuestionRank]), weights)
    with pytest.raises(ValueError, match=r"needs Needs\.PROMPT"):
        brought(replace(rank, needs=Needs.IMAGE))
    tower = TowerRank("mine", "x", lambda scores, rows, keep: scores.argsort()[:keep], nested=False)
    assert not brought(tower).nested, "others need what their kind says"


def test_what_merging_gives_is_as_many_rows_as_stay() -> None:
    """Of the rows' own width, type and device, whatever else it is given."""
    rows, kept = torch.zeros(N, 4), SOUND[PictureRank]
    sound = torch.ones(K, 4)
    for more in ((), (torch.zeros(N), torch.zeros(N, 2))):
        assert merged_rows(sound, (rows, kept, *more)) is None
        wrong: list[Any] = [
            sound[:-1],
            sound[:, :-1],
            sound[0],
            rows,
            sound.half(),
            sound.to("meta"),
        ]
        for result in [*wrong, sound.tolist(), sound.numpy(), None]:
            told = merged_rows(result, (rows, kept, *more))
            assert told == f"a tensor ({K}, 4) of torch.float32 on cpu"


@pytest.mark.parametrize("kind", [PictureRank, TowerRank])
def test_what_a_package_merges_is_looked_at(kind: Any) -> None:
    order, given = lambda *args: SOUND[PictureRank], (torch.zeros(N), torch.zeros(N, 2))
    given = () if kind is PictureRank else given
    rank = brought(kind("mine", "x", order, merge=lambda rows, kept, *more: rows[kept] + 1))
    assert torch.equal(rank.merge(ROWS, SOUND[PictureRank], *given), torch.ones(K, 4))
    short = brought(kind("mine", "x", order, merge=lambda rows, kept, *more: rows))
    with pytest.raises(PluginError, match=r"merge of rank 'mine' .* gave Tensor \(6, 4\)"):
        short.merge(ROWS, SOUND[PictureRank], *given)
    with pytest.raises(ValueError, match="its merge is no function, but int"):
        brought(kind("mine", "x", order, merge=7))
    parts = {PictureRank: FrameRank, TowerRank: TileRank}[kind]
    assert brought(parts("mine", "x", order)).order(*ARGUMENTS[parts]) is SOUND[PictureRank]
    with pytest.raises(ValueError, match=f"a {parts.__name__} does not merge; leave its merge out"):
        brought(parts("mine", "x", order, merge=lambda rows, kept, *more: rows[kept]))


@pytest.mark.parametrize("kind", [QuestionRank, UnrotatedRank])
def test_a_function_that_may_be_left_out_is_not_asked_for(kind: Any) -> None:
    rank = kind("mine", "x")
    assert brought(rank) == rank


def test_what_was_given_is_described_as_far_as_it_is_short() -> None:
    """And as far as it can be said without waiting for a device."""
    results: list[tuple[Any, str]] = [
        (np.arange(8)[::-1], "ndarray (8,) of int64 [7, 6, 5, 4, 3, 2, 1, 0] and must"),
        (np.arange(9)[::-1], "ndarray (9,) of int64 and must"),
        (torch.arange(4), "Tensor (4,) of torch.int64 and must"),
        ([1, 2], "list and must"),
    ]
    for result, told in results:
        rank = brought(replace(PLACES, choose=lambda total, keep, draw, result=result: result))
        with pytest.raises(PluginError) as caught:
            rank.choose(20, 8, Draw(0, 0, 0))
        assert f"choose of rank 'mine' of package 1.0 (package:MINE) gave {told}" in str(
            caught.value
        )
