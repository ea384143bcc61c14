"""Packs several questions about one picture into one sequence; each sees the picture, not the others.

A pack is: prompt head, image tokens, then segments (prompt tail + answer). Positions of every
segment restart after the image and a mask hides the other segments, so each segment is computed
exactly as it would be alone, at a fraction of the cost.

Letters: B packs, T tokens of the longest pack, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_flow.demo_model.prompt import ANSWER_END, prompt_head, prompt_tail

IGNORED = -100
MARK_WEIGHT = 0.3


@dataclass(frozen=True)
class Ask:
    """One question about a picture with its answer (without the end token)."""

    text: str
    answer: str
    early: str = ""
    """Where ``text`` starts with this, its last token is asked for the answer as well."""
    weight: float = 1.0
    """Factor on the loss of the answer's tokens."""
    marks: tuple[tuple[str, str], ...] = ()
    """Beginnings of ``text``, and the one-token word that the last token of each is asked for."""


@dataclass(frozen=True)
class PackBatch:
    """Tensors of a batch of packs; image rows of ``tokens`` hold 0 and are to be replaced."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    allowed_BTT: torch.Tensor
    """bool: query row may attend to key column."""
    targets_BT: torch.Tensor
    """Next token where it belongs to an answer, else ``IGNORED``."""
    weights_BT: torch.Tensor
    """Loss weight of each target: a presence question counts as much as a caption."""
    first_B: list[list[int]]
    """Per pack, for every segment, the row that predicts the answer's first token."""
    image: slice
    """Rows of the image tokens, the same in all packs."""


class Packer:
    """Encodes packs with a ``tokenizers.Tokenizer``, for pictures of ``image_tokens`` tokens."""

    def __init__(self, tokenizer: Any, image_tokens: int) -> None:
        self.encode = lambda text: tokenizer.encode(text).ids
        self.head = self.encode(prompt_head())
        self.image = slice(len(self.head), len(self.head) + image_tokens)

    def batch(self, packs: Sequence[Sequence[Ask]]) -> PackBatch:
        """Encode one list of questions per picture."""
        rows = [[(*self._segment(ask), ask) for ask in pack] for pack in packs]
        prefix = self.image.stop
        length = prefix + max(sum(len(ids) for ids, *_ in segments) for segments in rows)
        size = (len(rows), length)
        tokens, positions = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        targets, weights = torch.full(size, IGNORED), torch.zeros(size)
        owner = torch.full(size, -1)  # which segment a row belongs to; -1 padding, 0 shared prefix
        firsts = []
        for b, segments in enumerate(rows):
            tokens[b, : len(self.head)] = torch.tensor(self.head)
            positions[b, :prefix] = torch.arange(prefix)
            owner[b, :prefix] = 0
            at, first = prefix, []
            for number, (ids, answer_length, ask) in enumerate(segments, start=1):
                end = at + len(ids)
                tokens[b, at:end] = torch.tensor(ids)
                positions[b, at:end] = torch.arange(prefix, prefix + len(ids))
                owner[b, at:end] = number
                start = end - answer_length - 1
                targets[b, start : end - 1] = tokens[b, start + 1 : end]
                weights[b, start : end - 1] = 1.0 if answer_length <= 3 else 0.4
                weights[b, end - 2] = 0.2  # the end token is soon learnt
                weights[b, start : end - 1] *= ask.weight
                if ask.early:
                    row = at + len(self.encode(ask.early)) - 1
                    targets[b, row], weights[b, row] = ids[-answer_length], 1.0
                for beginning, word in ask.marks:
                    row = at + len(self.encode(beginning)) - 1
                    targets[b, row], weights[b, row] = self.encode(word)[0], MARK_WEIGHT
                first.append(start)
                at = end
            firsts.append(first)
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
        allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
        return PackBatch(tokens, positions, allowed, targets, weights, firsts, self.image)

    def _segment(self, ask: Ask) -> tuple[list[int], int]:
        """Token ids of tail and answer, and the answer's length with its end token."""
        answer = self.encode(ask.answer + ANSWER_END)
        return self.encode(prompt_tail(ask.text)) + answer, len(answer)


def additive_mask(allowed_BTT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, T, T] mask for scaled-dot-product attention: 0 where allowed, else very negative."""
    mask = torch.zeros(allowed_BTT.shape, dtype=dtype)
    return mask.masked_fill(~allowed_BTT, torch.finfo(dtype).min)[:, None]
