"""What prompts' last rows gave their tokens, kept until their images leave after the prefill; and what stays then.

Which layers are read, a plan says (:func:`vllm_flow.rewriting.late_readings`); who reads is `ranking`, who copies what
stays is `moving`. Nothing waits for the device.

Legend: P tokens of a prompt, M rows of an image's extent that are left, R rows alive.
"""

from __future__ import annotations

import torch

from vllm_flow.engine.worker.choosing.choice_places import ChoicePlaces
from vllm_flow.engine.worker.choosing.device_ranking import DeviceRanking
from vllm_flow.engine.worker.sending import sent
from vllm_flow.step import StepPlan


class LateScores:
    """One worker's, by request.

    Args:
        places: of tokens among the text of an extent.
    """

    def __init__(self, places: ChoicePlaces) -> None:
        self._places = places
        self._masses: dict[str, dict[int, torch.Tensor]] = {}
        """Request -> layer -> [P] what the last row of its prompt gave each of its tokens there."""

    def note(self, request_id: str, layer: int, mass_P: torch.Tensor) -> None:
        """Keep what a layer's attention gave a prompt's tokens."""
        self._masses.setdefault(request_id, {})[layer] = mass_P

    def noted(self, request_id: str, layer: int) -> torch.Tensor:
        """[P] what :meth:`note` keeps."""
        return self._masses[request_id][layer]

    def remove(self, request_id: str) -> None:
        """Drop what is kept of a request."""
        self._masses.pop(request_id, None)

    def kept_positions(
        self, request_id: str, plan: StepPlan, device: torch.device, end: int
    ) -> dict[int, torch.Tensor]:
        """First layer of a stage -> positions that stay of the prompt, of which nothing is kept any more.

        Args:
            plan: :func:`vllm_flow.rewriting.choosing_plan` of the request.
            end: the layer past the last that is asked about; what later ones gave, a pipeline's worker is not told.
        """
        masses = self._masses.pop(request_id, {})
        rows: torch.Tensor | None = None
        found = {}
        for variant in plan.variants:
            if variant.first_layer >= end:
                break
            if variant.gather is not None:
                gather_R = sent(torch.from_numpy(variant.gather), device)
                for ranking in variant.rankings:
                    one = DeviceRanking(ranking, gather_R)
                    offsets_M = one.offsets(rows, device)
                    if ranking.choice.picks is not None:
                        scores_M = self._places.picked(ranking.choice, offsets_M)
                    else:
                        mass_P, mine = masses[variant.first_layer - 1], one.image_rows
                        scores_M = mass_P[mine] if rows is None else mass_P[rows[mine]]
                    self._places.keep_best(ranking, scores_M, offsets_M, gather_R)
                rows = gather_R if rows is None else rows.index_select(0, gather_R)
            found[variant.first_layer] = (
                torch.arange(plan.num_rows, device=device) if rows is None else rows
            )
        return found
