"""LoRA: which adapter each row goes through, for as long as a step has fewer rows than vLLM planned.

Seams: ``punica_wrapper`` of the modules that vLLM wraps, its ``token_lora_indices`` and what its kernels
derive from them: ``_update_prefill_metadata`` on CPU, the tensors of ``token_mapping_meta`` on a GPU. They know the
rows of the step; where rows leave, they are told those that are left, and the step's own before vLLM, which
plans anew only where the batch differs, uses them again.

On a GPU vLLM makes those tensors while the host waits for the device, several times for each set of rows. Which
adapters a step has, and whether it has any, is known from the step as a whole: for fewer rows only what lies on the
device is made anew, and nothing waits. An adapter that has no row left has a count of 0, with which kernels are done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class _Whole:
    """What the step had before rows left."""

    wrapper: Any
    indices_T: torch.Tensor
    """[T] adapter slots, -1 for none."""
    on_gpu: tuple[torch.Tensor, ...]
    """What :func:`_made` gives of all rows; empty on a CPU."""


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
            self._whole = [_whole(wrapper) for wrapper in self._found() if not _unused(wrapper)]
        for whole in self._whole:
            _plan(whole.wrapper, whole.indices_T.index_select(0, rows))

    def restore(self) -> None:
        """Go on with all rows of the step."""
        for whole in self._whole or ():
            _plan(whole.wrapper, whole.indices_T)
            for tensor, before in zip(_made(whole.wrapper), whole.on_gpu, strict=True):
                tensor.copy_(before)
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


def _whole(wrapper: Any) -> _Whole:
    made = tuple(tensor.clone() for tensor in _made(wrapper))
    return _Whole(wrapper, wrapper.token_lora_indices.clone(), made)


def _made(wrapper: Any) -> tuple[torch.Tensor, ...]:
    """What depends on a step's rows on a GPU: the slot of each, rows by slot, rows per slot, and where those begin."""
    meta = getattr(wrapper, "token_mapping_meta", None)
    if meta is None:
        return ()
    return (
        meta.token_lora_mapping,
        meta.token_indices_sorted_by_lora_ids,
        meta.num_tokens_per_lora,
        meta.lora_token_start_loc,
    )


def _plan(wrapper: Any, indices_R: torch.Tensor) -> None:
    wrapper._token_lora_indices[: len(indices_R)].copy_(indices_R)
    wrapper.indices_len[0] = len(indices_R)
    if made := _made(wrapper):
        _plan_on_gpu(made, wrapper.token_mapping_meta.active_lora_ids, indices_R)
    elif wrapper.is_prefill:
        wrapper._update_prefill_metadata(wrapper.token_lora_indices)


def _plan_on_gpu(
    made: tuple[torch.Tensor, ...], slots_A: torch.Tensor, indices_R: torch.Tensor
) -> None:
    """As ``LoRAKernelMeta.prepare_tensors``, with the adapters of the step and without waiting.

    Args:
        slots_A: [A] the step's adapter slots, ascending from -1 where it has rows without; -1 behind the last, too,
            which kernels pass over whatever its count.
    """
    mapping_T, by_slot_T, counts_A, starts_A1 = made
    mapping_T[: len(indices_R)].copy_(indices_R)
    by_slot_T[: len(indices_R)].copy_(indices_R.argsort(stable=True))
    counts_A.copy_((indices_R == slots_A[:, None]).sum(1))
    starts_A1[1:].copy_(counts_A.cumsum(0))
