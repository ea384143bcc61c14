"""Chooses examples: items whose answer under a policy scores otherwise than under the baseline. (pure)"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vllm_flow.eval.report.results import TaskResult

LARGE = 0.5
"""Change of an item's score that makes a clear example; smaller ones serve where there is none."""


@dataclass(frozen=True)
class Flips:
    """Examples of one task under one policy."""

    policy: str
    lost: tuple[str, ...]
    """Item ids whose score fell; drawn at random from all of these."""
    gained: tuple[str, ...]
    lost_in_all: int
    gained_in_all: int


def choose_flips(task: TaskResult, count: int = 4, seed: int = 0) -> Flips | None:
    """At most `count` examples each way, None where no policy changed any score.

    The policy is the found cliff if an answer flipped there, else the next shallower one where one did,
    else the first other policy of the run.
    """
    candidates = [r for r in task.policies if r.gained or r.lost]
    if not candidates:
        return None
    start = task.cliff.found if task.cliff and task.cliff.found is not None else None

    def rank(index: int) -> tuple[bool, int, int]:
        cliff = candidates[index].policy.cliff if candidates[index].policy.kind == "cliff" else None
        shallower = cliff is not None and (start is None or cliff <= start)
        return (not shallower, -(cliff or 0) if shallower else 0, index)

    chosen = candidates[min(range(len(candidates)), key=rank)]
    base = task.baseline
    assert base is not None  # changes are counted against it
    before, after = task.scores[base.policy.name], task.scores[chosen.policy.name]
    change = {i: after[i].score - before[i].score for i in before if i in after}
    rng = random.Random(seed)

    def drawn(sign: int) -> tuple[str, ...]:
        moved = [i for i, by in change.items() if sign * by > 1e-9]
        rng.shuffle(moved)
        # Clear changes first, small ones by size; the sort is stable, so ties stay drawn.
        moved.sort(key=lambda i: -min(abs(change[i]), LARGE))
        return tuple(moved[:count])

    return Flips(chosen.policy.name, drawn(-1), drawn(1), chosen.lost, chosen.gained)
