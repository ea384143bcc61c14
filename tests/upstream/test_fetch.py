"""The source distribution comes through pip, or it is said why it does not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.upstream import fetch


def archive(folder: Path, version: str) -> Path:
    """A source distribution with a build backend that must not run."""
    path = folder / f"vllm-{version}.tar.gz"
    files = {
        "pyproject.toml": '[build-system]\nrequires = ["torch"]\nbuild-backend = "setuptools.build_meta"',
        "setup.py": "raise SystemExit('built')",
        "PKG-INFO": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        "tests/__init__.py": "",
        "tests/conftest.py": "raise SystemExit('not wanted')",
        "tests/v1/core/test_scheduler.py": "",
        "vllm/__init__.py": "",
    }
    with tarfile.open(path, "w:gz") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(f"vllm-{version}/{name}")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content.encode()))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip asks this folder only."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_unpacks_what_is_wanted_once(index: Path, tmp_path: Path) -> None:
    offered = archive(index, "9.9.9")
    where = fetch.tests_of("9.9.9", tmp_path / "cache")
    files = {path.relative_to(where).as_posix() for path in where.rglob("*") if path.is_file()}
    assert files == {"tests/__init__.py", "tests/v1/core/test_scheduler.py"}
    offered.unlink()
    assert fetch.tests_of("9.9.9", tmp_path / "cache") == where


def test_says_what_pip_says(index: Path, tmp_path: Path) -> None:
    archive(index, "9.9.8")
    with pytest.raises(fetch.Unavailable, match=r"vllm==9\.9\.9; it says: .*No matching"):
        fetch.tests_of("9.9.9", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
