"""Workers whose model runner evicts, one per platform.

Seam: ``ParallelConfig.worker_cls``. A worker builds its runner inside ``init_device``; ours gives
that runner the class of its generation, so no upstream code is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.platforms import current_platform

from vllm_flow.engine import adoption, obstacles
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.worker import group_memory
from vllm_flow.engine.worker.choosing import farthest_first
from vllm_flow.engine.worker.passes import pieces
from vllm_flow.engine.worker.runner_v1 import FlowRunnerV1
from vllm_flow.engine.worker.runner_v2 import FlowRunnerV2
from vllm_flow.engine.worker.worker_state import WorkerState
from vllm_flow.patches import pieces as pieces_patch

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class FlowWorker(PlatformWorker):  # type: ignore[valid-type, misc]
    """The platform's worker with a runner that evicts."""

    def init_device(self, *args: Any, **kwargs: Any) -> None:
        super().init_device(*args, **kwargs)
        settings = FlowSettings.of(self.vllm_config)
        assert settings is not None, "this worker class is set by vLLM-Flow's configuration"
        if pieces.compiles_in_pieces(self.vllm_config):
            pieces_patch.apply(pieces.piece_of)
        runner = self.model_runner
        state = WorkerState(settings, runner.vllm_config)
        if self.use_v2_model_runner:
            adoption.adopt(runner, FlowRunnerV2, flow_state=state)
        else:
            adoption.adopt(runner, FlowRunnerV1, flow_state=state)

    def determine_available_memory(self) -> int:
        available: int = super().determine_available_memory()
        return available if current_platform.is_cpu() else group_memory.less(self, available)

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        # By the end of vLLM's own, whatever is still to be compiled is reported, or ends the engine.
        if self.vllm_config.kernel_config.enable_jit_warmup:
            farthest_first.compile_all(self.model_runner.device)
        return super().compile_or_warm_up_model(*args, **kwargs)

    def flow_obstacles(self, added_ranks: Mapping[str, str]) -> dict[str, str]:
        """What this worker cannot do, and why; asked by :mod:`vllm_flow.engine.obstacles`.

        Args:
            added_ranks: other packages' ranks in the front end's environment.
        """
        found: dict[str, str] = self.model_runner.flow_state.obstacles()
        return found | obstacles.missing_ranks(added_ranks)

    def _should_warm_up_model(self) -> bool:
        """Whether the CPU's worker warms up: always, where the engine compiles.

        Without that, the first compiled step would be the first that no row leaves: a decode of one request, whose
        one row torch takes for a constant.
        """
        compiled = self.vllm_config.compilation_config.mode.name != "NONE"
        return compiled or super()._should_warm_up_model()
