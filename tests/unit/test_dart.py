"""DART's choice: the image's pivots and what is least like them and the question's, of equals the first."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.ranks.dart import PIVOTS, unlike_pivots


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_dart_keeps_pivots_and_what_is_least_like_each_in_turn(
    total: int, question: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, total))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    states, asking = draw.normal(size=(total, 5)), draw.normal(size=(question, 5))
    sizes, asked = draw.permutation(total) + 1.0, draw.permutation(question) + 1.0
    given_ = (torch.from_numpy(part) for part in (states, sizes, asking, asked))
    found = unlike_pivots(*given_, keep)
    assert found.dtype == torch.bool and int(found.sum()) == keep
    own = np.argsort(-sizes)[: min(PIVOTS, keep)].tolist()
    pivots = [states[at] for at in own]
    pivots += [asking[at] for at in np.argsort(-asked)[:PIVOTS]]
    stay, left = set(own), keep - len(own)
    for index, pivot in enumerate(pivots):
        others = [token for token in range(total) if token not in stay]
        cosines = [
            states[at] @ pivot / np.linalg.norm(states[at]) / np.linalg.norm(pivot) for at in others
        ]
        share = left // len(pivots) + (index < left % len(pivots))
        stay |= {others[at] for at in np.argsort(cosines)[:share]}
    assert found.nonzero()[:, 0].tolist() == sorted(stay)


def test_dart_of_a_uniform_picture_chooses_as_many_as_asked() -> None:
    same, sizes = torch.ones(9, 4), torch.ones(9)
    found = unlike_pivots(same, sizes, torch.zeros(2, 4), torch.ones(2), 6)
    assert found.nonzero()[:, 0].tolist() == list(range(6))


def test_dart_has_four_pivots_of_the_image_the_first_of_equals() -> None:
    """Of forty tokens with equal keys the first four, and then the one that is unlike them."""
    states = torch.tensor([[1.0, 0.0]]).repeat(40, 1)
    states[-1] = torch.tensor([-1.0, 0.0])
    for keep, expected in ((4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 39])):
        found = unlike_pivots(states, torch.ones(40), states[:1], torch.ones(1), keep)
        assert found.nonzero()[:, 0].tolist() == expected


def chosen(
    states: torch.Tensor, question: torch.Tensor, keys: torch.Tensor, keep: int
) -> list[int]:
    """Of tokens with equal keys, beside a question whose keys are given."""
    found = unlike_pivots(states, torch.ones(len(states)), question, keys, keep)
    return list(found.nonzero()[:, 0].tolist())


def test_of_a_questions_equal_keys_the_first_are_pivots() -> None:
    """Each of the question's forty is unlike a token of its own, the image's pivots those right behind them."""
    states, question = torch.zeros(60, 41), torch.eye(40, 41)
    states[:20, 40] = torch.tensor([1.0] * 4 + [-1.0] * 16)
    states[20:] = -question
    assert chosen(states, question, torch.ones(40), 8 + 4) == [*range(8), *range(20, 24)]


def test_of_tokens_as_unlike_the_first_stay() -> None:
    assert chosen(torch.ones(40, 4), torch.ones(1, 4), torch.ones(1), 25) == [*range(25)]


def test_a_token_of_no_length_is_neither_like_nor_unlike() -> None:
    states = torch.ones(40, 4)
    states[30] = 0
    states[35] = -1
    assert chosen(states, torch.ones(1, 4), torch.ones(1), 7) == [0, 1, 2, 3, 4, 30, 35]


def test_half_precision_is_compared_as_finely_as_any() -> None:
    draw = torch.Generator().manual_seed(0)
    states, question = (torch.randn(n, 8, generator=draw).bfloat16() for n in (90, 9))
    for keep in (20, 40, 60):
        both = [
            chosen(states.to(dtype), question.to(dtype), torch.arange(9.0), keep)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        assert both[0] == both[1]
