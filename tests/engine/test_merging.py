"""Ranks that merge: what stays takes in what goes, whatever shares the batch, the pictures or the cache with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine import v2_cpu
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
from tests.engine.test_lifecycle import TINY_POOL
from tests.engine.test_policies import assert_another_question_finds
from tests.engine.test_tower_ranks import encoded_pictures, encodings
from tests.engine.tiny_llava import Shape
from tests.longer import some
from tests.plugins.installing import visible, write_package
from vllm_flow.engine import obstacles
from vllm_flow.engine.scored_pictures import MERGING_MARK, NAME_MARK
from vllm_flow.engine.worker.choosing import merging
from vllm_flow.engine.worker.tower.scores import noted
from vllm_flow.ranks import GROUP, TowerRows, TowerScore, TowerTiles

BY_CLASS = (
    "0:64 visionzip",
    "0:50% visionzip, 2:20% uniform",
    "0:40% prumerge",
    "0:40% prumerge_plus, 3:0",
)
RECEIVED = ("0:60 visionzip_received", "0:50% visionzip_received, 2:30% cls_attention")
BEHIND = ("0:64 visionzip, 2:40% diversity, 3:10% last_prompt", "0:70% prumerge, 1:30% raters")
"""Ranks behind one that merges see what it made of the embeddings."""


def merged_asks(seed: int, merged: tuple[str, ...]) -> list[Ask]:
    """One image and two, beside requests that rank otherwise or not at all."""
    asks = [replace(one_image(seed + n), stages=stages) for n, stages in enumerate(merged)]
    asks += [replace(two_images(seed + n), stages=stages) for n, stages in enumerate(merged, 10)]
    return [
        *asks,
        replace(adjacent_images(seed + 30), stages=merged[0]),
        replace(one_image(seed + 32), stages="0:50% diversity"),
        one_image(seed + 33, 2),
        one_image(seed + 34),
        replace(text_only(4), stages=merged[0]),
    ]


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "groups-of-2": (2, {}),
    "chunks-of-192-groups-of-3-async": (
        3,
        {"max_num_batched_tokens": 192, "max_num_seqs": 12, "async_scheduling": True},
    ),
}


@pytest.mark.parametrize("name", v2_cpu.reduced([*OPTIONS], to=["groups-of-2"]))
def test_what_stays_takes_in_what_goes(open_engine: OpenEngine, name: str) -> None:
    group_layers, options = OPTIONS[name]
    engine = open_engine(LONG, group_layers, **options)
    asks = merged_asks(700, (*BY_CLASS, *RECEIVED, *BEHIND))
    if options:  # what looks at the prompt's end has no room for two images
        asks = [ask for ask in asks if not (len(ask.images) == 2 and ask.stages in BEHIND)]
    asks = v2_cpu.reduced(asks, to=[replace(ask, max_tokens=8) for ask in asks[::4]])
    compared = assert_exact(engine, asks, engine.run_joining(asks), ties=True)
    assert compared >= len(asks) * 0.8
    engine.check_idle()


@pytest.mark.parametrize(
    "shape", some([NEXT, SIGLIP, SIGLIP_NEXT], [NEXT]), ids=lambda shape: shape.name
)
def test_pictures_in_tiles_and_towers_without_a_class_token(
    open_engine: OpenEngine, shape: Shape
) -> None:
    """The ends of rows in a picture of tiles have no patch, and no part in it."""
    engine = open_engine(shape, 2)
    asks = merged_asks(800, RECEIVED[:1] if shape.siglip else (*BY_CLASS, RECEIVED[0]))
    # Fewer tokens than the picture has rows, whose ends stay before all else.
    few = "visionzip_received" if shape.siglip else "visionzip"
    asks += [replace(one_image(840 + n), stages=f"0:{7 * n} {few}") for n in (1, 2)]
    compared = assert_exact(engine, asks, engine.run(asks), ties=True)
    assert compared >= len(asks) * 0.8
    engine.check_idle()


def test_pictures_are_shared_and_left_as_they_are(open_engine: OpenEngine) -> None:
    """By requests that keep other numbers of tokens, by other ranks; those that do not merge have them apart."""
    engine = open_engine(LONG, 2)
    first = one_image(750)
    stages = ("0:64 visionzip", "0:40 visionzip", "0:50% prumerge", "0:50% prumerge_plus")
    later = [replace(first, stages=one) for one in stages]
    later += [replace(first, prompt=f"{first.prompt} w1", stages=stages[0])]
    others = set(encoded_pictures(engine))
    with encodings() as encoded:
        assert_exact(engine, [first], engine.run([first]))
        assert_exact(engine, later[:1], engine.run(later[:1]))
        assert encoded.call_count == 2
        before = {name: picture.clone() for name, picture in encoded_pictures(engine).items()}
        assert_exact(engine, later, engine.run(later))
        plain = [replace(first, stages="0:50% cls_attention"), replace(first, cliff=1), first]
        assert_exact(engine, plain, engine.run(plain))
        assert encoded.call_count == 2
    there = encoded_pictures(engine)
    assert all(torch.equal(there[name], picture) for name, picture in before.items())
    kinds = {
        name.startswith(MERGING_MARK): set(noted(there, name)) for name in before.keys() - others
    }
    always = {TowerScore.CLASS, *TowerTiles}
    assert kinds == {False: always, True: {*always, *TowerRows}}
    received = replace(first, stages=RECEIVED[0])
    assert_exact(engine, [received], engine.run([received]))
    assert any(name.startswith(NAME_MARK + MERGING_MARK) for name in encoded_pictures(engine))


def test_another_question_on_a_merged_picture_finds_it(open_engine: OpenEngine) -> None:
    """In the prefix cache, from which no other policy's request has anything."""
    engine = open_engine(LONG, 2, enable_prefix_caching=True)
    first = replace(one_image(760, before=20, after=90), stages=BY_CLASS[0])
    assert_another_question_finds(engine, first, before=20)
    for stages in ("0:65 visionzip", "0:64 cls_attention", ""):
        other = replace(first, stages=stages)
        (output,) = engine.run([other])
        assert output.num_cached_tokens == 0
        assert_exact(engine, [other], [output])


