"""Drafts beside LoRA and beside structured output: the oracle with the adapter merged, and answers of a grammar."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.cases import LONG, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine
from tests.engine.options import ADAPTERS, DRAFTS
from tests.engine.test_lora import assert_merged, run
from tests.engine.test_speculative import counted, repeating

pytestmark = pytest.mark.long


@pytest.fixture
def engine(open_engine: OpenEngine) -> Engine:
    return open_engine(
        LONG,
        2,
        speculative_config=DRAFTS,
        enable_lora=True,
        max_loras=len(ADAPTERS) + 1,
        max_lora_rank=8,
        max_num_batched_tokens=200,
    )


def test_drafts_of_several_adapters_are_exact(engine: Engine) -> None:
    asks = [
        repeating(961, cliff=2),
        repeating(962, stages="1:60% uniform, 3:0"),
        repeating(963),
        two_images(964, 3),
        text_only(965, 2),
        replace(one_image(966, 0, before=0), max_tokens=24),
    ]
    pairs = [(ask, adapter) for ask in asks for adapter in (1, 0, 2)]
    with counted(engine) as drafted:
        outputs = run(engine, pairs)
    assert_merged(engine, pairs, outputs)
    assert drafted.accepted > 10 and drafted.tokens - drafted.accepted > 20, drafted
    engine.check_blocks()


def test_drafts_keep_to_a_grammar(engine: Engine) -> None:
    """With a grammar of one sentence every draft that says otherwise is refused, with a policy and without."""
    said = "w1w2w3" * 4  # without blanks, which no token of the tests' tokenizer has
    asks = [one_image(967, 2), one_image(968), replace(one_image(969), stages="1:50% uniform")]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=16,
            structured_outputs=StructuredOutputsParams(choice=[said]),
            extra_args=ask.extra_args,
        )
        for ask in asks
    ]
    with counted(engine) as drafted:
        outputs = engine.llm.generate([engine.prompt(ask) for ask in asks], params, use_tqdm=False)
    assert {output.outputs[0].text.strip() for output in outputs} == {said}
    assert drafted.accepted
    engine.check_blocks()
