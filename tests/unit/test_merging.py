"""Ranks that merge: what stays, and what it becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine import merge_oracle
from tests.unit.test_rank_memory import Largest
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy
from vllm_flow.ranks import RANKS, TowerRank, TowerScore, merges, unlike
from vllm_flow.ranks.prumerge import NEAREST, attended_then_spaced, with_nearest
from vllm_flow.ranks.visionzip import contextual_of, dominant_then_contextual, into_contextual

SIZES = st.integers(1, 150).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))
SEEDS = st.integers(0, 2**31)
MERGING = [rank for rank in RANKS.values() if isinstance(rank, TowerRank) and merges(rank)]


def seen(total: int, seed: int, ends: int = 0) -> tuple[torch.Tensor, ...]:
    """Rows [N, 6], scores [N] that add up to one, keys [N, 4]; the last of every so many tokens ends a row."""
    draw = np.random.default_rng(seed)
    rows, keys = (
        torch.tensor(draw.normal(size=(total, width)), dtype=torch.float32) for width in (6, 4)
    )
    scores = torch.tensor(draw.random(total), dtype=torch.float32)
    scores /= scores.sum()
    if ends:
        end = torch.arange(total) % (ends + 1) == ends
        scores[end], rows[end], keys[end] = torch.inf, 0, 0
    return rows, scores, keys


@given(SIZES, SEEDS, st.sampled_from(MERGING), st.sampled_from([0, 3, 11]))
def test_what_stays_becomes_what_the_oracle_says(
    size: tuple[int, int], seed: int, rank: TowerRank, ends: int
) -> None:
    """And nothing that it is given is written to."""
    total, keep = size
    rows, scores, keys = given_before = seen(total, seed, ends)
    before = [tensor.clone() for tensor in given_before]
    order = rank.order(scores, rows, keep)
    stay, gap = merge_oracle.chosen(rank.name, scores.tolist(), keep)
    assert len(set(order.tolist())) == len(order) == keep
    if gap > 1e-3:
        assert sorted(order.tolist()) == sorted(stay)
    merged = rank.merge(rows, order, scores, keys)
    picture = merge_oracle.Picture(rows.double().numpy(), keys.double().numpy())
    expected, clear = merge_oracle.taken_in(rank.name, scores.tolist(), picture, order.tolist())
    if clear > 1e-2:
        np.testing.assert_allclose(merged.numpy(), expected, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(given_before, before, strict=True))


@given(SIZES, SEEDS, st.sampled_from(MERGING), st.sampled_from([0, 3]))
def test_only_the_ends_of_rows_have_no_part_in_it(
    size: tuple[int, int], seed: int, rank: TowerRank, ends: int
) -> None:
    """Whatever stands in their rows, nothing takes it in, and to the last bit they stay what they were."""
    total, keep = size
    rows, scores, keys = seen(total, seed, ends)
    order = rank.order(scores, rows, keep)
    closed = scores.isinf()
    other = rows.clone()
    other[closed] = 1e9
    merged, with_other = (rank.merge(given, order, scores, keys) for given in (rows, other))
    assert torch.equal(merged[closed[order]], rows[order][closed[order]])
    torch.testing.assert_close(merged[~closed[order]], with_other[~closed[order]], atol=0, rtol=0)


@given(st.integers(1, 150), SEEDS)
def test_of_a_picture_that_stays_whole_visionzip_leaves_all_as_it_is(total: int, seed: int) -> None:
    rows, scores, keys = seen(total, seed)
    order = dominant_then_contextual(scores, rows, total)
    assert torch.equal(into_contextual(rows, order, scores, keys), rows[order])


@given(SIZES, SEEDS)
def test_dominant_rows_are_left_and_contextual_ones_take_in_each_other_token_once(
    size: tuple[int, int], seed: int
) -> None:
    """Read off rows that say which token they are: what is added is a mean, of tokens that go, each in one."""
    total, keep = size
    _, scores, keys = seen(total, seed)
    own = torch.eye(total)
    order = dominant_then_contextual(scores, own, keep)
    weights = into_contextual(own, order, scores, keys) - own[order]
    first = keep - contextual_of(keep)
    assert not weights[:first].any() and (weights >= 0).all()
    assert not weights[:, order].any()
    totals = weights[first:].sum(1)
    torch.testing.assert_close(totals, (totals > 0.5).float(), atol=1e-5, rtol=0)
    taken = (weights > 0).sum(0)
    assert taken.max() <= 1 and int(taken.sum()) == (total - keep) * (contextual_of(keep) > 0)


@given(SIZES, SEEDS)
def test_prumerge_adds_the_nearest_times_what_the_class_token_gives_them(
    size: tuple[int, int], seed: int
) -> None:
    total, keep = size
    _, scores, keys = seen(total, seed)
    own = torch.eye(total)
    order = RANKS["prumerge"].order(scores, own, keep)
    weights = with_nearest(own, order, scores, keys) - own[order]
    assert ((weights > 0).sum(1) == min(NEAREST, total - 1)).all()
    assert not weights.gather(1, order[:, None]).any(), "nothing takes in itself"
    wanted = (weights > 0) * scores
    torch.testing.assert_close(weights, wanted, atol=1e-6, rtol=0)


@given(SIZES, SEEDS, st.sampled_from(MERGING))
def test_what_stays_becomes_the_same_in_whatever_order_tokens_come(
    size: tuple[int, int], seed: int, rank: TowerRank
) -> None:
    total, keep = size
    rows, scores, keys = seen(total, seed)
    order = rank.order(scores, rows, keep)
    merged = rank.merge(rows, order, scores, keys)
    shuffled = torch.from_numpy(np.random.default_rng(seed + 1).permutation(total))
    there = torch.empty_like(shuffled)
    there[shuffled] = torch.arange(total)
    again = rank.merge(rows[shuffled], there[order], scores[shuffled], keys[shuffled])
    torch.testing.assert_close(again, merged, atol=1e-5, rtol=1e-5)


def test_the_papers_counts() -> None:
    for keep, contextual in ((64, 10), (128, 20), (192, 30)):
        assert contextual_of(keep) == contextual
        assert parse_policy({"flow_preset": f"visionzip-{keep}"}, 32).kept(0, 0, 576) == keep
    scores = torch.arange(576.0).flip(0)
    chosen = dominant_then_contextual(scores, torch.zeros(576, 1), 64).tolist()
    assert chosen[:54] == list(range(54))
    # 522 others, every 52nd of which is contextual, the first ten.
    assert chosen[54:] == [54 + 52 * n for n in range(10)]
    chosen = attended_then_spaced(scores, torch.zeros(576, 1), 144).tolist()
    assert chosen[:36] == list(range(36)) and chosen[36:40] == [38, 43, 48, 53]


def test_few_tokens_have_none_that_takes_in() -> None:
    rows, scores, keys = seen(30, 1)
    order = dominant_then_contextual(scores, rows, 6)
    assert order.tolist() == scores.argsort(descending=True)[:6].tolist()
    assert torch.equal(into_contextual(rows, order, scores, keys), rows[order])


def test_where_only_the_end_of_a_row_could_take_in_nothing_does() -> None:
    """Of a picture of many rows few tokens stay: the one that would be contextual is an end, too."""
    rows, scores, keys = seen(40, 4)
    scores[:12], rows[:12], keys[:12] = torch.inf, 0, 0
    order = dominant_then_contextual(scores, rows, 7)
    assert order.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert not into_contextual(rows, order, scores, keys).any()


@pytest.mark.parametrize("rank", MERGING, ids=lambda rank: rank.name)
def test_half_precision_is_merged_in_single(rank: TowerRank) -> None:
    rows, scores, keys = seen(80, 2)
    order = rank.order(scores, rows, 60)
    merged = rank.merge(rows.bfloat16(), order, scores, keys)
    assert merged.dtype == torch.bfloat16
    exact = rank.merge(rows.bfloat16().float(), order, scores, keys)
    assert torch.equal(merged, exact.bfloat16())


@pytest.mark.parametrize("merge", [into_contextual, with_nearest])
def test_no_pairs_of_all_tokens_of_a_large_picture_are_held(
    monkeypatch: pytest.MonkeyPatch, merge: Callable[..., Any]
) -> None:
    rows, scores, keys = seen(1000, 3)
    order = dominant_then_contextual(scores, rows, 640)
    whole = merge(rows, order, scores, keys)
    monkeypatch.setattr(unlike, "AT_ONCE", 100)
    with Largest() as largest:
        found = merge(rows, order, scores, keys)
    assert largest.numbers <= max(100 * 100, unlike.SAME_PRODUCT * 1000)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", MERGING, ids=lambda rank: rank.name)
def test_a_stage_that_merges_begins_before_the_decoder(rank: TowerRank) -> None:
    said = "merges what enters the decoder, so its stage cannot begin at layer 2; start at layer 0"
    for keys in (
        {"flow_stages": f"2:50% {rank.name}"},
        {"flow_stages": f"0:50% uniform, 2:20% {rank.name}"},
        {"flow_cliff": [0, 2], "flow_keep": 9, "flow_rank": rank.name},
    ):
        with pytest.raises(PolicyError, match=said):
            parse_policy(keys, 6)
    with pytest.raises(PolicyError, match="flow_when"):
        parse_policy({"flow_stages": f"0:50% {rank.name}", "flow_when": "decode"}, 6)
    assert parse_policy({"flow_stages": f"0:50% {rank.name}, 2:20% diversity"}, 6)
    assert (rank.score == TowerScore.RECEIVED) == (rank.name == "visionzip_received")
