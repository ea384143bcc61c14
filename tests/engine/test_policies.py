"""Requests that keep some image tokens answer as the oracle does, whatever shares their batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from tests.engine import v2_cpu
from tests.engine.cases import LONG, MISTRAL, NEXT, QWEN, Ask, one_image, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, Engine, assert_exact, differ
from tests.engine.policy_cases import ROWS, device_mixed, place_mixed, row_mixed
from tests.engine.tiny_llava import words
from tests.longer import some
from vllm_flow.ranks import RANKS, FrameRank, TileRank, merges

SMALL, TIGHT = "chunks-of-97-groups-of-2", "chunks-of-192-groups-of-3-async"
CHUNKS: dict[str, tuple[int, dict[str, Any]]] = {
    "groups-of-2": (2, {}),
    SMALL: (2, {"max_num_batched_tokens": 97, "max_num_seqs": 12}),
}


WHOLE: dict[str, tuple[int, dict[str, Any]]] = {
    "groups-of-2": (2, {}),
    TIGHT: (
        3,
        {"max_num_batched_tokens": 192, "max_num_seqs": 12, "async_scheduling": True},
    ),
}


@pytest.mark.parametrize("name", v2_cpu.reduced(some(CHUNKS, [SMALL]), to=[SMALL]))
def test_ranks_by_place_are_exact(open_engine: OpenEngine, name: str) -> None:
    group_layers, options = CHUNKS[name]
    engine = open_engine(LONG, group_layers, **options)
    asks = place_mixed(LONG.layers)
    asks = v2_cpu.reduced(asks, to=[replace(ask, max_tokens=8) for ask in asks[2:12:3]])
    assert_exact(engine, asks, engine.run(asks))


@pytest.mark.parametrize("name", v2_cpu.reduced(some(WHOLE, [TIGHT]), to=["groups-of-2"]))
def test_ranks_of_the_device_are_exact(open_engine: OpenEngine, name: str) -> None:
    """What must be ranked whole is scheduled whole, however little room the steps have besides."""
    group_layers, options = WHOLE[name]
    engine = open_engine(LONG, group_layers, **options)
    asks = device_mixed(LONG.layers)
    asks = v2_cpu.reduced(asks, to=[replace(a, max_tokens=8) for a in (*asks[:9], *asks[9:13:3])])
    if "chunks" in name:
        # Two images and the text around them are more than a step has room for: refused, see below.
        asks = [a for a in asks if not (len(a.images) == 2 and "last_prompt" in str(a.stages))]
    compared = assert_exact(engine, asks, engine.run_joining(asks), ties=True)
    assert compared >= len(asks) * 0.8


@pytest.mark.parametrize("name", v2_cpu.reduced(some(WHOLE, [TIGHT]), to=["groups-of-2"]))
def test_ranks_by_many_rows_are_exact(open_engine: OpenEngine, name: str) -> None:
    """Of the question, of hidden states and of keys without positions; beside requests with other ranks."""
    group_layers, options = WHOLE[name]
    engine = open_engine(LONG, group_layers, **options)
    asks = row_mixed()
    asks = v2_cpu.reduced(asks, to=[replace(ask, max_tokens=8) for ask in asks[:8]])
    if "chunks" in name:  # see above
        asks = [a for a in asks if len(a.images) < 2]
    compared = assert_exact(engine, asks, engine.run_joining(asks), ties=True)
    assert compared >= len(asks) * 0.8


@pytest.mark.parametrize(
    "shape", some({QWEN.name: QWEN, MISTRAL.name: MISTRAL, NEXT.name: NEXT}, [QWEN.name])
)
def test_ranks_by_many_rows_in_other_decoders(open_engine: OpenEngine, shape: str) -> None:
    """With biases in their projections, other numbers of heads, and pictures in tiles."""
    found = {one.name: one for one in (QWEN, MISTRAL, NEXT)}[shape]
    engine = open_engine(found, 1)
    asks = [
        replace(ask, stages=stages)
        for n, stages in enumerate(ROWS[:5])
        for ask in (one_image(200 + n), two_images(210 + n))
    ]
    asks = [ask for ask in asks if "4:" not in str(ask.stages) or found.layers > 4]
    compared = assert_exact(engine, asks, engine.run(asks), ties=True)
    assert compared >= len(asks) * 0.7


def test_another_rank_is_another_answer(open_engine: OpenEngine) -> None:
    """A control of the oracle: what another rank keeps gives other logprobs, or these tests prove nothing."""
    engine = open_engine(LONG, 2)
    asks = [
        replace(one_image(96), stages=f"{0 if merges(rank) else 2}:30% {name}")
        for name, rank in RANKS.items()
        # Frames are a video's; a picture of one tile keeps what its class token attends to.
        if not isinstance(rank, FrameRank | TileRank)
    ]
    outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    for (ask, output), (other, another) in combinations(zip(asks, outputs, strict=True), 2):
        assert differ(output, another), (ask.stages, other.stages)


CACHED = {"enable_prefix_caching": True}
SHARED = (
    "1:50% uniform",
    "2:1/3 random, 4:0",
    "1:60% uniform, 3:30% random, 5:5 uniform",
    "0:7 uniform, 3:0",
)


def assert_another_question_finds(
    engine: Engine, first: Ask, before: int, afters: Sequence[int] = (3, 50)
) -> None:
    """Requests that leave ``first`` so many words behind its picture are exact, and find what they share with it.

    Args:
        before: words before the picture.
    """
    said = first.prompt.split()
    assert_exact(engine, [first], engine.run([first]))
    for after in afters:
        ask = replace(first, prompt=" ".join([*said[: before + 1 + after], words(11, after)]))
        outputs = engine.run([ask])
        assert_exact(engine, [ask], outputs)
        # The common prefix: text, image, more text; in whole blocks.
        common = 1 + before + LONG.image_tokens + after
        assert outputs[0].num_cached_tokens == common // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("stages", some(SHARED, SHARED[2:3]))
def test_prefixes_by_place_are_found_like_the_baselines(
    open_engine: OpenEngine, stages: str
) -> None:
    """Hits that end inside the image and after it, in groups of every kind; alone and all at once."""
    engine = open_engine(LONG, 2, **CACHED)
    first = replace(one_image(500 + SHARED.index(stages), before=20, after=90), stages=stages)
    assert_another_question_finds(engine, first, before=20, afters=(3, 50, 25))
    asks = [replace(first, prompt=f"{first.prompt} {words(5, n)}") for n in range(3)]
    assert_exact(engine, asks, engine.run(asks))


@pytest.mark.parametrize(
    "stages",
    some(
        ["2:50% last_image", "0:30% diversity, 3:0", "1:75% uniform, 3:30% last_image"],
        ["1:75% uniform, 3:30% last_image"],
    ),
)
def test_another_question_on_a_ranked_picture_finds_it(
    open_engine: OpenEngine, stages: str
) -> None:
    """A hit that ends inside the image, past the rows that stay, has nothing left to choose."""
    engine = open_engine(LONG, 2, **CACHED)
    first = replace(one_image(510, before=20, after=90), stages=stages)
    assert_another_question_finds(engine, first, before=20)
    asks = [replace(first, prompt=f"{first.prompt} {words(5, n)}", samples=n) for n in (1, 2)]
    assert_exact(engine, asks, engine.run(asks))


PROMPTS = {
    "2:50% last_prompt": "2:50% last_prompt, 4:30% last_prompt",
    "1:60% question, 3:30% raters": "2:50% raters, 4:30% question",
    "2:50% feather": "2:50% feather, 4:30% unrotated",
    "3:40% dart": "1:60% dart, 3:30% dart",
}
"""Of ranks that look at the whole prompt: stages for one image, and for two."""


@pytest.mark.parametrize("stages", some(PROMPTS, ["2:50% last_prompt", "3:40% dart"]))
def test_what_the_whole_prompt_chose_is_found_by_the_same_prompt(
    open_engine: OpenEngine, stages: str
) -> None:
    """Another prompt finds the text before the image alone, though it begins with the whole of the first."""
    engine = open_engine(LONG, 2, **CACHED)
    seed = 520 + 10 * [*PROMPTS].index(stages)
    first = replace(one_image(seed, before=40, after=60), stages=stages)
    other = replace(first, prompt=f"{first.prompt} {words(5, 1)}")
    tokens = 1 + 40 + LONG.image_tokens + 60
    same = (tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    for ask, hit in ((first, 0), (first, same), (other, BLOCK_SIZE), (first, same)):
        (output,) = engine.run([ask])
        assert_exact(engine, [ask], [output])
        assert output.num_cached_tokens == hit
    several = replace(two_images(seed + 5), stages=PROMPTS[stages], samples=2)
    assert_exact(engine, [several], engine.run([several]))


def test_policies_that_keep_do_not_share(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2, **CACHED)
    asks = [replace(one_image(540, before=40, after=40), stages=stages) for stages in SHARED]
    asks += [
        replace(asks[1], seed=5),
        one_image(540, before=40, after=40),
        replace(asks[1], stages="4:0"),
    ]
    for ask in asks:
        (output,) = engine.run([ask])
        assert output.num_cached_tokens == 0, "found what another policy computed"
        assert_exact(engine, [ask], [output])
    again = engine.run(asks)
    assert_exact(engine, asks, again)
    assert all(out.num_cached_tokens > LONG.image_tokens for out in again)


@pytest.mark.parametrize(
    ("stages", "left"),
    [
        ("1:50% uniform, 4:0", (144, 72, 72, 72, 0, 0)),
        ("0:60% diversity, 2:30% last_image, 5:7 random", (86, 86, 43, 43, 43, 7)),
        ("3:1/3 last_prompt", (144, 144, 144, 48, 48, 48)),
    ],
)
def test_blocks_and_reports_are_those_of_what_stays(
    open_engine: OpenEngine, stages: str, left: tuple[int, ...]
) -> None:
    engine = open_engine(LONG, 2)
    ask = replace(one_image(66), stages=stages, max_tokens=3)
    (output,) = engine.run([ask])
    found = output.kv_transfer_params["vllm_flow"]
    computed = len(output.prompt_token_ids) + 2
    held = [computed - LONG.image_tokens + left[start] for start in range(0, LONG.layers, 2)]
    assert found["kv_blocks"] == [-(-tokens // BLOCK_SIZE) for tokens in held]
    assert found["prefill_rows_saved"] == sum(LONG.image_tokens - count for count in left)
    assert found["image_tokens_evicted"] == LONG.image_tokens - left[-1]
    told = {stage["layer"]: stage for stage in found["stages"]}
    assert list(told) == [int(part.split(":")[0]) for part in stages.split(", ")]
    for layer, stage in told.items():
        assert stage["image_tokens_kept"] == left[layer]
        assert stage["image_tokens_evicted"] == LONG.image_tokens - left[layer]
