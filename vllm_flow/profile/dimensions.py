"""What a decoder, a vision tower and a request measure: all that the ideals count by. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TowerShape:
    """A vision transformer and the two-layer projector behind it, per image."""

    layers: int
    hidden: int
    mlp: int
    patches: int
    """Patch rows of one pass."""
    patch_values: int
    """Values of one patch: 3 x side x side, for each frame that is folded into it."""
    passes: int = 1
    """Of one image: its tiles, each of which attends to itself only."""
    class_rows: int = 1
    """Rows that a pass has beside its patches."""
    merged: int = 1
    """Patches that the projector makes one token of."""
    projector: int | None = None
    """Values between the projector's two layers; None: as many as the decoder is wide."""
    gated: bool = False
    """Whether the MLP has a gate, and so three matrices instead of two."""
    window: int | None = None
    """Patches that a patch attends to in layers with windows; None: no layer has them."""
    whole_layers: int = 0
    """Where there are windows, the layers that attend to all of a pass."""

    def __post_init__(self) -> None:
        if self.patches % self.merged:
            raise ValueError(f"{self.patches} patches cannot be merged by {self.merged}.")

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        return self.passes * self.patches // self.merged


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP, and what feeds it pictures."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tower: TowerShape | None = None
    value_bytes: int = 2
    """Bytes of a weight and of a stored key or value: 2 for bfloat16, 4 for float32."""

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer's projections and MLP."""
        queries = 2 * self.hidden * self.heads * self.head_dim  # q and o
        return queries + self.key_parameters + 3 * self.hidden * self.mlp

    @property
    def key_parameters(self) -> int:
        """Of these, the weights of the key and value projections."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def key_share(self) -> float:
        """What a row costs of which a layer needs keys and values alone, as a part of the layer."""
        return self.key_parameters / self.layer_parameters

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocab

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.value_bytes


class Layered(Protocol):
    """A decoder of which only the depth counts."""

    @property
    def layers(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Workload:
    """One request."""

    text_tokens: int
    image_tokens: int
    output_tokens: int
    images: int = 1

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.image_tokens

    @property
    def computed_tokens(self) -> int:
        """Tokens with keys and values at the end: all but the last output token."""
        return self.prompt_tokens + self.output_tokens - 1

    def context(self, tokens_out: int) -> int:
        """Tokens that the step computing output token ``tokens_out`` (0-based, >= 1) reads."""
        return self.prompt_tokens + tokens_out
