"""Multi-head latent attention: of each token one vector is stored, from which the keys and values of all heads come.

A layer has one "key head" then. Its key is the stored vector itself, once a query has gone through the matrix that
makes keys of it (vLLM decodes in the same way): so whoever reads keys asks here for cache and queries, whatever
the layer stores.

Seams: ``kv_cache``, ``W_UK_T`` and ``impl.do_kv_cache_update`` of vLLM's ``MLAAttention``; ``_prefill_backend`` of
``MLACommonMetadataBuilder``, which keeps the plan of one prefill, and its ``clone``.

Legend: B blocks, K key heads, N slots of a block, C content of a slot, R rows, Q query rows, H query heads, D head
size, L width of the latent part, P of the part that carries positions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vllm_flow.engine.replacing import replaced


def is_latent(attention: Any) -> bool:
    """Whether a layer of vLLM's stores latent vectors."""
    return getattr(attention, "kv_lora_rank", None) is not None


def cache_of(attention: Any) -> torch.Tensor:
    """[B, K, N, C] a layer's paged cache; K is 1 of latent vectors."""
    cache: torch.Tensor = attention.kv_cache
    return cache.unsqueeze(1) if is_latent(attention) else cache


def store(
    attention: Any, key_RKD: torch.Tensor, value_RKD: torch.Tensor, slots_R: torch.Tensor
) -> None:
    """Write tokens through a layer's backend.

    Args:
        key_RKD: of a latent layer the whole vector.
        value_RKD: not stored by a latent layer.
    """
    if not is_latent(attention):
        attention.impl.do_kv_cache_update(
            attention, key_RKD.contiguous(), value_RKD.contiguous(), attention.kv_cache, slots_R
        )
        return
    latent_RL, turned_RP = key_RKD[:, 0].tensor_split([attention.kv_lora_rank], dim=-1)
    attention.impl.do_kv_cache_update(
        latent_RL.contiguous(),
        turned_RP.contiguous()[:, None],
        attention.kv_cache,
        slots_R,
        attention.kv_cache_dtype,
        attention._k_scale,
    )


def queries_of(attention: Any, query: torch.Tensor) -> torch.Tensor:
    """[Q, H, D] queries for what a layer stores.

    Args:
        query: [Q, H, D], or with heads and head size in one, as they enter the layer's attention; of a latent
            layer [Q, H, size of a head's own keys].
    """
    if not is_latent(attention):
        return query.view(len(query), -1, attention.head_size)
    own_QHD, turned_QHP = query.tensor_split([attention.qk_nope_head_dim], dim=-1)
    latent_QHL = torch.einsum("qhd,hdl->qhl", own_QHD, attention.W_UK_T)
    return torch.cat([latent_QHL, turned_QHP], dim=-1)


class PrefillPlans:
    """The plans of a step's prefills: one for each variant, beside vLLM's own."""

    def __init__(self) -> None:
        self._own: dict[tuple[int, int], Any] = {}

    def of(self, builder: Any, variant: int) -> AbstractContextManager[None]:
        """While it lasts, the builder writes the plan of a prefill where that of no other variant is.

        Args:
            builder: a metadata builder of any backend, which lives as long as this object.
            variant: which one of the step, from 0.
        """
        stock = getattr(builder, "_prefill_backend", None)
        if stock is None:
            return nullcontext()
        key = (id(builder), variant)
        if key not in self._own:
            self._own[key] = stock.clone()
        return replaced("_prefill_backend", [(builder, self._own[key])])
