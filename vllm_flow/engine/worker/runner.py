"""What both of vLLM's model runners do alike once they evict: each has a worker's state, and asks it.

Seams: ``load_model``, ``get_kv_cache_spec``, ``initialize_kv_cache``, ``reset_encoder_cache``, ``execute_model``,
``_dummy_run`` and ``sample_tokens`` of either runner. Takes no decision.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from vllm_flow.engine.draft_layers import check_layers
from vllm_flow.engine.groups import group_specs, storage_layer
from vllm_flow.engine.worker import group_memory, variant_builders
from vllm_flow.engine.worker.device_step import DeviceStep
from vllm_flow.engine.worker.worker_state import WorkerState

_EAGER_PASS = DeviceStep(variants={}, profiles=True)


class FlowRunner:
    """Before the runner's own class; `runner_v1` and `runner_v2` add what differs."""

    flow_state: WorkerState
    flow_without_graph = False
    """Whether the step that is being prepared may not run as a graph, in any of the engines that share experts."""
    flow_scratch: Sequence[int] = ()
    """See :func:`vllm_flow.engine.worker.group_memory.scratch_of`; nothing where no graphs were profiled."""
    flow_variants_scratch: int = 0
    """Likewise :func:`vllm_flow.engine.worker.group_memory.scratch_of_variants`."""
    model: Any
    attn_groups: Any
    vllm_config: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.flow_state.use_model(self)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs, settings = super().get_kv_cache_spec(), self.flow_state.settings  # type: ignore[misc]
        check_layers(specs, self._flow_drafters(), lambda name: storage_layer(name, settings))
        return group_specs(specs, settings)

    def _flow_drafters(self) -> Collection[str]:
        """Names of the attention layers that vLLM says are a drafter's."""
        raise NotImplementedError

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)  # type: ignore[misc]
        graphs = self.vllm_config.compilation_config.cudagraph_mode
        variant_builders.settle(self.attn_groups, graphs.decode_mode().name == "FULL")
        self.flow_scratch = group_memory.scratch_of(self.attn_groups)
        self.flow_variants_scratch = group_memory.scratch_of_variants(self.attn_groups)
        self.flow_state.use_cache(self, kv_cache_config, is_profiling)

    def reset_encoder_cache(self) -> None:
        super().reset_encoder_cache()  # type: ignore[misc]
        self.flow_state.forget_pictures()

    def execute_model(
        self,
        scheduler_output: Any = None,
        intermediate_tensors: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.flow_state.hook.received = intermediate_tensors
        return super().execute_model(scheduler_output, intermediate_tensors, *args, **kwargs)  # type: ignore[misc]

    def _dummy_run(self, *args: Any, is_profile: bool = False, **kwargs: Any) -> Any:
        """Memory is profiled with the pass that takes more, compiled or eager."""
        self.flow_without_graph = False
        if is_profile and self._flow_eager_pass_counts():
            self.flow_state.hook.arm(_EAGER_PASS)
            super()._dummy_run(*args, is_profile=True, **kwargs)  # type: ignore[misc]
        return super()._dummy_run(*args, is_profile=is_profile, **kwargs)  # type: ignore[misc]

    def _flow_eager_pass_counts(self) -> bool:
        """Whether steps may run in either way, and vLLM sizes its KV cache by what they take."""
        config = self.vllm_config
        compiled = config.compilation_config.mode.name != "NONE"
        return compiled and config.cache_config.kv_cache_memory_bytes is None

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self.flow_state.attach(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]
