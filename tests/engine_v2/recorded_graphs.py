"""CUDA graphs without a GPU: what was captured runs again with the Python objects of the capture.

Graphs of pieces are not replayed, but steps take their padded sizes.

A replay of a real graph sees the addresses of its capture and no Python of the step. Here a replay
calls the captured forward pass with the captured metadata objects, so that whatever a step did not
write into the memory they point at stays as it was at capture. Memory pools, streams and kernels that
cannot be captured are beyond it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.gpu import cudagraph_utils, model_runner
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

from vllm_flow.engine.worker import decode_graphs

if TYPE_CHECKING:
    from tests.engine.harness import Engine


class Recorder:
    """Stands in for the capturing and replaying of vLLM's graph manager."""

    def __init__(self) -> None:
        self.replayed: list[int] = []
        """Rows of each replayed step, padding included."""
        self.padded: list[int] = []
        """Rows of padding of each step that would run in captured pieces."""
        self.widths: list[int] = []
        """Rows of each request in it."""
        self.drafts: list[int] = []
        """Rows of each replayed call of a drafter."""
        self._schedules: list[Callable[[], None]] = []
        self._capturing = False

    def capture(self, manager: Any, create_forward_fn: Any, *args: Any, **kwargs: Any) -> None:
        """As vLLM does: twice per size, once to warm up and once for good."""
        self._capturing = True
        for descriptor in manager._capture_descs.get(CUDAGraphMode.FULL, ()):
            create_forward_fn(descriptor, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(descriptor, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[descriptor] = forward
        manager._graphs_captured = True
        self._capturing = False

    def replay(self, manager: Any, descriptor: Any) -> None:
        for schedule in self._schedules:
            schedule()
        manager.graphs[descriptor](CUDAGraphMode.NONE)
        if isinstance(manager, ModelCudaGraphManager):
            self.replayed.append(descriptor.num_tokens)
            self.widths.append(descriptor.num_tokens // descriptor.num_reqs)
        else:
            self.drafts.append(descriptor.num_tokens)

    def dispatch(self, manager: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Note what a step of captured pieces is padded by."""
        descriptor = original(manager, *args, **kwargs)
        if descriptor.cg_mode == CUDAGraphMode.PIECEWISE:
            self.padded.append(descriptor.num_tokens - kwargs.get("num_tokens", args[1]))
        return descriptor

    def build(self, original: Any, builder: Any, prefix: int, common: Any, **kwargs: Any) -> Any:
        """Build a layer's metadata, and remember to plan its work anew.

        The CPU kernel takes a schedule made on the host. FlashAttention makes its own on the device,
        inside the graph, from the lengths it finds.
        """
        metadata = original(builder, prefix, common, **kwargs)
        if self._capturing:

            def schedule() -> None:
                metadata.scheduler_metadata = original(builder, 0, common).scheduler_metadata

            self._schedules.append(schedule)
        return metadata


@contextmanager
def recorded_graphs(
    engine: Engine, sizes: list[int], mode: CUDAGraphMode = CUDAGraphMode.FULL_DECODE_ONLY
) -> Iterator[Recorder]:
    """Run the engine's decode steps as recorded graphs of these sizes."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    with _recording(runner, sizes, mode) as recorder:
        yield recorder


_in_worker = ExitStack()
_recorders: list[Recorder] = []


def record(worker: Any, sizes: list[int], mode: CUDAGraphMode) -> None:
    """The same in a worker that is a process of its own, until it ends; for vLLM's ``collective_rpc``.

    As on a GPU, some graphs are first captured over a cache of profiling, by which vLLM measures their memory.
    """
    runner = worker.model_runner
    config = runner.kv_cache_config
    with _stand_ins(Recorder(), runner.compilation_config, sizes, mode):
        cudagraph_utils._init_minimal_kv_cache_for_profiling(runner)
        _capture(runner)
        cudagraph_utils._teardown_profiling_state(runner)
    runner.initialize_kv_cache(config)
    _recorders.append(_in_worker.enter_context(_recording(runner, sizes, mode)))


def recorded(worker: Any) -> tuple[list[int], list[int]]:
    """Rows of each step that was replayed, and rows of padding of each that would run in captured pieces."""
    return _recorders[-1].replayed, _recorders[-1].padded


@contextmanager
def _recording(runner: Any, sizes: list[int], mode: CUDAGraphMode) -> Iterator[Recorder]:
    recorder = Recorder()
    with _stand_ins(recorder, runner.compilation_config, sizes, mode):
        manager = ModelCudaGraphManager(
            runner.vllm_config,
            runner.device,
            mode,
            runner.decode_query_len,
        )
        with (
            mock.patch.object(runner, "cudagraph_manager", manager),
            _drafters_graphs(runner.speculator, mode),
        ):
            _capture(runner)
            yield recorder
        runner.model_state.flow_buffers = None


def _capture(runner: Any) -> None:
    with mock.patch.object(model_runner.torch, "accelerator", _NoMemory):
        runner.capture_model(profile_only=True)


@contextmanager
def _stand_ins(
    recorder: Recorder, compilation: Any, sizes: list[int], mode: CUDAGraphMode
) -> Iterator[None]:
    """In the places of what captures and replays, for a runner whose ``CompilationConfig`` this is."""
    build, dispatch = CPUAttentionMetadataBuilder.build, CudaGraphManager.dispatch

    def built(
        builder: Any, common_prefix_len: int, common_attn_metadata: Any, **kwargs: Any
    ) -> Any:
        return recorder.build(build, builder, common_prefix_len, common_attn_metadata, **kwargs)

    with (
        mock.patch.object(decode_graphs, "REPLAYABLE", ("CPU_ATTN",)),
        mock.patch.object(CPUAttentionMetadataBuilder, "build", built),
        mock.patch.object(
            CudaGraphManager, "capture", functools.partialmethod(_call, recorder.capture)
        ),
        mock.patch.object(
            CudaGraphManager,
            "dispatch",
            functools.partialmethod(_call, recorder.dispatch, dispatch),
        ),
        mock.patch.object(cudagraph_utils, "has_compiled_submodule", lambda model: True),
        mock.patch.object(
            CudaGraphManager, "run_fullgraph", functools.partialmethod(_call, recorder.replay)
        ),
        mock.patch.object(type(current_platform), "get_global_graph_pool", lambda self: None),
        mock.patch.object(compilation, "cudagraph_mode", mode),
        mock.patch.object(compilation, "cudagraph_capture_sizes", sizes),
        mock.patch.object(compilation, "max_cudagraph_capture_size", max(sizes)),
    ):
        yield


class _NoMemory:
    """What vLLM asks of the device while it captures."""

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def get_memory_info() -> tuple[int, int]:
        return 0, 0


@contextmanager
def _drafters_graphs(speculator: Any, mode: CUDAGraphMode) -> Iterator[None]:
    """Let a drafter that has graphs capture some, for as long as the context lasts."""
    if speculator is None:
        yield
        return
    before = dict(vars(speculator))
    speculator.init_cudagraph_manager(mode)
    try:
        yield
    finally:
        for name, value in before.items():
            if name.endswith("cudagraph_manager"):
                setattr(speculator, name, value)


def _call(self: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(self, *args, **kwargs)
