"""Works out which tokens of a prompt each stage leaves, and what only the device can choose. Integers only.

*How many* tokens stay is known from the policy. *Which* ones is known here where a rank goes by place;
where it looks at embeddings or attention, the device chooses. Then a stage is *virtual*: it says which
tokens would be left if the first ones stayed. Counts, slots and blocks are those of any other choice
of as many, but for positions inside the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.ranks import RANKS, PictureRank, PositionRank, TowerRank
from vllm_flow.ranks.base import Draw, Needs
from vllm_flow.sized_cache import SizedCache
from vllm_flow.spans import ImageSpans, IntArray, Range


@dataclass(frozen=True, slots=True)
class Choice:
    """Rows of one image of which some stay, and only the device knows which.

    Rows are those of the image's *extent*, from its first token to its last: text that stands between
    tokens of an image (row breaks, markers of tiles) always stays, but where it comes among the rows
    that stay depends on the choice.
    """

    image: int
    """Index of the image in the prompt."""
    rank: str
    start: int
    """Position of the image's first token."""
    stop: int
    """Position past its last one."""
    left: int
    """Rows of the extent that are left by then."""
    keep: int
    """How many of them stay, text included."""
    kept_end: int
    """Position past the last row that stays, if the first ones do."""
    ordered: int
    """Tokens that a rank by picture must put in order for all of the image's stages."""
    text: tuple[int, ...]
    """Offsets of text in the extent, ascending."""
    picks: tuple[int, ...] | None = None
    """Where no rank of the device chooses, but one has before: which of the image tokens left stay,
    counted in their order. Only the device knows their rows among those of text."""

    @property
    def by_prompt(self) -> bool:
        """Whether all of the prompt from the image on must be computed in one step for it, not the image alone."""
        return RANKS[self.rank].needs == Needs.PROMPT


@dataclass(frozen=True, slots=True)
class LayoutStage:
    """What is gone from decoder layer ``layer`` on."""

    layer: int
    evicted: ImageSpans
    """Of all images; virtual where a device chose."""
    choices: tuple[Choice, ...] = ()


CACHE_BYTES = 16 << 20
"""What stages of prompts that were asked for lately may take: thousands of pictures, or some long videos."""


def bytes_of(
    asked: tuple[FlowPolicy, tuple[ImageSpans, ...]], stages: tuple[LayoutStage, ...]
) -> int:
    """About how much memory stages take, and what they are remembered by."""
    size = 1024 + sum(512 + image.nbytes for image in asked[1])
    for stage in stages:
        size += 1024 + stage.evicted.nbytes
        # A number in a tuple is an object of its own.
        size += sum(512 + 40 * (len(c.text) + len(c.picks or ())) for c in stage.choices)
    return size


_known: SizedCache[tuple[LayoutStage, ...]] = SizedCache(CACHE_BYTES, bytes_of)


def clear_caches() -> None:
    """Forget what was made before."""
    _known.clear()


def layout_stages(policy: FlowPolicy, images: tuple[ImageSpans, ...]) -> tuple[LayoutStage, ...]:
    """:func:`make_stages`, which are remembered: a conversation's turns and a picture's questions have the same."""
    return _known.get((policy, images), lambda: make_stages(policy, images))


def make_stages(policy: FlowPolicy, images: tuple[ImageSpans, ...]) -> tuple[LayoutStage, ...]:
    """The stages of a prompt by ascending layer: one per layer that the policy names.

    Stages that change nothing for these images are there, too: what a stage stores is found by others
    whose images it changes.

    Args:
        images: per image its tokens, in the order of the prompt.
    """
    tracks = [_Track(index, spans, policy) for index, spans in enumerate(images)]
    layers = sorted({stage.layer for track in tracks for stage in track.stages})
    stages = []
    for layer in layers:
        choices = tuple(c for track in tracks for c in [track.advance(layer)] if c is not None)
        gone = [track.gone() for track in tracks]
        stages.append(LayoutStage(layer, ImageSpans.from_positions(np.concatenate(gone)), choices))
    return tuple(stages)


