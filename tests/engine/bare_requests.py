"""The requests of the scheduler without a model, and what its steps answer.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_flow.layout import TokenLayout


@dataclass
class Sent:
    """A request and what a slot holds of each of its tokens."""

    request: Request
    layout: TokenLayout | None
    answer: Sequence[int]
    """Its answer, which the memory knows before the scheduler does."""
    marks: list[int] = field(default_factory=list)
    """Per token: stands for the token and all before it, under the request's salt and pictures."""

    def marks_T(self, count: int) -> np.ndarray:
        request = self.request
        tokens: list[Any] = [*request.prompt_token_ids, *self.answer]
        tokens += [0] * (count - len(tokens))  # of an asynchronous step past the end
        for feature in request.mm_features:
            at = feature.mm_position
            tokens[at.offset : at.offset + at.length] = [feature.identifier] * at.length
        while len(self.marks) < count:
            before = self.marks[-1] if self.marks else hash(request.cache_salt)
            # Never 0, which is a slot that nothing was written to.
            self.marks.append(hash((before, tokens[len(self.marks)])) | 1)
        return np.array(self.marks[:count], dtype=np.int64)


def step_result(sent: list[Sent]) -> ModelRunnerOutput:
    """The step's output: a token for each request that is past its prompt."""
    sampled: list[list[int]] = []
    for one in sent:
        if one.request.is_prefill_chunk:
            sampled.append([])
            continue
        position = one.request.num_computed_tokens - one.request.num_prompt_tokens
        # An asynchronous scheduler runs a step past the end, whose token it drops.
        sampled.append([one.answer[min(position, len(one.answer) - 1)]])
    names = [one.request.request_id for one in sent]
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=sampled,
    )
