"""Answers at many layers become losses: the judge of the cliff search. (pure)

Knows a task's counts and metrics; nothing of engines. A loss is that of the task's headline metric against
the baseline, on the same questions, positive for worse.

Where the headline is the mean of the questions' scores, a picture's contribution to the loss is plain, and
the limits are those of `vllm_flow.eval.cliff.bounds`: exact-type limits, no resampling. Other
headlines (F1, CHAIR) are linearised by the jackknife for the same limits, and a BCa bootstrap of the
metric is made as well; the wider of the two counts. Units are pictures, since questions about one
picture fail together.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vllm_flow.eval.cliff.bounds import NOISE, Loss, loss_limits
from vllm_flow.eval.statistics.bootstrap import bca_limits, resampling
from vllm_flow.eval.tasks.base import Item, Scored, Task, mean_metrics, sum_counts, table_of
from vllm_flow.exits import Refused

Array = NDArray[np.float64]

RESAMPLES = 2000


class CliffError(Refused):
    """The search cannot go on or begin; the message is for the user."""


def in_random_order(
    items: Sequence[Item], seed: int, limit: int | None = None, task: Task | None = None
) -> list[Item]:
    """The questions, picture by picture, pictures in random order; at most `limit` of them.

    A picture's questions stay together, so that none is on both sides of a split. A limit takes a
    question of every picture before it takes a second one: many pictures tell more than many questions
    about a few. Questions that `task` scores together count as one there.
    """
    draws = random.Random(seed)
    by_picture: dict[str, dict[str, list[Item]]] = {}
    for item in draws.sample(list(items), len(items)):
        bundle = task.bundle(item)[0] if task is not None else item.id
        by_picture.setdefault(item.picture_of, {}).setdefault(bundle, []).append(item)
    rounds = itertools.zip_longest(*(bundles.values() for bundles in by_picture.values()))
    kept: dict[str, list[Item]] = {}
    left = len(items) if limit is None else limit
    for bundle in (bundle for one in rounds for bundle in one if bundle is not None):
        if len(bundle) > left:
            break
        left -= len(bundle)
        kept.setdefault(bundle[0].picture_of, []).extend(bundle)
    return [item for questions in kept.values() for item in questions]


def split_at(items: Sequence[Item], share: float) -> int:
    """How many questions make up at least `share` of all and whole pictures."""
    at = max(1, round(share * len(items)))
    while at < len(items) and items[at].picture_of == items[at - 1].picture_of:
        at += 1
    return at


class Evidence:
    """The answers so far, of questions in the search's order; `loss` is its judge."""

    def __init__(self, task: Task, items: Sequence[Item], num_layers: int) -> None:
        self.task, self.items, self.num_layers = task, items, num_layers
        self.left_out: dict[int, str] = {}
        """Questions that not even the baseline can answer, and why; they are in no loss."""
        self._answers: dict[int, dict[int, Scored]] = {}
        self._index = {item.id: index for index, item in enumerate(items)}
        numbers: dict[str, int] = {}
        self._unit = [numbers.setdefault(item.picture_of, len(numbers)) for item in items]
        self._loss = lru_cache(maxsize=None)(self._measure)

    def add(self, item_id: str, layer: int, text: str | None, error: str | None) -> None:
        """Take one answer, or the reason why there is none.

        Raises:
            CliffError: only a layer failed, which is the engine's fault and not the question's.
        """
        index = self._index[item_id]
        if text is not None:
            scored = self.task.score(self.items[index], text)
            self._answers.setdefault(layer, {})[index] = scored
        elif layer == self.num_layers:
            self.left_out[index] = str(error)
        elif index not in self.left_out:
            raise CliffError(f"question {item_id} at layer {layer}: {error}")
        self._loss.cache_clear()

    def missing(self, layer: int, first: int, last: int) -> list[int]:
        """Which of these questions have no answer at a layer yet."""
        known = self._answers.get(layer, {})
        return [at for at in range(first, last) if at not in known and at not in self.left_out]

    def _known(self, layer: int) -> dict[int, Scored]:
        """The answers at a layer to questions that the baseline answers as well, in the questions' order."""
        answers = self._answers.get(layer, {})
        return {at: answers[at] for at in sorted(answers) if at not in self.left_out}

    def pictures(self, first: int = 0) -> int:
        """Pictures of the questions from `first` on that are in a loss."""
        there = range(first, len(self.items))
        return len({self._unit[at] for at in there if at not in self.left_out})

    @property
    def layers(self) -> list[int]:
        """Layers with answers, the baseline (the number of layers) included."""
        return sorted(layer for layer in self._answers if self._known(layer))

    def score(self, layer: int) -> float:
        """The headline metric at a layer, on the questions that were asked."""
        totals = sum_counts(self.task.together(self._known(layer).values()))
        return float(np.asarray(self.task.metrics(totals)[self.task.headline]))

    def all_asked(self, layer: int, confidence: float) -> Loss:
        """The loss on every question that has been asked at a layer."""
        return self._loss_of(list(self._known(layer)), layer, confidence)

    def loss(self, layer: int, first: int, last: int, confidence: float) -> Loss:
        """The loss at a layer on questions `first` to `last` (excluded), all of which were asked.

        Raises:
            CliffError: none of them can be answered.
        """
        return self._loss(layer, first, last, confidence)

    def _measure(self, layer: int, first: int, last: int, confidence: float) -> Loss:
        wanted = [at for at in range(first, last) if at not in self.left_out]
        if not wanted:
            reason = next(iter(self.left_out.values()), "there is none")
            raise CliffError(f"not one question of {first} to {last - 1} was answered: {reason}")
        return self._loss_of(wanted, layer, confidence)

    def _loss_of(self, wanted: Sequence[int], layer: int, confidence: float) -> Loss:
        arms = (self._answers[self.num_layers], self._answers[layer])
        pairs = [one for arm in arms for one in self.task.together(arm[at] for at in wanted)]
        counts, scores = table_of(pairs)
        names, rows = list(counts), np.stack(list(counts.values()), axis=1)
        count = len(wanted)
        before, after = rows[:count], rows[count:]
        units = [self._unit[at] for at in wanted]
        sign = 1.0 if self.task.higher_is_better else -1.0
        if self.task.higher_is_better and self.task.headline in mean_metrics(self.task, pairs):
            lost = _by_unit(units, scores[:count] - scores[count:]) / count
            found = loss_limits(lost, 1 / count, count, confidence, len(lost))
        else:
            found = self._loss_of_ratio(
                _by_unit(units, before), _by_unit(units, after), names, sign, count, confidence
            )
        # Headlines are shares, so that no loss is beyond 1.
        return Loss(found.value, max(found.low, -1.0), min(found.high, 1.0), count)

    def _loss_of_ratio(
        self,
        before: Array,
        after: Array,
        names: Sequence[str],
        sign: float,
        count: int,
        confidence: float,
    ) -> Loss:
        """Limits for a metric of sums, from the counts [units, K] of both arms."""

        def loss(b: Array, a: Array) -> Array:
            return sign * (self._headline(b, names) - self._headline(a, names))

        whole = np.concatenate([before.sum(axis=0), after.sum(axis=0)])
        both = np.concatenate([before, after], axis=1)
        kinds, number = len(names), len(both)
        value = float(loss(whole[:kinds], whole[kinds:]))
        without = whole - both
        left_out = loss(without[:, :kinds], without[:, kinds:])
        # What each unit adds: pseudo-values of the jackknife, which for a mean are the units' own.
        adds = (number * value - (number - 1) * left_out) / number
        unchanged = np.all(np.abs(before - after) <= NOISE, axis=1)
        adds[unchanged] = 0.0
        linear = loss_limits(adds, 1 / count, count, confidence, number)
        low, high = linear.low - linear.value + value, linear.high - linear.value + value
        if number > 1:
            seed = np.random.SeedSequence(0)
            sums = np.concatenate([w @ both for w in resampling(number, RESAMPLES, seed)])
            samples = loss(sums[:, :kinds], sums[:, kinds:])
            if np.ptp(samples) > NOISE:
                # One-sided limits at `confidence` each.
                limits = bca_limits(value, samples, left_out, 2 * confidence - 1)
                low, high = min(low, limits[0]), max(high, limits[1])
        return Loss(value, low, high, count)

    def _headline(self, sums: Array, names: Sequence[str]) -> Array:
        totals = {name: sums[..., k] for k, name in enumerate(names)}
        return np.asarray(self.task.metrics(totals)[self.task.headline], dtype=np.float64)


def _by_unit(units: Sequence[int], rows: Array) -> Array:
    """The rows of each unit added up, [units, ...], in the order in which units come."""
    place = {unit: row for row, unit in enumerate(dict.fromkeys(units))}
    sums = np.zeros((len(place), *rows.shape[1:]))
    np.add.at(sums, [place[unit] for unit in units], rows)
    return sums
