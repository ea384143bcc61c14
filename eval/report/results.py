"""What a run says, as records: the shape of a summary. (pure)

Made by `vllm_flow.eval.report.summary`; read by figures, tables and the page. Knows no files and no drawing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_flow.eval.report.beside import Lengths
from vllm_flow.eval.report.savings import Saving
from vllm_flow.eval.statistics.bootstrap import Comparison
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.eval.statistics.verdicts import FoundCliff, Verdict
from vllm_flow.eval.tasks.base import Scored


@dataclass(frozen=True)
class Options:
    """How a run is read."""

    confidence: float = 0.95
    tolerance: float = 0.01
    """Loss that is put up with, in the headline metric's unit: 0.01 is one percentage point."""
    power: float = 0.8
    """Of the smallest difference that the sample could have shown."""
    resamples: int = 2000
    swaps: int = 9999
    seed: int = 0

    @property
    def level(self) -> float:
        """Error rate of tests."""
        return 1 - self.confidence


@dataclass(frozen=True)
class Policy:
    """A policy as `run.json` names it."""

    name: str
    kind: str
    cliff: int | None = None

    def layer(self, num_layers: int | None) -> int | None:
        """Layers that see the image, where the policy is a cliff or an end of that axis."""
        if self.kind == "baseline":
            return num_layers
        return self.cliff if self.kind in ("cliff", "text-only") else None


def policies_of(
    meta: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> tuple[Policy, ...]:
    """A run's policies, the baseline first; those that only its answers name have the kind `unlisted`."""
    listed = [Policy(p["name"], p["kind"], p.get("cliff")) for p in meta.get("policies", [])]
    known = {policy.name for policy in listed}
    extra = dict.fromkeys(row["policy"] for row in answers if row["policy"] not in known)
    listed += [Policy(name, "unlisted") for name in extra]
    return tuple(sorted(listed, key=lambda p: p.kind != "baseline"))


@dataclass(frozen=True)
class Compared:
    """A metric against the baseline."""

    comparison: Comparison
    p_corrected: float
    """By Holm, over the policies of the task."""
    detectable: float
    """Smallest true difference that would have been found with `Options.power`."""
    verdict: Verdict
    unseen: float = 0.0
    """Share of changed answers that the pictures compared may have missed altogether."""


@dataclass(frozen=True)
class PolicyResult:
    """A task under a policy."""

    policy: Policy
    answered: int
    failed: int
    missing: int
    paired: int
    """Items that have an answer here and under the baseline; comparisons rest on these."""
    values: Mapping[str, Interval]
    """Every metric, on all answered items; empty where there are none."""
    against: Mapping[str, Compared]
    """Every metric against the baseline; empty for the baseline itself and where no pair is there."""
    gained: int = 0
    """Pairs whose score is higher than under the baseline."""
    lost: int = 0
    agreement: Interval | None = None
    """Share of answers read as the baseline's were; None for the baseline itself."""
    where_reduced_loses: Interval | None = None
    """Mean score on `TaskResult.reduced_loses`; None where there are none."""
    lengths: Lengths | None = None
    """Of its answers; None where they were not recorded."""
    mcnemar_p: float | None = None
    """Of right and wrong answers, taking questions for independent; None where scores are not 0/1."""


@dataclass(frozen=True)
class TaskResult:
    """Everything about one task."""

    name: str
    headline: str
    higher_is_better: bool
    binary: bool
    items: int
    pictures: int
    """Units that are resampled: distinct pictures, and items without one."""
    exact: frozenset[str]
    """Metrics compared by the exact McNemar test and Newcombe's interval: those that are the share of
    right answers, if no picture is asked about twice. The others: by resampling pictures."""
    metrics: tuple[str, ...]
    """The headline first."""
    policies: tuple[PolicyResult, ...]
    """In the run's order, but the baseline first."""
    cliff: FoundCliff | None
    """None where there is no baseline or no cliff with answers."""
    scores: Mapping[str, Mapping[str, Scored]]
    """Policy's name -> item's id -> what the answer was worth."""
    reduced_loses: int = 0
    """Items that score lower than under the baseline with any of the downsampled pictures asked."""
    unclear: str = ""
    """What to say of answers in which the task's rule finds nothing that it looks for."""
    partly: tuple[str, ...] = ()
    """What to say of metrics of which only some parts have answers."""

    @property
    def baseline(self) -> PolicyResult | None:
        return next((r for r in self.policies if r.policy.kind == "baseline" and r.answered), None)

    def method(self, metric: str) -> str:
        """How a metric was compared."""
        return "exact" if metric in self.exact else "resampling"

    def result(self, policy: str) -> PolicyResult | None:
        """The result under the policy of that name."""
        return next((r for r in self.policies if r.policy.name == policy), None)


@dataclass(frozen=True)
class Summary:
    """A run, read."""

    num_layers: int | None
    policies: tuple[Policy, ...]
    tasks: tuple[TaskResult, ...]
    savings: tuple[Saving, ...]
    """Per policy over all tasks."""
    task_savings: Mapping[str, tuple[Saving, ...]] = field(default_factory=dict)
    """Per task and policy."""
    errors: Mapping[tuple[str, str], Counter[str]] = field(default_factory=dict)
    """(task, policy) -> reasons."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Tasks that could not be summarised, with the reason."""
