"""From which layer on a task needs the image no more, with an interval, and the tasks' order.

With m(L) a metric when the image rows are gone from layer L on, the share of what the picture is worth
that layers 0 to L - 1 have already taken from it is r(L) = (m(L) - m(0)) / (m(full) - m(0)). A task *levels off*
at the smallest L from which on r stays at 0.95 or more. Intervals: bootstrap over pictures (percentiles),
on the grid of layers that were asked. A task to which the picture is worth nothing, within the interval,
has no such layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_flow.demo_model.training.answers import JOBS, Answers, Counts, counts_of
from vllm_flow.eval.tasks import get_task

SHARE = 0.95
DRAWS = 2000
EARLIEST, LATEST = "scienceqa", "captions"
"""The tasks whose cliffs the paper finds first and last."""


@dataclass(frozen=True)
class Level:
    """Where one task levels off."""

    task: str
    metric: str
    layer: int | None
    """None where the picture is worth nothing to the model."""
    low: int
    """Of the 95 % interval."""
    high: int
    pictures: int
    draws: np.ndarray
    """[draws]: the layer in each resample."""


def level_off(values: np.ndarray, cliffs: Sequence[int]) -> np.ndarray:
    """[.., C] metric at C ascending cliffs, the last the full model -> [..] the layer it levels off at.

    Where the picture is worth nothing, or less, the full model's layer. (pure)
    """
    blind, full = values[..., :1], values[..., -1:]
    worth = full - blind
    reached = np.abs(worth) > 1e-12
    share = np.divide(values - blind, worth, out=np.zeros_like(values), where=reached)
    # Whether a cliff and all after it have the share: a running "and" from the right.
    stays = np.logical_and.accumulate((share >= SHARE)[..., ::-1], axis=-1)[..., ::-1]
    stays[..., -1] = True
    return np.asarray(cliffs)[stays.argmax(-1)]


def bootstrap_levels(
    counts: Counts,
    metrics: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    metric: str,
    cliffs: Sequence[int],
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[int | None, np.ndarray]:
    """The layer of all pictures, and [draws] those of resamples of the pictures.

    None for the layer where the 95 % interval of what the picture is worth includes nothing.
    """

    def curve(sums: np.ndarray) -> np.ndarray:
        parts = {name: sums[..., k] for k, name in enumerate(counts.names)}
        return np.asarray(metrics(parts)[metric], dtype=float)

    units = counts.pictures
    weights = np.random.default_rng(seed).multinomial(units, [1 / units] * units, size=draws)
    resampled = np.einsum("ru,cuk->rck", weights, counts.values)
    curves = curve(resampled)
    low, high = np.percentile(curves[:, -1] - curves[:, 0], [2.5, 97.5])
    drawn = level_off(curves, cliffs)
    if low <= 0 <= high:
        return None, drawn
    return int(level_off(curve(counts.values.sum(1)), cliffs)), drawn


def levels(
    kept: Path, data: Path, split: str, cliffs: Sequence[int], full: int, seed: int = 0
) -> list[Level]:
    """Every task that was asked at all these cliffs, shallowest first, those without a layer last."""
    grid = sorted({*cliffs, full})
    found = []
    for name, job in JOBS.items():
        folder = data / split / job.folder
        if not folder.is_dir():
            continue
        counts = counts_of(folder, job, Answers(kept, split, name), grid)
        if counts is None:
            continue
        metric = next(iter(job.metrics))
        layer, draws = bootstrap_levels(counts, get_task(job.task).metrics, metric, grid, seed=seed)
        low, high = (int(x) for x in np.percentile(draws, [2.5, 97.5], method="inverted_cdf"))
        found.append(Level(name, metric, layer, low, high, counts.pictures, draws))
    return sorted(found, key=lambda level: (level.layer is None, level.layer))


def order_text(found: Sequence[Level]) -> str:
    """What the levels say about the paper's order: multiple choice earliest, captions latest."""
    layers = {level.task: level.layer for level in found if level.layer is not None}
    draws = {level.task: level.draws for level in found}
    if EARLIEST not in layers or LATEST not in layers:
        return "Multiple choice and captions do not both have such a layer here, so no order can be told."
    first, last = layers[EARLIEST], layers[LATEST]
    sure = float((draws[EARLIEST] < draws[LATEST]).mean())
    before = [task for task, layer in layers.items() if layer < first]
    after = [task for task, layer in layers.items() if layer > last]
    text = (
        "The paper finds the cliff of multiple choice earliest and that of captions latest. Here multiple "
        f"choice levels off at layer {first} and captions at {last}; multiple choice is earlier "
        f"in {100 * sure:.0f} % of the resamples. "
    )
    if first < last and not before and not after:
        same = [task for task, layer in layers.items() if layer == last and task != LATEST]
        text += "No task is earlier than the first or later than the second: the order is found"
        return text + (f"; at the same layer as captions: {', '.join(same)}." if same else ".")
    parts = []
    if before:
        parts.append(f"earlier than multiple choice: {', '.join(before)}")
    if after:
        parts.append(f"later than captions: {', '.join(after)}")
    if not parts:
        parts.append("all tasks level off at the same layer")
    return text + f"The order is not found as it stands ({'; '.join(parts)})."
