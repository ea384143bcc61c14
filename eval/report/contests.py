"""Which method keeps most at the same cost, and where that cannot be told. (pure)

At a budget, every method is compared with every other one on the questions that both answered, and the p values
are corrected over all pairs of the task (Holm): so a method may be called the best after a look at the
scores. A difference counts as a win only where the winner costs no more than the loser, to within
one token a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from vllm_flow.eval.report.beside import ScoresById, share_of
from vllm_flow.eval.report.comparing import counts_by_unit
from vllm_flow.eval.report.cost import BASELINE, DOWNSAMPLE, Point
from vllm_flow.eval.report.results import Options, TaskResult
from vllm_flow.eval.statistics.bootstrap import Comparison, compare
from vllm_flow.eval.statistics.intervals import Interval, holm
from vllm_flow.eval.tasks.base import Item, Task

SAME = 1.0
"""Tokens a layer up to which two policies cost the same."""


@dataclass(frozen=True)
class Contest:
    """Two methods at one budget."""

    one: Point
    other: Point
    difference: Interval
    """Score of `other` minus that of `one`, on the same questions."""
    p_value: float
    p_corrected: float

    def told_apart(self, level: float) -> bool:
        """Whether a difference is shown, at whatever cost."""
        return self.p_corrected < level and self.difference.value != 0

    def winner(self, level: float, higher_is_better: bool) -> Point | None:
        """The one that is shown to be better at no higher cost; None where that cannot be told."""
        if not self.told_apart(level):
            return None
        other_wins = (self.difference.value > 0) == higher_is_better
        won, lost = (self.other, self.one) if other_wins else (self.one, self.other)
        return won if (won.tokens or 0.0) <= (lost.tokens or 0.0) + SAME else None


@dataclass(frozen=True)
class Regained:
    """What a method answers rightly of the questions that a reduced picture of the same cost loses."""

    point: Point
    downsampled: str
    share: Interval | None
    """None where the reduced picture loses nothing."""
    questions: int


@dataclass(frozen=True)
class Budget:
    """What there is to say of one budget on one task."""

    tokens: float
    points: tuple[Point, ...]
    """Best first."""
    contests: tuple[Contest, ...]
    regained: tuple[Regained, ...]

    def beaten_by(self, point: Point, level: float, higher_is_better: bool) -> list[Point]:
        """The methods that a method is shown to be better than."""
        return [
            pair.other if pair.one is point else pair.one
            for pair in self.contests
            if point in (pair.one, pair.other) and pair.winner(level, higher_is_better) is point
        ]

    def rivals(self, point: Point, level: float) -> list[Point]:
        """The methods from which one cannot be told apart."""
        return [
            pair.other if pair.one is point else pair.one
            for pair in self.contests
            if point in (pair.one, pair.other) and not pair.told_apart(level)
        ]


def budgets_of(found: Sequence[Point]) -> list[tuple[Point, ...]]:
    """Points of equal cost, dearest budget first: at least two methods, and reduced pictures around them.

    Of a method with several policies at one cost, the dearest counts.
    """
    priced = [p for p in found if p.tokens is not None and p.method.name != BASELINE]
    squares = sorted(
        (p for p in priced if p.method.name == DOWNSAMPLE), key=lambda p: p.tokens or 0.0
    )
    others = sorted(
        (p for p in priced if p.method.name != DOWNSAMPLE), key=lambda p: -(p.tokens or 0.0)
    )
    groups: list[tuple[Point, ...]] = []
    while others:
        top = others[0].tokens or 0.0
        group: dict[str, Point] = {}
        while others and top - (others[0].tokens or 0.0) <= SAME:
            point = others.pop(0)
            group.setdefault(point.method.name, point)
        if top > 0 and len(group) > 1:
            groups.append((*group.values(), *_around(squares, top)))
    return groups


def _around(squares: Sequence[Point], tokens: float) -> list[Point]:
    """Reduced pictures of this cost, else the nearest cheaper and the nearest dearer one."""
    same = [p for p in squares if abs((p.tokens or 0.0) - tokens) <= SAME]
    if same:
        return same[:1]
    cheaper = [p for p in squares if (p.tokens or 0.0) < tokens][-1:]
    return cheaper + [p for p in squares if (p.tokens or 0.0) > tokens][:1]


def contests(
    task: Task,
    result: TaskResult,
    items: Sequence[Item],
    found: Sequence[Point],
    options: Options,
) -> list[Budget]:
    """Every budget of a task, with every pair of its methods compared."""
    groups = budgets_of(found)
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    if not pairs:
        return []
    units = {item.id: item.picture_of for item in items}
    measured = _compare(task, result, units, pairs, options)
    corrected = holm([one.p_value for one in measured])
    every = [
        Contest(*pair, one.difference, one.p_value, p)
        for pair, one, p in zip(pairs, measured, corrected, strict=True)
    ]
    sign = 1 if task.higher_is_better else -1
    budgets = []
    for group in groups:
        count = len(group) * (len(group) - 1) // 2
        own, every = every[:count], every[count:]
        budgets.append(
            Budget(
                max(p.tokens or 0.0 for p in group if p.method.name != DOWNSAMPLE),
                tuple(sorted(group, key=lambda p: -sign * p.value.value)),
                tuple(own),
                tuple(_regained(result, group, units, options)),
            )
        )
    return budgets


def _compare(
    task: Task,
    result: TaskResult,
    units: Mapping[str, str],
    pairs: Sequence[tuple[Point, Point]],
    options: Options,
) -> list[Comparison]:
    """The headline metric of both points of each pair, on the questions that both answered."""
    arms: tuple[list[list[ScoresById]], ...] = ([], [])
    for pair in pairs:
        shared = _answered(result, (*pair[0].policies, *pair[1].policies))
        for arm, point in zip(arms, pair, strict=True):
            scores = (result.scores[policy] for policy in point.policies)
            arm.append([{item: own[item] for item in shared} for own in scores])
    names, counts = counts_by_unit(task, [*arms[0], *arms[1]], units)
    baseline, treatment = np.split(counts, 2)
    found = compare(
        names,
        baseline,
        treatment,
        task.metrics,
        resamples=options.resamples,
        swaps=options.swaps,
        confidence=options.confidence,
        seed=options.seed,
    )
    return found[task.headline]


def _answered(result: TaskResult, policies: Sequence[str]) -> list[str]:
    first, *others = (result.scores[name] for name in policies)
    return [item for item in first if all(item in scored for scored in others)]


def _regained(
    result: TaskResult, group: Sequence[Point], units: Mapping[str, str], options: Options
) -> list[Regained]:
    """Of what the dearest reduced picture of a budget loses, which share each method answers rightly.

    A choice that is no better than fewer patches would be right on the same questions; one by chance, on
    as many of them as on others.
    """
    squares = [p for p in group if p.method.name == DOWNSAMPLE]
    base = next((r.policy.name for r in result.policies if r.policy.kind == BASELINE), None)
    if not squares or base is None or not result.binary:
        return []
    square = squares[-1]
    before, reduced = result.scores[base], result.scores[square.policies[0]]
    lost = {i for i in before if i in reduced and before[i].score > 0.5 > reduced[i].score}
    found = []
    for point in group:
        if point.method.name == DOWNSAMPLE:
            continue
        asked = [item for item in _answered(result, point.policies) if item in lost]
        # Over seeds the mean: they answer the same questions, which are no more for it.
        right = [fmean(result.scores[p][item].score for p in point.policies) for item in asked]
        share = share_of(right, asked, units, options.confidence)
        found.append(Regained(point, square.policy, share, len(lost)))
    return found


def sentences(
    budget: Budget, names: Mapping[str, str], level: float, higher_is_better: bool
) -> list[str]:
    """What a budget says, in words that say no more than was found.

    Args:
        names: of points, as a reader knows them, by policy.
    """

    def listed(points: Sequence[Point]) -> str:
        return ", ".join(f"“{names[point.policy]}”" for point in points)

    best = budget.points[0]
    beaten = budget.beaten_by(best, level, higher_is_better)
    rest = budget.rivals(best, level)
    if beaten and not rest:
        return [f"{listed([best])} keeps most: it is shown to be better than every other method."]
    found = []
    if beaten:
        found.append(
            f"{listed([best])} scores highest and is shown to be better than {listed(beaten)}; not "
            f"told apart from {listed(rest)}."
        )
    else:
        found.append(
            f"Nothing can be told of the highest score, {listed([best])}: it is not told apart from any "
            "other at no higher cost."
        )
    for point in budget.points[1:]:
        others = budget.beaten_by(point, level, higher_is_better)
        if others:
            found.append(f"{listed([point])} is shown to be better than {listed(others)}.")
    return found
