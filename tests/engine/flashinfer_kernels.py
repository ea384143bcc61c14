"""FlashInfer's functions and wrappers in torch, for `flashinfer_standin`.

A wrapper keeps what the real one keeps (FlashInfer 0.7, read at the source): a plan lives in the wrapper until the next
one, arrays that come from the host are copied, and the array of pages is taken as it is, in the builder's memory. So
whoever runs a wrapper after another plan gets that plan's attention. TRT-LLM's functions have no plan, but arrays that
must be of the same requests. What a kernel would make of arrays that do not fit together nobody knows: here it is NaN.

Rounding, schedules and the speed of the kernels are beyond it.

Legend: T query tokens, H heads, K key heads, D head size, B pages, N slots of a page.
"""

from __future__ import annotations

from typing import Any

import torch


def attend(
    query_THD: torch.Tensor,
    key_SKD: torch.Tensor,
    value_SKD: torch.Tensor,
    scale: float,
    window_left: int = -1,
    causal: bool = True,
    soft_cap: float = 0.0,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, D] attention of one request's last tokens over all S that it has stored."""
    rows, stored = len(query_THD), len(key_SKD)
    shared = query_THD.shape[1] // key_SKD.shape[1]
    key_SHD, value_SHD = (x.repeat_interleave(shared, 1) for x in (key_SKD, value_SKD))
    scores_HTS = torch.einsum("thd,shd->hts", query_THD, key_SHD) * scale
    if soft_cap:
        scores_HTS = soft_cap * torch.tanh(scores_HTS / soft_cap)
    at_T, at_S = torch.arange(stored - rows, stored)[:, None], torch.arange(stored)
    hidden_TS = torch.zeros(rows, stored, dtype=torch.bool)
    if causal:
        hidden_TS |= at_S > at_T
    if window_left >= 0:
        hidden_TS |= at_S < at_T - window_left
    scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
    if sinks_H is not None:
        beside = sinks_H[:, None, None].expand(-1, rows, 1)
        scores_HTS = torch.cat((scores_HTS, beside), -1)
    weights_HTS = scores_HTS.softmax(-1)[..., :stored]
    return torch.einsum("hts,shd->thd", weights_HTS, value_SHD)


def paged(cache: torch.Tensor, pages: torch.Tensor, stored: int, layout: str) -> torch.Tensor:
    """[S, K, D] what a request has stored, from its pages in order."""
    found = cache[pages.long()]  # [pages, N, K, D], or with heads before slots
    found_NKD = found if layout == "NHD" else found.transpose(1, 2)
    return found_NKD.flatten(0, 1)[:stored]


