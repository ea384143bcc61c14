"""Keys back out of the paged KV cache, and the attention mass of a few query rows on spans of them.

Seam: the logical view ``[blocks, heads, slots, content]`` that vLLM 0.32 binds to every attention
layer, and ``AttentionImpl.do_kv_cache_update``, which every backend writes it through. How a backend
lays the keys of a block out is asked, not assumed: :func:`key_reader` writes known keys and takes
the reader that finds them again.

Legend: Q query rows, H query heads, K key heads (H a multiple of K), D head size, B blocks of the
cache, M blocks of a row, N slots of a block, T = M x N slots of a row, S spans, C content of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_flow.engine.worker.latent import cache_of, store

KeyReader = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""``read(cache_BKNC, blocks_M, head_size)`` -> keys [M, K, N, D]."""


def token_major(cache_BKNC: torch.Tensor, blocks_M: torch.Tensor, head_size: int) -> torch.Tensor:
    """Each slot holds its key, then its value: FlashAttention, FlashInfer, Triton, Flex.

    Heads before slots in memory (HND) or after (NHD) is a matter of strides.
    """
    return _token_major_view(cache_BKNC, head_size).index_select(0, blocks_M)


def column_major(cache_BKNC: torch.Tensor, blocks_M: torch.Tensor, head_size: int) -> torch.Tensor:
    """A head's keys of a block come first, as a [D, N] matrix: CPU, vector instructions."""
    return _column_major_view(cache_BKNC, head_size).index_select(0, blocks_M)


