"""Every family is exact at every cliff: greedy tokens and the best logprobs are Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.engine import v2_cpu
from tests.families.asking import Ask, every_cliff, prompts_of
from tests.families.checkpoints import chosen
from tests.families.conftest import COMPILED, Rows
from tests.families.making import Checkpoint, film, picture, words
from tests.families.running import STOCK, Engine, Judge, largest_difference

QUICK = ("qwen3_vl", "idefics3", "cohere2_vision", "kimi_vl", "lfm2_vl")
"""M-RoPE, and features injected between layers; a decoder in another place, markers within a picture; sliding
windows that a picture is wider than; latent attention; states of short convolutions."""

CHOSEN = chosen()
NAMES = CHOSEN or QUICK
RUNNER = ("V2" if v2_cpu.wanted() else "V1") + (", compiled" if COMPILED else "")
BLOCK = 32
"""Tokens of a chunk, and of a KV block but beside states."""


WHOLE = {
    *("qwen3_5", "qwen3_5_moe", "minicpm_v_4_6", "minicpm_v_4_7", "interns2_preview", "interns2_mobius"),
    *("lfm2_vl", "nemotron_nano_v2_vl", "nemotron_3_omni", "qwen3_5_video"),
    *("gemma3", "gemma4", "gemma4_moe", "gemma4_unified", "cosmos3_edge"),
    *("molmo2_qwen3", "molmo2_olmo3", "molmo2_video"),
}  # fmt: skip
"""Checkpoints of families whose last layer that sees an image runs whole: beside states, where a picture's tokens
see one another in both directions, and where perceptrons are layers of their own."""


def _tokens(checkpoint: Checkpoint) -> int:
    """Per answer: fewer where attention, or all of V2's kernels, go through an interpreter on CPU."""
    return 3 if checkpoint.attention else 6 if v2_cpu.wanted() else 16


def _cliffs(checkpoint: Checkpoint) -> list[int | None]:
    return [None, *range(checkpoint.num_layers + 1)]


def _record(table: Rows, name: str, what: str, asks: list[Ask], error: float) -> None:
    cliffs = sorted({ask.cliff for ask in asks if ask.cliff is not None})
    table.append(
        dict(family=name, runner=RUNNER, what=what, cliffs=cliffs, answers=len(asks), error=error)
    )


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_cached_prefixes_are_exact(
    name: str, checkpoint_of: Callable[[str], Checkpoint], table: Rows
) -> None:
    """All cliffs and the baseline in one batch, prefill in chunks of 32, then again from the cache."""
    checkpoint = checkpoint_of(name)
    engine = Engine(
        checkpoint,
        group_layers=checkpoint.group_layers,
        max_num_batched_tokens=BLOCK,
        enable_prefix_caching=True,
    )
    assert engine.spares_last_layers == (name not in WHOLE)
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size  # as large as a state
    judge, asks = Judge(engine), every_cliff(checkpoint, _cliffs(checkpoint))
    outputs = engine.run(asks, _tokens(checkpoint))
    _record(table, name, "chunks of 32", asks, judge.assert_exact(asks, outputs))
    engine.check_idle()
    again = engine.run(asks, _tokens(checkpoint))
    hits = [output.num_cached_tokens for output in again]
    for ask, hit, prompt in zip(asks, hits, map(judge.prompt, asks), strict=True):
        first = prompt.is_image_T[:block]
        # Nothing of a block is kept where it is a picture's from the first layer on (InstructBLIP).
        kept = ask.cliff != 0 or not bool(first.all())
        assert hit or len(prompt.ids) <= block or not kept, ask.keys
    assert sum(map(bool, hits)) >= len(asks) // 2, hits
    _record(table, name, "cached prefixes", asks, judge.assert_exact(asks, again))
    engine.check_idle()


@pytest.mark.skipif(not CHOSEN, reason="make test-families")
@pytest.mark.parametrize("name", NAMES)
def test_whole_prompts_are_exact_and_the_baseline_is_stock(
    name: str, checkpoint_of: Callable[[str], Checkpoint], table: Rows
) -> None:
    """A storage group per layer, no chunks; and without a policy the answers are stock vLLM's."""
    checkpoint = checkpoint_of(name)
    engine = Engine(checkpoint, group_layers=1)
    judge, asks = Judge(engine), every_cliff(checkpoint, _cliffs(checkpoint))
    # First of all, so that the pictures go through the tower in batches as they do in stock vLLM.
    plain = every_cliff(checkpoint, [None])
    without = engine.run(plain, _tokens(checkpoint))
    outputs = engine.run(asks, _tokens(checkpoint))
    _record(table, name, "whole prompts", asks, judge.assert_exact(asks, outputs))
    stock = Engine(checkpoint, STOCK).run(plain, _tokens(checkpoint))
    _record(table, name, "stock vLLM", plain, judge.assert_exact(plain, stock))
    error = largest_difference(without, stock)
    assert error <= 1e-6
    _record(table, name, "without a policy, beside stock", plain, error)
    engine.check_idle()


STAGES = (
    "0:40% diversity",
    "1:50% last_image",
    "1:60% last_image, 2:30% last_image",
    "1:70% last_image, 2:40% uniform",
    "1:50% last_prompt, 2:20% random",
    "0:60% uniform, 2:30% diversity",
    "1:50% diversity, 2:0",
    "1:60% question, 2:30% raters",
)

OF_ROWS = ("1:60% feather, 2:30% unrotated", "1:50% dart")
"""Ranks by what layers make of their rows."""
TURNED = ("idefics3", "qwen3_vl", "mistral3", "internvl")
"""Families of which the oracle sees queries and keys, and knows how they are turned."""

