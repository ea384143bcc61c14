"""Measures a work folder's model: ``python -m vllm_flow.demo.training.measure --work DIR --data DIR``.

Asks the held-out files that ``demo.datasets`` wrote, at the baseline and with the image rows removed
from given layers on (cliff 0: the picture is not seen at all, the blind baseline), and scores with the
evaluation's own rules. Answers are kept in ``DIR/answers``: the command goes on where it was stopped, and
``--table`` only reports. Intervals: 95 %, bootstrap over pictures.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_flow.demo.heldout import SPLITS
from vllm_flow.eval.bootstrap import Comparison, compare
from vllm_flow.eval.stats import Interval
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


def ask(reader: Any, folder: Path, job: Job, answers: Answers, cliffs: list[int], n: int) -> None:
    """Answer the job's questions on ``n`` pictures at every cliff that is not answered yet."""
    for picture, items in by_picture(get_task(job.task).read(folder), n).items():
        key = Path(picture).relative_to(folder).as_posix()
        open_cliffs = answers.missing(key, cliffs)
        if not open_cliffs:
            continue
        texts = list(dict.fromkeys(item.text for item in items))
        said = reader.answers(pixels_of(picture), texts, open_cliffs, job.tokens)
        answers.add(
            key,
            {
                cliff: {item.id: words[texts.index(item.text)] for item in items}
                for cliff, words in said.items()
            },
        )


def compared(
    folder: Path, job: Job, answers: Answers, cliffs: Sequence[int], full: int
) -> tuple[dict[str, list[Comparison]], int, int] | None:
    """Metric -> per cliff the comparison with the full model, on pictures answered at all of them.

    Returns also how many pictures and items there are; None where there is none.
    """
    task = get_task(job.task)
    every = by_picture(task.read(folder), 10**9)
    units, asked = [], 0
    for picture, items in every.items():
        key = Path(picture).relative_to(folder).as_posix()
        if answers.missing(key, [*cliffs, full]):
            continue
        sums = {}
        for cliff in [*cliffs, full]:
            sums[cliff] = defaultdict(float)
            for item in items:
                scored = task.score(item, answers.rows[key][cliff][item.id])
                for name, count in scored.counts.items():
                    sums[cliff][name] += count
        units.append(sums)
        asked += len(items)
    if not units:
        return None
    names = sorted({name for sums in units for counts in sums.values() for name in counts})

    def counts(chosen: Sequence[int]) -> np.ndarray:
        return np.array(
            [[[sums[cliff][name] for name in names] for sums in units] for cliff in chosen]
        )

    found = compare(
        names, counts([full] * len(cliffs)), counts(cliffs), task.metrics, swaps=199, seed=0
    )
    return found, len(units), asked


def percent(value: Interval, decimals: int = 1) -> str:
    """``95.3 (93.1 to 97.0)``."""
    parts = [f"{100 * x:.{decimals}f}" for x in (value.value, value.low, value.high)]
    return f"{parts[0]} ({parts[1]} to {parts[2]})"


def table(work: Path, data: Path, full: int) -> str:
    """Markdown: per split, task and metric the full model, the blind one, the target."""
    lines = [
        "| split | task | metric | model, % | blind, % | target | items (pictures) |",
        "|---|---|---|---|---|---|---|",
    ]
    for split in SPLITS:
        for name, job in JOBS.items():
            folder = data / split / job.folder
            if not folder.is_dir():
                continue
            answers = Answers(work / "answers", split, name)
            found = compared(folder, job, answers, [0], full)
            if found is None:
                continue
            results, pictures, items = found
            for metric, target in job.metrics.items():
                result = results[metric][0]
                goal = ""
                if target is not None and split == "seen":
                    lower = metric in LOWER_IS_BETTER
                    reached = (result.baseline.value <= target) == lower or (
                        result.baseline.value == target
                    )
                    sign = "at most" if lower else "at least"
                    goal = f"{sign} {100 * target:.0f}: {'reached' if reached else 'missed'}"
                lines.append(
                    f"| {split} | {name} | {metric} | {percent(result.baseline)} "
                    f"| {percent(result.treatment)} | {goal} | {items} ({pictures}) |"
                )
    return "\n".join(lines)


def curve(work: Path, data: Path, split: str, cliffs: Sequence[int], full: int) -> str:
    """Markdown: per task its first metric with the image rows removed from each layer on."""
    lines = [
        f"| task, {split} | " + " | ".join(str(cliff) for cliff in cliffs) + " | pictures |",
        "|---|" + "---|" * (len(cliffs) + 1),
    ]
    for name, job in JOBS.items():
        folder = data / split / job.folder
        if not folder.is_dir():
            continue
        answers = Answers(work / "answers", split, name)
        found = compared(folder, job, answers, list(cliffs), full)
        if found is None:
            continue
        metric = next(iter(job.metrics))
        cells = " | ".join(percent(one.treatment, 0) for one in found[0][metric])
        lines.append(f"| {name}, {metric} | {cells} | {found[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Ask what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the training's folder")
    parser.add_argument("--data", type=Path, required=True, help="made by demo.datasets")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--pictures", type=int, default=200, help="per split and task")
    parser.add_argument("--curve-pictures", type=int, default=0, help="of seen, at every layer")
    parser.add_argument("--step", type=int, default=2, help="of the layer curve")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--table", action="store_true", help="ask nothing, report")
    args = parser.parse_args()
    full, reader = 30, None
    if not args.table:
        import torch

        from vllm_flow.demo.training.reader import Reader

        torch.set_num_threads(args.threads)
        reader = Reader.of(args.work, device=args.device)
        full = reader.layers
    cliffs = list(range(0, full + 1, args.step))
    if reader is not None:
        for split in args.splits:
            for name in args.jobs:
                job, folder = JOBS[name], args.data / split / JOBS[name].folder
                answers = Answers(args.work / "answers", split, name)
                ask(reader, folder, job, answers, [0, full], args.pictures)
                if split == "seen" and args.curve_pictures:
                    ask(reader, folder, job, answers, cliffs, args.curve_pictures)
                print(f"asked: {split}, {name}", flush=True)
    print(table(args.work, args.data, full))
    print()
    print(curve(args.work, args.data, "seen", cliffs, full))


if __name__ == "__main__":
    main()
