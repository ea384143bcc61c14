"""The profile: a file that says where a model's cliff is, task by task, and on what evidence. (pure)

    {"format": "vllm-flow-cliff/1", "model": "llava-hf/llava-1.5-7b-hf",
     "architecture": "LlavaForConditionalGeneration", "num_layers": 32, "default": "pope",
     "tasks": {"pope": {"flow_cliff": 22, "evidence": {...}}, "textvqa": {...}},
     "created": "...", "versions": {...}}

`vllm-flow cliff` writes it, ``default_policy: {"profile": ...}`` reads it. What serving needs are the
cliffs; a cliff equal to the number of layers evicts nothing. Knows nothing of vLLM.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_flow.outputs import write_text
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_bounds import operators_policy
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import CLIFF_KEY, FORMS, POLICY_KEYS, REQUEST_KEYS, is_own
from vllm_flow.user_text import parse_json, shown

FORMAT = "vllm-flow-cliff/1"


READ_FROM = "read_from"
"""In the content that processes hand on: the file's name, for messages."""
KNOWN = (
    *("format", "model", "architecture", "num_layers", "default", "tasks", "created", "versions"),
)
HUB = re.compile(r"models--[^/]+--(?P<name>[^/]+)/snapshots/[^/]+$")
"""A model's folder in the hub's cache."""


