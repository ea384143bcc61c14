"""Prompts given as embeddings: served beside policies, and refused one of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import oracle
from tests.engine.cases import LONG, Ask, one_image, text_only
from tests.engine.harness import Engine, logprobs_of, params_of, tokens_of


def embedded(engine: Engine, ask: Ask) -> dict[str, Any]:
    model, _ = oracle.load(engine.model_dir)
    with torch.inference_mode():
        return {
            "prompt_embeds": oracle.embed(model, oracle.encode(engine.model_dir, ask.prompt), [])[0]
        }


def test_embeddings_beside_policies(together: Engine) -> None:
    text, evicts = text_only(921), one_image(922, 2)
    outputs = together.llm.generate(
        [embedded(together, text), together.prompt(evicts)],
        [params_of(text), params_of(evicts)],
        use_tqdm=False,
    )
    for ask, output in zip((text, evicts), outputs, strict=True):
        expected = oracle.check_greedy(
            together.model_dir,
            ask.prompt,
            [found for found in together.prompt(ask).get("multi_modal_data", {}).get("image", ())],
            ask.cliff,
            tokens_of(output),
        )
        assert tokens_of(output) == expected.token_ids
        assert logprobs_of(output) == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"flow_cliff": 2}, "flow_cliff=2: a prompt given as embeddings does not say"),
        ({"flow_stages": "1:50% uniform"}, "a prompt given as embeddings does not say"),
    ],
)
def test_a_policy_of_their_own_is_refused(
    together: Engine, keys: dict[str, Any], says: str
) -> None:
    ask = text_only(923)
    params = params_of(ask)
    params.extra_args = keys
    with pytest.raises(ValueError, match=says):
        together.llm.generate(embedded(together, ask), params, use_tqdm=False)


def test_the_baseline_is_none(together: Engine) -> None:
    ask = text_only(924)
    params = params_of(ask)
    params.extra_args = {"flow_cliff": LONG.layers}
    (output,) = together.llm.generate(embedded(together, ask), params, use_tqdm=False)
    expected = oracle.check_greedy(together.model_dir, ask.prompt, [], None, tokens_of(output))
    assert tokens_of(output) == expected.token_ids
