"""Hugging Face's own forward, from whose hidden states rows leave: for layers that keep a state, which no mask reaches.

Legend: T tokens, R of them alive, H hidden size. Knows neither policies nor vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

NORMS = ("norm", "embedding_norm", "norm_f")
"""Names of a decoder's final norm: LFM2's is the second, Nemotron-H's the third."""


@contextmanager
def leaving(
    decoder: Any, stay: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Hooks on a decoder of transformers, for one forward of one sequence.

    Args:
        stay: (layer, its hidden states [1, R, H]) -> [R] ascending positions that are alive from there on, among those
            alive before; None where none leaves. All others are zero from the final norm on.
    """
    alive: torch.Tensor | None = None
    tokens = 0

    def select(kwargs: dict[str, Any]) -> dict[str, Any]:
        mask, tables = kwargs["attention_mask"], kwargs.get("position_embeddings", ())
        if mask is not None:  # [1, 1, T, T] of attention, [1, T] of a state
            mask = mask[..., alive]
            mask = mask[..., alive, :] if mask.dim() == 4 else mask
        turned = {"position_embeddings": tuple(table[:, alive] for table in tables)}
        return {**kwargs, "attention_mask": mask, **(turned if tables else {})}

    def leave(index: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            nonlocal alive, tokens
            hidden_1RH = args[0]
            if index == 0:
                alive, tokens = None, hidden_1RH.shape[1]
            left = stay(index, hidden_1RH)
            if left is not None:
                before = torch.arange(tokens) if alive is None else alive
                hidden_1RH = hidden_1RH[:, torch.isin(before, left)]
                alive = left
            return (hidden_1RH, *args[1:]), kwargs if alive is None else select(kwargs)

        return hook

    def come_back(_module: Any, args: Any) -> Any:
        if alive is None:
            return args
        whole_1TH = args[0].new_zeros(1, tokens, args[0].shape[-1])
        whole_1TH[:, alive] = args[0]
        return (whole_1TH,)

    hooks = [
        layer.register_forward_pre_hook(leave(index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    norm = next(getattr(decoder, name) for name in NORMS if hasattr(decoder, name))
    hooks.append(norm.register_forward_pre_hook(come_back))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
