"""`vllm-flow report A B ...`: runs on the questions that they share, each beside one of them, the reference. (pure)

Two models or checkpoints, two versions of vLLM, CPU against GPU, one method against a peer's: whatever differs
between runs, each question is its own pair. A question counts in a pair where both runs answered it; which questions
are one and the same, `matching` decides. Scores, intervals and tests are those of a single run's report, with the
reference in the baseline's place, and Holm's correction goes over all pairs of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_flow.eval.report.matching import Questions, Side
from vllm_flow.eval.report.results import Compared, Options, PolicyResult, TaskResult
from vllm_flow.eval.report.summary import summarise
from vllm_flow.eval.statistics.intervals import holm
from vllm_flow.eval.statistics.power import detectable
from vllm_flow.eval.statistics.verdicts import judge
from vllm_flow.eval.tasks.base import Item, Task


@dataclass(frozen=True)
class Pair:
    """A run under one policy beside the reference under the same one, or under the one that was named."""

    task: str
    run: str
    """The other run's label."""
    policy: str
    """Of the other run."""
    reference_policy: str
    pictures: int
    """Of the questions that both answered."""
    questions: int
    """That both runs have; `result.paired` of them have an answer in both."""
    read: TaskResult
    """The pair as a task of two policies: `arm` of the reference, its baseline, and `arm` of the other run."""

    @property
    def result(self) -> PolicyResult:
        """The other run's."""
        return self.read.policies[1]

    @property
    def reference(self) -> PolicyResult:
        return self.read.policies[0]

    @property
    def headline(self) -> Compared:
        return self.result.against[self.read.headline]

    def share(self, metric: str) -> bool:
        """Whether a metric is a share, on both sides."""
        found = self.result.against[metric].comparison
        return all(0 <= side.value <= 1 for side in (found.baseline, found.treatment))


def arm(run: str, policy: str) -> str:
    """What a pair calls a run under a policy."""
    return f"{run} · {policy}"


def pairs_of(
    reference: Side,
    others: Sequence[Side],
    questions: Mapping[str, Mapping[str, Questions]],
    options: Options,
    against: str | None = None,
) -> list[Pair]:
    """Every pair that has answers, by task, then in the order of the reference's policies, then of runs.

    Args:
        questions: of `matching.shared_questions`, by run's label and task.
        against: the policy of the reference with which every policy of the others is paired; None for pairs of
            one policy each.
    """
    rows = {side.label: _rows(side) for side in (reference, *others)}
    found: list[Pair] = []
    for task in reference.items:
        order = dict.fromkeys([*reference.policies, *(p for side in others for p in side.policies)])
        own: list[Pair] = []
        for policy in order:
            for other in others:
                shared = questions[other.label].get(task)
                theirs = against or policy
                if shared is None or not shared.items:
                    continue
                arms = {
                    arm(reference.label, theirs): rows[reference.label].get((task, theirs), []),
                    arm(other.label, policy): rows[other.label].get((task, policy), []),
                }
                read = _read(arms, task, shared.items, reference.tasks, options)
                if read is not None:
                    both = set.intersection(*(set(scored) for scored in read.scores.values()))
                    pictures = len({item.picture_of for item in shared.items if item.id in both})
                    own.append(
                        Pair(task, other.label, policy, theirs, pictures, len(shared.items), read)
                    )
        found += _corrected(own, reference.tasks[task], options) if own else []
    return found


Rows = Sequence[Mapping[str, Any]]


def _rows(side: Side) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """A run's answers by task and policy."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in side.answers:
        found.setdefault((row["task"], row["policy"]), []).append(row)
    return found


def _read(
    arms: Mapping[str, Rows],
    task: str,
    items: Sequence[Item],
    tasks: Mapping[str, Task],
    options: Options,
) -> TaskResult | None:
    """Two arms' answers as a task of two policies, the first its baseline; None where no question has both."""
    kinds = zip(arms, ("baseline", "unlisted"), strict=True)
    roles = {"policies": [{"name": name, "kind": kind} for name, kind in kinds]}
    rows = [{**row, "policy": name} for name, own in arms.items() for row in own]
    (read,) = summarise(roles, {task: items}, rows, tasks, options).tasks
    return read if read.headline in read.policies[1].against else None


def _corrected(pairs: Sequence[Pair], task: Task, options: Options) -> list[Pair]:
    """The pairs of one task with Holm's correction over them, and with what so many tests can detect."""
    metrics = list(dict.fromkeys(m for pair in pairs for m in pair.result.against))
    corrected = {
        metric: iter(
            holm(
                [
                    pair.result.against[metric].comparison.p_value
                    for pair in pairs
                    if metric in pair.result.against
                ]
            )
        )
        for metric in metrics
    }
    found = []
    for pair in pairs:
        against = {}
        for metric, compared in pair.result.against.items():
            c, p = compared.comparison, next(corrected[metric])
            against[metric] = replace(
                compared,
                p_corrected=p,
                detectable=detectable(
                    c.standard_error, pair.pictures, len(pairs), options.confidence, options.power
                ),
                verdict=judge(
                    c.difference,
                    p,
                    identical=c.identical,
                    higher_is_better=task.higher_is_better,
                    tolerance=options.tolerance,
                    level=options.level,
                    unseen=compared.unseen,
                ),
            )
        result = replace(pair.result, against=against)
        found.append(replace(pair, read=replace(pair.read, policies=(pair.reference, result))))
    return found


def unpaired_policies(
    reference: Side, others: Sequence[Side], against: str | None
) -> dict[str, list[str]]:
    """The policies of each run, by its label, that no other run of the comparison has; empty where all are named."""
    if against is not None:
        return {}
    theirs = {policy for side in others for policy in side.policies}
    found = {reference.label: [p for p in reference.policies if p not in theirs]}
    found |= {
        side.label: [p for p in side.policies if p not in reference.policies] for side in others
    }
    return {label: names for label, names in found.items() if names}
