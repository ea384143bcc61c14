"""The attention hook: masses of the rows that predict answer tokens, taken while the layers run.

Seams: ``forward`` of each decoder layer's ``Attention``, wrapped on the instance, whose query has
its positions applied and whose keys are in the cache when it returns; and ``ModelRunnerOutput``,
which carries the result to the scheduler. Exists only where the operator configured an attention
log. Knows neither runner, and does not know which tokens are taken in the end: the scheduler does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_flow.attention import AnswerRow, LoggedRequest, TokenAttention, answer_rows
from vllm_flow.engine.wire import ATTENTION_FIELD
from vllm_flow.engine.worker.attention import span_lse_triton, span_lse_xformers
from vllm_flow.engine.worker.attention.keys import KeyReader, key_reader, span_lse, span_mass
from vllm_flow.engine.worker.attention.span_lse_triton import Kernel, SpanLse
from vllm_flow.engine.worker.caches import cached_layers
from vllm_flow.engine.worker.latent import cache_of, is_latent, queries_of
from vllm_flow.engine.worker.sending import sent
from vllm_flow.step import StepPlan, StepShares, Variant

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

SLOTS_AT_ONCE = 1 << 16
"""Slots whose keys are gathered in one go, which bounds the copy that a batch of long rows makes."""


@dataclass(frozen=True)
class _Reads:
    """Some of a step's answer rows in layers that share a block table and the rows alive.

    Q rows; M, S as in :mod:`vllm_flow.engine.worker.attention.keys`; S is that of the row with the most spans.
    """

    rows: tuple[int, ...]
    """Which of the step's answer rows."""
    queries: torch.Tensor
    """[Q] their rows in the layers' hidden states."""
    blocks: torch.Tensor
    """[Q, M] their blocks."""
    bounds: torch.Tensor
    """[Q, S + 1] where their spans begin and end."""


