"""Measures the demo model: ``python -m vllm_flow.demo_model.training.measure --data DATA --answers DIR``.

Asks the held-out files that ``demo.datasets`` wrote (``DATA/{split}/{task}``), at the baseline and with the
image rows removed from given layers on (cliff 0: the picture is not seen at all, the blind baseline), and
scores with the evaluation's own rules. Answers are kept in the folder of answers: the command goes on where
it was stopped, and ``--table`` only reports. Intervals: 95 %, bootstrap over pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flow.demo_model.heldout import SPLITS
from vllm_flow.demo_model.training.answers import (
    JOBS,
    LOWER_IS_BETTER,
    Answers,
    Job,
    by_picture,
    counts_of,
    pixels_of,
)
from vllm_flow.demo_model.training.levels import Level, levels, order_text
from vllm_flow.eval.statistics.bootstrap import Comparison, compare
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.eval.tasks import get_task


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
    counts = counts_of(folder, job, answers, [*cliffs, full])
    if counts is None:
        return None
    treated, baseline = counts.values[:-1], counts.values[-1:]
    found = compare(
        counts.names,
        baseline.repeat(len(treated), 0),
        treated,
        get_task(job.task).metrics,
        swaps=199,
        seed=0,
    )
    return found, counts.pictures, counts.items


def percent(value: Interval, decimals: int = 1) -> str:
    """``95.3 (93.1 to 97.0)``."""
    parts = [f"{100 * x:.{decimals}f}" for x in (value.value, value.low, value.high)]
    return f"{parts[0]} ({parts[1]} to {parts[2]})"


PHOTO_MARGIN = 0.1
"""How far below seen drawings unseen photographs were to be at most."""


def goal_text(
    split: str, metric: str, target: float | None, value: float, seen: float | None
) -> str:
    """What was aimed at and whether it was reached; empty where there is no target. (pure)

    ``seen``: the value on seen drawings, where that is known.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    if target is None:
        return ""
    if split == "seen":
        words = f"{'at least' if sign > 0 else 'at most'} {100 * target:.0f}"
        return f"{words}: {'reached' if sign * value >= sign * target else 'missed'}"
    if split == "unseen_photos" and seen is not None:
        reached = sign * value >= sign * seen - PHOTO_MARGIN
        return f"within 10 points of seen: {'reached' if reached else 'missed'}"
    return ""


def table(kept: Path, data: Path, full: int) -> str:
    """Markdown: per split, task and metric the full model, the blind one, the target."""
    lines = [
        "| split | task | metric | model, % | blind, % | target | items (pictures) |",
        "|---|---|---|---|---|---|---|",
    ]
    seen: dict[tuple[str, str], float] = {}
    for split in SPLITS:
        for name, job in JOBS.items():
            folder = data / split / job.folder
            if not folder.is_dir():
                continue
            answers = Answers(kept, split, name)
            found = compared(folder, job, answers, [0], full)
            if found is None:
                continue
            results, pictures, items = found
            for metric, target in job.metrics.items():
                result = results[metric][0]
                value = result.baseline.value
                goal = goal_text(split, metric, target, value, seen.get((name, metric)))
                if split == "seen":
                    seen[name, metric] = value
                lines.append(
                    f"| {split} | {name} | {metric} | {percent(result.baseline)} "
                    f"| {percent(result.treatment)} | {goal} | {items} ({pictures}) |"
                )
    return "\n".join(lines)


def curve(kept: Path, data: Path, split: str, cliffs: Sequence[int], full: int) -> str:
    """Markdown: per task its first metric with the image rows removed from each layer on."""
    lines = [
        f"| task, {split} | " + " | ".join(str(cliff) for cliff in cliffs) + " | pictures |",
        "|---|" + "---|" * (len(cliffs) + 1),
    ]
    for name, job in JOBS.items():
        folder = data / split / job.folder
        if not folder.is_dir():
            continue
        answers = Answers(kept, split, name)
        found = compared(folder, job, answers, list(cliffs), full)
        if found is None:
            continue
        metric = next(iter(job.metrics))
        cells = " | ".join(percent(one.treatment, 0) for one in found[0][metric])
        lines.append(f"| {name}, {metric} | {cells} | {found[1]} |")
    return "\n".join(lines)


def level_table(found: Sequence[Level]) -> str:
    """Markdown: from which layer on a task needs no image, shallowest first."""
    lines = [
        "| task | metric | levels off at layer (95 % interval) | pictures |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {level.task} | {level.metric} | {level.layer} ({level.low} to {level.high}) "
        f"| {level.pictures} |"
        if level.layer is not None
        else f"| {level.task} | {level.metric} | the picture is worth nothing here | {level.pictures} |"
        for level in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Ask what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per split")
    parser.add_argument("--answers", type=Path, required=True, help="folder of answers")
    parser.add_argument(
        "--work", type=Path, help="ask the model of this training's folder, not the shipped one"
    )
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

        from vllm_flow.demo_model.training.reader import Reader

        torch.set_num_threads(args.threads)
        reader = (
            Reader.shipped(device=args.device)
            if args.work is None
            else Reader.of(args.work, device=args.device)
        )
        full = reader.layers
    cliffs = list(range(0, full + 1, args.step))
    if reader is not None:
        for split in args.splits:
            for name in args.jobs:
                job, folder = JOBS[name], args.data / split / JOBS[name].folder
                answers = Answers(args.answers, split, name)
                ask(reader, folder, job, answers, [0, full], args.pictures)
                if split == "seen" and args.curve_pictures:
                    ask(reader, folder, job, answers, cliffs, args.curve_pictures)
                print(f"asked: {split}, {name}", flush=True)
    print(table(args.answers, args.data, full))
    print()
    print(curve(args.answers, args.data, "seen", cliffs, full))
    print()
    found = levels(args.answers, args.data, "seen", cliffs, full)
    print(level_table(found))
    print()
    print(order_text(found))


if __name__ == "__main__":
    main()