def limits(
    choices: Sequence[Choice], prompt_tokens: int
) -> tuple[tuple[Range, ...], tuple[Range, ...], int | None]:
    """What must be computed in one step, where no prefix may end, and how far prefixes reach at all.

    Args:
        choices: by ascending layer.

    Raises:
        ValueError: a rank looks at the whole prompt, whose length is not known.
    """
    prompt = min((c.start for c in choices if c.by_prompt), default=None)
    if prompt is not None and prompt_tokens <= prompt:
        raise ValueError("a rank that looks at the whole prompt needs to know how long it is")
    found: dict[int, Range] = {}
    barred: dict[int, Range] = {}
    for choice in choices:
        if choice.image not in found:  # what stays at a later stage was there at the first
            found[choice.image] = (choice.start, choice.stop)
            barred[choice.image] = (choice.start, choice.kept_end)
        if choice.by_prompt:
            found[choice.image] = (choice.start, prompt_tokens)
    atomic = sorted(found.values())
    return tuple(atomic), tuple(sorted(barred.values())), prompt


class _Track:
    """One image on its way through its stages."""

    def __init__(self, index: int, image: ImageSpans, policy: FlowPolicy) -> None:
        self.stages: tuple[Stage, ...] = policy.stages_of(index)
        self._index, self._seed = index, policy.seed
        self._start, self._stop = image.start, image.end
        self._extent: IntArray = np.arange(self._start, self._stop)
        self._text: IntArray = self._extent[~image.is_image(self._extent)]
        self._total = self._left = image.total
        self._rows = self._extent
        """Positions of the extent's rows that are left, ascending; of the first ones after a choice of
        the device."""
        self._virtual = False
        self._nested: str | None = None
        """A rank by picture, while all that is left is among the tokens that it put in order."""
        self._ordered = 0

    def advance(self, layer: int) -> Choice | None:
        """Pass one layer; what the device must choose there, None if nothing."""
        stage = next((stage for stage in self.stages if stage.layer == layer), None)
        if stage is None:
            return None
        keep = min(stage.kept(self._total), self._left)
        if keep == self._left:
            return None
        left, self._left = self._left, keep
        if keep == 0 or stage.rank is None:
            if self._virtual and len(self._text):
                return self._choice("uniform", 0, np.zeros(0, dtype=np.int64))
            self._rows = self._text
            return None
        picks: IntArray | None = None
        rank = RANKS[stage.rank]
        if isinstance(rank, PositionRank):
            picks = rank.choose(left, keep, Draw(self._seed, self._index, layer))
            if not (self._virtual and len(self._text)):
                # Rows of an image without text in it are in order, whichever they are.
                tokens = self._rows
                if len(self._text):
                    tokens = tokens[~np.isin(tokens, self._text)]
                self._rows = tokens[picks]
                if len(self._text):
                    self._rows = np.union1d(self._rows, self._text)
                return None
        return self._choice(stage.rank, keep, picks)

    def _choice(self, name: str, keep: int, picks: IntArray | None) -> Choice:
        rows = self._rows
        first = len(rows) == len(self._extent)
        ordered = 0
        if isinstance(RANKS[name], (PictureRank, TowerRank)):
            nested = first or self._nested == name
            ordered = max(keep, self._ordered) if nested else self._total
            self._ordered = ordered
            self._nested = name
        else:
            self._nested = None
        self._rows, self._virtual = rows[: keep + len(self._text)], True
        return Choice(
            image=self._index,
            rank=name,
            start=self._start,
            stop=self._stop,
            left=len(rows),
            keep=len(self._rows),
            kept_end=int(self._rows[-1]) + 1,
            ordered=ordered,
            text=tuple((self._text - self._start).tolist()),
            picks=None if picks is None else tuple(picks.tolist()),
        )

    def gone(self) -> IntArray:
        """Positions of the extent's rows that are gone, ascending."""
        left = np.zeros(len(self._extent), dtype=np.bool_)
        left[self._rows - self._start] = True
        gone: IntArray = self._extent[~left]
        return gone
