"""Ranks that share a budget out among tiles, crops and frames, or cover a picture: against the rules as published."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.engine import share_oracle
from tests.unit.test_rank_memory import Largest, embeddings_of
from vllm_flow.ranks import RANKS, FrameRank, TileRank, unlike
from vllm_flow.ranks.budgets import places, within_budgets
from vllm_flow.ranks.dycoke import least_repeated
from vllm_flow.ranks.hired import shared_out
from vllm_flow.ranks.holov import best_of_crops, crops_of
from vllm_flow.ranks.scope import covering

SIZES = st.integers(1, 120).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))
SEEDS = st.integers(0, 2**31)


def seen(total: int, seed: int, ends: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, other scores, and embeddings [N, 6]; the last of every so many tokens ends a row."""
    draw = np.random.default_rng(seed)
    scores, early = (torch.tensor(draw.random(total) ** 3, dtype=torch.float32) for _ in range(2))
    rows = torch.tensor(draw.normal(size=(total, 6)) + 0.5, dtype=torch.float32)
    if ends:
        end = torch.arange(total) % (ends + 1) == ends
        scores[end], early[end], rows[end] = torch.inf, torch.inf, 1.0
    return scores, early, rows


def tiles_of(total: int, tiles: int, scores: torch.Tensor) -> torch.Tensor:
    """The whole picture first, then its tiles, side by side in every row; -1 of ends."""
    whole = -(-total // (tiles + 1))
    at = torch.arange(total)
    found = torch.where(at < whole, 0, 1 + (at - whole) % max(1, tiles))
    return found.masked_fill(scores.isinf(), -1) if tiles else at * 0 - scores.isinf().long()


@given(SIZES, SEEDS, st.integers(0, 5), st.sampled_from([0, 4]))
def test_tiles_have_budgets_by_what_the_whole_picture_shows_there(
    size: tuple[int, int], seed: int, tiles: int, ends: int
) -> None:
    total, keep = size
    scores, early, _ = seen(total, seed, ends)
    tile = tiles_of(total, tiles, scores)
    assume(int(tile.max()) >= 0)
    given_before = [scores.clone(), early.clone(), tile.clone()]
    found = shared_out(scores, early, tile, keep).tolist()
    assert len(set(found)) == len(found) == keep
    expected = share_oracle.hired(scores.numpy(), early.numpy(), tile.tolist(), keep)
    assert sorted(found) == sorted(expected)
    assert all(map(torch.equal, given_before, (scores, early, tile)))


def test_a_tile_that_shows_nothing_keeps_nothing() -> None:
    """Two tiles, of which the whole picture's second stretch is all that the first layer attends to."""
    tile = torch.arange(24) // 8
    early = (torch.arange(24) >= 4).float()
    scores = torch.arange(24).flip(0).float()
    found = shared_out(scores, early, tile, 8).tolist()
    assert sorted(found) == [0, 1, 2, 3, 16, 17, 18, 19]
    # Half of each stretch: two tokens of each tile.
    early = (torch.arange(24) % 2).float()
    assert sorted(shared_out(scores, early, tile, 8).tolist()) == [0, 1, 2, 3, 8, 9, 16, 17]


def test_a_picture_of_one_tile_has_all_of_its_budget() -> None:
    scores, early, rows = seen(36, 5)
    found = shared_out(scores, early, torch.zeros(36).long(), 9)
    assert sorted(found.tolist()) == sorted(scores.argsort(descending=True)[:9].tolist())
    # So does a picture of which nothing is known, all of whose scores are alike.
    alike = torch.zeros(36)
    assert shared_out(alike, alike, alike.long(), 9).tolist() == list(range(9))


@given(SIZES, SEEDS, st.sampled_from([0, 4]))
def test_crops_have_budgets_by_their_attention(size: tuple[int, int], seed: int, ends: int) -> None:
    """Against the released code's rule, the variance of likeness included: but where a share is all but whole."""
    total, keep = size
    scores, _, rows = seen(total, seed, ends)
    found = best_of_crops(scores, rows, keep).tolist()
    assert len(set(found)) == len(found) == keep
    numbers = scores.double().numpy(), rows.double().numpy()
    expected, clear = share_oracle.settled(
        lambda a, b: share_oracle.holov(a, b, keep), *numbers, noise=1e-3
    )
    # Of crops of two tokens, the variance is too small to be scaled to the mean: 64 of 576 stay have 36 each.
    assume(clear and total // crops_of(total, keep) > 3)
    assert sorted(found) == expected


def test_crops_are_those_of_the_released_code() -> None:
    assert [crops_of(576, keep) for keep in (64, 128, 192, 576)] == [16, 8, 5, 1]
    assert crops_of(10, 1) == 10 and crops_of(1, 1) == 1
    # Four crops of nine: all attention is the third's, which has no more than nine tokens.
    scores = torch.zeros(36)
    scores[18:27] = torch.arange(9) + 1.0
    found = best_of_crops(scores, torch.ones(36, 2), 16).tolist()
    assert sorted(found) == [*range(7), *range(18, 27)]


@given(SIZES, SEEDS, st.sampled_from([0, 4]))
def test_each_token_adds_most_to_what_is_covered(
    size: tuple[int, int], seed: int, ends: int
) -> None:
    total, keep = size[0] // 2 + 1, min(size[1], size[0] // 2 + 1)
    scores, _, rows = seen(total, seed, ends)
    found = covering(scores, rows, keep).tolist()
    assert len(set(found)) == len(found) == keep
    numbers = scores.double().numpy(), rows.double().numpy()
    expected, clear = share_oracle.settled(
        lambda a, b: list(islice(share_oracle.scope(a, b), keep)), *numbers, noise=1e-5
    )
    assume(clear)
    assert sorted(found) == expected
    assert covering(scores, rows, total)[:keep].tolist() == found, "fewer begin more"


def test_what_covers_nothing_more_comes_last() -> None:
    """Two things, of which one is seen twice as well: one of each, then what is left in its order."""
    rows = torch.eye(2)[[0, 0, 0, 1, 1]]
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.3])
    assert covering(scores, rows, 5).tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("at_once", [24, 60])