class ProfileError(ValueError):
    """A profile cannot be used; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class Profile:
    """What serving needs of a profile."""

    policies: Mapping[str, FlowPolicy | None] = field(default_factory=dict)
    """By task; None is the baseline."""
    default: FlowPolicy | None = None
    """Of requests that name no task: the entry "default", else that of a single task, else none."""
    model: str = ""
    """What it was made for, as `vllm-flow cliff` was told."""
    architecture: str = ""
    """The same as its configuration names it; empty in a file that does not say."""

    def of_task(self, task: str) -> FlowPolicy | None:
        """The policy of a known task."""
        return self.policies[task]


def read_profile(source: Any, num_layers: int) -> Profile:
    """A profile for a model of `num_layers` decoder layers.

    Args:
        source: the path of a file, or what such a file holds.

    Raises:
        ProfileError: there is no such file, it is no profile, or one of another model.
    """
    name, content = load_profile(source)
    layers = content.get("num_layers")
    if layers != num_layers or isinstance(layers, bool):
        raise ProfileError(
            f"{name} is the profile of a model with {shown(layers)} decoder layers "
            f"({shown(content.get('model'))}), and this one has {num_layers}; make one for this "
            "model with `vllm-flow cliff`."
        )
    for entry in content:
        meant = difflib.get_close_matches(str(entry), KNOWN, n=1, cutoff=0.75)
        if entry not in KNOWN and meant:
            raise ProfileError(f"{name}: {shown(entry)} says nothing; did you mean {meant[0]!r}?")
    tasks = content.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        raise ProfileError(f'{name}: "tasks" must be an object with at least one task.')
    policies = {task: _policy(f"{name}: task {task!r}", tasks[task], num_layers) for task in tasks}
    said = content.get("default")
    if isinstance(said, str):
        if said not in policies:
            raise ProfileError(
                f'{name}: "default" is {shown(said)}, which is none of its tasks ({", ".join(policies)}).'
            )
        default = policies[said]
    elif said is not None:
        default = _policy(f'{name}: "default"', said, num_layers)
    else:
        default = next(iter(policies.values())) if len(policies) == 1 else None
    made_for = (str(content.get(key) or "") for key in ("model", "architecture"))
    return Profile(policies, default, *made_for)


def unlike(profile: Profile, names: Collection[str], architectures: Collection[str]) -> str | None:
    """That a profile was made for another model than the one that is served, as far as names tell; None if not.

    The number of layers tells little: many models have as many. A folder may hold a copy of any model, so of
    one that has another name the architecture decides, where the profile says it.

    Args:
        names: of the model that is served: its path or its name on the hub, and what clients call it.
        architectures: its configuration's.
    """
    if not profile.model or _last(profile.model) in map(_last, names):
        return None
    known = bool(profile.architecture and architectures)
    if known and profile.architecture not in architectures:
        return (
            f"it was made for {profile.model} ({profile.architecture}), and this is {next(iter(names))} "
            f"({', '.join(architectures)})"
        )
    if known and all(Path(name).is_dir() for name in list(names)[:1]):
        return None
    return f"it was made for {profile.model}, and this is called {next(iter(names))}"


def _last(model: str) -> str:
    """What two names of a model have in common: the last part, without owner, folder and capitals."""
    path = model.replace("\\", "/").rstrip("/")
    cached = HUB.search(path)
    return (cached["name"] if cached else path.rpartition("/")[2]).casefold()


def load_profile(source: Any) -> tuple[str, Mapping[str, Any]]:
    """A profile's name for messages, and its content; only its format is checked.

    Raises:
        ProfileError: there is no such file, or it is no profile of this format.
    """
    if isinstance(source, Mapping):
        name, content = str(source.get(READ_FROM) or "the profile"), source
    elif isinstance(source, (str, os.PathLike)) and str(source).strip():
        name = str(source)
        try:
            content = parse_json(Path(source).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"profile {name!r} cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise ProfileError(f"profile {name!r} is no JSON ({error}).") from None
    else:
        raise ProfileError(f"profile={shown(source)}: it must name a file of `vllm-flow cliff`.")
    found = content.get("format") if isinstance(content, Mapping) else None
    if found != FORMAT:
        raise ProfileError(
            f'{name} is no profile that can be read here: "format" is {shown(found)} and must be '
            f"{FORMAT!r}; `vllm-flow cliff` writes such files."
        )
    return name, content


def essential(source: Any) -> dict[str, Any]:
    """The content of a profile without its evidence: what is handed from process to process.

    Raises:
        ProfileError: see :func:`load_profile`.
    """
    read_from, content = load_profile(source)
    kept = {
        name: content[name]
        for name in ("format", "model", "architecture", "num_layers", "default")
        if name in content
    }
    tasks = content.get("tasks")
    if isinstance(tasks, Mapping):
        tasks = {
            task: {k: v for k, v in entry.items() if k != "evidence"}
            if isinstance(entry, Mapping)
            else entry
            for task, entry in tasks.items()
        }
    return {**kept, READ_FROM: read_from, "tasks": tasks}


def merged(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> dict[str, Any]:
    """`after` with the tasks and the default that the file had; a task that both have is `after`'s.

    Raises:
        ProfileError: the two are of different models.
    """
    if before is None:
        return dict(after)
    check_joins(before, after)
    tasks = {**before.get("tasks", {}), **after.get("tasks", {})}
    default = {"default": before["default"]} if "default" in before else {}
    return {**default, **after, "tasks": tasks}


def check_default(before: Mapping[str, Any] | None, task: str, default: str | None) -> None:
    """Refuse a task that a profile will not have once `task` has joined it.

    Raises:
        ProfileError: names those that it will have.
    """
    had = {} if before is None else before.get("tasks")
    tasks = [*(had if isinstance(had, Mapping) else ()), task]
    if default is not None and default not in tasks:
        raise ProfileError(
            f"--default {default!r}: the profile will have no such task; name one of {', '.join(dict.fromkeys(tasks))}."
        )


def with_default(content: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """The profile whose requests without a task get the policy of this one; as it was for None."""
    return dict(content) if task is None else {**content, "default": task}


def lacks_default(content: Mapping[str, Any]) -> bool:
    """Whether requests that name no task get no policy, as there are several and no default."""
    return len(content["tasks"]) > 1 and content.get("default") is None


def check_joins(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse to join two profiles, of the second of which only the model may be known yet.

    Raises:
        ProfileError: the two are of different models, or the first has no object of tasks.
    """
    for name in ("model", "num_layers"):
        if before.get(name) != after.get(name):
            raise ProfileError(
                f"the file there is the profile of another model: {name} is {shown(before.get(name))} there "
                f"and {shown(after.get(name))} here; name another file with --out."
            )
    if not isinstance(before.get("tasks", {}), Mapping):
        raise ProfileError(
            'the file there is damaged: its "tasks" must be an object; mend or delete it, or name another '
            "file with --out."
        )


def write_profile(path: Path, content: Mapping[str, Any]) -> None:
    """Write a profile; the file is complete or as it was."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _policy(where: str, entry: Any, num_layers: int) -> FlowPolicy | None:
    if not isinstance(entry, Mapping) or not any(key in entry for key in FORMS):
        raise ProfileError(
            f'{where} must be an object with "{CLIFF_KEY}", or another policy\'s keys.'
        )
    keys = {key: value for key, value in entry.items() if is_own(key)}
    others = [key for key in keys if key in REQUEST_KEYS and key not in POLICY_KEYS]
    if others:
        raise ProfileError(f"{where}: {others[0]!r} is no request key of a policy; leave it out.")
    try:
        return operators_policy(keys, num_layers)
    except PolicyError as error:
        raise ProfileError(f"{where}: {error}") from None
