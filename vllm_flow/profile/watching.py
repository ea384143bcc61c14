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

from vllm_flow.layout import storage_groups

if TYPE_CHECKING:
    from vllm import LLM

POOL_SLACK = 1
"""vLLM keeps one block of a pool as its null block."""


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


def group_starts(llm: LLM, num_layers: int) -> tuple[int, ...]:
    """First layer of each KV-cache group; stock vLLM has one group of all layers."""
    groups = len(core_of(llm).scheduler.kv_cache_manager.coordinator.single_type_managers)
    return storage_groups(num_layers, num_layers // groups)


@contextlib.contextmanager
def watch(llm: LLM) -> Iterator[Watch]:
    """Record the engine's steps until the block ends."""
    core = core_of(llm)
    scheduler, runner = core.scheduler, runner_of(llm)
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool, seen = pool_of(llm), Watch()
    spent = {"schedule": 0.0, "metadata": 0.0, "plan": 0.0}
    last: dict[str, Any] = {}

    def timed(name: str, after: Callable[[Any], None] | None = None) -> Callable[..., Any]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    result = original(*args, **kwargs)
                finally:
                    spent[name] += time.perf_counter() - start
                if after is not None:
                    after(result)
                return result

            return call

        return wrap

    def scheduled(output: Any) -> None:
        last["scheduled"] = output.num_scheduled_tokens
        free = pool.get_num_free_blocks()
        seen.peak_blocks = max(seen.peak_blocks, len(pool.blocks) - POOL_SLACK - free)
        seen.peak_running = max(seen.peak_running, len(scheduler.running))

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        def call() -> Any:
            spent.update(dict.fromkeys(spent, 0.0))
            last.clear()
            start = time.perf_counter()
            result = original()
            seconds = time.perf_counter() - start
            tokens = last.get("scheduled")
            if tokens:
                seen.steps.append(Step(len(tokens), sum(tokens.values()), seconds, **spent))
            return result

        return call

    def freed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any, *args: Any, **kwargs: Any) -> Any:
            seen.blocks.append(
                tuple(
                    len(manager.req_to_blocks.get(request.request_id, ())) for manager in managers
                )
            )
            return original(request, *args, **kwargs)

        return call

    state = getattr(runner, "model_state", None)  # model runner V2
    wrappers: Sequence[tuple[Any, str, Callable[..., Any]]] = (
        (core, "step_fn", step),
        (scheduler, "schedule", timed("schedule", scheduled)),
        (scheduler, "update_from_output", timed("schedule")),
        (scheduler, "_free_blocks", freed),
        (state, "prepare_attn", timed("metadata")),
        (runner, "_build_attention_metadata", timed("metadata")),
        (runner, "_plan_flow_step", timed("plan")),
        (state, "_plan_flow_step", timed("plan")),
        (state, "_prepare_graph", timed("plan")),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, wrapper in wrappers:
            if owner is not None and hasattr(owner, name):
                stack.enter_context(_wrapped(owner, name, wrapper))
        yield seen


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
