"""What a preset is: the stages of a published method, and how far they are that method."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from vllm_flow.policy import Keep, Stage

PUBLISHED_LAYERS = 32
"""Decoder layers of the models that the papers give their layers for (LLaVA-1.5-7B)."""
PUBLISHED_TOKENS = 576
"""Image tokens of the same models: counts become shares of an image."""


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    arxiv: str
    """Its number there."""
    where: str = ""
    """The section, or the version, that was followed."""
    code: str = ""
    """The released code that was read: OWNER/NAME on GitHub."""


@dataclass(frozen=True)
class Preset:
    """A published method by name."""

    name: str
    method: str
    """What its authors call it."""
    published: tuple[Stage, ...]
    """With layers of a decoder with 32."""
    same: tuple[str, ...]
    """What is as published, a sentence each."""
    different: tuple[str, ...]
    """What is not."""
    paper: Paper

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """The stages for a decoder of ``num_layers`` layers, none of them at its end or past it.

        A stage that ranks by the layer before is never moved to layer 0, where there is none.
        """
        found: dict[int, Stage] = {}
        for stage in self.published:
            layer = round(Fraction(stage.layer * num_layers, PUBLISHED_LAYERS))
            layer = max(layer, min(stage.layer, 1))
            found[layer] = Stage(layer, stage.keep, stage.rank)  # of two at one layer, the later
        return tuple(stage for stage in found.values() if stage.layer < num_layers)


def share(tokens: int) -> Keep:
    """So many tokens of :data:`PUBLISHED_TOKENS`, as a share that fits any image."""
    return Fraction(tokens, PUBLISHED_TOKENS)


POSITIONS = "Kept tokens keep their positions; the released code numbers them anew."
"""What most methods have different that drop tokens before the decoder."""
TOWER_LAYER = (
    "Attention is averaged over heads, in the layer of the tower whose output the decoder gets."
)
TILES = "LLaVA-NeXT's tiles are ranked together, as one picture; the released code ranks each by itself."
