"""The benchmarks: one file per task, found by itself.

A new task is a new module in this package that holds `TASK`, an instance of
`vllm_flow.eval.tasks.base.Task`; variants of it (other options under other names) go in a tuple
`VARIANTS`. Nothing else needs to know of it. Other packages register theirs under the entry-point group
`GROUP` (docs/extending.md), a variant by an entry of its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals, sum_counts
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.steps import STEPS, with_steps
from vllm_flow.registry import Added, Registry

__all__ = [
    "TASKS",
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


def _admitted(added: Added, brought: object) -> Task:
    """A package's task; ValueError where it is none."""
    if not isinstance(brought, Task):
        named = brought.__name__ if isinstance(brought, type) else type(brought).__name__
        what = "a class, not an object" if isinstance(brought, type) else "no task"
        raise ValueError(
            f"{named} is {what}; it must be an object derived from {Task.__module__}.Task"
        )
    if getattr(brought, "name", None) != added.name:
        raise ValueError(
            f"it calls itself {getattr(brought, 'name', None)!r}; its name must be that of its entry point"
        )
    lacking = [field for field in ("max_tokens", "headline") if not hasattr(brought, field)]
    if lacking:
        raise ValueError(f"it does not say its {lacking[0]}")
    if added.name.endswith(f"-{STEPS}"):
        raise ValueError(f"names in -{STEPS} are those of tasks that are asked step by step")
    return brought


GROUP = "vllm_flow.tasks"
"""Entry points by which other packages add tasks."""
RESERVED = frozenset({"lmms-eval"})
"""What `vllm-flow score` calls something else."""
TASKS: Registry[Task] = Registry(
    GROUP, "task", lambda: _tasks(), _admitted, lambda: RESERVED, r"[a-z][a-z0-9_-]*"
)
"""Every task and variant there is, by name: those of this package, then those of others."""


def task_names() -> list[str]:
    """The names of all tasks and variants, sorted."""
    return sorted(TASKS)


def get_task(name: str) -> Task:
    """The task of that name, `NAME-steps` asked step by step.

    Raises:
        ValueError: there is none, and the names that there are; or it is a package's that cannot be used.
    """
    stem, _, last = name.rpartition("-")
    if last == STEPS and stem in TASKS:
        return with_steps(get_task(stem))
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are: {', '.join(task_names())}")
    TASKS.check(name)
    return TASKS[name]
