"""Nonsense is refused with a ValueError that names the key, and the engine goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine import v2_cpu
from tests.engine.cases import GQA, one_image, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import STOCK, Engine, assert_exact, assert_same
from vllm_flow.engine.front_end import incoming

BAD: tuple[tuple[str, Any], ...] = (
    ("flow_cliff", -1),
    ("flow_cliff", GQA.layers + 1),
    ("flow_cliff", 2**64 - 1),  # the largest that vLLM itself lets through
    ("flow_cliff", True),
    ("flow_cliff", False),
    ("flow_cliff", 2.0),
    ("flow_cliff", math.nan),
    ("flow_cliff", math.inf),
    ("flow_cliff", "2"),
    ("flow_cliff", [2]),
    ("flow_cliff", None),
    ("flow_cliff", [1, 2, 3]),
    ("flow_keep", 3),
    ("flow_seed", 3),
    ("flow_when", "decode"),
    ("flow_stages", "2:50%"),
    ("flow_stages", "0:3 last_image"),
    ("flow_preset", "fatv"),
    ("flow_clif", 2),
    ("flow_", 2),
)


def params(extra_args: dict[str, Any], **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=4, extra_args=extra_args, **more)


def still_answers(engine: Engine) -> None:
    # Pictures of its own; test_refused_picture_can_be_sent_again is about the refused one.
    asks = [one_image(5, 2), two_images(6)]
    assert_exact(engine, asks, engine.run(asks))


@pytest.mark.parametrize(
    ("key", "value"), v2_cpu.reduced(BAD, to=BAD[:1]), ids=lambda part: repr(part)[:24]
)
def test_bad_value_is_refused(open_engine: OpenEngine, key: str, value: Any) -> None:
    engine = open_engine(GQA, 2)
    good, bad = engine.prompt(one_image(1)), engine.prompt(two_images(2))
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        engine.llm.generate(bad, params({key: value}), use_tqdm=False)
    # One bad request among good ones leaves none of them behind.
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        engine.llm.generate(
            [good, bad, good], [params({}), params({key: value}), params({})], use_tqdm=False
        )
    engine.check_idle()
    still_answers(engine)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"flow_cliff": 2, "flow_keep": [3], "flow_rank": "uniform"}, "flow_keep=.*1 value and the prompt has 2"),
        ({"flow_stages": "1:20% uniform, 2:9 uniform"}, "keeps 9 and '1:20% uniform' left 5"),
        ({"flow_cliff": 2, "flow_keep": 3, "flow_rank": "last_prompt"}, "see 6[0-9] tokens in one step"),
        ({"flow_cliff": 2, "flow_keep": 3, "flow_rank": "dart"}, "see 6[0-9] tokens in one step"),
        ({"flow_stages": "1:5 question", "flow_when": "decode"}, "flow_when='decode': 'question'"),
        ({"flow_cliff": 0, "flow_keep": 3, "flow_rank": "unrotated"}, "no layer is before layer 0"),
        ({"flow_preset": "divprune", "flow_when": "decode"}, "flow_when='decode': 'diversity'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_prompt_is_refused(
    open_engine: OpenEngine, keys: dict[str, Any], said: str
) -> None:
    """Two images of 25 tokens with text, in steps of 64 tokens, of which another request may take one."""
    engine = open_engine(GQA, 2, max_num_batched_tokens=64, max_num_seqs=2)
    with pytest.raises(ValueError, match=said):
        engine.llm.generate(engine.prompt(two_images(2)), params(keys), use_tqdm=False)
    engine.check_idle()
    still_answers(engine)


def test_refused_picture_can_be_sent_again(open_engine: OpenEngine) -> None:
    """vLLM's front end takes a processed picture for known to the engine, though the engine never got it."""
    # An engine of its own (the seed only tells it apart): a miss leaves it with a request that never ends.
    engine = open_engine(GQA, 2, seed=33)
    ask = one_image(33)
    with pytest.raises(ValueError, match="flow_cliff"):
        engine.llm.generate(engine.prompt(ask), params({"flow_cliff": -1}), use_tqdm=False)
    assert_exact(engine, [ask], engine.run([ask]))


def test_pictures_of_a_refused_batch_can_be_sent_again(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 2)
    asks = [one_image(34), one_image(35), one_image(36)]
    keys = [{}, {"flow_cliff": -1}, {}]
    with pytest.raises(ValueError, match="flow_cliff"):
        engine.llm.generate(
            [engine.prompt(ask) for ask in asks], [params(key) for key in keys], use_tqdm=False
        )
    assert_exact(engine, asks, engine.run(asks))


def test_prompt_that_ends_with_an_image_is_refused(open_engine: OpenEngine) -> None:
    """The first answer token would come from an evicted row."""
    engine = open_engine(GQA, 2)
    prompt = engine.prompt(one_image(34, after=0))
    with pytest.raises(ValueError, match="flow_cliff"):
        engine.llm.generate(prompt, params({"flow_cliff": 2}), use_tqdm=False)
    still_answers(engine)


def test_keys_of_others_are_left_alone(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 2)
    [out] = engine.llm.generate(
        engine.prompt(one_image(37)), params({"somebody_elses": "key"}), use_tqdm=False
    )
    assert len(out.outputs[0].token_ids) == 4


def test_keys_that_nobody_reads_are_told_of_once(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that was started without the extension: an answer under no policy must not pass for one under it."""
    said: list[str] = []
    monkeypatch.setattr(
        incoming.logger, "warning_once", lambda text, *values: said.append(text % values)
    )
    engine = open_engine(GQA, STOCK)
    ask = one_image(3, 1)
    with_keys, without = engine.run([ask]), engine.run([ask.without_policy()])
    assert_same(with_keys, without)
    (told,) = said
    assert "flow_cliff" in told and "--additional-config" in told