class AttentionTap:
    """Collects one step's attention masses at a time.

    Args:
        kv_cache_config: names the layers of each group, whose caches are allocated.
        layers: attention layer name -> vLLM's ``Attention``.
        kernel: the operator's choice; see :func:`vllm_flow.engine.worker.attention.span_lse_triton.lse_function`, and
            for "xformers" :func:`vllm_flow.engine.worker.attention.span_lse_xformers.lse_function`.

    Raises:
        ValueError: a layer's keys cannot be read; see :func:`vllm_flow.engine.worker.attention.keys.key_reader`. Or
            the kernel cannot read them.
    """

    def __init__(
        self, kv_cache_config: KVCacheConfig, layers: Mapping[str, Any], kernel: Kernel = "auto"
    ) -> None:
        self.requests: dict[str, LoggedRequest] = {}
        self._groups: dict[int, int] = {}
        self._block_size: dict[int, int] = {}
        self._rows: list[tuple[str, AnswerRow]] = []
        self._reads: dict[int, list[_Reads]] = {}
        self._masses: list[tuple[_Reads, torch.Tensor]] = []

        def ways(attention: Any) -> tuple[KeyReader, SpanLse]:
            read = key_reader(attention)
            if kernel == "xformers":
                return read, span_lse_xformers.lse_function(attention, read)
            if kernel == "auto" and is_latent(attention):
                return read, span_lse
            lse_of = span_lse_triton.lse_function(kernel, attention.kv_cache.device, read)
            if lse_of is span_lse_triton.span_lse_triton:
                span_lse_triton.compile_for(attention, read)
            return read, lse_of

        for layer in cached_layers(kv_cache_config, layers, ways):
            attention = layer.attention
            self._groups[layer.index] = layer.group
            # Of the kernel's blocks, which the block tables count in, too.
            self._block_size[layer.index] = cache_of(attention).shape[2]
            # An instance attribute hides the class's forward and leaves other instances alone.
            attention.forward = partial(
                self._forward, layer.index, attention, *layer.found, attention.forward
            )

    def add(self, request_id: str, request: LoggedRequest | None) -> None:
        """Log a request until :meth:`remove`; nothing for one that does not ask for it."""
        if request is not None:
            self.requests[request_id] = request

    def remove(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def arm(
        self,
        plan: StepPlan | None,
        shares: StepShares,
        block_tables: Sequence[torch.Tensor],
    ) -> None:
        """Set what the next forward pass collects.

        Args:
            plan: the step's plan, None where nothing is evicted.
            block_tables: per KV-cache group, [requests, blocks] block ids on the device.
        """
        requests = [self.requests.get(request_id) for request_id in shares.request_ids]
        rows = answer_rows(requests, shares.num_computed, shares.num_scheduled)
        self._rows = [(shares.request_ids[row.index], row) for row in rows]
        self._reads, self._masses = {}, []
        built: dict[Any, list[_Reads]] = {}
        for layer, group in self._groups.items():
            chosen = tuple(i for i, row in enumerate(rows) if layer in row.request.log.layers)
            if not chosen:
                continue
            variant = None if plan is None else plan.variant_at(layer)
            alike = (group, None if variant is None else variant.first_layer, chosen)
            if alike not in built:
                built[alike] = self._build(rows, chosen, layer, variant, block_tables[group])
            self._reads[layer] = built[alike]

    def attach(self, output: Any) -> Any:
        """Hand what was collected over with the step's output, when that is complete."""
        rows, masses = self._rows, self._masses
        self._rows, self._reads, self._masses = [], {}, []
        if not masses or output is None:
            return output
        fetch = _fetching(torch.cat([mass.flatten() for _, mass in masses]))
        reads = [read for read, _ in masses]

        def complete(finished: Any) -> Any:
            setattr(finished, ATTENTION_FIELD, _tokens(rows, reads, fetch()))
            return finished

        if isinstance(output, AsyncModelRunnerOutput):
            finish = output.get_output
            output.get_output = lambda: complete(finish())  # type: ignore[method-assign]
            return output
        return complete(output)

    def _forward(
        self,
        layer: int,
        attention: Any,
        read: KeyReader,
        lse_of: SpanLse,
        forward: Callable[..., torch.Tensor],
        query: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        output = forward(query, *args, **kwargs)
        for reads in self._reads.get(layer, ()):
            lse = lse_of(
                queries_of(attention, query.index_select(0, reads.queries)),
                cache_of(attention),
                read,
                reads.blocks,
                reads.bounds,
                attention.impl.scale,
            )
            self._masses.append((reads, span_mass(lse)))
        return output

    def _build(
        self,
        rows: Sequence[AnswerRow],
        chosen: Sequence[int],
        layer: int,
        variant: Variant | None,
        block_table: torch.Tensor,
    ) -> list[_Reads]:
        bounds = [rows[i].request.bounds(rows[i].num_tokens, layer) for i in chosen]
        block_size = self._block_size[layer]
        longest = max(int(bound[-1]) for bound in bounds)
        at_once = max(1, SLOTS_AT_ONCE // longest)
        return [
            _reads(
                [rows[i] for i in chosen[part]],
                tuple(chosen[part]),
                bounds[part],
                block_size,
                variant,
                block_table,
            )
            for part in (slice(at, at + at_once) for at in range(0, len(chosen), at_once))
        ]


def _reads(
    rows: Sequence[AnswerRow],
    chosen: tuple[int, ...],
    bounds: Sequence[np.ndarray],
    block_size: int,
    variant: Variant | None,
    block_table: torch.Tensor,
) -> _Reads:
    """Put some rows' integers on the device, in a single copy."""
    queries = np.array([row.row for row in rows])
    if variant is not None and variant.rows is not None:
        queries = np.searchsorted(variant.rows, queries)  # their rank among the rows alive
    num_spans = max(map(len, bounds))
    table = np.stack([np.pad(b, (0, num_spans - len(b)), mode="edge") for b in bounds])
    needed = -(-table[:, -1] // block_size)
    parts = (queries, np.array([row.index for row in rows]), needed, table.ravel())
    host = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    on_device = sent(host, block_table.device)
    at, owner, needed_Q, table_QS1 = on_device.split([len(part) for part in parts])
    columns = torch.arange(int(needed.max()), device=block_table.device)
    blocks = block_table.index_select(0, owner)[:, : len(columns)].long()
    return _Reads(
        rows=chosen,
        queries=at,
        # Past a row's own blocks a block table holds what was there before.
        blocks=blocks.where(columns < needed_Q[:, None], 0),
        bounds=table_QS1.view(len(rows), num_spans),
    )


def _fetching(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start the copy to the host; the result waits for it."""
    host = tensor.to("cpu", non_blocking=True)
    if tensor.device.type == "cpu":
        return host.numpy
    event = torch.cuda.Event(blocking=True)
    event.record()

    def fetch() -> np.ndarray:
        event.synchronize()
        return host.numpy()

    return fetch


def _tokens(
    rows: Sequence[tuple[str, AnswerRow]], reads: Sequence[_Reads], flat: np.ndarray
) -> dict[str, TokenAttention]:
    """Request id -> its token, from the step's masses one after the other, shallowest layer first."""
    masses: list[list[np.ndarray]] = [[] for _ in rows]
    start = 0
    for read in reads:
        shape = (len(read.rows), read.bounds.shape[1] - 1)
        table = flat[start : start + shape[0] * shape[1]].reshape(shape)
        start += table.size
        for i, mass in zip(read.rows, table, strict=True):
            masses[i].append(mass[: len(rows[i][1].request.spans.starts)])
    return {
        request_id: TokenAttention.of(row, np.stack(found))
        for (request_id, row), found in zip(rows, masses, strict=True)
    }
