"""Finds which extra of this package brings a module that is not installed, from the package's metadata.

    pip install 'vllm-flow[eval]'

(standard library only)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata, util

PACKAGE = "vllm-flow"
VLLM = "'vllm-flow[cuda]', or on a CPU 'vllm-flow[cpu]'"
CHOICE = ("cpu", "cuda")
"""Extras of which an environment has one."""
NAMED_OTHERWISE = {
    "PIL": "pillow",
    "resvg_py": "resvg-py",
    "skimage": "scikit-image",
}
"""Modules of an extra whose distribution has another name."""
WITH_VLLM = ("vllm", "torch", "transformers")
REQUIREMENT = re.compile(
    r"([\w.-]+)(?:\[([\w,. -]+)\])?[^;]*(?:;.*\bextra\s*==\s*[\"'](\w+)[\"'])?"
)


def remedy(error: BaseException, command: str = "") -> str | None:
    """A sentence for a module of an extra that is not installed; None for any other error.

    Args:
        command: whose extra of the same name comes first, if it brings the module.
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.partition(".")[0]
    if util.find_spec(module) is not None:
        return None  # it is there, and something else is wrong with it
    said = f"this needs the Python package {NAMED_OTHERWISE.get(module, module)!r}, which is not installed; run"
    if module in WITH_VLLM:
        return f"{said} pip install {VLLM}"
    try:
        extra = extra_of(module, metadata.requires(PACKAGE) or (), command)
    except metadata.PackageNotFoundError:
        return None
    return None if extra is None else f"{said} pip install '{PACKAGE}[{extra}]'"


def extra_of(module: str, requirements: Iterable[str], command: str = "") -> str | None:
    """The extra that brings a module; None where none does, or which one is for its user to know.

    Args:
        requirements: as a package's metadata has them: ``rich; extra == "eval"``.
    """
    wanted = NAMED_OTHERWISE.get(module, module)
    extras = _extras(requirements)
    found = [extra for extra in extras if extra not in CHOICE and wanted in _brought(extra, extras)]
    return command if command in found else next(iter(found), None)


def _extras(requirements: Iterable[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Extra -> what it requires -> with which extras of that."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for line in requirements:
        match = REQUIREMENT.match(line)
        if match is not None and match[3]:
            more = tuple(re.split(r"[ ,]+", match[2])) if match[2] else ()
            found.setdefault(match[3], {})[match[1].lower()] = more
    return found


def _brought(extra: str, extras: Mapping[str, Mapping[str, tuple[str, ...]]]) -> set[str]:
    """The packages of an extra, and of those that it names of this package."""
    required = extras.get(extra, {})
    further = required.get(PACKAGE, ())
    return {*required, *(name for other in further for name in _brought(other, extras))}
