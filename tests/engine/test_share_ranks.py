"""Ranks that share a budget out among tiles and crops, or cover a picture: exact, in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engine import v2_cpu
from tests.engine.cases import LONG, NEXT, SIGLIP, Ask, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.longer import some
from vllm_flow.engine.worker.choosing.picture_orders import PictureOrders
from vllm_flow.ranks import RANKS

BY_CLASS = (
    "0:50% hired",
    "2:30% hired, 3:0",
    "0:40% holov, 2:10% uniform",
    "1:60% holov",
    "0:50% scope, 2:20% scope",
    "1:75% uniform, 3:30% scope",
)
PICTURES = {"tiles": (NEXT, 1700), "one tile": (LONG, 1760)}
"""Shapes, and seeds of pictures."""
RECEIVED = ("0:40% holov_received", "2:30% holov_received, 3:7 last_prompt")


def share_asks(stages: tuple[str, ...], seed: int) -> list[Ask]:
    """One image and two, beside requests that rank otherwise or not at all."""
    asks = [replace(one_image(seed + n), stages=one) for n, one in enumerate(stages)]
    asks += [replace(two_images(seed + 10 + n), stages=one) for n, one in enumerate(stages)]
    return [
        *asks,
        replace(one_image(seed + 20), stages=f"0:5 {stages[0].split()[-1]}"),
        replace(one_image(seed + 21), stages="0:50% cls_attention"),
        one_image(seed + 22, 2),
        one_image(seed + 23),
        replace(text_only(4), stages=stages[0]),
    ]


@pytest.mark.parametrize("pictures", some(PICTURES, v2_cpu.reduced(PICTURES, to=["tiles"])))
def test_what_is_shared_out_is_exact(open_engine: OpenEngine, pictures: str) -> None:
    """Of pictures that are one tile, and of tiles with ends of rows between them."""
    shape, seed = PICTURES[pictures]
    engine = open_engine(shape, 2)
    asks = share_asks(BY_CLASS, seed)
    asks = v2_cpu.reduced(asks, to=[replace(ask, max_tokens=6) for ask in asks])
    compared = assert_exact(engine, asks, engine.run(asks), ties=True)
    assert compared >= len(asks) * 0.8
    engine.check_idle()


def test_crops_by_what_patches_receive_are_exact(open_engine: OpenEngine) -> None:
    engine = open_engine(SIGLIP, 2)
    asks = [ask for ask in share_asks(RECEIVED, 1740) if "cls_attention" not in str(ask.stages)]
    asks = v2_cpu.reduced(asks, to=[replace(ask, max_tokens=6) for ask in asks])
    assert_exact(engine, asks, engine.run(asks))
    engine.check_idle()


@pytest.mark.parametrize("rank", ["hired", "holov", "scope"])
def test_another_question_shares_the_pictures_prefix(open_engine: OpenEngine, rank: str) -> None:
    """With the same policy, and with no other; what is remembered of a picture serves those who keep as many."""
    engine = open_engine(LONG, 2, enable_prefix_caching=True)
    seed = 1790 + len(rank)
    first = replace(one_image(seed, before=20, after=60), stages=f"0:50% {rank}")
    assert_exact(engine, [first], engine.run([first]))
    others = [replace(first, prompt=f"{first.prompt} w{n}") for n in (3, 4)]
    outputs = engine.run(others)
    assert_exact(engine, others, outputs)
    assert all(output.num_cached_tokens for output in outputs)
    fewer = [replace(first, stages=f"0:{keep} {rank}") for keep in (40, 41, 72, 71)]
    assert_exact(engine, fewer, engine.run(fewer))
    assert_exact(engine, [first.without_policy()], engine.run([first.without_policy()]))


def test_a_picture_of_which_nothing_is_known_keeps_its_first_tokens() -> None:
    """It came as embeddings under the name of another's pixels; the front end refuses those that it sees."""
    unseen = {"name": torch.zeros(9, 4)}
    orders = PictureOrders(unseen)
    for name in ("hired", "holov", "scope", "cls_attention"):
        found = orders.order(RANKS[name], "name", torch.randn(9, 4), 3, remembered=False)
        assert len({*found.tolist()}) == 3 and (name == "holov" or found.tolist() == [0, 1, 2])
    frames = orders.order(RANKS["dycoke"], "name", torch.randn(9, 4), 3, remembered=False)
    assert frames.tolist() == [0, 1, 2]
