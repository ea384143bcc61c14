"""Lets vLLM compile in pieces on a CPU, where it would compile the decoder as one; graphs of pieces are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context, set_forward_context
from vllm.platforms import current_platform

from tests.engine.cases import one_image
from tests.engine.compiling import allow_compiling
from tests.engine.harness import Engine
from vllm_flow.engine.worker.passes import pieces
from vllm_flow.engine.worker.passes.pieces import Piece, pieces_of


def compile_in_pieces(monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> None:
    """As vLLM does on CUDA; pieces are traced by Dynamo, and compiled by Inductor where ``backend`` says so."""
    allow_compiling(monkeypatch, inductor=True)
    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_keep(config: Any) -> None:
        check(config)
        compilation = config.compilation_config
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.backend = backend
        for name in vars(compilation.pass_config):
            if name.startswith("fuse_"):  # by kernels of CUDA's
                setattr(compilation.pass_config, name, False)
        compilation.compile_sizes = []  # what CUDA takes from the sizes of its graphs

    monkeypatch.setattr(pieces, "weak_ref_tensor", lambda tensor: tensor)  # an operator of CUDA's
    # Names operators of CUDA's; PyTorch does the same for any, with a copy.
    monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)
    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(check_and_keep))


class RecordedGraphs:
    """In the place of vLLM's ``CUDAGraphWrapper`` around a piece: replays read and write where the capture did.

    So what a step fails to put there shows as a wrong token. As graphs of all sizes share one pool, to replay one
    destroys what those captured before it have made.

    Args:
        pool: the outputs of every graph so far, by size; one for all pieces.
    """

    def __init__(self, run: Callable[..., Any], pool: dict[int, list[torch.Tensor]]) -> None:
        self._run, self._pool = run, pool
        self._entries: dict[Any, tuple[tuple[Any, ...], Sequence[torch.Tensor]]] = {}
        self.concrete_cudagraph_entries: dict[Any, Any] = {}
        """As vLLM's wrapper has them."""
        self.replayed: list[int] = []

    def __call__(self, *args: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return self._run(*args)
        key = context.batch_descriptor
        if key not in self._entries:
            found = self._run(*args)
            self._entries[key] = args, found if isinstance(found, tuple | list) else (found,)
            self.concrete_cudagraph_entries[key] = SimpleNamespace(cudagraph=True)
            self._pool.setdefault(key.num_tokens, []).extend(self._entries[key][1])
            return found
        given, outputs = self._entries[key]
        for now, then in zip(args, given, strict=True):
            if isinstance(then, torch.Tensor):
                assert now.data_ptr() == then.data_ptr(), "a graph reads where it was captured"
            else:
                assert now == then
        for size, outputs_before in self._pool.items():
            if size > key.num_tokens:  # vLLM captures the largest first
                for output in outputs_before:
                    output.fill_(torch.nan)
        found = self._run(*given)
        several = isinstance(found, tuple | list)
        for output, new in zip(outputs, found if several else (found,), strict=True):
            output.copy_(new)
        self.replayed.append(key.num_tokens)
        return outputs if several else outputs[0]


def record_pieces(engine: Engine, sizes: Iterable[int]) -> list[RecordedGraphs]:
    """Capture the engine's pieces in these sizes; the graphs, one per piece."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    found: list[Piece] | None = pieces_of(
        runner.vllm_config.compilation_config, engine.shape.layers
    )
    assert found is not None
    runner.flow_state.builder.graph_rows = max(sizes)
    graphs, pool = [], dict[int, list[torch.Tensor]]()
    for piece in found:
        piece._run = RecordedGraphs(piece._run, pool)
        graphs.append(piece._run)
    embeddings, positions = _buffers(engine, runner.model)
    for size in sizes:
        with set_forward_context(
            None,
            runner.vllm_config,
            num_tokens=size,
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
            batch_descriptor=BatchDescriptor(size),
        ):
            runner.model(
                input_ids=None, positions=positions[:size], inputs_embeds=embeddings[:size]
            )
    return graphs


def _buffers(engine: Engine, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the runner keeps embeddings and positions, which is where graphs read them."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append((kwargs["inputs_embeds"], kwargs["positions"]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        engine.run([one_image(29)])
    finally:
        hook.remove()
    embeddings, positions = found[0]
    assert embeddings._base is not None and positions._base is not None
    return embeddings._base, positions._base


@contextmanager
def left_as_given(model: Any) -> Iterator[None]:
    """Every call of the model meanwhile leaves its inputs as they were: they are the runner's."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    around = model.flow_hook.around_call

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.extend(
            (kwargs[name], kwargs[name].clone()) for name in ("inputs_embeds", "positions")
        )

    @contextmanager
    def compared(*given_to_it: Any) -> Iterator[None]:
        with around(*given_to_it):
            yield
        assert given and all(torch.equal(now, before) for now, before in given)
        given.clear()

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with mock.patch.object(model.flow_hook, "around_call", compared):
            yield
    finally:
        hook.remove()
