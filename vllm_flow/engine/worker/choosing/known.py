"""What a worker knows of a step's choices before its layers run: it has looked itself, or an earlier stage has told it.

Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vllm_flow.engine.worker.choosing import telling
from vllm_flow.engine.worker.choosing.late_scores import LateScores
from vllm_flow.handing_on import Key, Part, What

if TYPE_CHECKING:
    from vllm.sequence import IntermediateTensors


@dataclass
class Known:
    """One step's, but for what prompts' last rows gave their tokens, which requests keep until their prompt is over.

    Attributes:
        orders: :attr:`vllm_flow.step.Ranking.key` -> tokens of a picture, best first.
        weights: the same -> [Q] how much each row of the question counts.
    """

    late_scores: LateScores
    orders: dict[Key, torch.Tensor] = field(default_factory=dict)
    weights: dict[Key, torch.Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what is the step's."""
        self.orders.clear()
        self.weights.clear()

    def take(
        self, parts: Sequence[Part], received: IntermediateTensors | None
    ) -> torch.Tensor | None:
        """Go on with what an earlier pipeline stage saw and chose.

        Returns:
            [R] rows of the step that are alive in the first layer; None where the host knows them.
        """
        rows_R = None
        for part, found in telling.taken_apart(received, parts):
            match part.what:
                case What.ROWS:
                    rows_R = found
                case What.ORDER:
                    self.orders[part.key] = found
                case What.WEIGHTS:
                    self.weights[part.key] = found
                case What.MASS:
                    # A copy: nothing else is kept of the step's tensor.
                    self.late_scores.note(*part.key, found.clone())
        return rows_R

    def tell(self, parts: Sequence[Part], rows_R: torch.Tensor | None) -> torch.Tensor:
        """What a later pipeline stage takes.

        Args:
            rows_R: [R] rows of the step that are alive in its first layer; None where all are.
        """
        return telling.put_together(self._part(part, rows_R) for part in parts)

    def _part(self, part: Part, rows_R: torch.Tensor | None) -> torch.Tensor:
        match part.what:
            case What.ORDER:
                # More may be remembered of the picture.
                return self.orders[part.key][: part.length]
            case What.WEIGHTS:
                return self.weights[part.key]
            case What.MASS:
                return self.late_scores.noted(*part.key)
        assert rows_R is not None, "of rows that were chosen some have left"
        return rows_R
