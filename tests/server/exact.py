"""Answers of a server against the oracle's, tokens and logprobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tests.engine import oracle
from tests.server.conftest import LAYERS
from tests.server.serving import Server

TOLERANCE = 1e-4
CLIFFS = (None, *range(1, LAYERS + 1))
EXACT = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "ignore_eos": True}


def assert_oracles(
    server: Server, choice: Any, prompt: str, pictures: Sequence[Image.Image], cliff: int | None
) -> None:
    """A choice's tokens and logprobs are the oracle's, up to a tie between two tokens."""
    found = choice.model_extra["token_ids"]
    expected = oracle.check_greedy(server.model_dir, prompt, pictures, cliff, found)
    same = len(expected.token_ids)
    if list(expected.token_ids) != found:
        assert expected.gaps[-1] < 5 * TOLERANCE, "a token differs from the oracle's"
        same -= 1
    assert same > 0
    said = [token.logprob for token in choice.logprobs.content]
    for one, other in zip(said[:same], expected.logprobs, strict=False):
        assert math.isclose(one, other, abs_tol=TOLERANCE)
