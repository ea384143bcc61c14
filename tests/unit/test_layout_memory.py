"""What layouts of long videos cost the host: memory that is kept, and Python objects per token."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction

import pytest

from vllm_flow import layout_stages
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.spans import ImageSpans

TOKENS = 16384
VIDEO = ImageSpans.from_ranges([(20, 20 + TOKENS)])


def drawn(seed: int, *layers: int) -> TokenLayout:
    """Of a video of which half stays, then half of that, and so on, drawn with a seed of the client's."""
    shares = [Stage(at, Fraction(1, 2 << n), "random") for n, at in enumerate(layers)]
    found = TokenLayout.of(FlowPolicy((tuple(shares),), seed), VIDEO, TOKENS + 100)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    layout_stages.clear_caches()
    yield
    layout_stages.clear_caches()


def kept_by(seeds: range, *layers: int) -> int:
    """Bytes that are held once the layouts of these seeds are gone."""
    drawn(0, *layers)
    gc.collect()
    tracemalloc.start()
    try:
        for seed in seeds:
            drawn(seed, *layers)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_clients_seeds_fill_caches_to_a_bound() -> None:
    few = kept_by(range(1, 41), 2, 7)
    layout_stages.clear_caches()
    many = kept_by(range(1, 301), 2, 7)
    assert many < 1.1 * layout_stages.CACHE_BYTES + (1 << 20)
    assert few > 1 << 20, "a few are kept"


def test_a_layout_is_counted_as_large_as_it_is() -> None:
    """Of arrays, or the bound would be on something else."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        asked = FlowPolicy(((Stage(2, Fraction(1, 2), "random"),),), 5), (VIDEO,)
        stages = layout_stages.make_stages(*asked)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.8 * taken < layout_stages.bytes_of(asked, stages) < 1.5 * taken
    assert taken < 256 << 10, "a span takes 40 bytes: it was 160 when spans were tuples"


def test_layouts_that_are_equal_are_equal_whoever_made_them() -> None:
    one = drawn(3, 2)
    layout_stages.clear_caches()
    other = drawn(3, 2)
    assert one == other and one.stages[0].evicted is not other.stages[0].evicted
    assert hash(one.spans) == hash(other.spans)
    assert one != drawn(4, 2)
    assert pickle.loads(pickle.dumps(one)) == one