BESIDE_STATES = (
    "0:40% diversity",
    "4:50% last_image",
    "1:60% uniform, 4:30% last_image",
    "4:50% last_prompt, 5:20% random",
    "4:50% question",
    "0:60% uniform, 2:30% diversity",
    "1:50% diversity, 2:0",
)
"""Where layer 3 is one of few that attend: by attention right behind it."""


BY_PLACE = ("0:60% uniform, 2:30% uniform", "1:50% random", "1:50% uniform, 3:0")
"""Where pieces of a video see themselves: how many of each stay is the host's to say."""

IN_TOWER = (
    *("0:40% cls_attention", "1:60% cls_attention, 2:30% last_image"),
    *("0:40% holov", "1:50% scope"),
)
OF_TILES = ("0:40% hired",)
OF_FRAMES = ("0:60% dycoke", "1:80% dycoke, 2:30% dycoke", "1:45% dycoke, 2:20% last_image")
FILMED = tuple(
    f"{name}_video"
    for name in (
        *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5"),
        *("internvl", "llava_onevision", "llava_next"),
    )
)
"""Families of whose videos the frames are known."""
WITH_CLASS_TOKEN = ("llava", "shikra", "internvl", "internvl_qwen3")
LOOKED_INTO = (
    *(*WITH_CLASS_TOKEN, "llava_onevision"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
)
RECEIVED = (
    *("0:40% received_attention", "1:60% received_attention, 2:30% last_image"),
    "0:40% holov_received",
)
"""Of the families whose tower is looked into, and one picture of which is one tile."""
MERGED = ("0:60% visionzip_received, 2:20% uniform",)
MERGED_BY_CLASS = ("0:60% visionzip", "0:50% prumerge, 2:30% last_image", "0:50% prumerge_plus")
DEEP = ("qwen3_vl", "qwen3_vl_moe")
"""Of those the families whose pictures have embeddings for further layers, which nobody merges."""


UNEVEN = {
    "shikra": (2, 0),
    "llava_onevision": (1, 1),
    "qwen3_vl_moe": (4, 1),
    "minicpm_o_2_6": (2, 0),
}
"""Seed and size of pictures no two tokens of which rank alike, where the first picture has such: LLaVA-OneVision's is
one tile, which is its overview too, and has every embedding twice."""


@pytest.mark.parametrize("name", NAMES if CHOSEN else ("idefics3",))
def test_what_stays_of_a_picture_is_exact(
    name: str, checkpoint_of: Callable[[str], Checkpoint], table: Rows
) -> None:
    """Stages of every kind of rank; without a choice of families, one with text within a picture."""
    checkpoint = checkpoint_of(name)
    engine = Engine(checkpoint, group_layers=1)
    judge, (ask, _) = Judge(engine), prompts_of(checkpoint)
    if name in UNEVEN:
        seed, size = UNEVEN[name]
        ask = replace(ask, pictures=(picture(seed, checkpoint.sizes[size]),))
    # Ranks by attention are refused where a layer does not see every token.
    local = checkpoint.windows or checkpoint.local
    unread = ("last_image", "last_prompt", "question") if local else ()
    kinds = [stages for stages in STAGES if not any(rank in stages for rank in unread)]
    if name == "cosmos3_edge":  # of whose layers 0, 2, 4, ... attend
        kinds = [stages.replace("2:", "3:") for stages in kinds]
    if checkpoint.recurrent:
        kinds = list(BESIDE_STATES)
    if checkpoint.mutual and checkpoint.video:
        kinds = list(BY_PLACE)
    if name in TURNED:
        kinds += [*OF_ROWS]
    if name in WITH_CLASS_TOKEN:
        kinds += (*IN_TOWER, *MERGED_BY_CLASS)
        kinds += () if name.startswith("internvl") else OF_TILES
    if name in LOOKED_INTO:
        kinds += RECEIVED[:1] if checkpoint.recurrent else RECEIVED
        kinds += () if name in DEEP else MERGED
    asks = [replace(ask, stages=stages) for stages in kinds]
    outputs = engine.run(asks, _tokens(checkpoint))
    _record(table, name, "stages and ranks", asks, judge.assert_exact(asks, outputs))
    if name in DEEP:
        with pytest.raises(ValueError, match="nobody does in a model whose pictures have more"):
            engine.run([replace(ask, stages=MERGED[0])], _tokens(checkpoint))
    engine.check_idle()


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name in FILMED] if CHOSEN else FILMED[:1]
)
def test_what_stays_of_a_videos_frames_is_exact(
    name: str, checkpoint_of: Callable[[str], Checkpoint], table: Rows
) -> None:
    """Six frames, as the model sees them: a window and a half. Pictures are refused."""
    checkpoint = checkpoint_of(name)
    engine = Engine(checkpoint, group_layers=1)
    judge, (ask, _) = Judge(engine), prompts_of(checkpoint)
    frames = 6 * checkpoint.seen_together
    ask = replace(ask, films=(film(3, checkpoint.sizes[0], frames=frames),))
    kinds = OF_FRAMES[:1] if checkpoint.recurrent else OF_FRAMES
    asks = [replace(ask, stages=stages) for stages in kinds]
    outputs = engine.run(asks, _tokens(checkpoint))
    _record(table, name, "frames", asks, judge.assert_exact(asks, outputs))
    if checkpoint.image:
        text = f"{words(5, 1)} {checkpoint.image} {words(7, 501)}"
        shown = Ask(text, (picture(1, checkpoint.sizes[0]),), stages=OF_FRAMES[0])
        with pytest.raises(
            ValueError, match="'dycoke' goes by the frames of a video, and this prompt"
        ):
            engine.run([shown], _tokens(checkpoint))
    engine.check_idle()
