"""The package as installed: light to import, nothing forgotten, the plugin where vLLM looks."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["vllm_flow", "vllm_flow.cli", "vllm_flow.demo"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


def test_every_package_is_listed() -> None:
    """`packages` is an explicit list; a forgotten one is missing from wheels without a word."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = set()
    for top, name in (
        ("vllm_flow",) * 2,
        ("eval", "vllm_flow.eval"),
        ("patches", "vllm_flow.patches"),
    ):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *parts)))
    assert listed == found


def test_version_is_the_distribution_version() -> None:
    import vllm_flow

    assert vllm_flow.__version__ == metadata.version("vllm-flow")


def test_entry_points() -> None:
    points = {p.group: p.value for p in metadata.distribution("vllm-flow").entry_points}
    # Read from the project's file: an environment installed before may have an earlier one.
    project = (ROOT / "pyproject.toml").read_text()
    assert 'vllm-flow = "vllm_flow.cli:entry"' in project
    assert points["console_scripts"] in ("vllm_flow.cli:entry", "vllm_flow.cli:main")
    assert points["vllm.general_plugins"] == "vllm_flow.engine.plugin:register"
