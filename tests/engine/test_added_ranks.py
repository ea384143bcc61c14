"""Ranks of an installed package in a running engine: exact like this package's own, and refused before they harm it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.cases import LONG, one_image, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, assert_exact
from tests.engine.tiny_llava import words
from tests.plugins.installing import RANK_PACKAGE, lay_out, visible, write_package
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end.default_policies import check_policies
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.ranks import GROUP

STAGES = (
    "0:50% center",
    "2:30% far_from_mean, 4:0",
    "1:60% center, 3:30% far_from_mean, 5:5 center",
    "0:40 far_from_mean, 2:11 center",
)
UNSOUND = """
    import numpy as np
    from vllm_flow.ranks import PictureRank, PositionRank

    def choose(total, keep, draw):
        if (total, keep) == (144, 72):
            raise RuntimeError("no such half")
        return np.arange(keep)

    ODD = PositionRank("odd", "x", choose)
    TWICE = PictureRank("twice", "x", lambda rows, keep: rows[:, 0].argsort()[:keep] * 0)
"""


@pytest.fixture
def center(tmp_path: Path) -> Iterator[None]:
    with visible(lay_out(RANK_PACKAGE, tmp_path / "site")):
        yield


def test_a_packages_ranks_are_exact(center: None, open_engine: OpenEngine) -> None:
    """By place and by embeddings, in stages, late and beside other policies; other choices are other answers."""
    engine = open_engine(LONG, 2)
    asks = [replace(one_image(900 + n), stages=stages) for n, stages in enumerate(STAGES)]
    asks += [replace(two_images(910), stages=STAGES[2]), one_image(96), one_image(12, 3)]
    asks += [replace(one_image(920), stages="2:30% center", late=True)]
    assert assert_exact(engine, asks, engine.run_joining(asks), ties=True) >= len(asks) - 1
    with pytest.raises(AssertionError, match="differ"):
        other = replace(asks[0], stages="0:50% uniform")
        assert_exact(engine, [other], engine.run(asks[:1]))


def test_prefixes_are_shared_as_its_kind_says(center: None, open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2, enable_prefix_caching=True)
    for n, stages in enumerate(("1:50% center", "2:30% far_from_mean")):
        first = replace(one_image(930 + n, before=20, after=90), stages=stages)
        assert_exact(engine, [first], engine.run([first]))
        said = first.prompt.split()
        ask = replace(first, prompt=" ".join([*said[: 21 + 50], words(11, 50)]))
        outputs = engine.run([ask])
        assert_exact(engine, [ask], outputs)
        common = 1 + 20 + LONG.image_tokens + 50
        assert outputs[0].num_cached_tokens == common // BLOCK_SIZE * BLOCK_SIZE


def test_an_unsound_rank_is_refused_and_the_engine_goes_on(
    tmp_path: Path, open_engine: OpenEngine
) -> None:
    engine = open_engine(LONG, 2)
    places = {"odd": "unsound:ODD", "twice": "unsound:TWICE"}
    with visible(write_package(tmp_path, "unsound", GROUP, places, UNSOUND)):
        with pytest.raises(ValueError, match=r"unsound:ODD\) failed: RuntimeError: no such half"):
            engine.run([replace(one_image(1), stages="0:50% odd")])
        with pytest.raises(
            ValueError, match=r"it must be .* indices, each once; mend unsound 1\.0"
        ):
            engine.run([replace(one_image(1), stages="0:50% twice")])
        with pytest.raises(ValueError, match="'odd', 'twice'"):
            engine.run([replace(one_image(1), stages="0:50% xyz")])
        ask = replace(one_image(96), stages="2:30% last_image")
        assert_exact(engine, [ask], engine.run([ask]))
        settings = FlowSettings.read(
            {"default_policy": {"flow_stages": "0:9 twice"}}, EngineFacts(6)
        )
        with pytest.raises(ValueError, match="default_policy: rank 'twice' orders"):
            check_policies(settings)
        with pytest.raises(ValueError, match="'default_policy'.*'twic' is no rank; did you mean"):
            FlowSettings.read({"default_policy": {"flow_stages": "0:9 twic"}}, EngineFacts(6))
