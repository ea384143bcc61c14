"""The demo model, 30 pretrained layers: exact at some cliffs; at more, and for longer, in ``make test-long``.

The tiny models have random weights; here attention is what training made it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from PIL import Image
from vllm import LLM, SamplingParams

from tests.engine import oracle
from vllm_flow.demo_model.assemble import assemble
from vllm_flow.demo_model.heldout import HeldoutScene, Question, load_questions, load_scenes
from vllm_flow.engine.inspect import check_integrity

SOME = ((None, 7, 15), 8)
"""Cliffs, and tokens of an answer."""
MORE = ((None, 0, 1, 7, 14, 15, 23, 29, 30), 32)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLM]:
    llm = LLM(
        model=str(assemble()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        kv_cache_memory_bytes=256 << 20,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        additional_config={"vllm_flow": {"group_layers": 5}},
    )
    yield llm
    check_integrity(llm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cliffs", "tokens"),
    [pytest.param(*SOME, id="some"), pytest.param(*MORE, id="more", marks=pytest.mark.long)],
)
def test_the_demo_model_is_exact(engine: LLM, cliffs: tuple[int | None, ...], tokens: int) -> None:
    """Greedy tokens equal, logprobs within 1e-4; all questions and cliffs in one call."""
    asked: list[Question | HeldoutScene] = [load_questions("seen")[0], load_scenes()[1]]
    jobs = [(item, cliff) for item in asked for cliff in cliffs]
    outputs = engine.generate(
        [
            {
                "prompt": item.prompt,
                "multi_modal_data": {"image": Image.open(item.image_path).convert("RGB")},
            }
            for item, _ in jobs
        ],
        [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                logprobs=1,
                ignore_eos=True,
                extra_args=None if cliff is None else {"flow_cliff": cliff},
            )
            for _, cliff in jobs
        ],
        use_tqdm=False,
    )
    said = set()
    for (item, cliff), output in zip(jobs, outputs, strict=True):
        found = output.outputs[0]
        picture = Image.open(item.image_path).convert("RGB")
        expected = oracle.check_greedy(assemble(), item.prompt, [picture], cliff, found.token_ids)
        assert tuple(output.prompt_token_ids) == expected.prompt_token_ids
        assert tuple(found.token_ids) == expected.token_ids, f"cliff {cliff}"
        logprobs = [row[t].logprob for row, t in zip(found.logprobs, found.token_ids, strict=True)]
        assert all(
            math.isclose(a, b, rel_tol=0, abs_tol=1e-4)
            for a, b in zip(logprobs, expected.logprobs, strict=True)
        ), f"cliff {cliff}"
        said.add((item.prompt, tuple(found.token_ids)))
    # Were the answers the same at every cliff, the comparison would prove nothing.
    assert len(said) > len(asked) * 2
