"""Held-out scenes in the files of four benchmarks, so that the evaluation runs without any download.

`python -m vllm_flow.demo_model.datasets --out DIR` writes them. They have the formats of POPE, ScienceQA,
TextVQA and COCO (for CHAIR), field for field as far as official scorers read them, and nothing else
of those benchmarks: call results on them "POPE-style" and so on. Left and right borrow POPE's format,
counting TextVQA's. Questions are worded as in the demo model's training (`vllm_flow.demo_model.questions`),
and everything is decided by the seed.

One module per task with one function `write(scenes, out, items, seed)`; `common` holds what they
share; `readme` the text that is written beside the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_flow.demo_model.datasets import chair, counting, places, pope, scienceqa, textvqa
from vllm_flow.demo_model.datasets.readme import write_readme
from vllm_flow.demo_model.heldout import DATA, load_scenes

__all__ = ["BENCHMARKS", "TASKS", "write_datasets"]

BENCHMARKS = ("pope", "scienceqa", "textvqa", "chair")
"""Those of `TASKS` that have a benchmark's name."""

TASKS: Mapping[str, Callable[..., int]] = {
    "pope": pope.write,
    "scienceqa": scienceqa.write,
    "textvqa": textvqa.write,
    "chair": chair.write,
    "places": places.write,
    "counting": counting.write,
}
"""Task name, which is also its folder, -> the function that writes it and returns its item count."""


def write_datasets(
    out: Path,
    items: int | None = None,
    seed: int = 0,
    split: str = "seen",
    tasks: Sequence[str] = BENCHMARKS,
    pictures: Path = DATA,
) -> dict[str, int]:
    """Write the tasks' folders below `out`; return how many items each holds.

    Args:
        out: made where missing; files of the same names are overwritten.
        items: at most so many items per task (POPE: per label file; CHAIR: pictures), None for all.
        seed: decides everything that is drawn.
        split: one of the splits of `pictures`.
        tasks: names out of `TASKS`.
        pictures: a folder of scenes, as shipped or as `training.heldout_data` writes it.

    Raises ValueError for an unknown task or split, a split without scenes, or `items` below 1.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}: use some of {', '.join(TASKS)}")
    if items is not None and items < 1:
        raise ValueError(f"items must be at least 1, got {items}")
    scenes = load_scenes(split, pictures)
    if not scenes:
        there = dict.fromkeys(scene.split for scene in load_scenes(folder=pictures))
        raise ValueError(
            f"there are no scenes of the split {split!r} (there are: {', '.join(there)}); "
            "python -m vllm_flow.demo_model.training.heldout_data makes them"
        )
    counts = {name: TASKS[name](scenes, out / name, items, seed) for name in tasks}
    write_readme(out, counts, seed, split)
    return counts
