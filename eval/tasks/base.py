"""What a task is: items to ask, a score for each answer, metrics from summed counts.

A task knows its data files and its official scoring rule; it knows nothing of models, engines,
policies or of how answers were obtained. Adding one: see `vllm_flow.eval.tasks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Totals = Mapping[str, float | NDArray[np.float64]]
"""Summed counts: numbers, or arrays of one shape (one entry per bootstrap sample)."""
Metrics = dict[str, float | NDArray[np.float64]]
"""Metrics of the same shape; shares lie in [0, 1]."""


@dataclass(frozen=True)
class Item:
    """One question on at most one picture."""

    id: str
    """Unique within the task."""
    text: str
    """The user's text, without conversation template and without an image placeholder."""
    image: str | None
    """A file's path, or a place inside a file as `vllm_flow.eval.tasks.pictures` names it and opens it.
    The file need not exist when items are read."""
    truth: Mapping[str, Any]
    """Everything scoring needs; JSON-serialisable. `image_id`, where it is there, names the picture for all
    questions about it (see `picture_of`)."""
    group: str = ""
    """A part of the task that is also scored by itself, e.g. POPE's category."""

    @property
    def picture_of(self) -> str:
        """Names the picture: the same for all questions about it, also where a file embeds it in every row.

        It is what was sampled independently, and so what statistics take as their unit. An item without a
        picture stands for itself.
        """
        named = self.truth.get("image_id") or self.truth.get("image")
        if self.image is None or not named:
            return self.image or f"item {self.id}"
        return str(named)


@dataclass(frozen=True)
class Scored:
    """What one answer is worth."""

    id: str
    parsed: Any
    """What was read from the answer; JSON-serialisable."""
    score: float
    """This item's own score in [0, 1]; higher is better, also where the task's metrics fall."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What the task's metrics are made of, to be summed over items; an absent name counts 0."""
    group: str = ""
    unclear: bool = False
    """The rule found nothing in the answer that it looks for; `Task.unclear` says what follows."""
    bundle: tuple[str, int] = ("", 1)
    """With which others this answer is scored (`Task.together`), and how many they are with it."""


class Task(ABC):
    """A benchmark. Implementations are frozen dataclasses whose fields are the task's options.

    Picture files are read as vLLM's server reads them. The official scripts (LLaVA's, OPERA's) open them with
    PIL's `convert("RGB")`: sideways where only EXIF data says how to turn them, and a transparent pixel in
    whatever colour is stored under it. `load_image(..., "stored")`, on the command line `--image-reading
    stored`, reads as they do. The words around a question and what is done to its picture follow a model's
    authors, which for LLaVA-1.5 is not what a server does (docs/evaluation.md, "As it is served").
    """

    name: str
    """What the command line and the run directory call it; variants have names of their own."""
    max_tokens: int
    """Output tokens the official protocol allows."""
    headline: str
    """The metric that is reported first."""
    higher_is_better: bool = True
    """Of the headline metric."""
    image_preparation: Literal["conversation", "pad", "plain"] = "conversation"
    """`pad`: to a square with the CLIP mean colour, as LLaVA-1.5 does; `plain`: left alone; `conversation`: the
    one or the other, as the authors of the model's conversation do."""
    full_marks: Mapping[str, float] = MappingProxyType({})
    """Metrics that the benchmark reports in points: what a share of 1 is worth there, e.g. 2000."""
    parts: Mapping[str, Collection[str]] = MappingProxyType({})
    """Metrics that count some of the items only: the groups (`Scored.group`) of these. See `measured`."""
    unclear: str = ""
    """What to say of `Scored.unclear` answers, after "answers that": how the rule takes them."""
    binary: bool = True
    """Whether an item's score is 0 or 1 (then differences are tested by McNemar's test, else by a
    paired bootstrap)."""

    @abstractmethod
    def read(self, data: Path) -> list[Item]:
        """The items under the directory `data`, in the official order.

        Raises `DataError` where files are missing or malformed. The module's docstring lists the
        layouts that are found.
        """

    @abstractmethod
    def score(self, item: Item, text: str) -> Scored:
        """Score an answer.

        The official scripts strip a model's output before they record it; whoever records answers does
        that. The rules here take the recorded text as it is, white space included.
        """

    @abstractmethod
    def metrics(self, totals: Totals) -> Metrics:
        """The task's metrics from summed counts, numbers or arrays alike; 0/0 is 0."""

    def bundle(self, item: Item) -> tuple[str, int]:
        """Which items are scored together: a name and their number. A sample takes all of them or none."""
        return (item.id, 1)

    def together(self, scored: Iterable[Scored]) -> list[Scored]:
        """The answers with the counts of bundles added, each to one answer of its bundle.

        For benchmarks with a score that no answer has by itself (MME: both questions about a picture right).
        Called with the answers that are summed; a bundle that is not whole among them counts nothing.
        """
        return list(scored)

    def asked_as(self, style: str) -> Task:
        """The task with the prompts of another family (`vllm_flow.eval.tasks.prompts`); itself where the
        family's authors published none for it."""
        return replace(self, prompts=style) if hasattr(self, "prompts") else self  # type: ignore[type-var]


