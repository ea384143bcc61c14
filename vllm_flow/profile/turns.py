"""Decode steps of two engines, a few of the one and a few of the other in turn.

A step takes milliseconds, a machine's moods last seconds: whole runs set side by side differ by more than what is asked
for. So two batches decode at the same time, one per engine, and a ratio is taken of steps that lie next to each other.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.profile import ideal, load, watching
from vllm_flow.profile.engines import System
from vllm_flow.profile.findings import Decode, Ratio, Spread

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_flow.profile.rounds import Bench

TURN = 8
"""Steps of a turn. The first is not counted: the processor's caches are the other engine's, and on a GPU its last step
may still be running."""


def decode(bench: Bench, batch: int, rounds: int) -> tuple[Decode, ...]:
    """Pure decode steps of one batch, of each system beside stock vLLM's.

    Raises:
        ValueError: no turn had a second step of the whole batch.
    """
    _, prompts = bench.requests(batch)
    stock, *others = bench.systems
    step_ms: dict[str, list[float]] = defaultdict(list)
    speedups: dict[str, list[float]] = {stock.name: [1.0] * rounds}
    what, shuffler = f"decode, {bench.work.image_tokens} image tokens", random.Random(bench.seed)
    for number, other in bench.rounds(rounds, what, others or (stock,)):
        sides = (stock, other)[: 1 + (other is not stock)]
        turns = in_turns(bench, sides, prompts, shuffler)
        if not number:
            continue
        for side, seconds in zip(sides, zip(*turns, strict=True), strict=True):
            step_ms[side.name].append(1e3 * statistics.median(seconds))
        if other is not stock:
            ratio = statistics.median(first / second for first, second in turns)
            speedups.setdefault(other.name, []).append(ratio)
    return tuple(
        Decode(
            system=system.name,
            image_tokens=bench.work.image_tokens,
            batch=batch,
            step_ms=Spread.of(step_ms[system.name]),
            speedup=Ratio.of(speedups[system.name]),
            ideal_bytes=ideal.decode_ratio(bench.shape, bench.work, bench.seen(system), batch),
        )
        for system in bench.systems
    )


def in_turns(
    bench: Bench,
    systems: Sequence[System],
    prompts: Sequence[dict[str, Any]],
    shuffler: random.Random,
) -> list[tuple[float, ...]]:
    """The same requests by each system, which must have engines of their own, step for step.

    Returns:
        Of each turn, one value per system: the median of its steps, in seconds.

    Raises:
        ValueError: as :func:`decode`.
    """
    llms = [bench.engine(system) for system in systems]
    for llm, system in zip(llms, systems, strict=True):
        params = load.params_of(system, bench.work.output_tokens)
        for index, prompt in enumerate(bench.unseen(prompts)):
            llm.llm_engine.add_request(f"turn-{index}", prompt, params)
        _prefill(llm, len(prompts))
    turns: list[tuple[float, ...]] = []
    order = list(range(len(llms)))
    while all(llm.llm_engine.has_unfinished_requests() for llm in llms):
        shuffler.shuffle(order)
        taken = {index: _turn(llms[index], len(prompts)) for index in order}
        if all(taken.values()):
            turns.append(tuple(statistics.median(taken[index]) for index in sorted(taken)))
    for llm in llms:
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    if not turns:
        decoding = counted(len(prompts), "request only decodes", "requests all only decode")
        raise ValueError(
            f"of {counted(bench.work.output_tokens, 'output token')} no two steps were left in which {decoding}; use a "
            "larger --output-tokens, or a smaller --decode-batch."
        )
    return turns


def _prefill(llm: LLM, batch: int) -> None:
    """Up to the first step in which the whole batch decodes, or the end of its requests."""
    with watching.watch(llm) as seen:
        while llm.llm_engine.has_unfinished_requests() and not _decoding(seen.steps[-1:], batch):
            llm.llm_engine.step()


def _turn(llm: LLM, batch: int) -> list[float]:
    """Seconds of each counted step."""
    with watching.watch(llm) as seen:
        for _ in range(TURN):
            if llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
    return [step.seconds for step in _decoding(seen.steps[1:], batch)]


def _decoding(steps: Sequence[watching.Step], batch: int) -> list[watching.Step]:
    return [step for step in steps if not step.holds_prompt and step.requests == batch]
