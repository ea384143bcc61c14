"""Gemma 3 and Molmo 2, whose pictures attend in both directions, through Triton's attention: a few requests beside the
oracle.

``make test-families`` asks more of them, under both model runners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from tests.engine import v2_cpu
from tests.families.making import Checkpoint

TOKENS = 3

pytestmark = pytest.mark.skipif(not v2_cpu.wanted(), reason="needs Triton's interpreter")


@pytest.fixture(scope="session")
def checkpoint_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Checkpoint]]:
    from tests.families.checkpoints import build

    root = tmp_path_factory.mktemp("families")
    yield lambda name: build(name, root)
    from tests.families import running

    running.close_all()


def test_pictures_that_see_themselves(
    checkpoint_of: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a policy, at a cliff, after the prefill, and with a part left of the picture: one batch, in chunks."""
    from tests.families.asking import prompts_of
    from tests.families.running import Engine, Judge

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_args: (9, 0))
    gemma3 = checkpoint_of("gemma3")
    one, two = prompts_of(gemma3)
    asks = [two, replace(two, cliff=2), replace(one, cliff=1, late=True)]
    asks.append(replace(one, stages="1:60% uniform, 3:0"))
    # Two pictures do not fit a step, and beside the text before it not always one.
    engine = Engine(gemma3, 2, max_num_batched_tokens=32)
    Judge(engine).assert_exact(asks, engine.run(asks, TOKENS))
    engine.check_idle()


@pytest.mark.long
def test_pictures_by_triton_and_the_rest_by_flashinfer(
    checkpoint_of: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's choice on Blackwell: of each variant by itself, whether a picture is in it that sees itself."""
    from vllm.v1.attention.backends.composite import MMPrefixAttentionRouting

    from tests.engine import flashinfer_standin as standin
    from tests.families.asking import prompts_of
    from tests.families.running import Engine, Judge

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_args: (9, 0))
    chosen: list[int] = []
    select = MMPrefixAttentionRouting.select

    def noted(self: MMPrefixAttentionRouting, metadata: object) -> int:
        chosen.append(select(self, metadata))
        return chosen[-1]

    monkeypatch.setattr(MMPrefixAttentionRouting, "select", noted)
    gemma3 = replace(checkpoint_of("gemma3"), attention="TRITON_FLASHINFER")
    one, two = prompts_of(gemma3)
    asks = [
        two,
        replace(two, cliff=2),
        replace(one, cliff=1),
        replace(one, stages="1:60% uniform, 3:0"),
    ]
    with standin.flashinfer(standin.BLACKWELL, "TRITON_FLASHINFER"):
        engine = Engine(gemma3, 2, max_num_batched_tokens=64, block_size=64)
        Judge(engine).assert_exact(asks, engine.run(asks, TOKENS))
        engine.check_idle()
    assert set(chosen) == {0, 1}


@pytest.mark.long
def test_frames_that_see_themselves_and_pictures_side_by_side(
    checkpoint_of: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures side by side are a range each, and so is each frame of a video, between timestamps. Of one picture the
    device may choose what stays, by embeddings and by attention."""
    from tests.families.asking import Ask
    from tests.families.making import film, picture, words
    from tests.families.running import Engine, Judge

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_args: (9, 0))
    molmo2 = checkpoint_of("molmo2_video")
    wide, narrow = molmo2.sizes
    mark, films, shown = molmo2.image, (film(4, narrow),), (picture(2, narrow), picture(3, narrow))
    # Where a step begins with one of these, vLLM would cut it to what the request before it leaves.
    both = Ask(f"{molmo2.video}{mark} {words(4, 503)}", shown[:1], films=films)
    pair = Ask(f"{mark}{mark} {words(6, 502)}", shown)
    moving = Ask(f"{words(3, 2)} {molmo2.video} {words(4, 504)}", (), films=films)
    one = Ask(f"{words(5, 1)} {mark} {words(7, 501)}", (picture(1, wide),))
    asks = [both, replace(both, cliff=2), replace(pair, cliff=2), replace(pair, cliff=1, late=True)]
    asks += [replace(moving, stages="1:60% uniform"), replace(one, stages="0:60% diversity, 2:0")]
    asks.append(replace(one, stages="1:60% last_image, 3:30% last_prompt"))
    engine = Engine(molmo2, 2, max_num_batched_tokens=32, max_num_seqs=len(asks))
    Judge(engine).assert_exact(asks, engine.run(asks, TOKENS))
    engine.check_idle()
