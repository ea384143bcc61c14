"""Puts the extension's classes where vLLM's tests take vLLM's own.

The tests import ``Scheduler``, ``AsyncScheduler`` and ``KVCacheManager`` by name; what they find
there are subclasses of those that first give each plain full-attention cache its storage groups,
and then are the extension's. Everything else stays stock: other caches (sliding windows, chunks, Mamba,
MLA, several groups), and whatever the tests build by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm.config.scheduler import SchedulerConfig
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched import async_scheduler, diffusion_scheduler, scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    SlidingWindowSpec,
)

from vllm_flow.engine.core.scheduler import FlowAsyncScheduler, FlowScheduler
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.groups import group_specs
from vllm_flow.engine.settings import CONFIG_KEY, FlowSettings
from vllm_flow.engine.states import is_state

# Imported above so that its classes derive from vLLM's own schedulers, not from ours.
assert issubclass(diffusion_scheduler.DiffusionScheduler, scheduler.Scheduler)

LAYERS = 12
"""Decoder layers where a test names no model."""


def grouped(config: KVCacheConfig, num_layers: int, num_groups: int) -> KVCacheConfig | None:
    """The same cache in storage groups, None where the extension would refuse it.

    The same memory: a layer's block is as large as before, so that of a group is smaller, and there
    are more of them (besides the null block).
    """
    if len(config.kv_cache_groups) != 1:
        return None
    (group,) = config.kv_cache_groups
    if type(group.kv_cache_spec) in (SlidingWindowSpec, ChunkedLocalAttentionSpec):
        return None  # stored whole with the extension, and these tests count what is freed
    if is_state(group.kv_cache_spec):
        return None  # states alone, without a layer that has keys
    settings = FlowSettings.read(
        {"group_layers": num_layers // num_groups}, EngineFacts(num_layers)
    )
    names = [f"layers.{first}.attn" for first in settings.group_starts]
    try:
        specs = group_specs(dict.fromkeys(names, group.kv_cache_spec), settings)
    except ValueError:
        return None
    return replace(
        config,
        num_blocks=num_groups * (config.num_blocks - 1) + 1,
        kv_cache_groups=[
            replace(group, layer_names=[name], kv_cache_spec=specs[name]) for name in names
        ],
    )


def install(num_groups: int, used: Callable[[], None]) -> None:
    """Replace the names that vLLM's tests import; before they are imported.

    Args:
        used: called whenever the extension's classes are built in the place of vLLM's.
    """
    scheduler.Scheduler = _scheduler(scheduler.Scheduler, FlowScheduler, num_groups, used)
    async_scheduler.AsyncScheduler = _scheduler(
        async_scheduler.AsyncScheduler, FlowAsyncScheduler, num_groups, used
    )
    kv_cache_manager.KVCacheManager = _manager(num_groups, used)


def _scheduler(stock: type, flow: type, num_groups: int, used: Callable[[], None]) -> type:
    class Upstream(flow):  # type: ignore[misc, valid-type]
        def __new__(cls, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
            num_layers = vllm_config.model_config.get_total_num_hidden_layers()
            if grouped(kv_cache_config, num_layers, num_groups) is None:
                return stock(vllm_config, kv_cache_config, *args, **kwargs)
            return super().__new__(cls)

        def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kw: Any) -> None:
            num_layers = vllm_config.model_config.get_total_num_hidden_layers()
            config = grouped(kv_cache_config, num_layers, num_groups)
            vllm_config.additional_config = _options(num_layers, num_groups)
            vllm_config.cache_config.num_gpu_blocks = config.num_blocks
            super().__init__(vllm_config, config, *args, **kw)
            used()

        def _mamba_block_aligned_split(self, *args: Any, **kwargs: Any) -> int:
            # Of an object that a test has built by hand, which is no scheduler.
            if not isinstance(self, Upstream):
                return stock._mamba_block_aligned_split(self, *args, **kwargs)
            return super()._mamba_block_aligned_split(*args, **kwargs)

    Upstream.__name__ = Upstream.__qualname__ = flow.__name__
    return Upstream


def _manager(num_groups: int, used: Callable[[], None]) -> type:
    class Upstream(KVCacheManager):
        def __init__(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
            config = grouped(kv_cache_config, LAYERS, num_groups)
            super().__init__(config or kv_cache_config, *args, **kwargs)
            if config is not None:
                _Adopted(self, num_groups)
                used()

    return Upstream


class _BareScheduler:
    """What a scheduler has once vLLM's constructor is through, as far as ours looks."""

    connector = None
    num_spec_tokens = 0

    def __init__(self, manager: KVCacheManager, num_groups: int) -> None:
        self.kv_cache_manager = manager
        self.hash_block_size = manager.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.cache_config = SimpleNamespace(
            cache_dtype="auto", enable_prefix_caching=manager.enable_caching
        )
        self.vllm_config = SimpleNamespace(
            additional_config=_options(LAYERS, num_groups),
            model_config=SimpleNamespace(
                get_total_num_hidden_layers=lambda: LAYERS,
                served_model_name="model",
                is_mm_prefix_lm=False,
                multimodal_config=None,
                is_hybrid=False,
                hf_text_config=SimpleNamespace(),
                model_arch_config=[SimpleNamespace(head_size=1, total_num_kv_heads=1)] * LAYERS,
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
            scheduler_config=SchedulerConfig.default_factory(),
            cache_config=self.cache_config,
            kv_transfer_config=None,
            speculative_config=None,
            num_speculative_tokens=0,
            num_prefill_lookahead_tokens=0,
        )


class _Adopted(FlowScheduler.__bases__[0], _BareScheduler):  # type: ignore[misc]
    """Prepares a KV-cache manager that has no scheduler, by the scheduler's own constructor."""


def _options(num_layers: int, num_groups: int) -> dict[str, Any]:
    return {CONFIG_KEY: {"group_layers": num_layers // num_groups}}
