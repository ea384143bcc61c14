"""Runs `vllm-flow score` in tests; reports without figures; one Ray for those that need it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eval import files
from tests.plugins.installing import RANK_PACKAGE, TASK_PACKAGE, lay_out
from vllm_flow.cli import main


class Command:
    """Runs `vllm-flow score` and keeps what it said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def scores(self, *arguments: object) -> dict[str, Any]:
        out = self.folder / "out/scores.json"
        status = main(["score", *map(str, arguments), "--json", str(out)])
        self.output, self.errors = self.capsys.readouterr()
        assert status == 0, self.errors
        return json.loads(out.read_text())

    def refuses(self, *arguments: object, status: int = 2) -> str:
        assert main(["score", *map(str, arguments)]) == status
        self.output, self.errors = self.capsys.readouterr()
        assert self.output == ""
        assert self.errors.count("\n") == 1 and "Traceback" not in self.errors
        return self.errors


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A directory with POPE's three label files."""
    return files.pope_labels(tmp_path / "labels")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    splits = {"val": {7: (["dog"], ["A man and a dog."]), 8: (["cat"], [])}}
    return files.coco(tmp_path / "annotations", splits)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time; tests of something else do without."""
    monkeypatch.setattr("vllm_flow.eval.report.figures.draw_all", lambda *_: {})
    monkeypatch.setattr("vllm_flow.eval.report.figures_compare.draw", lambda *_: {})


@pytest.fixture(scope="package")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Where a package with ranks lies, and one with a task; `visible` lets this process have them."""
    root = tmp_path_factory.mktemp("packages")
    ranks, task = (lay_out(package, root / package) for package in (RANK_PACKAGE, TASK_PACKAGE))
    return ranks, task


@pytest.fixture(scope="package")
def cluster(packages: tuple[Path, Path]) -> Iterator[str]:
    """Ray on this machine, two slots; its address. Started once for all files: its processes take seconds each.

    Its workers have the packages with ranks and tasks, of which this process knows nothing.
    """
    import ray

    from vllm_flow.eval.sweep import connection

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        # That name alone: as Ray starts, it leaves its secret in the environment for those that join.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, packages)), prepend=os.pathsep)
        connection.connect(None, 2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
