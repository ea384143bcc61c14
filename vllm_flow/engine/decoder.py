"""The decoder hook: rows leave the hidden states at the cliff and come back after the final norm.

Seam: ``forward`` of each decoder layer and of the final norm, wrapped on the loaded model's
instances. Knows steps, not policies, runners or schedulers. With no step armed it adds one
attribute look-up per layer and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from vllm_flow.engine.families import Decoder


@dataclass(frozen=True)
class DeviceVariant:
    """A plan's variant on the device; see :class:`vllm_flow.plan.Variant` for R."""

    num_rows: int
    rows: torch.Tensor | None
    """[R] rows of the step that are alive; None where all are."""
    gather: torch.Tensor | None
    """[R] rows of the variant before; None where nothing is dropped."""


@dataclass(frozen=True)
class FlowStep:
    """One forward pass with eviction."""

    variants: dict[int, DeviceVariant]
    """First layer -> variant."""
    attn_metadata: dict[str, Any] = field(default_factory=dict)
    """Attention layer name -> backend metadata, for layers past the first cliff."""
    slot_mapping: dict[str, torch.Tensor] = field(default_factory=dict)
    """Attention layer name -> [R] slots to write."""


class DecoderHook:
    """Runs one decoder's layers on the rows that are alive.

    Legend: T rows of the step (with padding), R rows alive, H hidden size.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._step: FlowStep | None = None
        self._num_rows = 0
        self._variant: DeviceVariant | None = None
        self._positions: torch.Tensor | None = None
        self._wrapped: list[nn.Module] = []
        for index, layer in enumerate(decoder.layers):
            self._wrap(layer, partial(self._layer, index))
        self._wrap(decoder.norm, self._norm)

    def arm(self, step: FlowStep | None) -> None:
        """Set what the next forward pass does; None for a stock pass. Forgotten after the pass."""
        self._step, self._variant, self._positions = step, None, None

    def remove(self) -> None:
        """Give every module its own ``forward`` back."""
        for module in self._wrapped:
            del module.forward
        self._wrapped.clear()

    def _wrap(self, module: nn.Module, replacement: Callable[..., Any]) -> None:
        # An instance attribute hides the class's forward and leaves other instances alone.
        module.forward = partial(replacement, module.forward)  # type: ignore[method-assign]
        self._wrapped.append(module)

    def _layer(
        self,
        index: int,
        forward: Callable[..., Any],
        positions: torch.Tensor,
        hidden_TH: torch.Tensor,
        residual_TH: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = self._step
        if step is None:
            return forward(positions, hidden_TH, residual_TH, **kwargs)
        if index == 0:
            self._begin(step, hidden_TH.shape[0])
        hidden_RH, residual_RH = hidden_TH, residual_TH
        variant = step.variants.get(index)
        if variant is not None:
            self._variant = variant
            if variant.gather is not None:
                hidden_RH = hidden_RH.index_select(0, variant.gather)
                if residual_RH is not None:
                    residual_RH = residual_RH.index_select(0, variant.gather)
                # The model passes every layer the whole step's positions: [T], M-RoPE [3, T].
                self._positions = positions.index_select(-1, variant.rows)
        if self._variant is not None and self._variant.num_rows == 0:
            # A step of image tokens only: nothing is alive, and kernels dislike empty launches.
            return hidden_RH, hidden_RH if residual_RH is None else residual_RH
        if self._positions is not None:
            positions = self._positions
        return forward(positions, hidden_RH, residual_RH, **kwargs)

    def _norm(
        self,
        forward: Callable[..., Any],
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None = None,
    ) -> Any:
        variant, num_rows = self._variant, self._num_rows
        self.arm(None)
        if variant is None or variant.rows is None:
            return forward(hidden_RH, residual_RH)
        # The sampler indexes the step's rows; those of evicted tokens are never sampled.
        hidden_TH = hidden_RH.new_zeros(num_rows, hidden_RH.shape[-1])
        if variant.num_rows:
            normed = forward(hidden_RH, residual_RH)
            hidden_RH = normed[0] if isinstance(normed, tuple) else normed
            hidden_TH[variant.rows] = hidden_RH
        return hidden_TH if residual_RH is None else (hidden_TH, residual_RH)

    def _begin(self, step: FlowStep, num_rows: int) -> None:
        self._num_rows = num_rows
        context = get_forward_context()
        context.attn_metadata.update(step.attn_metadata)
        context.slot_mapping.update(step.slot_mapping)
