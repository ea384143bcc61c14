"""A ``flashinfer`` of torch: what vLLM's own FlashInfer backend calls, so that the backend runs on a CPU.

FlashInfer's kernels need a GPU; what vLLM's builder plans, when, and in whose memory, does not. Its functions and
wrappers: `flashinfer_kernels`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from vllm import (
    _custom_ops,  # noqa: F401  # loads the operators of this build
    envs,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils import flashinfer as vllm_flashinfer
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.engine.flashinfer_kernels import (
    BatchAttentionWithAttentionSinkWrapper,
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    fast_decode_plan,
    get_seq_lens,
    trtllm_batch_context_with_kv_cache,
    trtllm_batch_decode_with_kv_cache,
    xqa_batch_decode_with_kv_cache,
)

NATIVE, XQA, BLACKWELL = (8, 0), (9, 0), (10, 0)
"""Compute capabilities by what vLLM takes there: FlashInfer's own kernels; these for prompts alone; TRT-LLM's."""


class _CopyPageIndices:
    """vLLM's kernel of this name, where there is no Triton to interpret it."""

    def __getitem__(self, _grid: Any) -> Any:
        return self._copy

    @staticmethod
    def _copy(
        page_indices: torch.Tensor,
        block_table: torch.Tensor,
        _stride: int,
        starts: torch.Tensor,
        BLOCK_SIZE: int,
    ) -> None:
        bounds = starts.tolist()
        for row, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            page_indices[begin:end] = block_table[row, : end - begin]


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """vLLM's operator of this name, which its CPU build lacks: rows beyond the slots and slots below 0 are nobody's."""
    rows = torch.nonzero(slot_mapping >= 0).flatten()
    slots, size = slot_mapping[rows], key_cache.shape[1]
    key_cache[slots // size, slots % size] = key[rows]
    value_cache[slots // size, slots % size] = value[rows]


class _Device:
    """A platform that is the process's own but for its compute capability."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = DeviceCapability(*capability)

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability:
        return self._capability

    def is_device_capability(self, capability: int, device_id: int = 0) -> bool:
        return self._capability.to_int() == capability

    def has_device_capability(self, capability: int, device_id: int = 0) -> bool:
        return self._capability.to_int() >= capability

    def is_device_capability_family(self, capability: int, device_id: int = 0) -> bool:
        return self._capability.major == capability // 10


def _modules() -> dict[str, ModuleType]:
    def lacking(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError("no part of the stand-in")

    found = {}
    for name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils"):
        found[name] = ModuleType(name)
        found[name].__spec__ = ModuleSpec(name, None)
    vars(found["flashinfer"]).update(
        __path__=[],
        BatchAttentionWithAttentionSinkWrapper=BatchAttentionWithAttentionSinkWrapper,
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
        BatchPrefillWithRaggedKVCacheWrapper=type("BatchPrefillWithRagged", (), {}),
        get_seq_lens=get_seq_lens,
        nvfp4_quantize_append_paged_kv_cache_with_slot_mapping=lacking,
    )
    vars(found["flashinfer.decode"]).update(
        fast_decode_plan=fast_decode_plan,
        trtllm_batch_decode_with_kv_cache=trtllm_batch_decode_with_kv_cache,
    )
    vars(found["flashinfer.prefill"])["trtllm_batch_context_with_kv_cache"] = (
        trtllm_batch_context_with_kv_cache
    )
    vars(found["flashinfer.utils"]).update(
        FP4Tensor=type("FP4Tensor", (), {}),
        # Asked for by vLLM 0.33.
        get_device_sm_count=lambda _device: 1,
        get_trtllm_gen_multi_ctas_kv_counter_bytes=lambda *_sizes: 1,
    )
    return found


def _define_operator() -> None:
    """For the rest of the process; a build that has the operator keeps its own."""
    operators = torch.ops._C_cache_ops
    if hasattr(operators, "reshape_and_cache_flash"):
        return
    library = torch.library.Library("_C_cache_ops", "FRAGMENT")
    library.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
    )
    library.impl("reshape_and_cache_flash", reshape_and_cache_flash, "CPU")
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []
"""Kept, or their operators would go with them."""


def backend_module() -> Any:
    """vLLM's module with the FlashInfer backend; imported over the stand-in, unless FlashInfer is installed."""
    name = "vllm.v1.attention.backends.flashinfer"
    if name not in sys.modules and "flashinfer" not in sys.modules:
        modules = _modules()
        sys.modules.update(modules)
        try:
            import_module(name)
        finally:  # nobody else is to take it for the real one
            for own in modules:
                del sys.modules[own]
    return import_module(name)


@contextmanager
def flashinfer(capability: tuple[int, int], backend: str = "FLASHINFER") -> Iterator[Any]:
    """An engine that starts and runs meanwhile does so with vLLM's FlashInfer backend, as on such a device.

    Args:
        backend: vLLM's name of it, or of one that it is a part of.

    Yields:
        The backend's module.
    """
    _define_operator()
    module, device = backend_module(), _Device(capability)
    asked = (vllm_flashinfer.supports_trtllm_attention, vllm_flashinfer.has_nvidia_artifactory)
    path = AttentionBackendEnum[backend].get_path()
    with ExitStack() as patched:

        def patch(owner: Any, name: str, value: Any) -> None:
            patched.enter_context(mock.patch.object(owner, name, value))

        patch(module, "current_platform", device)
        patch(vllm_flashinfer, "current_platform", device)
        patch(vllm_flashinfer, "has_nvidia_artifactory", lambda: True)
        patch(module, "flashinfer_xqa_batch_decode_with_kv_cache", xqa_batch_decode_with_kv_cache)
        patch(module, "trtllm_workspace_buffer", torch.zeros(1, dtype=torch.uint8))
        patch(type(current_platform), "get_attn_backend_cls", lambda *_a, **_k: path)
        patched.enter_context(
            mock.patch.dict(vars(envs), VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE=1 << 16)
        )
        if hasattr(module, "_get_multi_ctas_kv_counter_buffer"):  # from vLLM 0.33 on
            counters = torch.zeros(1, dtype=torch.uint8)
            patch(module, "_get_multi_ctas_kv_counter_buffer", lambda *_sizes: counters)
        if not hasattr(module._copy_page_indices_kernel, "run"):
            patch(module, "_copy_page_indices_kernel", _CopyPageIndices())
        _forget(asked)
        yield module
    _forget(asked)


def _forget(asked: Any) -> None:
    """What was found of the device is remembered for the process."""
    for function in asked:
        function.cache_clear()