def get_seq_lens(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    return torch.clamp(indptr[1:] - indptr[:-1] - 1, min=0) * page_size + last_page_len


class _Wrapper:
    """What both wrappers keep of a plan."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", **_kernels: Any
    ) -> None:
        self._float_workspace_buffer, self._kv_layout = float_workspace_buffer, kv_layout
        self._int_workspace_buffer = torch.zeros(1 << 16, dtype=torch.int32)
        """Where the real ones keep a plan, too: it does not move, and graphs read it."""

    def _keep(
        self,
        query_starts: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        page_size: int,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        causal: bool,
    ) -> None:
        self._requests = len(last_page_len)
        lengths = get_seq_lens(indptr, last_page_len, page_size)
        plan = torch.cat((query_starts, indptr, lengths)).int()
        self._int_workspace_buffer[: len(plan)] = plan
        self._indices = indices  # no copy
        self._sm_scale, self._window_left, self._causal = sm_scale, window_left, causal
        self._logits_soft_cap = logits_soft_cap or 0.0

    def _attend(
        self, query_THD: torch.Tensor, kv_cache: Any, out: torch.Tensor, sinks: Any = None
    ) -> torch.Tensor:
        count, plan = self._requests, self._int_workspace_buffer.tolist()
        starts, indptr = plan[: count + 1], plan[count + 1 : 2 * count + 2]
        lengths = plan[2 * count + 2 : 3 * count + 2]
        if starts[-1] != len(query_THD):
            return out.fill_(torch.nan)
        for request in range(count):
            begin, end = starts[request : request + 2]
            if begin == end:
                continue
            pages = self._indices[indptr[request] : indptr[request + 1]]
            key, value = (paged(x, pages, lengths[request], self._kv_layout) for x in kv_cache)
            out[begin:end] = attend(
                query_THD[begin:end],
                key,
                value,
                self._sm_scale,
                self._window_left,
                self._causal,
                self._logits_soft_cap,
                sinks,
            )
        return out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        seq_lens: torch.Tensor | None = None,
        **_kernels: Any,
    ) -> None:
        # One slice of both phases' pages: a prefill's do not begin at 0.
        self._keep(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            page_size,
            sm_scale,
            window_left,
            logits_soft_cap,
            causal,
        )

    def run(
        self, q: torch.Tensor, paged_kv_cache: Any, *, out: torch.Tensor, **_scales: Any
    ) -> Any:
        return self._attend(q, paged_kv_cache, out)


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        sinks: torch.Tensor,
        sm_scale: float,
        *,
        out: torch.Tensor,
        **_scales: Any,
    ) -> Any:
        return self._attend(q, paged_kv_cache, out, sinks)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        **_kernels: Any,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self.is_cuda_graph_enabled = use_cuda_graph

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_len_per_req: int = 1,
        **_kernels: Any,
    ) -> None:
        alike = torch.arange(len(indptr), dtype=torch.int32) * q_len_per_req
        self._keep(
            alike,
            indptr,
            indices,
            last_page_len,
            page_size,
            sm_scale,
            window_left,
            logits_soft_cap,
            causal=True,
        )

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        *,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
        **_scales: Any,
    ) -> Any:
        return self._attend(q, paged_kv_cache, out, sinks)


def fast_decode_plan(wrapper: BatchDecodeWithPagedKVCacheWrapper, **arguments: Any) -> None:
    wrapper.plan(**arguments)


def _without_plan(
    query: torch.Tensor,
    kv_cache: Any,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    window_left: int,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    layout: str,
) -> torch.Tensor:
    arrays = (block_tables, seq_lens, starts)
    assert all(array.dtype == torch.int32 and array.is_contiguous() for array in arrays)
    for row, (begin, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        stored = int(seq_lens[row])
        if begin == end or not stored:  # nobody's request, there to fill a graph
            continue
        size = kv_cache[0].shape[1 if layout == "NHD" else 2]
        pages = block_tables[row, : -(-stored // size)]
        key, value = (paged(x, pages, stored, layout) for x in kv_cache)
        out[begin:end] = attend(query[begin:end], key, value, scale, window_left, sinks_H=sinks)
    return out


def trtllm_batch_context_with_kv_cache(
    *,
    query: torch.Tensor,
    kv_cache: Any,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor,
    window_left: int = -1,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    kv_layout: str = "HND",
    **_quantised: Any,
) -> torch.Tensor:
    pages = -(-seq_lens // kv_cache[0].shape[2])
    if (
        not len(seq_lens) == batch_size == len(cum_seq_lens_q) - 1
        or int(cum_seq_lens_q[-1]) != len(query)
        or cum_seq_lens_kv.diff().tolist() != pages.tolist()
        or int(cum_seq_lens_q.diff().max()) > max_q_len
        or int(seq_lens.max()) > max_kv_len
    ):
        return out.fill_(torch.nan)
    return _without_plan(
        query,
        kv_cache,
        block_tables,
        seq_lens,
        cum_seq_lens_q,
        bmm1_scale,
        window_left,
        sinks,
        out,
        kv_layout,
    )


def _decode(
    *,
    query: torch.Tensor,
    kv_cache: Any,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: float,
    bmm2_scale: float,
    window_left: int = -1,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    kv_layout: str,
    q_len_per_req: int | None = 1,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    if starts is None:
        assert q_len_per_req is not None
        starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32) * q_len_per_req
    if int(starts[-1]) > len(query) or int(seq_lens.max()) > max_seq_len:
        return out.fill_(torch.nan)
    return _without_plan(
        query,
        kv_cache,
        block_tables,
        seq_lens,
        starts,
        bmm1_scale,
        window_left,
        sinks,
        out,
        kv_layout,
    )


def trtllm_batch_decode_with_kv_cache(
    *,
    backend: str,
    max_q_len: int | None = None,
    cum_seq_lens_q: torch.Tensor | None = None,
    o_sf_scale: float | None = None,
    kv_cache_sf: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    multi_ctas_kv_counter_buffer: torch.Tensor | None = None,
    **arguments: Any,
) -> torch.Tensor:
    assert backend == "trtllm-gen" and arguments["kv_layout"] == "HND"
    return _decode(starts=cum_seq_lens_q, **arguments)


def xqa_batch_decode_with_kv_cache(
    *,
    mask: torch.Tensor | None = None,
    q_cu_seq_lens: torch.Tensor | None = None,
    kv_cache_sf: Any = None,
    **arguments: Any,
) -> torch.Tensor:
    if (mask is None) != (arguments["q_len_per_req"] == 1):
        raise ValueError("drafts need a mask")
    return _decode(starts=q_cu_seq_lens, **arguments)
