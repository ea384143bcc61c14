"""A step's plan as the device has it: what the decoder hook, or vLLM's compiled pieces, go by.

Data alone; who makes it: :mod:`vllm_flow.engine.worker.metadata`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_flow.engine.worker.choosing.device_ranking import DeviceRanking, DeviceReading
from vllm_flow.handing_on import Part


@dataclass(frozen=True)
class DeviceLastKeys:
    """A plan's last keys on the device; see :class:`vllm_flow.last_layer.LastKeys` for D."""

    rows: torch.Tensor
    """[D] rows of the step."""
    gather: torch.Tensor
    """[D] rows of the variant before."""
    slots: torch.Tensor
    """[D] slots to write."""


@dataclass(frozen=True)
class DeviceVariant:
    """A plan's variant on the device; see :class:`vllm_flow.step.Variant` for R."""

    num_rows: int
    rows: torch.Tensor | None
    """[R] rows of the step that are alive; None where all are. With rankings, before they are made."""
    gather: torch.Tensor | None
    """[R] rows of the variant before; None where nothing is dropped. With rankings, likewise."""
    last: DeviceLastKeys | None = None
    """Rows of which this one layer only stores keys and values."""
    rankings: tuple[DeviceRanking, ...] = ()
    """Images whose part of ``gather`` is known only when the layer before has run."""


@dataclass(frozen=True)
class DeviceStep:
    """One forward pass with eviction."""

    variants: dict[int, DeviceVariant]
    """First layer -> variant."""
    attn_metadata: dict[str, Any] = field(default_factory=dict)
    """Attention layer name -> backend metadata, for layers past the first cliff."""
    slot_mapping: dict[str, torch.Tensor] = field(default_factory=dict)
    """Attention layer name -> [R] slots to write."""
    late: dict[int, list[DeviceReading]] = field(default_factory=dict)
    """Layer -> rows whose attention there decides what leaves after the prefill."""
    later: tuple[DeviceRanking, ...] = ()
    """Of later pipeline stages, for which the first one looks at embeddings."""
    told: tuple[Part, ...] = ()
    """What the pipeline stage before tells."""
    tells: tuple[Part, ...] = ()
    """What the one behind is told."""
    profiles: bool = False
    """A pass of nobody's rows, run eagerly to see what memory that takes."""

    @property
    def rankings(self) -> list[DeviceRanking]:
        """Of all variants."""
        return [ranking for variant in self.variants.values() for ranking in variant.rankings]

    def with_rows(self, rows_R: torch.Tensor) -> DeviceStep:
        """The step with the rows that are alive in its first variant, as an earlier pipeline stage has chosen them.

        Behind rankings of its own, ``rows`` are as much a guess as before.
        """
        alive, variants = rows_R, {}
        for number, (layer, variant) in enumerate(sorted(self.variants.items())):
            gather = variant.gather
            if number == 0:
                gather = rows_R
            elif gather is not None:
                alive = alive.index_select(0, gather)
            variants[layer] = replace(variant, rows=alive, gather=gather)
        return replace(self, variants=variants)

    @property
    def eager(self) -> bool:
        """Whether the layers' own code has to run: compiled code knows one number of rows, and no reader."""
        return (
            self.profiles
            or bool(self.late)
            or bool(self.later)
            or any(variant.gather is not None for variant in self.variants.values())
        )
