"""Draws the model card's two figures: the training's checks, and scores against the cliff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.demo_model.training.answers import JOBS, LOWER_IS_BETTER, Answers
from vllm_flow.demo_model.training.measure import compared
from vllm_flow.style import COLOURS, MARKERS, QUIET, house

SMALL = {"font.size": 9}
TITLES = {
    "pope": "yes/no: F1",
    "scienceqa": "multiple choice: accuracy",
    "words": "words on signs: accuracy",
    "words with OCR": "words, with a reader's tokens",
    "captions": "captions: 1 - CHAIR_i",
    "counting": "counting: accuracy",
    "places": "left or right: accuracy",
}


def checks_of(
    rows: Sequence[Mapping[str, Any]], stage: str, mark: str
) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and key -> values, of a stage's checks in order; a step that was done again counts last."""
    by_step = {row["step"]: row for row in rows if row["stage"] == stage and mark in row}
    steps = sorted(by_step)
    keys = [k for k in by_step[steps[-1]] if k not in ("stage", "s", "step")] if steps else []
    return steps, {key: [by_step[step][key] for step in steps] for key in keys}


def draw_training(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Two panels: what the tower tells right, and answer tokens by task."""
    panels = (
        ("vision", "thing_accuracy", "1. Vision tower: patches and letters told right"),
        ("lora", "presence", "3. LoRA and projector: answer tokens right"),
    )
    with house() as plt, plt.rc_context(SMALL):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
        for axis, (stage, mark, title) in zip(axes, panels, strict=True):
            steps, values = checks_of(rows, stage, mark)
            shares = {k: v for k, v in values.items() if not k.startswith("wrong")}
            for number, (name, series) in enumerate(shares.items()):
                axis.plot(
                    steps,
                    [100 * value for value in series],
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=3.5,
                    linewidth=1.4,
                    label=name.removesuffix("_accuracy"),
                )
            axis.set_title(title, loc="left", fontweight="bold", fontsize=9)
            axis.set_xlabel("step")
            # Below the axes, where it can hide no point.
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize=8)
        axes[0].set_ylabel("%")
        axes[0].set_ylim(0, 101)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path


def draw_layers(answers: Path, data: Path, cliffs: Sequence[int], path: Path) -> Path:
    """A small panel per task: score with its 95 % band against the cliff, the full model dotted."""
    found = {}
    for name, job in JOBS.items():
        folder = data / "seen" / job.folder
        if folder.is_dir():
            result = compared(folder, job, Answers(answers, "seen", name), cliffs, cliffs[-1])
            if result is not None:
                found[name] = (next(iter(job.metrics)), result)
    with house() as plt, plt.rc_context(SMALL):
        columns = 4
        lines = -(-len(found) // columns)
        figure, axes = plt.subplots(
            lines, columns, figsize=(11, 2.5 * lines), layout="constrained", sharex=True, sharey=True,
            squeeze=False,
        )  # fmt: skip
        for number, (axis, (name, (metric, result))) in enumerate(
            zip(axes.flat, found.items(), strict=False)
        ):
            parts = [one.treatment for one in result[0][metric]]
            flip = metric in LOWER_IS_BETTER

            def shown(value: float, flip: bool = flip) -> float:
                return 100 * (1 - value if flip else value)

            colour = COLOURS[number % len(COLOURS)]
            edges = [sorted((shown(part.low), shown(part.high))) for part in parts]
            axis.fill_between(
                cliffs, [low for low, _ in edges], [high for _, high in edges],
                color=colour, alpha=0.2, linewidth=0,
            )  # fmt: skip
            axis.plot(
                cliffs, [shown(part.value) for part in parts], color=colour, marker="o",
                markersize=3, linewidth=1.6,
            )  # fmt: skip
            axis.axhline(shown(parts[-1].value), color=QUIET, linewidth=0.8, linestyle=":")
            axis.set_title(
                f"{TITLES[name]} ({counted(result[1], 'picture')})",
                loc="left",
                fontsize=8.5,
                fontweight="normal",
            )
        for axis in list(axes.flat)[len(found) :]:
            axis.set_visible(False)
        for axis in list(axes.flat)[: len(found)]:
            axis.tick_params(labelbottom=True)
            axis.set_ylim(0, 101)
        figure.supxlabel("image rows are gone from this layer on", fontsize=9)
        figure.supylabel("%", fontsize=9)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path
