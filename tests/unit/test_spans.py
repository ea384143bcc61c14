"""Image spans against counting one position at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.spans import ImageSpans


def ranges_within(last_start: int, longest: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    one = st.tuples(st.integers(0, last_start), st.integers(0, longest))
    return st.lists(one.map(lambda x: (x[0], x[0] + x[1])), max_size=5)


# Far apart, or so near that they touch and overlap.
RANGES = ranges_within(60, 20) | ranges_within(9, 4)


def positions_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {p for start, end in ranges for p in range(start, end)}


@given(RANGES)
def test_counts_match_a_naive_model(ranges: list[tuple[int, int]]) -> None:
    spans, image = ImageSpans.from_ranges(ranges), positions_of(ranges)
    everywhere = np.arange(100)
    naive = [sum(q < p for q in image) for p in everywhere]
    assert spans.total == len(image)
    assert spans.end == max(image, default=-1) + 1
    assert [spans.count_before(int(p)) for p in everywhere] == naive
    assert spans.counts_before(everywhere).tolist() == naive
    assert spans.is_image(everywhere).tolist() == [p in image for p in everywhere]
    kept = [int(p) for p in everywhere if p not in image]
    assert spans.kept_positions(np.arange(len(kept))).tolist() == kept


@given(RANGES)
def test_ranges_are_normal(ranges: list[tuple[int, int]]) -> None:
    spans = ImageSpans.from_ranges(ranges)
    assert positions_of(list(spans.ranges)) == positions_of(ranges)
    assert all(a[1] < b[0] for a, b in zip(spans.ranges, spans.ranges[1:], strict=False))
    assert ImageSpans.from_positions(np.array(sorted(positions_of(ranges)), dtype=int)) == spans


@pytest.mark.parametrize("ranges", [((3, 3),), ((5, 8), (2, 4)), ((0, 5), (4, 9)), ((-1, 3),)])
def test_ranges_that_are_not_normal_are_refused(ranges: tuple) -> None:
    with pytest.raises(ValueError, match="from_ranges"):
        ImageSpans(ranges)
