"""Ranks by the vision tower's class token: where their scores come from, and who is refused them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoImageProcessor
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.siglip import SiglipVisionModel

from tests.engine import v2_cpu
from tests.engine.cases import LONG, NEXT, Ask, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact, params_of, tokens_of
from tests.engine.test_lifecycle import TINY_POOL
from tests.engine.tiny_llava import picture
from vllm_flow.engine import tower_scores
from vllm_flow.engine.tower_scores import Tower, class_attention, tower_of
from vllm_flow.ranks import RANKS, TowerRank

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


def encoded_pictures(engine: Engine) -> list[torch.Tensor]:
    core = engine.llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    return list(tower_scores.encoded(runner).values())


def scored(engine: Engine) -> list[torch.Tensor]:
    return [p for p in encoded_pictures(engine) if hasattr(p, tower_scores.SCORES_FIELD)]


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
    others = " or ".join(repr(n) for n, rank in RANKS.items() if not isinstance(rank, TowerRank))
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


def config(**changes: Any) -> Any:
    model = SimpleNamespace(
        architecture="QuiteAnotherModel",
        multimodal_config=SimpleNamespace(
            enable_mm_embeds=True, mm_encoder_tp_mode=changes.pop("mode", "weights")
        ),
    )
    return SimpleNamespace(**{"model_config": model, "ec_transfer_config": None} | changes)


def llava(kind: type[Any], tower: type[Any], strategy: str = "default") -> Any:
    """A model without weights."""
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.vision_tower = tower.__new__(tower)
    torch.nn.Module.__init__(model.vision_tower)
    model.config = SimpleNamespace(vision_feature_select_strategy=strategy)
    return model


@pytest.mark.parametrize("kind", [LlavaForConditionalGeneration, LlavaNextForConditionalGeneration])
def test_who_is_refused(kind: type[Any]) -> None:
    """Each with a sentence of its own; the families that can are named to all that cannot."""
    clip = llava(kind, CLIPVisionModel)
    for model, engine, said in (
        (torch.nn.Linear(1, 1), config(), "LLaVA-1.5, LLaVA-NeXT and Shikra, and not of QuiteAnother"),
        (llava(kind, SiglipVisionModel), config(), "tower, a SiglipVisionModel, has no such token"),
        (llava(kind, CLIPVisionModel, "full"), config(), "'full' is one of the image's tokens itself"),
        (clip, config(mode="data"), "workers encode different pictures (mm_encoder_tp_mode='data')"),
        (clip, config(ec_transfer_config=object()), "in another engine (ec_transfer_config)"),
    ):  # fmt: skip
        assert said in (tower_of(model, engine).unreadable or "")
    layers = [SimpleNamespace(self_attn=SimpleNamespace(attn=n)) for n in range(3)]
    clip.vision_tower.vision_model = SimpleNamespace(encoder=SimpleNamespace(layers=layers))
    assert tower_of(clip, config()).unreadable is None


@pytest.mark.parametrize("kind", [LlavaForConditionalGeneration, LlavaNextForConditionalGeneration])
def test_every_worker_sees_every_picture(kind: type[Any]) -> None:
    """vLLM falls back from ``mm_encoder_tp_mode="data"`` where a model does not share pictures out: these do not."""
    assert not kind.supports_encoder_tp_data


@pytest.mark.parametrize("heads", [1, 3])
def test_the_class_tokens_attention_is_the_softmax_of_its_row(heads: int) -> None:
    """By another formula; and the mean of workers with some of the heads each is that of all heads."""
    pictures, rows, size = 2, 7, 8
    generator = torch.Generator().manual_seed(heads)
    query, key = torch.randn(2, pictures, rows, heads * size, generator=generator).double()
    attention = SimpleNamespace(head_size=size, scale=0.3)
    found = class_attention(attention, query, key)
    logits = torch.einsum(
        "plhd,pmhd->phlm", *(t.view(pictures, rows, heads, size) for t in (query, key))
    )
    expected = (0.3 * logits).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)
    halves = [
        class_attention(attention, *(t[..., n * size : (n + 1) * size] for t in (query, key)))
        for n in range(heads)
    ]
    torch.testing.assert_close(torch.stack(halves).mean(0), found, atol=1e-6, rtol=1e-5)


def test_what_is_no_picture_has_no_scores() -> None:
    """Where the model makes nothing of what it is given, nothing is read."""
    attention = SimpleNamespace(forward=None, head_size=4, scale=1)
    assert Tower(attention, None).encode(lambda: [], {}) == ()
    assert vars(attention)["forward"] is None
