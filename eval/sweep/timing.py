"""Times a prefill under every policy of a run, so that scores can be seen against time as well as tokens.

One engine of its own, with all cores or one GPU, once the answers are there: requests share steps while
they are answered, so their times say little. Every policy has its turn in every round, in an order that
changes; pictures are encoded, and reduced, before the clock runs. Writes RUN/times.json.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.sweep.engine_actor import Ask, EngineActor
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.machines import Machine, Pool, alive
from vllm_flow.eval.sweep.pictures import picture_key, read_pictures
from vllm_flow.eval.sweep.work import TaskWork, plan_work
from vllm_flow.outputs import write_text
from vllm_flow.user_text import parse_json

FILE = "times.json"
REQUESTS = 4
"""Prefilled at once, each with a picture of its own."""

Times = dict[str, list[float]]
"""Policy -> seconds, round by round."""


class Stopwatch:
    """An engine that is asked for first tokens alone."""

    def __init__(self, options: EngineOptions) -> None:
        self.actor = EngineActor(options)

    def measure(self, items: Sequence[Mapping[str, Any]], rounds: int, seed: int) -> Times:
        """Seconds of a prefill of all items, per policy and round; one round before them warms up."""
        engine, order = self.actor, list(self.actor.options.policies)
        pictures = read_pictures(items, engine.options.background)
        known = [item for item in items if not isinstance(pictures[picture_key(item)], Exception)]
        shuffler, found = random.Random(seed), Times()
        embedded: dict[str, Sequence[Any]] = {}
        for number in range(rounds + 1):
            shuffler.shuffle(order)
            for policy in order:
                grid = None
                if engine.options.full_grid is not None and engine.geometry is not None:
                    grid = policy.grid(engine.options.full_grid, engine.geometry.num_layers)
                asks = [Ask(item, policy, pictures[picture_key(item)], grid) for item in known]
                if grid is not None and policy.name not in embedded:
                    embedded[policy.name] = engine.downsampler.embed(
                        [ask.picture for ask in asks], grid
                    )
                ready = embedded.get(policy.name, [None] * len(asks))
                for ask, embedding in zip(asks, ready, strict=True):
                    engine.enqueue(ask, policy.request_keys(), embedding, max_tokens=1)
                outputs = engine.llm.wait_for_completion(use_tqdm=False)
                if number:
                    found.setdefault(policy.name, []).append(seconds_of(outputs))
        return found


def seconds_of(outputs: Sequence[Any]) -> float:
    """From the first request scheduled to the last first token, by the engine's own clock."""
    metrics = [output.metrics for output in outputs]
    return float(max(m.first_token_ts for m in metrics) - min(m.scheduled_ts for m in metrics))


def time_policies(
    path: Path,
    tasks: Sequence[TaskWork],
    options: EngineOptions,
    pool: Pool,
    rounds: int,
    hardware: str,
) -> None:
    """Time the policies of `options`, unless the run has the times of all of them already.

    Raises:
        OutputError: they cannot be written.
    """
    import ray

    names = {policy.name for policy in options.policies}
    if names <= known(path).keys():
        print(f"{path / FILE} has the times of all these policies; to time them anew, delete it.")
        return
    rows = items_of(tasks, options)
    if not rows:
        print("No question has a picture, so that no prefill is timed.")
        return
    print(
        f"Timing prefills of {counted(len(rows), 'request')}, {counted(rounds, 'round')} of "
        f"{counted(len(names), 'policy', 'policies')}."
    )
    actor = ray.remote(Stopwatch).options(**placement(pool, alive())).remote(options)
    try:
        seconds = ray.get(actor.measure.remote(rows, rounds, options.seed))
    finally:
        ray.kill(actor)
    record = {
        "requests": len(rows), "rounds": rounds, "hardware": hardware, "seconds": seconds,
    }  # fmt: skip
    write_text(path / FILE, json.dumps(record, indent=1) + "\n")


def placement(pool: Pool, machines: Sequence[Machine]) -> dict[str, float]:
    """What the engine takes of the cluster: a GPU, or all the cores that the sweep's engines had and one machine has.

    Whole machines are rare in a cluster of GPUs.
    """
    if pool.num_gpus:
        return {"num_gpus": pool.num_gpus}
    largest = max((machine.cpus for machine in machines), default=1)
    return {"num_cpus": min((pool.num_cpus or 1) * pool.engines, largest)}


def known(path: Path) -> Mapping[str, Any]:
    """The policies that have been timed; none where the file is not there or damaged."""
    try:
        return dict(parse_json((path / FILE).read_text("utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def items_of(tasks: Sequence[TaskWork], options: EngineOptions) -> list[dict[str, Any]]:
    """The first questions with pictures of their own, from the first task that has any."""
    for work in tasks:
        chosen: dict[str, Any] = {}
        for item in work.items:
            if item.image is not None and len(chosen) < REQUESTS:
                chosen.setdefault(item.image, item)
        if chosen:
            one = replace(work, items=list(chosen.values()))
            return plan_work([one], options.policies, set())
    return []
