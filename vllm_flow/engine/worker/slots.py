"""Whole tokens out of the paged KV cache and back into it, keys and values alike, slot by slot.

Seam: the logical view ``[blocks, heads, slots, content]`` that vLLM 0.32 binds to every attention layer,
and ``AttentionImpl.do_kv_cache_update``, which every backend writes it through. Where a backend puts the
numbers of one token is asked, not assumed: :func:`token_places` writes numbers that name their places.

Legend: B blocks, K key heads, N slots of a block, C content of a slot, D head size, R rows (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_flow.engine.worker.latent import cache_of, is_latent, store

_DIGIT = 128
"""Integers up to this are exact in every type that a cache has."""


@dataclass(frozen=True)
class TokenPlaces:
    """Where the numbers of one token lie in a head's part of a block, whose shape is [N, C]."""

    slot_NC: torch.Tensor | None
    """[N, C] first index of each of a token's numbers; None where token n has row n to itself."""
    content_NC: torch.Tensor | None
    """[N, C] second index."""

    def take(self, cache_BKNC: torch.Tensor, slots_R: torch.Tensor) -> torch.Tensor:
        """[R, K, C] what some slots hold, a copy.

        Args:
            slots_R: block times N plus the place in the block.
        """
        return cache_BKNC[self._index(cache_BKNC, slots_R)]

    def put(self, cache_BKNC: torch.Tensor, slots_R: torch.Tensor, rows_RKC: torch.Tensor) -> None:
        """Write into some slots what :meth:`take` gave."""
        cache_BKNC[self._index(cache_BKNC, slots_R)] = rows_RKC

    def _index(self, cache_BKNC: torch.Tensor, slots_R: torch.Tensor) -> tuple[Any, ...]:
        size = cache_BKNC.shape[2]
        block_R, place_R = slots_R // size, slots_R % size
        if self.slot_NC is None or self.content_NC is None:
            return block_R, slice(None), place_R
        head_K = torch.arange(cache_BKNC.shape[1], device=slots_R.device)
        return (
            block_R[:, None, None],
            head_K[None, :, None],
            self.slot_NC[place_R][:, None],
            self.content_NC[place_R][:, None],
        )


def token_places(attention: Any) -> TokenPlaces:
    """The places of an attention layer whose KV cache is allocated and not in use yet.

    Writes through the backend into block 0 (vLLM's null block), and restores the block.

    Raises:
        ValueError: what is written is not found again, number by number.
    """
    cache = cache_of(attention)
    name, slots = attention.attn_backend.get_name(), cache.shape[2]
    found_NC = _written(attention)
    numbers = torch.arange(found_NC.numel(), device=cache.device)
    if not torch.equal(found_NC.flatten().sort().values, numbers):
        raise ValueError(
            f"how attention backend {name} stores keys and values ({cache.dtype}, blocks of {slots}) "
            "is not known"
        )
    if torch.equal(found_NC.flatten(), numbers):
        return TokenPlaces(None, None)
    at_NC = found_NC.flatten().argsort().view_as(found_NC)  # number -> place
    width = found_NC.shape[1]
    return TokenPlaces(at_NC // width, at_NC % width)


def _written(attention: Any) -> torch.Tensor:
    """[N, C] which number of a block, counted token by token, its keys first, lies at each place."""
    cache = cache_of(attention)
    if cache.dtype != getattr(attention, "dtype", cache.dtype) or not cache.is_floating_point():
        raise ValueError(f"keys and values are stored as {cache.dtype}, and not as they are")
    (heads, slots, content), size = cache.shape[1:], attention.head_size
    latent = is_latent(attention)
    values = getattr(attention, "head_size_v", size)  # MiMo-V2's are narrower
    if content != (size if latent else size + values) or heads != attention.num_kv_heads:
        raise ValueError(
            f"attention backend {attention.attn_backend.get_name()} stores more than "
            f"{'a latent vector per token' if latent else 'a key and a value per head and token'}"
        )
    number_NC = torch.arange(slots * content, device=cache.device).view(slots, content)
    before = cache[:1].clone()
    found = torch.zeros_like(number_NC)
    unit = 1
    try:
        while unit < number_NC.numel():
            digit_NKC = (number_NC // unit % _DIGIT)[:, None].expand(-1, heads, -1)
            digit_NKC = digit_NKC.to(cache.dtype)
            places = torch.arange(slots, device=cache.device)
            store(attention, digit_NKC[..., :size], digit_NKC[..., size:], places)
            read_KNC = cache[0].float()
            if not torch.equal(read_KNC, read_KNC[:1].expand_as(read_KNC)):
                raise ValueError(
                    f"attention backend {attention.attn_backend.get_name()} does not store all heads alike"
                )
            found += read_KNC[0].round().long() * unit
            unit *= _DIGIT
    finally:
        cache[:1] = before
    return found
