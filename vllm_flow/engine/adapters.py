"""LoRA: which adapter each row goes through, for as long as a step has fewer rows than vLLM planned.

Seams: ``punica_wrapper`` of the modules that vLLM wraps, its ``token_lora_indices`` and what its kernels
derive from them: ``_update_prefill_metadata`` on CPU, ``token_mapping_meta`` on a GPU. They know the rows
of the step; where rows leave, they are told those that are left, and the step's own before vLLM, which
plans anew only where the batch differs, uses them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.utils.gpu_sync_debug import gpu_sync_allowed


@dataclass(frozen=True)
class _Whole:
    """What the step had before rows left."""

    wrapper: Any
    indices_T: torch.Tensor
    """[T] adapter slots, -1 for none."""


class AdapterRows:
    """The adapters of one decoder's rows; does nothing where none is wrapped, or none is used.

    Legend: T rows of the step, R rows alive.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._wrappers: list[Any] | None = None
        self._whole: list[_Whole] | None = None

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the step, [R] with R > 0."""
        if self._whole is None:
            self._whole = [
                _Whole(wrapper, wrapper.token_lora_indices.clone())
                for wrapper in self._found()
                if not _unused(wrapper)
            ]
        for whole in self._whole:
            _plan(whole.wrapper, whole.indices_T.index_select(0, rows))

    def restore(self) -> None:
        """Go on with all rows of the step."""
        for whole in self._whole or ():
            _plan(whole.wrapper, whole.indices_T)
        self._whole = None

    def _found(self) -> list[Any]:
        if self._wrappers is None:
            wrappers = (
                getattr(module, "punica_wrapper", None) for module in self._decoder.modules()
            )
            self._wrappers = list({id(found): found for found in wrappers if found}.values())
        return self._wrappers


def _unused(wrapper: Any) -> bool:
    """Whether no row of the step goes through an adapter, as the kernels' early exit knows."""
    on_gpu = getattr(wrapper, "token_mapping_meta", None)
    return bool(wrapper.no_lora if on_gpu is None else on_gpu.no_lora_flag_cpu[0])


def _plan(wrapper: Any, indices_R: torch.Tensor) -> None:
    wrapper._token_lora_indices[: len(indices_R)].copy_(indices_R)
    wrapper.indices_len[0] = len(indices_R)
    on_gpu = getattr(wrapper, "token_mapping_meta", None)
    if on_gpu is not None:
        with gpu_sync_allowed():  # as in vLLM's own steps
            on_gpu.prepare_tensors(wrapper.token_lora_indices)
    elif wrapper.is_prefill:
        wrapper._update_prefill_metadata(wrapper.token_lora_indices)
