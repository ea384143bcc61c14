"""Packages with entry points for tests: real ones by pip, broken ones by what pip would leave behind."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vllm_flow.eval.tasks import TASKS
from vllm_flow.ranks import RANKS

HERE = Path(__file__).parent
RANK_PACKAGE, TASK_PACKAGE = "flow_center_rank", "flow_capitals_task"


def pip_install(package: str, target: Path) -> Path:
    """Install a package of this folder, without an index, into a folder of its own."""
    source = target.with_name(f"{target.name}-source") / package
    shutil.copytree(HERE / package, source)  # pip builds where the source is
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--target", str(target), str(source)),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def lay_out(package: str, target: Path) -> Path:
    """A package of this folder as pip would install it, without the seconds that takes."""
    project = (HERE / package / "pyproject.toml").read_text()
    group, points = re.search(r'entry-points\."(.+?)"\]\n(.+?)\n\n', project, re.DOTALL).groups()  # type: ignore[union-attr]
    places = dict(line.replace('"', "").split(" = ") for line in points.splitlines())
    return write_package(
        target, package, group, places, (HERE / package / f"{package}.py").read_text()
    )


def write_package(
    target: Path, name: str, group: str, points: Mapping[str, str], code: str = ""
) -> Path:
    """What pip leaves behind of a package ``name`` 1.0 with one module; without code there is none."""
    about = target / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{entry} = {place}" for entry, place in points.items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    if code:
        (target / f"{name}.py").write_text(textwrap.dedent(code))
    return target


@contextmanager
def visible(*targets: Path) -> Iterator[None]:
    """This process with packages that it did not have when it began."""
    modules = set(sys.modules)
    sys.path[:0] = map(str, targets)
    _look_anew()
    try:
        yield
    finally:
        del sys.path[: len(targets)]
        for name in set(sys.modules) - modules:
            found = getattr(sys.modules[name], "__file__", None) or ""
            if any(found.startswith(f"{target}/") for target in targets):
                del sys.modules[name]
        _look_anew()


def _look_anew() -> None:
    importlib.invalidate_caches()
    RANKS.refresh()
    TASKS.refresh()