def test_of_many_tokens_some_are_covered(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """No more pairs are held than of as many tokens as may be compared."""
    monkeypatch.setattr(unlike, "AT_ONCE", at_once)
    rows, scores = embeddings_of(200, 8, False), torch.rand(200)
    with Largest() as largest:
        found = covering(scores, rows, 60).tolist()
    assert len(set(found)) == 60
    assert largest.numbers <= max(at_once * at_once + 200, 200 * 8)
    unit = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
    nth = -(-200 * 200 // at_once**2)
    gains = np.maximum(unit[::nth] @ unit.T, 0).sum(0) * scores.numpy()
    assert found[0] == int(gains.argmax())


FRAMES = st.tuples(st.integers(1, 11), st.integers(1, 9), st.integers(0, 2))


@given(FRAMES, SEEDS, st.data())
def test_frames_keep_what_they_do_not_repeat(
    shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    """Of any number of frames, and what stands behind them; fewer begin more."""
    frames, each, behind = shape
    total = frames * each + behind
    keep = data.draw(st.integers(1, total))
    rows = seen(total, seed)[2]
    frame = torch.arange(total) // each
    frame = frame.masked_fill(torch.arange(total) >= frames * each, -1)
    found = least_repeated(rows, frame, keep).tolist()
    expected, clear = share_oracle.settled(
        lambda a: share_oracle.dycoke(a, frame.tolist(), keep), rows.double().numpy()
    )
    assume(clear)
    assert sorted(found) == expected
    assert least_repeated(rows, frame, total)[:keep].tolist() == found


def test_frames_keep_as_many_as_published() -> None:
    """70 % of three frames of four go, LLaVA-OneVision's 196 tokens each: 58 of each stay."""
    frame = torch.arange(8 * 196) // 196
    found = least_repeated(seen(8 * 196, 3)[2], frame, 2 * (196 + 3 * 58))
    assert frame[found].bincount().tolist() == [196, 58, 58, 58] * 2
    # Two windows of which the second is the first once more but for one token of its second frame.
    rows = seen(16, 4)[2].repeat(2, 1)
    rows[21] = -rows[17]
    frame = torch.arange(32) // 4
    assert 21 in least_repeated(rows, frame, 8 + 6).tolist()


@given(SIZES, SEEDS, st.integers(1, 5))
def test_no_group_keeps_more_than_its_budget_while_others_have_room(
    size: tuple[int, int], seed: int, groups: int
) -> None:
    total, keep = size
    draw = np.random.default_rng(seed)
    scores = torch.from_numpy(draw.integers(0, 5, total) / 4.0)
    group = torch.from_numpy(draw.integers(0, groups, total))
    place = places(scores, group, groups)
    for one in range(groups):
        tokens = [n for n in range(total) if group[n] == one]
        ordered = sorted(tokens, key=lambda n: (-float(scores[n]), n))
        assert [int(place[n]) for n in ordered] == list(range(len(tokens)))
    budget = torch.from_numpy(draw.integers(0, keep + 1, groups))
    found = within_budgets(scores, group, budget, keep).tolist()
    inside = [n for n in range(total) if place[n] < budget[group[n]]]
    assert len(set(found)) == len(found) == keep
    assert set(found) <= set(inside) or set(inside) <= set(found)


def test_new_kinds_of_ranks_are_what_they_say() -> None:
    kinds: dict[str, Any] = {"hired": TileRank, "dycoke": FrameRank}
    for name, kind in kinds.items():
        assert type(RANKS[name]) is kind and RANKS[name].merge is None
    nested = {
        name: RANKS[name].nested for name in ("scope", "holov", "holov_received", "hired", "dycoke")
    }
    assert nested == {
        "scope": True, "holov": False, "holov_received": False, "hired": False, "dycoke": True,
    }  # fmt: skip
