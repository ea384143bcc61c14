"""Ranks that choose by place or picture: which tokens, how many, and always the same."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.ranks import (
    RANKS,
    AttentionRank,
    PictureRank,
    PositionRank,
    TowerRank,
    TowerScore,
)
from vllm_flow.ranks.base import Draw, Needs
from vllm_flow.ranks.cls_attention import most_attended
from vllm_flow.ranks.cls_diverse import ROUND, important_then_diverse
from vllm_flow.ranks.diversity import farthest_first
from vllm_flow.ranks.feather import grid
from vllm_flow.ranks.raters import raters

SIZES = st.integers(1, 700).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total)))
DRAWS = st.builds(Draw, st.integers(0, 2**32 - 1), st.integers(0, 50), st.integers(0, 80))
SHARES = ("scope", "holov", "holov_received", "hired", "dycoke")
ROWS = ("question", "raters", "unrotated", "feather", "dart")
PLACES = [rank for rank in RANKS.values() if isinstance(rank, PositionRank)]


@given(SIZES, DRAWS, st.sampled_from(PLACES))
def test_a_rank_by_place_keeps_as_many_as_asked(
    size: tuple[int, int], draw: Draw, rank: PositionRank
) -> None:
    total, keep = size
    chosen = rank.choose(total, keep, draw)
    assert len(chosen) == keep and (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0 and chosen[-1] < total
    assert (chosen == rank.choose(total, keep, draw)).all()


@given(SIZES, DRAWS)
def test_uniform_leaves_no_hole(size: tuple[int, int], draw: Draw) -> None:
    total, keep = size
    chosen = RANKS["uniform"].choose(total, keep, draw)
    gaps = np.diff(np.concatenate(([-1], chosen, [total])))
    assert gaps[1:-1].max(initial=0) <= -(-total // keep)
    # The ends are half a gap, give or take the rounding.
    assert max(gaps[0], gaps[-1]) <= -(-total // (2 * keep)) + 1


def test_random_draws_differ_by_seed_image_and_layer_alone() -> None:
    choose = RANKS["random"].choose
    drawn = {
        (seed, image, layer): tuple(choose(576, 64, Draw(seed, image, layer)))
        for seed in (0, 1)
        for image in (0, 1)
        for layer in (0, 7)
    }
    assert len(set(drawn.values())) == len(drawn)


def test_random_is_fair() -> None:
    """Each of 20 tokens is among 5 kept in a quarter of 4000 draws; five standard errors aside."""
    counts = np.zeros(20)
    for seed in range(4000):
        counts[RANKS["random"].choose(20, 5, Draw(seed, 0, 0))] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_random_is_the_same_for_ever() -> None:
    """The right value, written down once: answers of last year's runs can be made again."""
    assert RANKS["random"].choose(16, 4, Draw(7, 1, 3)).tolist() == [1, 2, 5, 15]


@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 2**31))
def test_diversity_is_greedy_farthest_first(count: int, width: int, seed: int) -> None:
    embeddings = np.random.default_rng(seed).normal(size=(count, width))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    chosen = farthest_first(torch.from_numpy(embeddings), count).tolist()
    assert sorted(chosen) == list(range(count))
    nearest = (distance + np.where(np.eye(count) > 0, np.inf, 0)).min(0)
    assert nearest[chosen[0]] >= nearest.max() - 1e-5
    for done in range(1, count):
        apart = distance[chosen[:done]].min(0)
        left = [token for token in range(count) if token not in chosen[:done]]
        assert apart[chosen[done]] >= apart[left].max() - 1e-5


