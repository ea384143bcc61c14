"""Finds which rows of a step predict answer tokens, and what each of their keys counts towards.

Equations 6 to 8 of "From Redundancy to Relevance: Information Flow in LVLMs Across Reasoning
Tasks" (arXiv 2406.06579) share an answer token's attention out among system, image, user and output
tokens. Here the keys of a request are consecutive *spans*, each with one such label, so that a share
is a sum over spans wherever the keys are stored. Integers only; imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vllm_flow.layout import TokenLayout
from vllm_flow.log_keys import AttentionLog
from vllm_flow.spans import IntArray

SYSTEM, USER, OUTPUT = -3, -2, -1
"""Labels of spans; image i of the prompt has label i."""

Ranges = Sequence[tuple[int, int]]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KeySpans:
    """A request's tokens as consecutive spans; the last one, the output, has no end."""

    starts: IntArray
    """[S] position of each span's first token, ascending; 0 first."""
    labels: IntArray
    """[S] what each span's attention counts towards."""
    num_images: int

    @classmethod
    def of(cls, prompt_tokens: int, images: Sequence[Ranges], *, single: bool = False) -> KeySpans:
        """Spans of a prompt and what will follow it.

        Args:
            prompt_tokens: length of the prompt, image tokens included.
            images: per image, the half-open ranges of its embedding positions. Text between them
                (row breaks) belongs to the user, as does all text after the first image token.
                Text before it belongs to the system; without any image nothing tells the two
                apart, and the whole prompt is the user's.
            single: give every image token a span of its own.
        """
        spans: list[tuple[int, int]] = []
        end = 0
        for start, stop, image in sorted(
            (start, stop, image) for image, ranges in enumerate(images) for start, stop in ranges
        ):
            if start > end:
                spans.append((end, USER if spans else SYSTEM))
            spans += [(at, image) for at in (range(start, stop) if single else (start,))]
            end = stop
        if prompt_tokens > end:
            spans.append((end, USER))
        spans.append((prompt_tokens, OUTPUT))
        starts, labels = np.array(spans, dtype=np.int64).T
        return cls(starts, labels, len(images))


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """A request that logs its attention, as a worker knows it."""

    log: AttentionLog
    prompt_tokens: int
    spans: KeySpans
    layout: TokenLayout | None
    """Where its tokens are stored; None where nothing is evicted."""
    _stored: dict[int, IntArray] = field(default_factory=dict, init=False, repr=False)

    def bounds(self, num_tokens: int, layer: int) -> IntArray:
        """[S + 1] slots in which the spans of the first ``num_tokens`` tokens begin, then the end.

        Tokens that a layer does not keep have no slot there; past the cliff an image's span is empty.
        """
        layout = self.layout
        if layout is not None and not layout.gone_by(num_tokens):
            layout = None  # the row that predicts the first answer token sees the image
        stage = 0 if layout is None else layout.stage_at(layer)
        starts = self._stored.get(stage)
        if starts is None:
            starts = self.spans.starts
            if layout is not None:
                starts = layout.stored_positions(starts, layer)
            self._stored[stage] = starts
        end = num_tokens if layout is None else layout.stored_tokens(num_tokens, layer)
        return np.append(starts, end)


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """A row of a step from which an answer token is read."""

    index: int
    """Batch index of the request."""
    row: int
    """Row of the step."""
    token: int
    """Which answer token, from 0."""
    num_tokens: int
    """Tokens that the row sees, its own included."""
    request: LoggedRequest


def answer_rows(
    requests: Sequence[LoggedRequest | None],
    num_computed: Sequence[int],
    num_scheduled: Sequence[int],
) -> list[AnswerRow]:
    """The rows to log in a step; arguments are parallel, in the order of the batch's rows.

    A request's last row in a step predicts the token after it, which is an answer token once the
    whole prompt has been computed. Recomputing a preempted request repeats rows: who knows which
    tokens were taken must choose among them.
    """
    rows = []
    end = 0
    for index, (request, computed, scheduled) in enumerate(
        zip(requests, num_computed, num_scheduled, strict=True)
    ):
        end += int(scheduled)
        num_tokens = int(computed) + int(scheduled)
        if request is not None and num_tokens >= request.prompt_tokens:
            token = num_tokens - request.prompt_tokens
            rows.append(AnswerRow(index, end - 1, token, num_tokens, request))
    return rows


@dataclass(frozen=True, slots=True)
class TokenAttention:
    """Where one answer token's attention goes, in L layers, averaged over heads."""

    token: int
    layers: IntArray
    """[L] decoder layers, ascending."""
    shares: FloatArray
    """[L, 4] system, image, user, output; each row sums to 1."""
    images: FloatArray
    """[L, images] each image's part of the second column."""
    heat: FloatArray | None
    """[L, image tokens] each image token's part, in the prompt's order; None unless asked for."""

    @classmethod
    def of(cls, row: AnswerRow, mass: FloatArray) -> TokenAttention:
        """Sum up the mass of a request's spans, [L, S] for its L logged layers."""
        spans = row.request.spans

        def total(labels: IntArray) -> FloatArray:
            member = spans.labels[:, None] == labels[None, :]
            summed: FloatArray = mass @ member.astype(np.float32)
            return summed

        images = total(np.arange(spans.num_images))
        text = total(np.array([SYSTEM, USER, OUTPUT]))
        image = images.sum(axis=1, dtype=np.float32)
        return cls(
            token=row.token,
            layers=np.array(row.request.log.layers, dtype=np.int32),
            shares=np.stack([text[:, 0], image, text[:, 1], text[:, 2]], axis=1),
            images=images,
            heat=mass[:, spans.labels >= 0] if row.request.log.heat else None,
        )

    @property
    def num_rows(self) -> int:
        """Rows of the log, one per layer."""
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        heat = 0 if self.heat is None else self.heat.nbytes
        return self.layers.nbytes + self.shares.nbytes + self.images.nbytes + heat
