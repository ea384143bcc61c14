"""Ranks by the vision tower's attention: where their scores come from, and who is refused them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoImageProcessor

from tests.engine import v2_cpu
from tests.engine.cases import (
    LONG,
    NEXT,
    Ask,
    one_image,
    text_only,
    two_images,
)
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact, params_of, tokens_of
from tests.engine.test_lifecycle import TINY_POOL
from tests.engine.tiny_llava import picture
from vllm_flow.engine.worker.tower import scores as tower_scores
from vllm_flow.engine.worker.tower.scores import Tower
from vllm_flow.ranks import RANKS, FrameRank, TowerRank

RANKED = ("0:50% cls_attention", "2:30% cls_attention, 3:0", "0:30% cls_diverse, 2:10% uniform")


def encodings() -> Any:
    """Counts the calls in which pictures are encoded."""
    return mock.patch.object(Tower, "encode", autospec=True, side_effect=Tower.encode)


def test_tokens_of_tiles_are_exact(open_engine: OpenEngine) -> None:
    """LLaVA-NeXT puts a picture together from tiles, without their padding and with ends of rows."""
    engine = open_engine(NEXT, 2)
    asks = [replace(one_image(n), stages=stages) for n, stages in enumerate(RANKED, 301)]
    asks += [replace(two_images(310), stages=RANKED[0]), one_image(311, 2), one_image(312)]
    asks += [replace(one_image(314), stages=("0:5 cls_attention"))]  # fewer than there are rows
    assert_exact(engine, asks, engine.run(asks))


@pytest.mark.parametrize("stages", v2_cpu.reduced(RANKED, to=RANKED[2:]))
def test_a_picture_that_another_request_had_encoded_is_ranked(
    open_engine: OpenEngine, stages: str
) -> None:
    """Whoever had it encoded asked for nothing of the kind."""
    engine = open_engine(LONG, 2)
    seed = 320 + RANKED.index(stages)
    first = one_image(seed)
    with encodings() as encoded:
        assert_exact(engine, [first], engine.run([first]))
        assert encoded.call_count == 1
        later = [replace(first, stages=stages), replace(first, prompt=f"{first.prompt} w1 w2")]
        later += [replace(later[1], stages=stages)]
        assert_exact(engine, later, engine.run(later))
        assert encoded.call_count == 1
    assert len(scored(engine)) == len(encoded_pictures(engine)) > 0


def encoded_pictures(engine: Engine) -> dict[str, torch.Tensor]:
    """By name."""
    core = engine.llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    return dict(tower_scores.encoded(runner))


def scored(engine: Engine) -> list[torch.Tensor]:
    pictures = encoded_pictures(engine).values()
    return [p for p in pictures if hasattr(p, tower_scores.SCORES_FIELD)]


def test_scores_go_with_what_was_encoded(open_engine: OpenEngine) -> None:
    """Pictures come and go in a cache with room for few; all of them stay scored while they are there."""
    engine = open_engine(LONG, 2, max_num_batched_tokens=192, max_num_seqs=4)
    asks = [replace(one_image(330 + n), stages=RANKED[n % 3]) for n in range(6)]
    assert_exact(engine, asks, engine.run_joining(asks), ties=True)
    assert 0 < len(scored(engine)) == len(encoded_pictures(engine)) < 6
    engine.llm.llm_engine.reset_encoder_cache()
    assert not encoded_pictures(engine)
    assert_exact(engine, asks[:2], engine.run(asks[:2]))


@pytest.mark.parametrize("stages", RANKED)
def test_another_question_shares_the_pictures_prefix(open_engine: OpenEngine, stages: str) -> None:
    engine = open_engine(LONG, 2, enable_prefix_caching=True)
    first = replace(one_image(340 + RANKED.index(stages), before=20, after=60), stages=stages)
    assert_exact(engine, [first], engine.run([first]))
    others = [replace(first, prompt=f"{first.prompt} w{n}") for n in (3, 4)]
    outputs = engine.run(others)
    assert_exact(engine, others, outputs)
    assert all(output.num_cached_tokens for output in outputs)
    assert_exact(engine, [first.without_policy()], engine.run([first.without_policy()]))


def test_fewer_diverse_tokens_are_chosen_anew(open_engine: OpenEngine) -> None:
    """What is remembered of a picture serves those who keep as many."""
    engine = open_engine(LONG, 2)
    asks = [replace(one_image(345), stages=f"0:{keep} cls_diverse") for keep in (60, 40, 60, 41)]
    for ask in asks:
        assert_exact(engine, [ask], engine.run([ask]))
    assert_exact(engine, asks, engine.run(asks))


def test_preempted_requests_are_ranked_again(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 3, kv_cache_memory_bytes=TINY_POOL, async_scheduling=True)
    asks = [replace(one_image(350 + n), stages=RANKED[n % 3], max_tokens=40) for n in range(12)]
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted
    assert_exact(engine, asks, outputs, ties=True)
    engine.check_idle()


def embeddings_of(engine: Engine, seed: int) -> torch.Tensor:
    """What the engine's own tower and projector make of a picture, [N, H], as a client may send it."""
    core = engine.llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    pixels = AutoImageProcessor.from_pretrained(engine.model_dir)(
        picture(engine.shape, seed), return_tensors="pt"
    )["pixel_values"]
    with torch.inference_mode():
        (found,) = model.embed_multimodal(pixel_values=pixels)
    return found.clone()


def test_pictures_that_come_as_embeddings_refuse_the_rank(open_engine: OpenEngine) -> None:
    """Per request: beside them pictures that come as pixels are ranked."""
    engine = open_engine(LONG, 2, enable_mm_embeds=True)
    unfit = (TowerRank, FrameRank)
    others = " or ".join(repr(n) for n, rank in RANKS.items() if not isinstance(rank, unfit))
    ask = one_image(360)
    sent = embeddings_of(engine, ask.images[0])

    def run(ask: Ask, data: Any, **more: Any) -> Any:
        prompt = {"prompt": ask.prompt, "multi_modal_data": {"image": data}, **more}
        return engine.llm.generate(prompt, params_of(ask), use_tqdm=False)

    for stages in ("0:50% cls_attention", "1:50% uniform, 2:30% cls_attention", "0:9 cls_diverse"):
        rank = stages.split()[-1]
        with pytest.raises(
            ValueError,
            match=rf"flow_stages.*'{rank}' reads the attention of the vision tower's class token, and a picture of "
            "this prompt came as embeddings, which no tower of this engine has seen; send its pixels, or rank by "
            rf"{others}\.",
        ):
            run(replace(ask, stages=stages), [sent])
        engine.check_idle()
    # Other ranks serve them, and what comes as pixels is ranked by the tower.
    fine = [replace(ask, stages="1:50% diversity"), replace(ask, cliff=2), ask]
    assert_exact(engine, fine, [run(one, [sent])[0] for one in fine])
    fine = [replace(one_image(360 + n), stages=stages) for n, stages in enumerate(RANKED)]
    fine += [replace(text_only(4), stages="0:9 cls_attention")]
    assert_exact(engine, fine, engine.run(fine))
    # Pixels under the name of embeddings: vLLM goes by what came first, and the engine goes on.
    named = {"multi_modal_uuids": {"image": ["one name"]}}
    run(ask, [sent], **named)
    pixels = picture(engine.shape, 361)
    ((output,)) = run(replace(ask, stages="0:50% cls_attention"), [pixels], **named)
    assert tokens_of(output)
    assert_exact(engine, fine, engine.run(fine))
    engine.check_idle()