def test_preempted_requests_merge_again(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 3, kv_cache_memory_bytes=TINY_POOL, async_scheduling=True)
    asks = [
        replace(one_image(770 + n), stages=BY_CLASS[n % 4], max_tokens=40, cliff=None)
        for n in range(12)
    ]
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted
    assert_exact(engine, asks, outputs, ties=True)
    engine.check_idle()


BLUR = """
    from vllm_flow.ranks import PictureRank

    def far_from_mean(rows, keep):
        apart = (rows.float() - rows.float().mean(0)).norm(dim=-1)
        return apart.argsort(descending=True, stable=True)[:keep]

    def blurred(rows, kept):
        return (0.75 * rows[kept].float() + 0.25 * rows.float().mean(0)).to(rows.dtype)

    BLUR = PictureRank("blur", "far from the mean, of which each takes in a quarter", far_from_mean, merge=blurred)
    SHORT = PictureRank("short", "x", far_from_mean, merge=lambda rows, kept: rows[kept[1:]])
"""


def test_a_packages_rank_merges_embeddings(tmp_path: Path, open_engine: OpenEngine) -> None:
    """Needs no tower, so its pictures are those of all requests; one that merges amiss is refused beforehand."""
    engine = open_engine(LONG, 2)
    first = one_image(780)
    places = {"blur": "blurring:BLUR", "short": "blurring:SHORT"}
    with visible(write_package(tmp_path, "blurring", GROUP, places, BLUR)):
        asks = [
            first,
            replace(first, stages="0:50% blur"),
            replace(first, stages="0:30% diversity"),
        ]
        asks += [replace(first, stages="0:60% blur, 2:30% diversity")]
        asks += [replace(two_images(781), stages="0:40 blur, 3:0")]
        with encodings() as encoded:
            assert_exact(engine, asks[:1], engine.run(asks[:1]))
            assert_exact(engine, asks[1:4], engine.run(asks[1:4]))
            assert encoded.call_count == 1
        assert_exact(engine, asks, engine.run(asks))
        with pytest.raises(ValueError, match=r"merge of rank 'short' .* must give a tensor \("):
            engine.run([replace(first, stages="0:50% short")])
    engine.check_idle()


def test_who_cannot_merge_says_why() -> None:
    plain, deep = (SimpleNamespace(injected=name) for name in (None, "deepstack_input_embeds"))
    adapted, other = (SimpleNamespace(enable_tower_connector_lora=on) for on in (True, False))

    def said(decoder: Any, lora: Any) -> dict[str, str]:
        return merging.unmergeable(decoder, lora)

    assert said(plain, None) == said(plain, other) == {}
    assert "deepstack" in said(deep, None)[obstacles.MERGING]
    assert "enable_tower_connector_lora" in said(plain, adapted)[obstacles.MERGING]
