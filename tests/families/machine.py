"""What vLLM 0.32 lacks on a CPU, or does there once per process, and what it makes too large: put right for one engine.

What each family's checkpoint needs of it is said in its row of docs/models.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from vllm import _custom_ops
from vllm.distributed import parallel_state
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.conftest import look_in_this_process
from tests.engine import v2_cpu
from tests.families.making import Checkpoint
from vllm_flow.engine import states

if not torch.backends.cuda.is_built():
    # MiniCPM-V's resampler asks, and a torch that is built for CPU raises: vLLM 0.32 does not run it there.
    torch.cuda.is_current_stream_capturing = lambda: False


@contextmanager
def that_serves(checkpoint: Checkpoint) -> Iterator[None]:
    """While an engine of the checkpoint starts; what outlasts it is said where it is done."""
    look_in_this_process()
    _shrink(checkpoint)
    _have_experts_shared()
    if checkpoint.views:
        _have_views_multiplied()
    if checkpoint.chunks or "llvmlite.binding.ffi" in sys.modules:
        _have_numba_looked_at()
    if checkpoint.recurrent:
        from tests.families import gated_delta, state_copies

        gated_delta.install()
        if not v2_cpu.wanted():  # whose interpreter runs vLLM's kernels
            state_copies.install()
    with (
        # What vLLM's kernels would do wrong, `gated_delta` does not.
        mock.patch.object(states, "loses_drafts", lambda: not checkpoint.recurrent),
        _attention_of(checkpoint.attention),
        _in_chunks(checkpoint.latent),
    ):
        yield


@contextmanager
def _attention_of(backend: str) -> Iterator[None]:
    """The CPU platform, which has one attention backend only, gives out another one meanwhile."""
    if not backend or not current_platform.is_cpu():
        yield
        return
    # It sizes a launch by the device, also where an interpreter runs it: for the rest of the process.
    torch.cuda.get_device_capability = lambda *_args: (9, 0)
    path = AttentionBackendEnum[backend].get_path()
    with mock.patch.object(type(current_platform), "get_attn_backend_cls", lambda *_a, **_k: path):
        yield


@contextmanager
def _in_chunks(wanted: bool) -> Iterator[None]:
    """The CPU platform leaves chunks and prefix caching meanwhile, which it turns off for latent vectors."""
    if not wanted or not current_platform.is_cpu():
        yield
        return
    platform = type(current_platform)
    stock = platform.check_and_update_config

    def check(config: Any) -> None:
        asked = config.scheduler_config, config.cache_config
        names = ("enable_chunked_prefill", "max_num_batched_tokens", "enable_prefix_caching")
        own = [
            (part, name, getattr(part, name))
            for part in asked
            for name in names
            if hasattr(part, name)
        ]
        stock(config)
        for part, name, value in own:
            setattr(part, name, value)

    with mock.patch.object(platform, "check_and_update_config", staticmethod(check)):
        yield


def _shrink(checkpoint: Checkpoint) -> None:
    for where, shrink in checkpoint.shrunk.items():
        module, name = where.rsplit(".", 1)
        owner = import_module(f"vllm.model_executor.models.{module}")
        setattr(owner, name, shrink(getattr(owner, name)))


def _have_numba_looked_at() -> None:
    """vLLM's worker for CPUs looks at what every module holds; numba's library has any attribute, and none of use.

    Kimi-K2.5's image processor is compiled by numba, and drafts by ngram are, here in the worker's process.
    """
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    if library.__getattr__.__name__ == "look":
        return
    stock = library.__getattr__

    def look(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stock(self, name)

    library.__getattr__ = look


def _have_views_multiplied() -> None:
    """A matrix product of a CPU does not take a tensor whose rows are not in one piece: it gets a copy from now on."""
    stock = _custom_ops.onednn_mm
    if stock.__name__ == "multiply":
        return

    def multiply(handler: Any, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return stock(handler, rows.contiguous(), bias)

    _custom_ops.onednn_mm = multiply


def _have_experts_shared() -> None:
    """vLLM makes the group of workers that share experts with the first engine of a process, if that has some."""
    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        world = parallel_state.get_world_group()
        backend = torch.distributed.get_backend(world.device_group)
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [[0]], world.local_rank, backend, group_name="ep"
        )
