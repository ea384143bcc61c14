"""Logprobs of prompts with a policy: None where a token was evicted or predicted by one, else the oracle's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import RequestOutput

from tests.engine import kept_oracle, oracle, v2_cpu
from tests.engine.cases import LONG, Ask, adjacent_images, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import LOGPROB_TOLERANCE, Engine, assert_exact, params_of
from tests.engine.tiny_llava import picture
from vllm_flow.engine.worker.prompt_scores import unscored

PLACE = (
    one_image(701, 2),
    replace(two_images(702), stages="1:50% uniform, 4:0"),
    replace(one_image(703), stages="2:1/3 random, 4:20% uniform"),
    one_image(704, 0, before=0),
    adjacent_images(705, 5),
    one_image(706),
    one_image(707, LONG.layers),
    text_only(708, 2),
)
DEVICE = (
    replace(one_image(711), stages="2:60% last_image, 4:20% last_image"),
    replace(two_images(712), stages="0:50% diversity"),
    replace(one_image(713), stages="1:50% last_prompt, 3:0"),
    one_image(714, 3),
)
CHUNKS = {"max_num_batched_tokens": 97, "max_num_seqs": 12}


def scored(engine: Engine, asks: Sequence[Ask], **more: Any) -> list[RequestOutput]:
    """As ``Engine.run``, with the prompts' logprobs and those of each position's best token."""
    prompts = [engine.prompt(ask) for ask in asks]
    params = [params_of(ask, prompt_logprobs=1, **more) for ask in asks]
    return engine.llm.generate(prompts, params, use_tqdm=False)


def predictions(engine: Engine, ask: Ask) -> tuple[oracle.Prompt, dict[int, torch.Tensor]]:
    """The prompt, and of each position that stays the logits of what follows it."""
    pictures = [picture(engine.shape, seed) for seed in ask.images]
    prompt = oracle.encode(engine.model_dir, ask.prompt, pictures)
    image = torch.tensor(prompt.is_image_T)
    if ask.stages:
        kept = kept_oracle.forward_kept(engine.model_dir, prompt, [], ask.stages, ask.seed)
        stays = ~image
        stays[[place for alive in kept.chosen[max(kept.chosen)] for place in alive]] = True
        return prompt, dict(zip(stays.nonzero()[:, 0].tolist(), kept.logits, strict=True))
    cliff = engine.shape.layers if ask.cliff is None else ask.cliff
    stays = ~image if cliff < engine.shape.layers else torch.ones_like(image)
    # The other formulation: the model's own forward with hidden keys.
    logits = oracle.forward_masked(engine.model_dir, prompt, [], cliff)
    return prompt, {place: logits[place] for place in stays.nonzero()[:, 0].tolist()}


def expected(engine: Engine, ask: Ask) -> tuple[oracle.Prompt, list[torch.Tensor | None]]:
    """The prompt, and for each position the distribution of its token; None where there is none."""
    prompt, rows = predictions(engine, ask)
    return prompt, [
        rows[place - 1].log_softmax(-1) if {place - 1, place} <= rows.keys() else None
        for place in range(len(prompt.ids))
    ]


def assert_scored(engine: Engine, ask: Ask, output: RequestOutput) -> int:
    """Each entry is the oracle's; returns how many there are."""
    prompt, rows = expected(engine, ask)
    entries = output.prompt_logprobs
    assert entries is not None and len(entries) == len(prompt.ids)
    assert [entry is None for entry in entries] == [row is None for row in rows]
    for token, entry, row in zip(prompt.ids, entries, rows, strict=True):
        if entry is None or row is None:
            continue
        assert math.isclose(entry[token].logprob, float(row[token]), abs_tol=LOGPROB_TOLERANCE)
        best = max(found.logprob for found in entry.values())
        assert math.isclose(best, float(row.max()), abs_tol=LOGPROB_TOLERANCE)
    return sum(row is not None for row in rows)


@pytest.mark.parametrize(
    ("asks", "options"), [(PLACE, CHUNKS), (DEVICE, {})], ids=["chunks", "device"]
)
def test_entries_are_the_oracles_or_none(
    open_engine: OpenEngine, asks: Sequence[Ask], options: dict[str, Any]
) -> None:
    engine = open_engine(LONG, 2, **options)
    asks = [replace(ask, max_tokens=4) for ask in asks]
    outputs = scored(engine, asks)
    assert_exact(engine, asks, outputs)
    counts = [assert_scored(engine, *pair) for pair in zip(asks, outputs, strict=True)]
    assert min(counts) > 3


def test_a_cached_prefix_is_computed_again(open_engine: OpenEngine) -> None:
    """As in stock vLLM, which has no logits of what it finds; what it computed is found afterwards."""
    engine = open_engine(LONG, 2, enable_prefix_caching=True)
    ask = one_image(721, 2, before=40)
    assert_exact(engine, [ask], engine.run([ask]))
    (output,) = scored(engine, [ask])
    assert output.num_cached_tokens == 0
    assert_scored(engine, ask, output)
    (again,) = engine.run([ask])
    assert again.num_cached_tokens > LONG.image_tokens
    assert_exact(engine, [ask], [again])


def test_flat_logprobs_say_the_same(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2)
    ask = replace(one_image(722, 2), max_tokens=1)
    (listed,), (flat,) = scored(engine, [ask]), scored(engine, [ask], flat_logprobs=True)
    assert listed.prompt_logprobs is not None and flat.prompt_logprobs is not None
    assert type(flat.prompt_logprobs) is not list
    assert [entry or {} for entry in listed.prompt_logprobs] == list(flat.prompt_logprobs)


@pytest.mark.skipif(not v2_cpu.wanted(), reason="vLLM has them under Model Runner V2 alone")
@pytest.mark.parametrize("start", [None, 20])
def test_scores_of_chosen_tokens_are_no_numbers_where_a_token_left(
    open_engine: OpenEngine, start: int | None
) -> None:
    engine, ids = open_engine(LONG, 2, **CHUNKS), [20, 60, -1]
    asks = [replace(ask, max_tokens=4) for ask in (PLACE[0], PLACE[1], PLACE[5])]
    found = [predictions(engine, ask) for ask in asks]
    more: dict[str, Any] = {} if start is None else {"prompt_logprob_start": start}
    first = start or 0
    params = [
        params_of(ask, prompt_logprob_token_ids=[ids] * (len(prompt.ids) - 1 - first), **more)
        for ask, (prompt, _) in zip(asks, found, strict=True)
    ]
    outputs = engine.llm.generate([engine.prompt(ask) for ask in asks], params, use_tqdm=False)
    assert_exact(engine, asks, outputs)
    for output, (prompt, rows) in zip(outputs, found, strict=True):
        scores = torch.tensor(output.prompt_token_id_logprobs)
        assert len(scores) == len(prompt.ids) - 1 - first
        assert torch.isneginf(scores[:, 2]).all()
        for place, row in enumerate(scores[:, :2], first):
            if place in rows:
                logprobs = rows[place].log_softmax(-1)[ids[:2]]
                torch.testing.assert_close(row, logprobs, atol=LOGPROB_TOLERANCE, rtol=0)
            else:
                assert row.isnan().all()


@given(st.lists(st.booleans(), min_size=1))
def test_positions_without_a_logprob(evicted: list[bool]) -> None:
    evicted[-1] = False  # a policy needs text after the image
    logprobs = [0.0] + [math.nan if gone else -1.0 for gone in evicted[:-1]]
    assert unscored(logprobs) == {
        place
        for place in range(len(evicted))
        if evicted[place] or (place > 0 and evicted[place - 1])
    }
