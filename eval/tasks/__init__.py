"""The benchmarks: one file per task, found by itself.

A new task is a new module in this package that holds `TASK`, an instance of
`vllm_flow.eval.tasks.base.Task`; variants of it (other options under other names) go in a tuple
`VARIANTS`. Nothing else needs to know of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, sum_counts
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.steps import STEPS, with_steps

__all__ = [
    "Item",
    "Metrics",
    "Scored",
    "Task",
    "Totals",
    "get_task",
    "load_image",
    "sum_counts",
    "task_names",
]

NOT_TASKS = {
    "anls", "base", "boxes", "cells", "choices", "coco", "language", "parquet", "pictures", "prompts", "reading",
    "steps",
}  # fmt: skip
"""What the tasks share lives in their room too."""


@lru_cache(maxsize=1)
def _tasks() -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name in NOT_TASKS:
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        if not isinstance(getattr(module, "TASK", None), Task):
            raise TypeError(f"{module.__name__} must hold TASK, an instance of Task")
        for task in (module.TASK, *getattr(module, "VARIANTS", ())):
            if task.name in tasks:
                raise ValueError(f"{module.__name__}: there is already a task {task.name!r}")
            tasks[task.name] = task
    return tasks


def task_names() -> list[str]:
    """The names of all tasks and variants, sorted."""
    return sorted(_tasks())


def get_task(name: str) -> Task:
    """The task of that name, `NAME-steps` asked step by step; ValueError, listing the names, where there is none."""
    tasks = _tasks()
    stem, _, last = name.rpartition("-")
    if last == STEPS and stem in tasks:
        return with_steps(tasks[stem])
    if name not in tasks:
        raise ValueError(f"no task {name!r}; there are: {', '.join(sorted(tasks))}")
    return tasks[name]
