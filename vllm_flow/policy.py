"""A request's policy: stages, from each of which fewer tokens of an image are left.

A policy is a nested family of kept sets, one per decoder layer. Its simplest one is a single stage
that keeps nothing: the information-flow cliff ("From Redundancy to Relevance: Information Flow in
LVLMs Across Reasoning Tasks", section 3). Knows nothing of keys, prompts, torch or vLLM; how a
request writes a policy is `policy_keys`', which tokens a rank keeps is `ranks`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Literal, TypeAlias

Keep: TypeAlias = "int | Fraction"
"""Tokens of an image, or a share of them above 0 and below 1."""
WHOLE = 2**31 - 1
"""More tokens than an image has: all of them are kept. No Fraction, since 1 equals Fraction(1)."""
When: TypeAlias = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Stage:
    """From decoder layer ``layer`` (0-based) on, ``keep`` of an image's tokens are left.

    Raises:
        ValueError: tokens are kept and no rank says which, or the reverse; or a share that is none.
    """

    layer: int
    keep: Keep = 0
    rank: str | None = None
    """Name of the rank that chooses among the tokens left by then; None where none is kept."""

    def __post_init__(self) -> None:
        if (self.rank is None) != (self.keep == 0):
            raise ValueError(
                f"a stage needs a rank where it keeps tokens, and only there: {self!r}"
            )

    def kept(self, total: int) -> int:
        """Tokens kept of an image of ``total``; a share rounds down."""
        if isinstance(self.keep, int):
            return min(self.keep, total)
        return self.keep.numerator * total // self.keep.denominator

    def __str__(self) -> str:
        """As ``flow_stages`` writes it, such as ``0:284 diversity`` or ``20:0``."""
        amount = f"{self.layer}:{keep_text(self.keep)}"
        return amount if self.rank is None else f"{amount} {self.rank}"


@dataclass(frozen=True, slots=True)
class FlowPolicy:
    """Which image tokens leave a request, and at which decoder layers.

    Layers before an image's first stage see all of it. Text always stays, with its positions.
    """

    images: tuple[tuple[Stage, ...], ...]
    """Stages by ascending layer, image by image in the order of the prompt; those of one entry hold
    for every image."""
    seed: int = 0
    """Of ranks that draw."""
    when: When = "prefill"
    """"decode": the whole prompt is prefilled with the image, which leaves before the second token."""

    @classmethod
    def withdrawal(cls, cliff: int) -> FlowPolicy:
        """Every image token leaves at decoder layer ``cliff`` (0-based): so many layers see it."""
        return cls(((Stage(cliff),),))

    @property
    def shared(self) -> bool:
        """Whether the same stages hold for every image."""
        return len(self.images) == 1

    @property
    def only_withdraws(self) -> bool:
        """Whether no image is ever kept in part."""
        return all(stage.keep == 0 for stages in self.images for stage in stages)

    @property
    def ranks(self) -> frozenset[str]:
        """Names of the ranks it needs."""
        return frozenset(s.rank for stages in self.images for s in stages if s.rank is not None)

    def stages_of(self, image: int) -> tuple[Stage, ...]:
        """The stages of the image with this index in the prompt."""
        return self.images[0] if self.shared else self.images[image]

    def within(self, num_layers: int) -> FlowPolicy:
        """The same without stages that a decoder of ``num_layers`` layers never reaches."""
        images = tuple(
            tuple(stage for stage in stages if stage.layer < num_layers) for stages in self.images
        )
        return self if images == self.images else replace(self, images=images)

    def kept(self, layer: int, image: int, total: int) -> int:
        """Tokens that decoder layer ``layer`` sees of an image of ``total`` tokens."""
        left = total
        for stage in self.stages_of(image):
            if stage.layer <= layer:
                left = min(left, stage.kept(total))
        return left

    def __str__(self) -> str:
        """One line that says all of it; two policies that differ have different ones."""
        every = " | ".join(stages_text(stages) for stages in self.images)
        text = every if self.shared else f"[{every}]"
        seed = f" seed={self.seed}" if self.seed else ""
        return f"{text}{seed}{'' if self.when == 'prefill' else ' when=' + self.when}"


def keep_text(keep: Keep) -> str:
    """Tokens or share as a request writes them: ``284``, ``12.5%``, ``71/144``."""
    if isinstance(keep, int):
        return "100%" if keep == WHOLE else str(keep)
    percent = keep * 100
    # Exact in decimal only where the denominator divides a power of ten; four digits are enough.
    if 10**4 % percent.denominator == 0:
        return f"{(Decimal(percent.numerator) / Decimal(percent.denominator)).normalize():f}%"
    return f"{keep.numerator}/{keep.denominator}"


def stages_text(stages: Sequence[Stage]) -> str:
    """Stages as ``flow_stages`` writes them, such as ``0:284 diversity, 20:0``."""
    return ", ".join(map(str, stages))


def first_layer_beyond(
    policy: FlowPolicy, bound: FlowPolicy, image_tokens: Sequence[int]
) -> int | None:
    """The first layer in which a policy evicts more of an image than a bound allows.

    Args:
        policy: what a request asks for.
        bound: the most that may be evicted, as a policy.
        image_tokens: tokens of each image, in the order of the prompt.

    Returns:
        The layer (0-based); None where the policy stays within the bound.
    """
    found = [
        stage.layer
        for image, total in enumerate(image_tokens)
        for stage in policy.stages_of(image)
        if policy.kept(stage.layer, image, total) < bound.kept(stage.layer, image, total)
    ]
    return min(found, default=None)
