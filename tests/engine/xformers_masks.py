"""What stands in for xformers' op where there is no CUDA device: its mask materialised, and torch's softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_flow.engine.worker.attention.span_lse_xformers import inputs_of


def xformers_or_skip() -> None:
    """Skip a test that needs xformers where it is missing."""
    pytest.importorskip("xformers", reason="xformers is not installed (extra 'xformers')")


def materialised_lse(
    query_PHD: torch.Tensor, keys_BKND: torch.Tensor, mask: Any, scale: float
) -> torch.Tensor:
    """:func:`vllm_flow.engine.worker.attention.span_lse_xformers.partial_lse`, all keys of all pages at once."""
    query, key = inputs_of(query_PHD, keys_BKND)
    pairs = len(query_PHD)
    # The op reads the tensors; materialising reads the numbers beside them.
    mask.k_seqinfo.seqstart_py = mask.k_seqinfo.seqstart.tolist()
    mask.k_seqinfo.seqlen_py = mask.k_seqinfo.seqlen.tolist()
    # Columns past a pair's pages name any page, which the op does not read. Materialised, the last column
    # with a page's name decides.
    columns = torch.arange(mask.block_tables.shape[1])
    nowhere = int(mask.block_tables.max()) + 1
    own = columns < (mask.k_seqinfo.seqlen[:, None] + mask.page_size - 1) // mask.page_size
    mask.block_tables = mask.block_tables.where(own, nowhere)
    seen = mask.materialize((pairs, pairs * len(columns) * mask.page_size)) == 0
    seen = seen[:, : key.shape[1]]
    logits = torch.einsum("pkgd,tkgd->kgpt", query[0].float(), key[0, : seen.shape[1]].float())
    lse_HP = (logits * scale).masked_fill(~seen, -torch.inf).logsumexp(-1).flatten(0, 1)
    # Of an empty span the op may make anything.
    starts_P, ends_P = mask.k_seqinfo.seqstart[:pairs], mask.k_seqinfo.seqlen
    return lse_HP.masked_fill(starts_P == ends_P, torch.nan)
