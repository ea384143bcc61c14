"""What a model adds between its layers, of the rows that are alive by then. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class Alive(Mapping[str, torch.Tensor]):
    """Stands in for a mapping of a step's tensors [T, H]: a look-up gives the rows alive by then.

    A proxy, since the tensors are views of a buffer that vLLM keeps from step to step.
    """

    def __init__(self, tensors: Any, alive: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._tensors, self._alive = tensors, alive

    @property
    def tensors(self) -> Alive:
        """As vLLM's ``IntermediateTensors`` has it."""
        return self

    def __contains__(self, name: object) -> bool:
        return name in self._tensors.tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._alive(self._tensors[name])

    def __iter__(self) -> Any:
        return iter(self._tensors.tensors)

    def __len__(self) -> int:
        return len(self._tensors)
