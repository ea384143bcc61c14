"""Spans and rows of the attention log against naive models, over prompts, cliffs and chunks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.staged_cases import LAYERS as STAGED_LAYERS
from tests.unit.staged_cases import Case as Staged
from tests.unit.staged_cases import cases as staged_cases
from vllm_flow.attention import (
    OUTPUT,
    SYSTEM,
    USER,
    AnswerRow,
    KeySpans,
    LoggedRequest,
    TokenAttention,
    answer_rows,
)
from vllm_flow.layout import TokenLayout
from vllm_flow.log_keys import AttentionLog
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

LAYERS = 4


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[list[tuple[int, int]]]]:
    """A prompt's length and its images' ranges; images may touch, and have text inside."""
    at = draw(st.integers(0, 4))
    images = []
    for _ in range(draw(st.integers(0, 3))):
        ranges = []
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(1, 5))
            ranges.append((at, at + length))
            at += length + draw(st.integers(0, 2))
        images.append(ranges)
    return max(at + draw(st.integers(0, 4)), 1), images


def naive_labels(num_tokens: int, prompt: int, images: list[list[tuple[int, int]]]) -> list[int]:
    """The label of every token, one by one, straight from the definition."""
    image_of = {
        at: i
        for i, ranges in enumerate(images)
        for start, end in ranges
        for at in range(start, end)
    }
    first = min(image_of, default=-1)
    return [
        OUTPUT if at >= prompt else image_of.get(at, SYSTEM if at < first else USER)
        for at in range(num_tokens)
    ]


def logged(
    prompt: int, images: list[list[tuple[int, int]]], cliff: int = LAYERS, single: bool = False
) -> LoggedRequest:
    spans = ImageSpans.from_ranges(span for ranges in images for span in ranges)
    policy = FlowPolicy.withdrawal(cliff) if cliff < LAYERS else None
    return LoggedRequest(
        AttentionLog(tuple(range(LAYERS)), single),
        prompt,
        KeySpans.of(prompt, images, single=single),
        TokenLayout.of(policy, spans),
    )


@given(
    prompts(), st.integers(1, 8), st.integers(0, LAYERS), st.integers(0, LAYERS - 1), st.booleans()
)
def test_bounds_label_every_stored_token(
    case: tuple[int, list[list[tuple[int, int]]]], more: int, cliff: int, layer: int, single: bool
) -> None:
    prompt, images = case
    request = logged(prompt, images, cliff, single)
    for num_tokens in (prompt, prompt + more):
        bounds = request.bounds(num_tokens, layer)
        assert bounds[0] == 0 and (np.diff(bounds) >= 0).all()
        found = np.repeat(request.spans.labels, np.diff(bounds)).tolist()
        expected = naive_labels(num_tokens, prompt, images)
        if layer >= cliff:
            expected = [label for label in expected if label < 0]
        assert found == expected
    if single:
        image_tokens = sum(end - start for ranges in images for start, end in ranges)
        assert (request.spans.labels >= 0).sum() == image_tokens


@given(staged_cases(("uniform", "random")), st.booleans(), st.data())
def test_bounds_are_of_what_a_layer_stores_in_whatever_order_they_are_asked_for(
    case: Staged, late: bool, data: st.DataObject
) -> None:
    """Of images that leave late, the row that predicts the first answer token sees all."""
    if late:
        case = replace(case, policy=replace(case.policy, when="decode"))
    images = [
        list(ImageSpans.from_ranges((p, p + 1) for p in image).ranges) for image in case.images
    ]
    spans = KeySpans.of(case.prompt, images)
    request = LoggedRequest(AttentionLog((0,), False), case.prompt, spans, case.layout)
    lengths, layers = st.integers(case.prompt, case.length + 2), st.integers(0, STAGED_LAYERS - 1)
    for num_tokens, layer in data.draw(st.lists(st.tuples(lengths, layers), min_size=1)):
        gone = {p for image in case.images for p in image} - case.left(layer)
        if late and num_tokens == case.prompt:
            gone = set()
        labels = naive_labels(num_tokens, case.prompt, images)
        found = np.repeat(spans.labels, np.diff(request.bounds(num_tokens, layer)))
        assert found.tolist() == [label for at, label in enumerate(labels) if at not in gone]


def test_a_prompt_without_image_is_the_users() -> None:
    spans = KeySpans.of(5, [])
    assert spans.starts.tolist() == [0, 5] and spans.labels.tolist() == [USER, OUTPUT]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 5), st.booleans()), min_size=1, max_size=5
    ),
    st.data(),
)
def test_every_answer_token_has_one_row_whatever_the_chunks(
    shapes: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    requests = [logged(prompt, []) if logs else None for prompt, _, logs in shapes]
    computed = [0] * len(shapes)
    seen: list[list[int]] = [[] for _ in shapes]
    last = [prompt + tokens - 1 for prompt, tokens, _ in shapes]
    while any(c < end for c, end in zip(computed, last, strict=True)):
        alive = [i for i, end in enumerate(last) if computed[i] < end]
        # The prompt in chunks, then one token per step.
        scheduled = [data.draw(st.integers(1, max(shapes[i][0] - computed[i], 1))) for i in alive]
        starts = np.concatenate(([0], np.cumsum(scheduled)))
        rows = answer_rows([requests[i] for i in alive], [computed[i] for i in alive], scheduled)
        for row in rows:
            i = alive[row.index]
            assert row.request is requests[i]
            # The row sees itself and all before it, and predicts the token after it.
            position = computed[i] + row.row - starts[row.index]
            assert row.num_tokens == position + 1 == shapes[i][0] + row.token
            seen[i].append(row.token)
        for i, count in zip(alive, scheduled, strict=True):
            computed[i] += count
    for (_, tokens, logs), found in zip(shapes, seen, strict=True):
        assert found == (list(range(tokens)) if logs else [])


@given(prompts(), st.booleans(), st.integers(0, 2**32 - 1))
def test_shares_are_sums_over_spans(
    case: tuple[int, list[list[tuple[int, int]]]], heat: bool, seed: int
) -> None:
    prompt, images = case
    request = logged(prompt, images, single=heat)
    mass = np.random.default_rng(seed).dirichlet(np.ones(len(request.spans.starts)), LAYERS)
    mass = mass.astype(np.float32)
    found = TokenAttention.of(AnswerRow(0, 0, 7, prompt + 7, request), mass)
    labels = request.spans.labels
    assert found.token == 7 and found.num_rows == LAYERS
    np.testing.assert_allclose(found.shares.sum(1), 1, atol=1e-5)
    for column, label in ((0, SYSTEM), (2, USER), (3, OUTPUT)):
        np.testing.assert_allclose(
            found.shares[:, column], mass[:, labels == label].sum(1), atol=1e-6
        )
    for image in range(len(images)):
        np.testing.assert_allclose(
            found.images[:, image], mass[:, labels == image].sum(1), atol=1e-6
        )
    np.testing.assert_allclose(found.images.sum(1), found.shares[:, 1], atol=1e-6)
    assert (found.heat is not None) == heat
    if found.heat is not None:
        np.testing.assert_allclose(found.heat.sum(1), found.shares[:, 1], atol=1e-5)


@pytest.mark.parametrize("images", [[], [[(2, 5)]]])
def test_size_counts_every_array(images: list[list[tuple[int, int]]]) -> None:
    request = logged(6, images, single=True)
    mass = np.ones((LAYERS, len(request.spans.starts)), dtype=np.float32)
    token = TokenAttention.of(AnswerRow(0, 0, 0, 6, request), mass)
    image_tokens = sum(end - start for ranges in images for start, end in ranges)
    assert token.nbytes == 4 * LAYERS * (1 + 4 + len(images) + image_tokens)
