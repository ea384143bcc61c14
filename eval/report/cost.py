"""What every policy of a run costs, and which of them are one method at several budgets. (pure)

Cost is counted as recorded, not as asked for: image tokens that a decoder layer computes in prefill, on average
over layers and questions with a picture; and, where the run measured it, the time of a prefill beside the
baseline's. Knows answers' rows and `run.json`; scores nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.eval.report.results import Summary, TaskResult
from vllm_flow.eval.statistics.intervals import Interval, between
from vllm_flow.eval.sweep.policy import Policy, presets_of
from vllm_flow.policy import FlowPolicy
from vllm_flow.ranks import RANKS

BASELINE, CLIFF, DOWNSAMPLE = "baseline", "cliff", "fewer patches"
CHANCE = ("uniform", "random")
"""Ranks that look at nothing: what they keep is a control."""


@dataclass(frozen=True)
class Method:
    """A way to spend a budget: policies of one method differ in how much they keep."""

    name: str
    control: bool = False
    """A method that must be beaten by whatever claims to choose well."""


@dataclass(frozen=True)
class Times:
    """Prefill time beside the baseline's, round by round of one measurement."""

    ratio: float
    """The median; below 1 is faster."""
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Point:
    """A method at one budget on one task: its cost, its score, and over how many seeds."""

    method: Method
    policies: tuple[str, ...]
    """Those that differ in the seed alone."""
    names: tuple[str, ...]
    """Presets that are this policy."""
    tokens: float | None
    """Image tokens per layer, on average."""
    times: Times | None
    value: Interval
    """The score; over several seeds the mean of their scores and of their limits."""
    seeds: tuple[float, float] | None
    """Lowest and highest score of several seeds."""
    between: Interval | None = None
    """The mean score of such seeds, as far as these few tell it (`intervals.between`)."""

    @property
    def policy(self) -> str:
        """The policy's name, without its seed where there are several."""
        return self.policies[0] if len(self.policies) == 1 else without_seed(self.policies[0])


def read_policies(meta: Mapping[str, Any]) -> dict[str, Policy]:
    """The run's policies by name; those that this version cannot read are left out."""
    found = {}
    for record in meta.get("policies", []):
        try:
            found[record["name"]] = Policy.from_json(record)
        except (KeyError, ValueError, TypeError):
            continue
    return found


def method_of(policy: Policy) -> Method:
    """Which method a policy belongs to."""
    if policy.kind == "downsample":
        return Method(DOWNSAMPLE, control=True)
    flow = policy.flow()
    if flow is None:
        return Method(BASELINE if policy.kind == BASELINE else policy.name)
    late = ", after prefill" if flow.when == "decode" else ""
    if is_cliff(flow):
        return Method(CLIFF + late)
    (stages,) = flow.images
    parts = [
        f"none from layer {stage.layer}"
        if stage.rank is None
        else stage.rank + (f" from layer {stage.layer}" if stage.layer else "")
        for stage in stages
    ]
    return Method(", ".join(parts) + late, control=all(rank in CHANCE for rank in flow.ranks))


def is_cliff(flow: FlowPolicy) -> bool:
    """Whether everything leaves at a layer, or evenly spread at a layer and the next."""
    (stages,) = flow.images
    if len(stages) == 2 and stages[0].rank == "uniform":
        return stages[1].keep == 0 and stages[1].layer == stages[0].layer + 1
    return len(stages) == 1 and stages[0].keep == 0


def without_seed(name: str) -> str:
    """A policy's name without what says its seed."""
    return " ".join(word for word in name.split(" ") if not word.startswith("seed="))


def tokens_by_policy(
    answers: Sequence[Mapping[str, Any]], policies: Mapping[str, Policy], num_layers: int
) -> dict[tuple[str, str], float]:
    """(task, policy) -> image tokens per layer, on average over the questions with a picture."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in answers:
        tokens, saved = row.get("image_tokens"), row.get("prefill_rows_saved")
        policy = policies.get(row["policy"])
        if not tokens or policy is None or row["answer"] is None:
            continue
        if policy.kind != "downsample":  # whose tokens go through every layer
            if saved is None:
                continue
            tokens -= saved / num_layers
        found.setdefault((row["task"], row["policy"]), []).append(float(tokens))
    return {key: statistics.fmean(values) for key, values in found.items()}


def times_by_policy(measured: Mapping[str, Any] | None) -> dict[str, Times]:
    """Policy -> its time beside the baseline's, from what `vllm-flow eval --time` wrote."""
    seconds: Mapping[str, Sequence[float]] = (measured or {}).get("seconds", {})
    base = seconds.get(BASELINE)
    if not base:
        return {}
    found = {}
    for name, values in seconds.items():
        # Round by round, so that a slow moment of the machine hits both.
        ratios = [value / one for value, one in zip(values, base, strict=False)]
        if ratios:
            middle = statistics.median(ratios)
            found[name] = Times(middle, min(ratios), max(ratios), len(ratios))
    return found


def points(
    summary: Summary,
    task: TaskResult,
    policies: Mapping[str, Policy],
    tokens: Mapping[tuple[str, str], float],
    times: Mapping[str, Times],
    confidence: float = 0.95,
) -> list[Point]:
    """A task's policies with a score, by method and cost; those that differ in the seed are one point."""
    groups: dict[tuple[str, str], list[str]] = {}
    for result in task.policies:
        name = result.policy.name
        if name not in policies or task.headline not in result.values:
            continue
        flow = policies[name].flow()
        drawn = flow is not None and any(RANKS[rank].draws for rank in flow.ranks)
        groups.setdefault((without_seed(name) if drawn else name, ""), []).append(name)
    found = []
    for names in groups.values():
        values = [r.values[task.headline] for r in task.policies if r.policy.name in names]
        first = policies[names[0]]
        flow = first.flow()
        cost = [tokens[task.name, name] for name in names if (task.name, name) in tokens]
        found.append(
            Point(
                method=method_of(first),
                policies=tuple(names),
                names=() if flow is None else presets_of(flow, summary.num_layers or 0),
                tokens=statistics.fmean(cost) if cost else None,
                times=next((times[name] for name in names if name in times), None),
                value=Interval(*(
                    statistics.fmean(getattr(v, part) for v in values)
                    for part in ("value", "low", "high")
                )),
                seeds=(min(v.value for v in values), max(v.value for v in values))
                if len(values) > 1
                else None,
                between=between([v.value for v in values], confidence),
            )
        )  # fmt: skip
    return sorted(found, key=lambda p: (p.method.name, p.tokens if p.tokens is not None else 0.0))
