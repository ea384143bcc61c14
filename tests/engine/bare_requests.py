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
    drafted: Sequence[int] = ()
    """The last tokens of the step being scheduled, which are guesses."""

    def marks_T(self, count: int) -> np.ndarray:
        """Marks of the first ``count`` tokens; a guess that is wrong, and all after it, have others."""
        request = self.request
        tokens: list[Any] = [*request.prompt_token_ids, *self.answer]
        tokens += [0] * (count - len(tokens))  # of an asynchronous step past the end
        for feature in request.mm_features:
            at = feature.mm_position
            tokens[at.offset : at.offset + at.length] = [feature.identifier] * at.length
        while len(self.marks) < count:
            before = self.marks[-1] if self.marks else hash(request.cache_salt)
            self.marks.append(mark(before, tokens[len(self.marks)]))
        marks, first = self.marks[:count], count - len(self.drafted)
        for position, token in enumerate(self.drafted, start=first):
            marks[position] = mark(marks[position - 1], token)
        return np.array(marks, dtype=np.int64)

    def said(self, position: int) -> int:
        """The token of the answer at ``position``.

        An asynchronous scheduler runs a step past the end, whose token it drops.
        """
        return self.answer[min(position, len(self.answer) - 1)]

    def guesses(self, count: int) -> list[int]:
        """The next ``count`` tokens of the answer; of one place in it after the other another one is wrong."""
        first = self.request.num_output_tokens
        found = [self.said(first + index) for index in range(count)]
        wrong = first % (count + 2)
        if wrong < count:
            found[wrong] = WRONG
        return found


WRONG = 1
"""A token that no answer has."""


def mark(before: int, token: Any) -> int:
    """Never 0, which is a slot that nothing was written to."""
    return hash((before, token)) | 1


def step_result(sent: list[Sent]) -> ModelRunnerOutput:
    """The step's output for each request that is past its prompt: the guesses that are right, and a token."""
    sampled: list[list[int]] = []
    for one in sent:
        if one.request.is_prefill_chunk:
            sampled.append([])
            continue
        position = one.request.num_computed_tokens - one.request.num_prompt_tokens
        position -= len(one.drafted)
        tokens = [one.said(position)]
        for token in one.drafted:
            if token != tokens[-1]:
                break
            tokens.append(one.said(position + len(tokens)))
        sampled.append(tokens)
    names = [one.request.request_id for one in sent]
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=sampled,
    )
