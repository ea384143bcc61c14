"""Watches an engine's steps and its block pool from inside the process.

Wraps bound methods of one engine's objects and takes the wrappers off again; knows nothing of what is
measured for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_flow.engine.states import is_state
from vllm_flow.engine.worker.choosing.layer_ranks import LayerRanks
from vllm_flow.engine.worker.choosing.ranking import Ranker

if TYPE_CHECKING:
    from vllm import LLM

POOL_SLACK = 1
"""vLLM keeps one block of a pool as its null block."""
RANKING = (Ranker.look, Ranker.attended, Ranker.compare, Ranker.choose)
"""Methods in which the device ranks."""
LAYER_RANKING = (LayerRanks.note_keys, LayerRanks.unrotated)
"""Likewise; others of theirs are called by the ranker's."""


@dataclass
class Step:
    """One engine step. Times in seconds."""

    requests: int
    tokens: int
    seconds: float
    schedule: float
    """Scheduler: choosing, allocating, and taking the step's output back."""
    metadata: float
    """Attention metadata of all storage groups, the step plan included."""
    plan: float
    """The step plan and its metadata alone; 0 in a stock engine."""

    @property
    def holds_prompt(self) -> bool:
        """Whether any request had more than its one decoded row."""
        return self.tokens > self.requests


@dataclass
class Watch:
    """What was seen of an engine's steps and of its block pool."""

    steps: list[Step] = field(default_factory=list)
    blocks: list[tuple[int, ...]] = field(default_factory=list)
    """Per ended request, blocks held per KV-cache group."""
    peak_blocks: int = 0
    peak_running: int = 0

    def seconds(self, *, prompt: bool) -> float:
        """Time in steps with prompt tokens, or in pure decode steps."""
        return sum(step.seconds for step in self.steps if step.holds_prompt == prompt)

    def decode_batch(self) -> float:
        """Requests of a pure decode step, on average over the time spent in them."""
        steps = [step for step in self.steps if not step.holds_prompt]
        total = sum(step.seconds for step in steps)
        return sum(step.requests * step.seconds for step in steps) / total if steps else 0.0

    def host_share(self, part: str = "both") -> float:
        """Share of the steps' time spent in scheduler and/or step plan.

        Args:
            part: ``schedule``, ``plan``, ``metadata`` or ``both`` (schedule + plan).
        """
        total = sum(step.seconds for step in self.steps)
        names = ("schedule", "plan") if part == "both" else (part,)
        return sum(getattr(step, name) for step in self.steps for name in names) / (total or 1.0)


def core_of(llm: LLM) -> Any:
    """The engine core, which runs in this process."""
    return llm.llm_engine.engine_core.engine_core