def tiled_pairs(cache_BKNC: torch.Tensor, blocks_M: torch.Tensor, head_size: int) -> torch.Tensor:
    """A head's keys of a block come first, as [N / 16, D / 2, 16, 2] tiles: CPU, AMX on 16 bits."""
    if cache_BKNC.shape[2] % 16 or head_size % 2:
        raise ValueError("not a whole number of tiles")
    blocks = _key_half(cache_BKNC, head_size).index_select(0, blocks_M)
    tiles = blocks.unflatten(2, (-1, head_size // 2, 16, 2))
    return tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _key_half(cache_BKNC: torch.Tensor, head_size: int) -> torch.Tensor:
    return cache_BKNC.flatten(2)[..., : cache_BKNC.shape[2] * head_size]


def _token_major_view(cache_BKNC: torch.Tensor, head_size: int) -> torch.Tensor:
    return cache_BKNC[..., :head_size]


def _column_major_view(cache_BKNC: torch.Tensor, head_size: int) -> torch.Tensor:
    blocks = _key_half(cache_BKNC, head_size)
    return blocks.unflatten(2, (head_size, cache_BKNC.shape[2])).transpose(2, 3)


READERS: tuple[KeyReader, ...] = (token_major, column_major, tiled_pairs)

STRIDED: Mapping[KeyReader, Callable[[torch.Tensor, int], torch.Tensor]] = {
    token_major: _token_major_view,
    column_major: _column_major_view,
}
"""``view(cache_BKNC, head_size)`` -> keys [B, K, N, D] where they lie, for the layouts in which a stride
per dimension reaches every key: what a kernel reads that gathers nothing."""


class UnreadableKeys(ValueError):
    """The attention log cannot be taken; ``reason`` says why, for whoever else reads keys."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the attention log reads keys and plain dot products, but {reason}; leave out "
            "attention_log, or choose another attention backend."
        )


def window_of(impl: Any) -> int | None:
    """How far back a layer looks, in tokens, as its backend holds it; None if as far as there are tokens."""
    window = getattr(_whole(impl), "sliding_window", None)
    left = window[0] if isinstance(window, tuple) else window
    return None if left is None or left < 0 else int(left)


def chunk_of(attention: Any) -> int | None:
    """Tokens of a chunk, where a layer sees the row's own chunk alone (Llama 4); None where it has none."""
    return getattr(attention, "attention_chunk_size", None)


def extra_logits(attention: Any) -> str | None:
    """What beside dot products a layer's softmax is over, or goes through first; None where it is nothing.

    A sink is a logit that belongs to no key: it stays where image tokens leave, and whoever leaves it out
    gives the keys too much.
    """
    impl = _whole(attention.impl)
    for feature in ("sinks", "alibi_slopes", "logits_soft_cap"):
        value = getattr(impl, feature, None)
        if isinstance(value, torch.Tensor) or value:
            return feature
    return None


def _whole(impl: Any) -> Any:
    """Of a combination of backends the one that takes every step; the combination tells little of itself."""
    variants = getattr(impl, "get_impl_variants", None)
    return impl if variants is None else variants()[0]


def key_reader(attention: Any) -> KeyReader:
    """The reader for an attention layer whose KV cache is allocated and not in use yet.

    Writes random keys through the backend into block 0 (vLLM's null block), reads them back with
    each reader, and restores the block.

    Raises:
        UnreadableKeys: no reader finds the keys, or the layer's logits are not plain dot products with every
            key.
    """
    backend = attention.attn_backend.get_name()
    if (feature := extra_logits(attention)) is not None:
        raise UnreadableKeys(f"{attention.layer_name} has {feature}")
    if window_of(attention.impl) is not None:
        raise UnreadableKeys(f"{attention.layer_name} sees a sliding window, not every token")
    if chunk_of(attention) is not None:
        raise UnreadableKeys(f"{attention.layer_name} sees a chunk of the tokens, not every one")
    cache = cache_of(attention)
    slots = cache.shape[2]
    # A generator of its own: the default one belongs to the sampler.
    keys_NKD = torch.randn(
        (slots, attention.num_kv_heads, attention.head_size),
        generator=torch.Generator().manual_seed(0),
    ).to(cache.device, getattr(attention, "dtype", cache.dtype))
    before = cache[:1].clone()
    try:
        # Some values are narrower than keys: what is wider than its slot would go into the next one.
        values = -keys_NKD[..., : getattr(attention, "head_size_v", None)]
        store(attention, keys_NKD, values, torch.arange(slots, device=cache.device))
        for read in READERS:
            if _finds(read, cache, keys_NKD):
                return read
    finally:
        cache[:1] = before
    raise UnreadableKeys(
        f"how attention backend {backend} stores keys ({cache.dtype}, blocks of {slots}) is not known"
    )


def _finds(read: KeyReader, cache: torch.Tensor, keys_NKD: torch.Tensor) -> bool:
    first = torch.zeros(1, dtype=torch.int64, device=cache.device)
    try:
        found = read(cache, first, keys_NKD.shape[-1])[0]
    except (RuntimeError, ValueError):  # shapes that this layout cannot have
        return False
    return torch.equal(found.transpose(0, 1), keys_NKD.to(cache.dtype))


def span_lse(
    query_QHD: torch.Tensor,
    cache_BKNC: torch.Tensor,
    read: KeyReader,
    blocks_QM: torch.Tensor,
    bounds_QS1: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Log-sum-exp of each query row's logits over consecutive spans of its keys.

    The reference for :func:`vllm_flow.engine.worker.attention.span_lse_triton.span_lse_triton`, and what runs
    where that does not. Gathers the rows' blocks (Q x T keys, nothing of size T x T) and computes in float32.

    Args:
        query_QHD: queries as they enter attention, positions applied.
        cache_BKNC: one layer's paged KV cache, the rows' own keys written already.
        read: how that cache stores keys.
        blocks_QM: blocks of each row's keys, in the order of their slots; what lies past a row's
            last bound is read and ignored, so any valid block id will do there.
        bounds_QS1: span s of row q is the slots from ``bounds[q, s]`` up to ``bounds[q, s + 1]``;
            ascending from 0; repeated where a span is empty.
        scale: factor of the dot products.

    Returns:
        [Q, H, S] float32; minus infinity for an empty span.
    """
    num_rows, num_heads, head_size = query_QHD.shape
    num_spans = bounds_QS1.shape[1] - 1
    keys = read(cache_BKNC, blocks_QM.flatten(), head_size).unflatten(0, blocks_QM.shape)
    keys_QKTD = keys.transpose(1, 2).flatten(2, 3).float()
    query = query_QHD.float().unflatten(1, (keys_QKTD.shape[1], -1))
    logits_QHT = torch.einsum("qkgd,qktd->qkgt", query * scale, keys_QKTD).flatten(1, 2)

    slots_T = torch.arange(logits_QHT.shape[-1], device=bounds_QS1.device)
    span_QT = torch.searchsorted(
        bounds_QS1[:, 1:].contiguous(), slots_T.expand(num_rows, -1).contiguous(), right=True
    )
    # Slots past the last bound fall into a span of their own, which is cut off at the end: what
    # lies there is anybody's, not even finite numbers are certain.
    index = span_QT[:, None, :].expand_as(logits_QHT)
    shape = (num_rows, num_heads, num_spans + 1)
    peak = logits_QHT.new_full(shape, -torch.inf).scatter_reduce(-1, index, logits_QHT, "amax")
    weight = (logits_QHT - peak.gather(-1, index)).exp()
    lse = peak + logits_QHT.new_zeros(shape).scatter_add(-1, index, weight).log()
    return lse[..., :num_spans]


def span_mass(lse_QHS: torch.Tensor) -> torch.Tensor:
    """[Q, S] probability mass of each span, averaged over heads; each row sums to 1."""
    return lse_QHS.softmax(-1).mean(1)
