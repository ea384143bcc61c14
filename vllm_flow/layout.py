"""Lays out what a request stores where: its policy applied to its images. Integers only.

Knows layers, tokens and blocks; nothing of batches (that is `plan`), and neither torch nor vLLM.

A request's *packed position* of a kept token in a layer is its rank among the tokens that the layer
keeps: where its key and value live in the block table. Which tokens a stage keeps: `layout_stages`.
Terms, with a drawing: docs/glossary.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from vllm_flow.counts import counted
from vllm_flow.layout_stages import LayoutStage, layout_stages, limits
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans, IntArray, Range


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where one request's tokens are stored, per layer: its policy applied to its images."""

    spans: ImageSpans
    """All image tokens of the prompt."""
    stages: tuple[LayoutStage, ...]
    """By ascending layer; at least one, and one of them evicts."""
    salt: str
    """Says what of the policy decides which tokens are kept: requests that share it and a prefix have
    the same stages in it."""
    prompt_tokens: int = 0
    pictures: tuple[str, ...] = ()
    """Per image what names its embeddings, empty where nothing does: whoever has the same name has
    the same embeddings."""
    digest: bytes = b""
    """Names the whole prompt, where a rank looks at all of it; known to the scheduler alone."""
    late: bool = False
    """Whether images leave when the whole prompt is computed: until then it is stored by position."""
    atomic: tuple[Range, ...] = field(init=False)
    """Ranges of positions that must be computed in one step, by ascending start; they may overlap."""
    shareable: int | None = field(init=False)
    """Tokens from the start that are stored alike whatever follows them; past these only the same
    prompt has the same ones. None: no rank looks at what follows."""
    breaks: tuple[int, ...] = field(init=False)
    """First layer of each stage."""
    totals: tuple[int, ...] = field(init=False)
    """Tokens that are gone from each stage on, once the whole prompt is computed."""
    read_layers: tuple[int, ...] = field(init=False)
    """Layers whose attention a late eviction chooses by; none where places decide."""
    _barred: tuple[Range, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        choices = [choice for stage in self.stages for choice in stage.choices]
        if self.late and self.prompt_tokens < self.spans.end:
            raise ValueError("images that leave after the prompt need to know how long it is")
        # What leaves late is computed like a prompt without a policy, in any parts.
        atomic, barred, shareable = limits([] if self.late else choices, self.prompt_tokens)
        object.__setattr__(self, "atomic", atomic)
        object.__setattr__(self, "_barred", barred)
        object.__setattr__(self, "shareable", shareable)
        read = (s.layer - 1 for s in self.stages if any(c.picks is None for c in s.choices))
        object.__setattr__(self, "read_layers", tuple(read) if self.late else ())
        object.__setattr__(self, "breaks", tuple(stage.layer for stage in self.stages))
        object.__setattr__(self, "totals", tuple(stage.evicted.total for stage in self.stages))

    @classmethod
    def of(
        cls,
        policy: FlowPolicy | None,
        images: ImageSpans | Sequence[ImageSpans],
        prompt_tokens: int = 0,
        pictures: Sequence[str] = (),
    ) -> TokenLayout | None:
        """The layout, or None where nothing is ever evicted (no policy, or no image).

        Args:
            images: per image its tokens, in the order of the prompt; spans alone are one image.
            prompt_tokens: length of the prompt, which ranks that look at all of it need.
            pictures: see the field.

        Raises:
            ValueError: a policy for another number of images, or one of a late eviction without the
                prompt's length.
        """
        images = (images,) if isinstance(images, ImageSpans) else tuple(images)
        if policy is None or not any(image.total for image in images):
            return None
        if not policy.shared and len(policy.images) != len(images):
            raise ValueError(
                f"{policy}: for {counted(len(policy.images), 'image')}, but there "
                f"{'is' if len(images) == 1 else 'are'} {len(images)}"
            )
        stages = layout_stages(policy, images)
        if not any(stage.evicted.total for stage in stages):
            return None
        return cls(
            ImageSpans.from_ranges(span for image in images for span in image.ranges),
            stages,
            str(policy),
            prompt_tokens,
            tuple(pictures),
            late=policy.when == "decode",
        )

    @property
    def cliff(self) -> int:
        """How many layers see every image whole."""
        return next(stage.layer for stage in self.stages if stage.evicted.total)

    def fingerprint(self, group_layers: int) -> str:
        """Says what blocks of a prompt hold in storage groups of so many layers: equal ones, the same slots."""
        # Pictures side by side are one range, and of each as many tokens stay.
        gone = [stage.evicted.ranges for stage in self.stages]
        told = repr(
            (self.salt, self.late, self.spans.ranges, gone, self.prompt_tokens, group_layers)
        )
        return sha256(told.encode()).hexdigest()[:16]

    def gone_by(self, num_tokens: int) -> bool:
        """Whether stages have effect on who sees the first ``num_tokens`` tokens, the last its own."""
        return not self.late or num_tokens > self.prompt_tokens

    @property
    def chooses(self) -> bool:
        """Whether the device chooses what stays."""
        return any(stage.choices for stage in self.stages)

    def stage_at(self, layer: int) -> int:
        """How many stages have begun by decoder layer ``layer`` (0-based): 0 before the first."""
        return bisect_right(self.breaks, layer)

    def evicted(self, layer: int) -> ImageSpans | None:
        """What is gone in a layer, None before the first stage; virtual where the device chose."""
        stage = self.stage_at(layer)
        return self.stages[stage - 1].evicted if stage else None

    def stages_in(self, first_layer: int, last_layer: int) -> tuple[LayoutStage, ...]:
        """The stages by which any of these consecutive layers stores tokens packed."""
        first = max(self.stage_at(first_layer) - 1, 0)
        return self.stages[first : self.stage_at(last_layer)]

    def evicts_at(self, layer: int) -> bool:
        """Whether a layer stores tokens packed: a stage has begun."""
        return layer >= self.breaks[0]

    def may_end_at(self, num_tokens: int) -> bool:
        """Whether who has the first ``num_tokens`` tokens can continue with the next one.

        A prefix that ends inside an image of which a device chooses is short of tokens that stay, and
        who continues it lacks the rows to choose from; once as many as stay are before its end, all of
        them are stored.
        """
        return not any(start < num_tokens < end for start, end in self._barred)

    def findable(self, num_tokens: int) -> int:
        """Of the first ``num_tokens`` tokens, as many from the start as others can find."""
        if self.late:  # what it answers is computed without the image, which nobody else's is
            return min(num_tokens, self.prompt_tokens)
        if self.digest or self.shareable is None:
            return num_tokens
        return min(num_tokens, self.shareable)

    def key(self, prefix: bytes, num_tokens: int) -> bytes:
        """What the packed blocks of a prefix are found by: its hash, and what follows if that matters."""
        if self.shareable is None or num_tokens <= self.shareable:
            return prefix
        return sha256(prefix + self.digest).digest()

    def last_end(self, num_tokens: int, block_size: int) -> int:
        """The longest prefix of whole blocks within ``num_tokens`` tokens that may end, in tokens."""
        end = self.findable(num_tokens) // block_size * block_size
        for start, stop in reversed(self._barred):
            if start < end < stop:
                end = start // block_size * block_size
        return end

    @property
    def last_step_tokens(self) -> int:
        """Tokens of the prompt that its last step has at least: a token alone may be computed by a captured
        step, in which nobody reads what attention a late eviction chooses by."""
        return 2 if self.read_layers else 1

    def shortened_chunk(self, num_computed: int, num_scheduled: int, ahead: int = 0) -> int:
        """Tokens of a chunk from ``num_computed`` on, cut where it would divide what belongs together.

        Or join what must be apart: a preempted request computes its prompt with the image, and what it
        had answered without. 0 where not even the first of them can be computed alone.

        Args:
            ahead: tokens behind a chunk whose embeddings a drafter reads: an image whose tokens belong together is
                not among them, unless another one ends right before it.
        """
        end = num_computed + num_scheduled
        if self.late and num_computed < self.prompt_tokens:
            end = min(end, self.prompt_tokens)
            if 0 < self.prompt_tokens - end < self.last_step_tokens:
                end = self.prompt_tokens - self.last_step_tokens
            return end - num_computed
        cut = self._undivided(num_computed, end)
        before = max(cut - ahead, num_computed)
        if cut < end and self._undivided(num_computed, before) == before:
            cut = before
        return cut - num_computed

    def _undivided(self, num_computed: int, end: int) -> int:
        """Where a chunk ends that would divide what belongs together if it ended at ``end``."""
        for start, stop in self.atomic:
            if num_computed <= start < end < stop:
                return start
        return end

    def leaves_out(self, num_computed: int, num_scheduled: int, wanted: int) -> bool:
        """Whether a chunk of ``wanted`` tokens would have computed something that belongs together, of which one of
        ``num_scheduled`` computes nothing."""
        return any(
            num_computed + num_scheduled <= start and stop <= num_computed + wanted
            for start, stop in self.atomic
        )

    def extended_chunk(self, num_computed: int, num_scheduled: int, at_most: int) -> int:
        """Tokens of a chunk that begins with what must be computed in one step, and would end inside it.

        Args:
            at_most: tokens that there is room for.
        """
        end = max(
            (
                stop
                for start, stop in self.atomic
                if start == num_computed < num_computed + num_scheduled < stop
            ),
            default=num_computed + num_scheduled,
        )
        return min(end - num_computed, at_most)

    def stored_tokens(self, num_tokens: int, first_layer: int) -> int:
        """Slots that the first ``num_tokens`` tokens need in a storage group.

        Args:
            num_tokens: tokens of the request, prompt and output, from the start.
            first_layer: shallowest layer of the storage group. One layer before a stage makes
                the whole group hold what the stage evicts, since its layers share one block table.
        """
        evicted = self.evicted(first_layer)
        if evicted is None or not self.gone_by(num_tokens):
            return num_tokens
        return num_tokens - evicted.count_before(num_tokens)

    def stored_positions(self, positions: IntArray, layer: int) -> IntArray:
        """Slot in ``layer`` of the first stored token at or after each position, same shape."""
        evicted = self.evicted(layer)
        return positions if evicted is None else positions - evicted.counts_before(positions)

    def block_positions(self, num_blocks: int, first_layer: int, block_size: int) -> IntArray:
        """Position of the first token that each of a request's first blocks serves, ascending.

        A prefix needs exactly the blocks whose position lies in it. A group in which a stage begins
        stores more tokens for its layers before it, which need a block the earlier.

        Args:
            first_layer: shallowest layer of the storage group.
        """
        slots = np.arange(num_blocks, dtype=np.int64) * block_size
        evicted = self.evicted(first_layer)
        return slots if evicted is None else evicted.kept_positions(slots)

    def evicted_tokens(self, num_tokens: int | None = None) -> tuple[tuple[int, int], ...]:
        """Per stage its first layer and how many image tokens are gone from there on.

        Args:
            num_tokens: as many are computed; None: any number past the prompt's.
        """
        totals = self.totals
        if num_tokens is not None and not self.gone_by(num_tokens):
            totals = (0,) * len(totals)
        return tuple(zip(self.breaks, totals, strict=True))


def of_prompt(layout: TokenLayout | None) -> TokenLayout | None:
    """By which the blocks of a prompt are filled and found; None where that is by position."""
    return None if layout is not None and layout.late else layout
