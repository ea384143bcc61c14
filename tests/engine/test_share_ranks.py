"""Ranks that share a budget out among tiles and crops, or cover a picture: exact, in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.cases import LONG, NEXT, SIGLIP, Ask, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.tiny_llava import Shape

BY_CLASS = (
    "0:50% hired",
    "2:30% hired, 3:0",
    "0:40% holov, 2:10% uniform",
    "1:60% holov",
    "0:50% scope, 2:20% scope",
    "1:75% uniform, 3:30% scope",
)
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


@pytest.mark.parametrize(("shape", "seed"), [(NEXT, 1700), (LONG, 1760)], ids=["tiles", "one tile"])
def test_what_is_shared_out_is_exact(open_engine: OpenEngine, shape: Shape, seed: int) -> None:
    """Of pictures that are one tile, and of tiles with ends of rows between them."""
    engine = open_engine(shape, 2)
    asks = share_asks(BY_CLASS, seed)
    assert_exact(engine, asks, engine.run(asks))
    engine.check_idle()


def test_crops_by_what_patches_receive_are_exact(open_engine: OpenEngine) -> None:
    engine = open_engine(SIGLIP, 2)
    asks = [ask for ask in share_asks(RECEIVED, 1740) if "cls_attention" not in str(ask.stages)]
    assert_exact(engine, asks, engine.run(asks))
    engine.check_idle()
