"""What the decoder hook needs to know of a loaded model, whatever its family.

Data only; knows no family and imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import nn

Call: TypeAlias = Literal[
    "residual", "named", "scaled", "masked", "plain", "tensor", "alone", "batched"
]
"""How a model calls its layers and its final norm (T rows of a step, H wide):

- ``residual``: ``layer(positions, hidden [T, H], residual) -> (hidden, residual)``, ``norm(hidden, residual)``
- ``named``: as ``residual``, each argument by its name, in whatever order the layer has them, and what is no row's
- ``scaled``: ``layer(positions, hidden [T, H], residual, scaling [T, 1, 1] or None) -> (hidden, residual)``,
  ``norm(hidden, residual)``, and rows that are not as many as positions are taken to lie on other workers
- ``masked``: as ``residual``, with a fourth argument for layers, a mask of the step's rows [T, 1] or None
- ``plain``: ``layer(positions, hidden [T, H]) -> hidden``, ``norm(hidden)``
- ``tensor``: ``layer(hidden_states=[T, H], position_ids=[T]) -> hidden``, ``norm(hidden)``
- ``alone``: ``layer(hidden [T, H]) -> hidden``, ``norm(hidden)``: positions are in what comes in
- ``batched``: ``layer(hidden [1, T, H], position_ids=, position_embeddings=) -> hidden``, ``norm(hidden)``,
  the layers of transformers
"""


@dataclass(frozen=True)
class Decoder:
    """The parts of a language model that the hook wraps, shallowest layer first."""

    model: nn.Module
    """The module that runs the layers."""
    layers: Sequence[nn.Module]
    norm: nn.Module | None
    """None where it runs with the logits, behind the module: rows come back as that returns."""
    call: Call = "residual"
    injected: str | None = None
    """Keyword argument of ``model`` that maps names to tensors [T, H], which it adds between layers."""
    first_layer: int = 0
    """Number of the first of ``layers``: above 0 where earlier stages of a pipeline have others."""
    hands_on: bool = False
    """Whether a later stage has the layers behind these: the module then returns what lies between two layers."""

    @property
    def own(self) -> range:
        """Numbers of ``layers``."""
        return range(self.first_layer, self.first_layer + len(self.layers))
