"""Attention masses of a Hugging Face model without its attention maps, by xformers on a CUDA device.

The table of :func:`vllm_flow.analysis.attention_reference.attention_masses`, its reference: a share is
`exp(lse_span - lse_total)`, with the log-sum-exp of partial attention over the span. Takes any implementation of
attention for the forward itself, and rows x spans of memory per layer where maps take heads x T x T.

Seam: transformers' registries of attention functions and of masks, under :data:`NAME`, for one forward.
Shapes: T tokens (prompt expanded, then output), H query heads, K key heads, D head size, P pairs of a row and a span.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_flow.analysis.attention_reference import (
    Masses,
    Rows,
    answer_rows,
    mean_flow,
    span_of,
)
from vllm_flow.counts import counted
from vllm_flow.engine.worker.attention import xformers_needs
from vllm_flow.style import SPANS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vllm_flow.analysis.vlm import Encoded, Vlm

NAME = "vllm_flow_span_masses"
Take = Callable[[torch.Tensor, torch.Tensor, float], None]
"""``take(query_THD, key_TKD, scale)``, once per layer, in order."""
_TAKE: contextvars.ContextVar[Take] = contextvars.ContextVar(NAME)


def against(vlm: Vlm) -> str | None:
    """What keeps xformers from this model's attention; None if nothing does."""
    lacking = xformers_needs.missing()
    if lacking is not None:
        return lacking
    if vlm.device.type != "cuda":
        return f"the model is on {vlm.device.type}"
    if vlm.model.dtype not in (torch.float16, torch.bfloat16):
        return f"the model is in {str(vlm.model.dtype).removeprefix('torch.')}, not in 16 bits"
    return None


@torch.inference_mode()
def span_masses(
    vlm: Vlm, encoded: Encoded, answer: Sequence[int], rows: Rows = "predicting"
) -> Masses:
    """Masses of `answer` after the prompt, in one forward; :func:`against` must have nothing against it.

    ValueError where rows do not see all that is before them.
    """
    prompt = len(encoded.ids_T)
    total = prompt + len(answer)
    window = getattr(vlm.decoder.config, "sliding_window", None)
    if window is not None and total > window:
        raise ValueError(
            f"some layers see the last {counted(window, 'token')} only, of {total} with the answer: load the "
            'model with attention="eager"'
        )
    is_image = np.concatenate([encoded.is_image_T.numpy(), np.zeros(len(answer), dtype=bool)])
    span_T, image_P = span_of(is_image, prompt), encoded.image_P.numpy()
    # A span may be several runs of positions: text lies between the rows of some pictures.
    edges = np.flatnonzero(np.diff(span_T)) + 1
    starts, stops = np.array([0, *edges]), np.array([*edges, total])
    member_RS = (span_T[starts][:, None] == np.arange(len(SPANS))).astype(np.float64)
    at = answer_rows(prompt, len(answer), rows)
    row_T = np.arange(total)
    # Every row over the runs, and the answer's rows over each image token: as far as a row sees.
    owner = np.repeat(row_T, len(starts))
    first, last = np.tile(starts, total), np.tile(stops, total)
    single = np.tile(image_P, at.stop - at.start)
    owner = np.concatenate([owner, np.repeat(row_T[at], len(image_P))])
    first, last = np.concatenate([first, single]), np.concatenate([last, single + 1])
    last = np.maximum(np.minimum(last, owner + 1), first)
    shares: list[NDArray[Any]] = []
    heats: list[NDArray[Any]] = []

    def take(query_THD: torch.Tensor, key_TKD: torch.Tensor, scale: float) -> None:
        lse_HP = row_lse(query_THD, key_TKD, scale, owner, first, last).double()
        runs, heat = lse_HP.split([total * len(starts), len(single)], 1)
        runs = runs.unflatten(1, (total, len(starts)))
        heat = heat.unflatten(1, (at.stop - at.start, -1))
        whole = runs.logsumexp(-1, keepdim=True)
        shares.append((runs - whole).exp().mean(0).cpu().numpy() @ member_RS)
        heats.append((heat - whole[:, at]).exp().mean(0).cpu().numpy())

    with taking(vlm, take):
        vlm.forward(encoded, answer, logits_to_keep=1)
    to_spans = np.stack(shares)
    heat_LAP = np.stack(heats)
    arrays = (
        to_spans[:, at],
        heat_LAP.sum(-1, keepdims=True),
        heat_LAP,
        np.stack([mean_flow(share, span_T) for share in shares]),
    )
    return Masses(*(array.astype(np.float32) for array in arrays))


def row_lse(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    scale: float,
    owner_P: NDArray[Any],
    first_P: NDArray[Any],
    last_P: NDArray[Any],
) -> torch.Tensor:
    """[H, P] float32: of pair p the log-sum-exp of row ``owner[p]`` over keys ``first[p]`` up to ``last[p]``."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalGappyKeysMask

    num_tokens, num_key_heads, _ = key_TKD.shape
    group = query_THD.shape[1] // num_key_heads
    key = key_TKD[None, :, :, None].expand(-1, -1, -1, group, -1)
    found = []
    for part in xformers_needs.parts(len(owner_P), num_key_heads):
        rows = torch.from_numpy(owner_P[part]).to(query_THD.device)
        mask = BlockDiagonalGappyKeysMask.from_seqlens(
            [1] * len(rows),
            [*first_P[part].tolist(), num_tokens],
            (last_P - first_P)[part].tolist(),
            device=query_THD.device,
        )
        query = query_THD[rows].unflatten(1, (num_key_heads, group))[None]
        found.append(partial_lse(query, key, mask, scale)[0].flatten(0, 1).float())
    return torch.cat(found, 1)


def partial_lse(
    query_1PKGD: torch.Tensor, key_1TKGD: torch.Tensor, mask: Any, scale: float
) -> torch.Tensor:
    """[1, K, G, P]: each pair's own log-sum-exp. Keys stand in for values, which are of no interest."""
    from xformers.ops.fmha import memory_efficient_attention_partial
    from xformers.ops.fmha.triton_splitk import FwOp

    return memory_efficient_attention_partial(
        query_1PKGD, key_1TKGD, key_1TKGD, mask, scale=scale, op=FwOp
    )[1]


@contextlib.contextmanager
def taking(vlm: Vlm, take: Take) -> Iterator[None]:
    """While open, a forward of one sequence hands each decoder layer's queries and keys over."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = vlm.decoder.config
    before = config._attn_implementation
    token = _TAKE.set(take)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _TAKE.reset(token)


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Transformers' own attention; queries and keys [1, heads, T, D] have their positions applied."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _TAKE.get()(query[0].transpose(0, 1), key[0].transpose(0, 1), module.scaling)
    return sdpa_attention_forward(module, query, key, *args, **kwargs)
