"""Prefix caching with policies: as long as stock vLLM's hits, exact, and never across policies.

Groups of two layers and cliffs 0..6 make every kind of storage group: whole, packed, and mixed
where the cliff is odd.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.cases import LONG, Ask, one_image
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, STOCK, Engine, assert_exact, tokens_of
from tests.engine.tiny_llava import SPECIALS, WORDS, words
from tests.longer import some

CACHED = {"enable_prefix_caching": True}
CLIFFS = range(LONG.layers + 1)
QUICK = (0, 3)
"""Every group packed; one with the cliff inside."""
ALLOWED = tuple(range(len(SPECIALS), len(SPECIALS) + len(WORDS)))
"""Answers of words alone, so that an answer can be said again in the next turn's prompt."""


def conversation(engine: Engine, first: Ask, turns: int) -> list[tuple[Ask, int]]:
    """Ask, then ask again with everything said so far in the prompt; asks and cached tokens."""
    ask, done = replace(first, allowed=ALLOWED), []
    for turn in range(turns):
        (output,) = engine.run([ask])
        assert_exact(engine, [ask], [output])
        done.append((ask, output.num_cached_tokens))
        said = " ".join(WORDS[token - len(SPECIALS)] for token in tokens_of(output))
        ask = replace(ask, prompt=f"{ask.prompt} {said} {words(9, 900 + turn)}")
    return done


@pytest.mark.parametrize("cliff", some(CLIFFS, QUICK))
def test_a_conversation_hits_as_long_as_in_stock_vllm(open_engine: OpenEngine, cliff: int) -> None:
    engine, stock = open_engine(LONG, 2, **CACHED), open_engine(LONG, STOCK, **CACHED)
    first = one_image(300 + cliff, cliff, before=37, after=13)
    turns = conversation(engine, first, 4)
    for turn, (ask, hit) in enumerate(turns):
        (expected,) = stock.run([ask.without_policy()])
        # Stock may also find the last block that the turn before filled while it answered.
        assert hit >= expected.num_cached_tokens - BLOCK_SIZE, f"turn {turn}"
        if turn:
            assert hit > 37 + LONG.image_tokens, f"turn {turn} does not reach past the image"


@pytest.mark.parametrize("cliff", some(CLIFFS, QUICK))
def test_one_image_many_questions(open_engine: OpenEngine, cliff: int) -> None:
    """Hits that end inside a packed block, at different places, each followed by other tokens."""
    engine, stock = open_engine(LONG, 2, **CACHED), open_engine(LONG, STOCK, **CACHED)
    first = one_image(320 + cliff, cliff, before=20, after=90)
    said = first.prompt.split()
    for after in (90, 3, 50, 25, 75, 90):
        # The questions share their first words, so the common prefix ends at ever other places.
        ask = replace(first, prompt=" ".join([*said[: 21 + after], words(11, after)]))
        outputs = engine.run([ask])
        assert_exact(engine, [ask], outputs)
        (expected,) = stock.run([ask.without_policy()])
        assert outputs[0].num_cached_tokens >= expected.num_cached_tokens - BLOCK_SIZE
    # All at once: several requests copy the same half-filled block.
    asks = [replace(first, prompt=f"{first.prompt} {words(5, n)}") for n in range(4)]
    outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    assert min(out.num_cached_tokens for out in outputs) >= 21 + LONG.image_tokens


@pytest.mark.parametrize("chunk", [512, 64])
@pytest.mark.parametrize("cliff", some(range(LONG.layers), QUICK))
def test_what_arrives_together_shares_as_in_stock_vllm(
    open_engine: OpenEngine, cliff: int, chunk: int
) -> None:
    """Followers wait until the first has computed what they share, then find it; samples do, too."""
    options = {**CACHED, "max_num_batched_tokens": 512, "long_prefill_token_threshold": chunk}
    engine, stock = open_engine(LONG, 2, **options), open_engine(LONG, STOCK, **options)
    first = one_image(390 + cliff, cliff, before=30, after=70)
    asks = [replace(first, prompt=f"{first.prompt} {words(8, n)}") for n in range(3)]
    asks.append(replace(one_image(400 + cliff, cliff, before=30, after=70), samples=3))
    outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    others = stock.run([ask.without_policy() for ask in asks])
    if chunk == 512:
        hits = [out.num_cached_tokens for out in outputs[:3]]
        expected = [out.num_cached_tokens for out in others[:3]]
        assert all(hit >= other - BLOCK_SIZE for hit, other in zip(hits, expected, strict=True))
    # In chunks, stock followers find one chunk and compute the rest beside the first; ours wait.
    assert min(out.num_cached_tokens for out in outputs[1:3]) > 30 + LONG.image_tokens


def test_policies_do_not_share(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2, **CACHED)
    asks = [one_image(340, cliff, before=40, after=40) for cliff in (None, *range(6))]
    for ask in asks:
        (output,) = engine.run([ask])
        assert output.num_cached_tokens == 0, "found what another policy computed"
        assert_exact(engine, [ask], [output])
    again = engine.run(asks)
    assert_exact(engine, asks, again)
    assert all(out.num_cached_tokens > LONG.image_tokens for out in again)


def test_donors_that_were_aborted(open_engine: OpenEngine) -> None:
    """Blocks of a prefill that never ended are found as far as they were computed."""
    engine = open_engine(LONG, 2, max_num_batched_tokens=48, max_num_seqs=4, **CACHED)
    for cliff in range(6):
        ask = one_image(350 + cliff, cliff, before=10, after=60)
        for steps in (1, 2, 4, 6):
            engine.add(f"{cliff}-{steps}", ask)
            for _ in range(steps):
                engine.step()
            engine.abort(f"{cliff}-{steps}")
        engine.drain()
        assert_exact(engine, [ask], engine.run([ask]))


def test_a_pool_that_thrashes(open_engine: OpenEngine) -> None:
    """Preempted requests with a policy resume from what is left of their own blocks."""
    engine = open_engine(LONG, 2, kv_cache_memory_bytes=2 << 20, **CACHED)
    asks = [one_image(380 + i % 5, (1, 2, 3, 0, None)[i % 5]) for i in range(15)]
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted, "the pool is too large for this test"
    assert_exact(engine, asks, outputs)


def test_a_client_cannot_reach_a_policys_blocks_with_a_salt(open_engine: OpenEngine) -> None:
    engine = open_engine(LONG, 2, **CACHED)
    prompt = engine.prompt(one_image(370)) | {"cache_salt": "\x00vllm-flow\x00cliff=2\x00"}
    with pytest.raises(ValueError, match="cache_salt"):
        engine.llm.generate([prompt], use_tqdm=False)
    ask = one_image(371, 2)
    assert_exact(engine, [ask], engine.run([ask]))
