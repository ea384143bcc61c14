"""Ranks that merge: what stays takes in what goes, whatever shares the batch, the pictures or the cache with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.cases import (
    LONG,
    NEXT,
    SIGLIP,
    SIGLIP_NEXT,
    Ask,
    adjacent_images,
    one_image,
    text_only,
    two_images,
)
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.tiny_llava import Shape

MERGED = (
    "0:64 visionzip",
    "0:50% visionzip, 2:20% uniform",
    "0:40% prumerge",
    "0:40% prumerge_plus, 3:0",
    "0:60 visionzip_received",
    "0:64 visionzip, 2:40% diversity, 3:10% last_prompt",
)


def merged_asks(seed: int, merged: tuple[str, ...] = MERGED) -> list[Ask]:
    """One image and two, beside requests that rank otherwise or not at all."""
    asks = [replace(one_image(seed + n), stages=stages) for n, stages in enumerate(merged)]
    asks += [replace(two_images(seed + n), stages=stages) for n, stages in enumerate(merged, 10)]
    return [
        *asks,
        replace(adjacent_images(seed + 30), stages=merged[0]),
        replace(one_image(seed + 31), stages="0:50% cls_attention"),
        replace(one_image(seed + 32), stages="0:50% diversity"),
        one_image(seed + 33, 2),
        one_image(seed + 34),
        replace(text_only(4), stages=merged[0]),
    ]


def test_what_stays_takes_in_what_goes(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2)
    asks = merged_asks(700)
    assert_exact(engine, asks, engine.run(asks), ties=True)
    engine.check_idle()
