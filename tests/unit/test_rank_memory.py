"""Ranks that compare all tokens with all others: the same choice in little memory, and how much that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine import diverse_oracle
from vllm_flow.ranks import unlike
from vllm_flow.ranks.cls_diverse import important_then_diverse
from vllm_flow.ranks.diversity import farthest_first


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operator has made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        found = [made] if isinstance(made, torch.Tensor) else made
        self.numbers = max([self.numbers, *(t.numel() for t in found or () if t is not None)])
        return made


def embeddings_of(count: int, width: int, equal: bool) -> torch.Tensor:
    rng = torch.Generator().manual_seed(count + width)
    embeddings = torch.randn(count, width, generator=rng)
    if equal:
        same = [3, count // 3, count // 2, count - 2, count - 1]
        embeddings[same] = embeddings[3].clone()
    return embeddings


SHAPES = [(40, 8), (41, 64), (203, 24), (307, 128), (307, 333)]


@pytest.mark.parametrize("at_once", [1, 24, 1000])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_farthest_first_is_the_oracles_however_little_is_held(
    monkeypatch: pytest.MonkeyPatch, count: int, width: int, equal: bool, at_once: int
) -> None:
    monkeypatch.setattr(unlike, "AT_ONCE", at_once)
    embeddings = embeddings_of(count, width, equal)
    before = embeddings.clone()
    found = farthest_first(embeddings, count - 6).tolist()
    expected = diverse_oracle.farthest_first(embeddings.double().numpy())[: count - 6]
    if equal:  # the last ones are at no distance of any other
        found, expected = found[: count - 12], expected[: count - 12]
    assert found == expected
    assert torch.equal(embeddings, before), "they are the decoder's"


@pytest.mark.parametrize("at_once", [1, 24, 1000])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_half_important_is_the_oracles_however_little_is_held(
    monkeypatch: pytest.MonkeyPatch, count: int, width: int, equal: bool, at_once: int
) -> None:
    monkeypatch.setattr(unlike, "AT_ONCE", at_once)
    embeddings = embeddings_of(count, width, equal)
    scores = torch.from_numpy(np.random.default_rng(count).permutation(count).astype(float))
    found = important_then_diverse(scores, embeddings, count // 2)
    order = scores.argsort(descending=True).tolist()
    if equal:  # as where all is held
        monkeypatch.setattr(unlike, "AT_ONCE", 4096)
        assert torch.equal(found, important_then_diverse(scores, embeddings, count // 2))
        return
    tokens = embeddings.double().numpy()
    expected = diverse_oracle.important_then_diverse(order, tokens, count // 2)
    assert set(found.tolist()) == expected


@pytest.mark.parametrize(
    "choose",
    [farthest_first, lambda rows, keep: important_then_diverse(rows[:, 0], rows, keep)],
    ids=["diversity", "cls_diverse"],
)
def test_no_rank_holds_all_pairs_of_a_long_video(
    monkeypatch: pytest.MonkeyPatch, choose: Callable[..., Any]
) -> None:
    """1000 tokens with room for the pairs of 100: at most those, or the embeddings themselves."""
    monkeypatch.setattr(unlike, "AT_ONCE", 100)
    with Largest() as largest:
        choose(embeddings_of(1000, 8, False), 990)
    assert largest.numbers <= max(100 * 100, unlike.SAME_PRODUCT * 1000)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (10, 3), (1000, 1000), (9, 5000), (17, 600)])
def test_blocks_cover_all_rows_and_are_alike(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    monkeypatch.setattr(unlike, "AT_ONCE", 100)
    blocks = [range(rows)[part] for part in unlike.row_blocks(rows, columns)]
    assert {row for block in blocks for row in block} == set(range(rows))
    assert len({len(block) for block in blocks}) == 1
    assert len(blocks[0]) * columns <= max(100 * 100, unlike.SAME_PRODUCT * columns)


@pytest.mark.parametrize("at_once", [1, 24, 1000])
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_distances_are_one_minus_the_cosine_however_they_are_come_by(
    monkeypatch: pytest.MonkeyPatch, count: int, width: int, at_once: int
) -> None:
    monkeypatch.setattr(unlike, "AT_ONCE", at_once)
    embeddings = embeddings_of(count, width, False)
    tokens = embeddings.double().numpy()
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    expected = 1 - unit @ unit.T
    one = unlike.distances_from(unlike.unit(embeddings), torch.tensor([7]))
    np.testing.assert_allclose(one, expected[7], atol=1e-5)
    np.fill_diagonal(expected, np.inf)
    found, nearest = unlike.distances(unlike.unit(embeddings))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(nearest, expected.min(0), atol=1e-5)
    in_parts = unlike.nearest_other(unlike.unit(embeddings))
    np.testing.assert_allclose(in_parts, expected.min(0), atol=1e-5)
