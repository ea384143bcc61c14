"""What the demo model is asked, its kept answers, and the counts that scores are made of. No model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_flow.eval.tasks import get_task, load_image
from vllm_flow.eval.tasks.base import Item


@dataclass(frozen=True)
class Job:
    """A task asked of one of a split's folders."""

    folder: str
    task: str
    tokens: int
    """Tokens an answer may have; the greedy answers taught are shorter."""
    metrics: Mapping[str, float | None]
    """Metric -> the target on seen drawings (None: no target was set)."""


JOBS: dict[str, Job] = {
    "pope": Job("pope", "pope", 4, {"f1": 0.95, "f1_adversarial": None, "accuracy": None}),
    "scienceqa": Job("scienceqa", "scienceqa", 3, {"img_accuracy": 0.85}),
    "words": Job("textvqa", "textvqa-no-ocr", 5, {"accuracy": 0.8}),
    "words with OCR": Job("textvqa", "textvqa", 5, {"accuracy": None}),
    "captions": Job("chair", "chair", 64, {"chair_i": 0.1, "chair_s": None, "recall": 0.8}),
    "counting": Job("counting", "textvqa-no-ocr", 4, {"accuracy": None}),
    "places": Job("places", "pope", 4, {"accuracy_random": None}),
}
LOWER_IS_BETTER = {"chair_i", "chair_s"}


def by_picture(items: Iterable[Item], pictures: int) -> dict[str, list[Item]]:
    """The items of the first so many pictures."""
    found: dict[str, list[Item]] = {}
    for item in items:
        if item.image is not None and (item.image in found or len(found) < pictures):
            found.setdefault(item.image, []).append(item)
    return found


class Answers:
    """What was answered: a line of JSON per picture, in a file per split and job."""

    def __init__(self, folder: Path, split: str, job: str) -> None:
        self.path = folder / f"{split}-{job.replace(' ', '-')}.jsonl"
        self.rows: dict[str, dict[int, dict[str, str]]] = defaultdict(dict)
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        for cliff, said in row["answers"].items():
            self.rows[row["picture"]][int(cliff)] = said

    def missing(self, picture: str, cliffs: Sequence[int]) -> list[int]:
        """The cliffs that this picture was not asked at."""
        return [cliff for cliff in cliffs if cliff not in self.rows[picture]]

    def add(self, picture: str, answers: Mapping[int, Mapping[str, str]]) -> None:
        """Store answers, cliff -> item id -> text."""
        row = {"picture": picture, "answers": {str(cliff): said for cliff, said in answers.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._take(row)


def pixels_of(picture: str) -> Any:
    """[1, 3, height, width] uint8, a tensor."""
    import torch

    return torch.from_numpy(np.asarray(load_image(picture)).copy()).permute(2, 0, 1)[None]


@dataclass(frozen=True)
class Counts:
    """A task's counts by picture, of pictures that were answered at every cliff."""

    names: tuple[str, ...]
    """K names of counts."""
    values: np.ndarray
    """[C, U, K] float64: C cliffs, U pictures."""
    items: int

    @property
    def pictures(self) -> int:
        """U."""
        return int(self.values.shape[1])


def counts_of(folder: Path, job: Job, answers: Answers, cliffs: Sequence[int]) -> Counts | None:
    """The counts at these cliffs; None where no picture was answered at all of them."""
    task = get_task(job.task)
    units, asked = [], 0
    for picture, items in by_picture(task.read(folder), 10**9).items():
        key = Path(picture).relative_to(folder).as_posix()
        if answers.missing(key, cliffs):
            continue
        sums: dict[int, dict[str, float]] = {cliff: defaultdict(float) for cliff in cliffs}
        for cliff in cliffs:
            for item in items:
                scored = task.score(item, answers.rows[key][cliff][item.id])
                for name, count in scored.counts.items():
                    sums[cliff][name] += count
        units.append(sums)
        asked += len(items)
    if not units:
        return None
    names = tuple(sorted({name for sums in units for counts in sums.values() for name in counts}))
    values = [[[sums[cliff][name] for name in names] for sums in units] for cliff in cliffs]
    return Counts(names, np.array(values), asked)