@given(st.integers(1, 30), st.data())
def test_diversity_of_fewer_begins_diversity_of_more(count: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    embeddings = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
    assert (
        farthest_first(embeddings, keep).tolist()
        == farthest_first(embeddings, count)[:keep].tolist()
    )


def test_diversity_of_a_uniform_picture_chooses_each_token_once() -> None:
    same = torch.ones(6, 4)
    assert farthest_first(same, 6).tolist() == list(range(6))
    assert farthest_first(torch.zeros(6, 4), 3).tolist() == [0, 1, 2]
    assert farthest_first(torch.ones(1, 4), 1).tolist() == [0]


def with_equals(places: Sequence[int], width: int) -> torch.Tensor:
    """[307, width] embeddings, some of them the very same, as those of the ends of a picture's rows."""
    embeddings = torch.randn(307, width, generator=torch.Generator().manual_seed(width))
    embeddings[list(places)] = embeddings[places[0]].clone()
    return embeddings


@pytest.mark.parametrize("width", [64, 128, 333, 1024])
def test_of_equals_the_first_is_the_farthest(width: int) -> None:
    """Wherever a product's rows stand, of which the last of 307 stands apart."""
    equals = [16, 33, 70, 148, 306]
    embeddings = with_equals(equals, width)
    chosen = farthest_first(embeddings, 307).tolist()
    assert [token for token in chosen if token in equals] == equals
    assert chosen[-4:] == equals[1:], "the others are as near as can be"


@pytest.mark.parametrize("width", [64, 128, 333, 1024])
def test_of_equals_the_first_go_as_most_alike(width: int) -> None:
    equals, between = [160, 200, 250, 306], 153
    embeddings = with_equals(equals, width)
    embeddings[between] = embeddings[160] + 0.1 * embeddings[between]
    found = important_then_diverse(torch.zeros(307), embeddings, 305).tolist()
    assert {*range(307)} - {*found} == {160, 200}


def scored(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of which some are equal, as of half-precision floats; and embeddings."""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.integers(0, 9, count) / 8.0), torch.from_numpy(
        draw.normal(size=(count, 5))
    )


@given(st.integers(1, 60), st.integers(0, 2**31), st.data())
def test_the_most_attended_come_first(count: int, seed: int, data: st.DataObject) -> None:
    scores, embeddings = scored(count, seed)
    keep = data.draw(st.integers(0, count))
    expected = sorted(range(count), key=lambda token: (-float(scores[token]), token))
    assert most_attended(scores, embeddings, keep).tolist() == expected[:keep]


@given(st.integers(1, 90), st.integers(0, 2**31), st.data())
def test_half_are_important_and_the_rest_outlast_the_others(
    count: int, seed: int, data: st.DataObject
) -> None:
    """Against the same rule by sets: of each round's compared tokens, the most alike go."""
    scores, embeddings = scored(count, seed)
    keep = data.draw(st.integers(1, count))
    found = important_then_diverse(scores, embeddings, keep).tolist()
    assert len(set(found)) == len(found) == keep
    order = most_attended(scores, embeddings, count).tolist()
    important, left = order[: keep // 2], order[keep // 2 :]
    assert found[: keep // 2] == important
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).numpy()
    while len(left) > keep - len(important):
        others = left[1::2]
        compared = sorted(left[::2], key=lambda token: -cosine[token, others].max())
        left = compared[min(ROUND, len(left) - keep + len(important), len(compared)) :] + others
    assert set(found) == {*important, *left}


def test_of_two_tokens_alike_one_stays() -> None:
    """Eight pairs of equals that nothing attends to, and eight tokens that stay for it."""
    pairs = torch.eye(8).repeat_interleave(2, 0)
    embeddings = torch.cat([torch.ones(8, 8), pairs])
    scores = torch.cat([torch.ones(8), torch.zeros(16)])
    found = important_then_diverse(scores, embeddings, 16).tolist()
    assert found[:8] == list(range(8))
    assert sorted((token - 8) // 2 for token in found[8:]) == list(range(8))


def test_what_a_rank_looks_at_decides_what_must_be_computed_at_once() -> None:
    """Of these; further ranks need no line here (docs/ranks.md has the recipe)."""
    expected = {
        "uniform": Needs.NOTHING,
        "random": Needs.NOTHING,
        "diversity": Needs.IMAGE,
        "cls_attention": Needs.IMAGE,
        "cls_diverse": Needs.IMAGE,
        "received_attention": Needs.IMAGE,
        **dict.fromkeys(SHARES, Needs.IMAGE),
        "last_image": Needs.IMAGE,
        "last_prompt": Needs.PROMPT,
        **dict.fromkeys(ROWS, Needs.PROMPT),
    }
    known = {name: RANKS[name] for name in expected}
    assert {name: rank.needs for name, rank in known.items()} == expected
    assert all(isinstance(RANKS[name], AttentionRank) for name in ("last_image", "last_prompt"))
    assert isinstance(RANKS["diversity"], PictureRank)
    towers = {n: (r.nested, r.score) for n, r in known.items() if isinstance(r, TowerRank)}
    assert towers == {
        "cls_attention": (True, TowerScore.CLASS),
        "cls_diverse": (False, TowerScore.CLASS),
        "received_attention": (True, TowerScore.RECEIVED),
        "scope": (True, TowerScore.CLASS),
        "holov": (False, TowerScore.CLASS),
        "holov_received": (False, TowerScore.RECEIVED),
        "hired": (False, TowerScore.CLASS),
    }
    assert all(name == rank.name and rank.title for name, rank in RANKS.items())
    assert {name for name, rank in known.items() if rank.draws} == {"random"}
    assert {name for name, rank in known.items() if rank.reads_layer} == {
        "last_image",
        "last_prompt",
        *ROWS,
    }
    assert {name for name, rank in known.items() if rank.late} == {
        "uniform",
        "random",
        "last_prompt",
    }


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_raters_are_the_tokens_above_the_mean(total: int, question: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    image, asking = draw.normal(size=(total, 5)), draw.normal(size=(question, 5))
    found = raters(torch.from_numpy(image), torch.from_numpy(asking)).bool().tolist()
    exps = np.exp(image @ asking.T)
    relevance = (exps / exps.sum(1, keepdims=True)).mean(0)
    clear = np.abs(relevance - 1 / question) > 1e-6
    assert [found[at] for at in np.flatnonzero(clear)] == (relevance > 1 / question)[clear].tolist()
    assert any(found)


def test_where_all_are_as_relevant_all_rate() -> None:
    for question in range(1, 30):
        assert raters(torch.ones(7, 3), torch.ones(question, 3)).tolist() == [1.0] * question


def test_a_grid_has_every_third_token_of_every_third_row() -> None:
    assert grid(36).tolist() == [0, 3, 18, 21]
    assert len(grid(576)) == 64 and len(grid(729)) == 81
    for total in (2, 35, 575):  # no square
        assert len(set(grid(total).tolist())) == -(-total // 9) and grid(total).max() < total
    assert grid(1).tolist() == [0]
