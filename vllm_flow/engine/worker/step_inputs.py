"""What a runner knows of a step beside who takes part in it: tables, padding, and what became of drafts.

Data alone; who builds a step of it: :mod:`vllm_flow.engine.worker.metadata`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_flow.engine.worker.sending import sent

if TYPE_CHECKING:
    from vllm_flow.engine.worker.variant_tensors import VariantTensors


class DraftCounts(NamedTuple):
    """What layers with states must know of each request's drafts: in a step with some the state of each is kept, and
    the next step goes on from that of the last one that was accepted. N requests of the batch.
    """

    accepted: torch.Tensor
    """[N] on the device, tokens that the step before gave each, the first of them no draft."""
    drafts: torch.Tensor
    """[N] on the host, drafts of each that the step checks; -1 for a chunk of its prompt."""

    def builder_arguments(self, tensors: VariantTensors) -> dict[str, torch.Tensor]:
        """What the builder of a variant's metadata is given of them, [Q] each."""
        requests = tensors.requests
        on_host = torch.from_numpy(tensors.variant.requests)
        return {
            "num_accepted_tokens": self.accepted.index_select(0, requests),
            "num_decode_draft_tokens_cpu": self.drafts.index_select(0, on_host),
        }


class Lengths(NamedTuple):
    """How long requests are, where drafts are checked while the host plans the next step. N requests of the batch."""

    told: torch.Tensor
    """[N] on the host, which takes every draft to have been accepted."""
    known: torch.Tensor
    """[N] on the device."""

    def rejected_tokens(self) -> torch.Tensor:
        """[N] on the device, drafts of each that were rejected since the host was told."""
        found: torch.Tensor = sent(self.told, self.known.device) - self.known
        return found


class StepInputs(NamedTuple):
    """What is known of a step beside its plan."""

    block_tables: Sequence[torch.Tensor]
    """Per KV-cache group, [requests, blocks] block ids on the device."""
    padded_rows: int = 0
    """Rows that the model is called with, where vLLM pads the step for a CUDA graph."""
    lengths: Lengths | None = None
    """None where the host knows them. Where it does not, requests have their prompt behind them."""
    draft_counts: DraftCounts | None = None
    """What layers with states know of drafts, in an engine that drafts."""