def runner_of(llm: LLM) -> Any:
    """The model runner, which runs in this process."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner


def pool_of(llm: LLM) -> Any:
    """The KV block pool."""
    return core_of(llm).scheduler.kv_cache_manager.block_pool


def pool_blocks(llm: LLM) -> int:
    """Blocks that requests can hold."""
    return len(pool_of(llm).blocks) - POOL_SLACK


def group_starts(llm: LLM) -> tuple[int, ...]:
    """First layer of each KV-cache group; stock vLLM has one group of all layers."""
    return tuple(getattr(manager.kv_cache_spec, "first_layer", 0) for manager in _managers(llm))


def _managers(llm: LLM) -> list[Any]:
    """Those of groups that store keys and values."""
    managers = core_of(llm).scheduler.kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in managers if not is_state(manager.kv_cache_spec)]


@contextlib.contextmanager
def watch(llm: LLM) -> Iterator[Watch]:
    """Record the engine's steps until the block ends."""
    core = core_of(llm)
    scheduler, runner = core.scheduler, runner_of(llm)
    recorder = _Recorder(llm)
    state = getattr(runner, "model_state", None)  # model runner V2
    wrappers: Sequence[tuple[Any, str, Callable[..., Any]]] = (
        (core, "step_fn", recorder.step),
        (scheduler, "schedule", recorder.timed("schedule", recorder.scheduled)),
        (scheduler, "update_from_output", recorder.timed("schedule")),
        (scheduler, "_free_blocks", recorder.freed),
        (state, "prepare_attn", recorder.timed("metadata")),
        (runner, "_build_attention_metadata", recorder.timed("metadata")),
        (getattr(runner, "flow_state", None), "plan", recorder.timed("plan")),
        (state, "_prepare_graph", recorder.timed("plan")),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, wrapper in wrappers:
            if owner is not None and hasattr(owner, name):
                stack.enter_context(_wrapped(owner, name, wrapper))
        yield recorder.seen


class RankingClock:
    """Time that choosing which image tokens stay takes: on the host's clock, or the device's own."""

    def __init__(self) -> None:
        self._host = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def seconds(self) -> float:
        """So far; waits for the device."""
        if not self._events:
            return self._host
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._events) / 1e3

    def timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a method whose work counts as ranking."""

        def on_device(*args: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = original(*args)
            end.record()
            self._events.append((start, end))
            return result

        def on_host(*args: Any) -> Any:
            start = time.perf_counter()
            result = original(*args)
            self._host += time.perf_counter() - start
            return result

        return on_device if torch.cuda.is_available() else on_host


@contextlib.contextmanager
def ranking_clock(llm: LLM) -> Iterator[RankingClock]:
    """Time the ranking of an engine with the extension until the block ends.

    What counts: putting a picture's tokens in order, the attention row that scores them, and writing
    what stays. A choice by place, made on the host with the step plan, is no ranking.
    """
    runner = runner_of(llm)
    ranker, clock = runner.flow_state.ranker, RankingClock()
    with contextlib.ExitStack() as stack:
        for owner, methods in ((ranker, RANKING), (ranker.layer_ranks, LAYER_RANKING)):
            for method in methods:
                stack.enter_context(_wrapped(owner, method.__name__, clock.timed))
        yield clock


class _Recorder:
    """Wraps the methods of one engine so that what happens in a step adds up in a `Watch`."""

    def __init__(self, llm: LLM) -> None:
        self.seen = Watch()
        self._pool = pool_of(llm)
        self._scheduler = core_of(llm).scheduler
        self._managers = _managers(llm)
        self._spent = {"schedule": 0.0, "metadata": 0.0, "plan": 0.0}
        self._scheduled: dict[str, int] | None = None

    def timed(
        self, name: str, after: Callable[[Any], None] | None = None
    ) -> Callable[..., Callable[..., Any]]:
        """A wrapper that adds its method's time to a part of the step."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    result = original(*args, **kwargs)
                finally:
                    self._spent[name] += time.perf_counter() - start
                if after is not None:
                    after(result)
                return result

            return call

        return wrap

    def scheduled(self, output: Any) -> None:
        """Take down what the scheduler decided, and how full pool and batch are."""
        self._scheduled = output.num_scheduled_tokens
        used = len(self._pool.blocks) - POOL_SLACK - self._pool.get_num_free_blocks()
        self.seen.peak_blocks = max(self.seen.peak_blocks, used)
        self.seen.peak_running = max(self.seen.peak_running, len(self._scheduler.running))

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the engine's step: a record for each that scheduled anything."""

        def call() -> Any:
            self._spent.update(dict.fromkeys(self._spent, 0.0))
            self._scheduled = None
            start = time.perf_counter()
            result = original()
            seconds = time.perf_counter() - start
            if tokens := self._scheduled:
                self.seen.steps.append(
                    Step(len(tokens), sum(tokens.values()), seconds, **self._spent)
                )
            return result

        return call

    def freed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the release of a request's blocks: how many it held in each group."""

        def call(request: Any, *args: Any, **kwargs: Any) -> Any:
            held = (m.req_to_blocks.get(request.request_id, ()) for m in self._managers)
            self.seen.blocks.append(tuple(len(blocks) for blocks in held))
            return original(request, *args, **kwargs)

        return call


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Hide a method of one instance behind ``wrapper(method)``."""
    own = vars(owner).get(name)
    setattr(owner, name, wrapper(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
