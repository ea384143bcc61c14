"""Packs several questions about one picture into one sequence; each sees the picture, not the others.

A pack is: prompt head, 64 image tokens, then segments (prompt tail + answer). Positions of every
segment restart after the image and a mask hides the other segments, so each segment is computed
exactly as it would be alone, at a fraction of the cost.

Letters: B packs, T tokens of the longest pack, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_flow.demo.classes import (
    ANSWER_SUFFIX,
    CAPTION_REQUEST,
    CLASSES,
    caption_of,
    presence_question,
    with_article,
)
from vllm_flow.demo.prompt import ANSWER_END, prompt_head, prompt_tail
from vllm_flow.demo.vision import IMAGE_TOKENS

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


def questions_of(objects: Sequence[str], rng: random.Random, most: int = 3) -> list[Ask]:
    """As many presence questions with yes as with no (at most ``most`` each), and the caption.

    Half of them carry POPE's answer suffix, so that the bare question works as well.
    """

    def ask(name: str, answer: str) -> Ask:
        return Ask(presence_question(name) + rng.choice(("", ANSWER_SUFFIX)), answer)

    yes = rng.sample(list(objects), min(most, len(objects)))
    no = rng.sample([name for name in CLASSES if name not in objects], len(yes))
    asks = [ask(name, "Yes") for name in yes]
    asks += [ask(name, "No") for name in no]
    rng.shuffle(asks)
    return [*asks, Ask(CAPTION_REQUEST, caption_of(objects).capitalize())]


def presence_only(objects: Sequence[str], rng: random.Random) -> list[Ask]:
    """Every object with and without the suffix, and as many absent ones: what the small model learns.

    No captions: from scratch they take most of the loss and presence does not come off. The class
    name's own token is asked for the answer too: finding the object there and reading it off at the
    end are two steps, and together they are not found from random weights in a short training.
    """
    no = rng.sample([name for name in CLASSES if name not in objects], 2 * len(objects))

    def ask(name: str, suffix: str, answer: str) -> Ask:
        early = f"Is there {with_article(name)}"
        return Ask(presence_question(name) + suffix, answer, early)

    asks = [ask(name, suffix, "Yes") for name in objects for suffix in ("", ANSWER_SUFFIX)]
    return asks + [ask(name, rng.choice(("", ANSWER_SUFFIX)), "No") for name in no]


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

    def __init__(self, tokenizer: Any, image_tokens: int = IMAGE_TOKENS) -> None:
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
