"""Experts that engines share: how many rows each layer of them is given in every engine.

With data parallelism of a model with experts, vLLM's engines run their steps side by side, and each layer of experts
gathers the rows of all of them, by numbers that were agreed on before the step. Where rows leave between layers, each
layer has numbers of its own. They are agreed on here, once for each call of the model.

Seams: ``dp_metadata`` of vLLM's forward context, whose ``sp_local_sizes`` every layer of experts enters once and in
order (``fused_moe/runner/moe_runner.py``), compiled or not; ``get_dp_group``.

Legend: E engines, X layers of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_dp_group
from vllm.forward_context import DPMetadata, get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.v1.worker.dp_utils import should_skip_dp_coordination

from vllm_flow.engine.worker.device_step import DeviceStep


def rows_by_layer(
    variant_rows: Mapping[int, int], step_rows: int, layers: Sequence[int]
) -> list[int]:
    """Rows that go through each of some layers.

    Args:
        variant_rows: first layer -> rows from there on.
        step_rows: before any row has left.
        layers: ascending.

    Returns:
        At least 1 each: a layer waits for every engine, so one without rows runs it on a row that is nobody's.
    """
    found = []
    for layer in layers:
        begun = [first for first in variant_rows if first <= layer]
        found.append(max(1, variant_rows[max(begun)] if begun else step_rows))
    return found


class LayerRows(DPMetadata):
    """vLLM's numbers of rows, with a layer's own for each layer of experts.

    Args:
        rows_EX: of every engine, for each layer in the order of their calls.
    """

    def __init__(self, rows_EX: torch.Tensor) -> None:
        super().__init__(rows_EX[:, 0])
        self._left = iter(rows_EX.unbind(1))

    @contextmanager
    def sp_local_sizes(self, *args: Any, **kwargs: Any) -> Iterator[list[int]]:
        self.num_tokens_across_dp_cpu = next(self._left)
        with super().sp_local_sizes(*args, **kwargs) as sizes:
            yield sizes


class SharedExperts:
    """Agrees on numbers of rows with the other engines.

    Args:
        layers: the decoder's.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = [
            index
            for index, layer in enumerate(layers)
            for module in layer.modules()
            if isinstance(module, MoERunner)
        ]

    def agree(self, step: DeviceStep | None) -> None:
        """Put every layer's numbers into the forward context, if rows leave in any engine.

        All engines call this for the same calls of the model. In steps that are captured or replayed as graphs no row
        leaves in any of them: an engine that may lose rows asks for a step without
        (:meth:`.WorkerState.without_graph`).
        """
        context = get_forward_context()
        told = context.dp_metadata
        if told is None or not self._layers or should_skip_dp_coordination():
            return
        if context.cudagraph_runtime_mode != CUDAGraphMode.NONE:
            return
        group, step_rows_E = get_dp_group(), told.num_tokens_across_dp_cpu
        own = group.rank_in_group
        step_rows, variants = int(step_rows_E[own]), {} if step is None else step.variants
        left = {
            first: step_rows if variant.rows is None else variant.num_rows
            for first, variant in variants.items()
        }
        rows_EX = torch.zeros(group.world_size, len(self._layers), dtype=torch.int32)
        rows_X = rows_by_layer(left, step_rows, self._layers)
        rows_EX[own] = torch.tensor(rows_X, dtype=torch.int32)
        dist.all_reduce(rows_EX, group=group.cpu_group)
        if bool((rows_EX != step_rows_E[:, None]).any()):
            context.dp_metadata = LayerRows(rows_EX)


@contextmanager
def nobodys_row() -> Iterator[None]:
    """While a layer runs on a row of no request: attention reads and writes nothing."""
    context = get_forward_context()
    kept = context.attn_metadata, context.slot_mapping
    context.attn_metadata, context.slot_mapping = None, {}
    try:
        yield
    finally:
        context.attn_metadata, context.slot_mapping = kept