def whole_bundles(scored: Iterable[Scored]) -> list[list[Scored]]:
    """The bundles of which every answer is there, in the order in which they begin."""
    found: dict[tuple[str, int], list[Scored]] = {}
    for one in scored:
        found.setdefault(one.bundle, []).append(one)
    return [parts for (_, size), parts in found.items() if len(parts) == size]


def with_counts(scored: Iterable[Scored], more: Mapping[str, Mapping[str, float]]) -> list[Scored]:
    """Answers with further counts: id -> counts."""
    return [
        replace(one, counts={**one.counts, **more[one.id]}) if one.id in more else one
        for one in scored
    ]


def sum_counts(scored: Iterable[Scored]) -> dict[str, float]:
    """The counts of many items, added up."""
    totals: dict[str, float] = {}
    for one in scored:
        for name, count in one.counts.items():
            totals[name] = totals.get(name, 0.0) + count
    return totals


def table_of(
    scored: Sequence[Scored],
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """The counts of answers by name, and their scores; arrays [answers]."""
    names = sorted({name for one in scored for name in one.counts})
    counts = {name: np.array([one.counts.get(name, 0.0) for one in scored]) for name in names}
    return counts, np.array([one.score for one in scored])


def mean_metrics(task: Task, scored: Sequence[Scored]) -> set[str]:
    """The metrics that are nothing but the mean of the scores: of every answer by itself, and of all of them.

    That a metric equals the mean score is not enough: half of the answers may be right, and half of them yes.
    """
    counts, scores = table_of(scored)
    if not len(scores):
        return set()
    whole = task.metrics({name: count.sum() for name, count in counts.items()})
    return {
        metric
        for metric, single in task.metrics(counts).items()
        if np.allclose(single, scores) and np.isclose(whole[metric], scores.mean())
    }


def measured(task: Task, metrics: Iterable[str], scored: Iterable[Scored]) -> list[str]:
    """Of the names of metrics the headline's, and those of metrics that some answer counts in.

    Of others, 0/0 being 0, a value of 0 would read as if every answer were wrong (RefCOCO's `accuracy_testA`
    where only `val` was asked).
    """
    groups = {one.group for one in scored}
    return [
        name
        for name in metrics
        if name == task.headline or not groups.isdisjoint(task.parts.get(name, groups))
    ]


def partly_measured(task: Task, metrics: Iterable[str], scored: Iterable[Scored]) -> list[str]:
    """Sentences on metrics that are means over parts of a benchmark, of some of which there are no answers: MME's
    `perception` is in points of 2000 whatever it is measured on."""
    groups = {one.group for one in scored}
    found = []
    for name in metrics:
        parts = task.parts.get(name, ())
        there = [part for part in parts if part in groups]
        if len(there) < len(parts):
            named = f" ({', '.join(there)})" if there else ""
            found.append(
                f"{name} is over {len(there)} of its {len(parts)} parts{named}; nothing was answered of the others"
            )
    return found


def counts_of(totals: Totals, *names: str) -> list[Any]:
    """Counts by name, zero for those that no item has; all of the totals' shape."""
    zero = 0.0 * next(iter(totals.values()), 0.0)
    return [totals.get(name, zero) for name in names]


def ratio(numerator: Any, denominator: Any) -> Any:
    """`numerator / denominator`, elementwise for arrays; 0 where the denominator is 0."""
    top, bottom = np.broadcast_arrays(
        np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    )
    result = np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0)
    return result if result.ndim else float(result)


def accuracy_parts(groups: Iterable[str]) -> Mapping[str, Collection[str]]:
    """`Task.parts` of `grouped_accuracy`."""
    return MappingProxyType({f"accuracy_{name}": (name,) for name in groups})


def grouped_accuracy(totals: Totals, groups: Iterable[str]) -> Metrics:
    """Accuracy over all and per group, from the counts `right_{group}` and `asked_{group}`."""
    parts = {name: counts_of(totals, f"right_{name}", f"asked_{name}") for name in groups}
    right, asked = (sum(part[side] for part in parts.values()) for side in (0, 1))
    metrics: Metrics = {"accuracy": ratio(right, asked)}
    return metrics | {f"accuracy_{name}": ratio(*part) for name, part in parts.items()}
