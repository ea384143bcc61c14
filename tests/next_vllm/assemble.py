"""Puts a vLLM together that no index has: the Python of one version over the CPU binaries of another.

vLLM's CPU wheels appear later than its CUDA wheels. Compiled operators change seldom, what this package
stands on is Python. The wheel is got through pip, as :mod:`tests.upstream.fetch` gets its sources;
nothing is installed: a folder comes into being that goes to the front of ``PYTHONPATH``.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIRES = ("orjson",)
"""What it needs to be imported, and the installed version of vLLM does not."""

CACHE = Path(__file__).resolve().parents[2] / ".cache/next-vllm"
TIME_LIMIT = 900
"""Seconds for a wheel of 340 MB."""


class Unavailable(Exception):
    """The wheel, or the binaries, cannot be had; the message says why."""


def assembled(version: str, cache: Path = CACHE) -> Path:
    """The folder with this version of vLLM; put together the first time.

    Raises:
        Unavailable: pip cannot get the wheel, or no CPU build of vLLM is installed.
    """
    folder = cache / version
    if not folder.exists():
        binaries = installed_binaries()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            whole = Path(scratch, "whole")
            put_together(download(version, Path(scratch)), binaries, version, whole)
            pip("install", "--target", str(whole), *REQUIRES)
            whole.rename(folder)
    return folder


def installed_binaries() -> list[Path]:
    """The compiled parts of the installed CPU build.

    Raises:
        Unavailable: there is none.
    """
    spec = importlib.util.find_spec("vllm")
    found = [] if spec is None or spec.origin is None else Path(spec.origin).parent.glob("*.so")
    binaries = sorted(found)
    if not any(path.name.startswith("_C") for path in binaries):
        raise Unavailable("no CPU build of vLLM is installed here whose binaries could be used")
    return binaries


def download(version: str, folder: Path) -> Path:
    """The wheel, through pip.

    Raises:
        Unavailable: with what pip said.
    """
    pip("download", "--dest", str(folder), f"vllm=={version}")
    return next(folder.glob("vllm-*.whl"))


def pip(action: str, *arguments: str) -> None:
    """Let pip get something, without what that requires in turn.

    Raises:
        Unavailable: with what pip said.
    """
    command = [sys.executable, "-m", "pip", action, "--no-deps", "--only-binary=:all:", "-q"]
    try:
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not get {arguments[-1]} in {TIME_LIMIT} s") from None
    if done.returncode:
        raise Unavailable(f"pip cannot get {arguments[-1]}: {done.stderr.strip()}")


def put_together(wheel: Path, binaries: list[Path], version: str, folder: Path) -> None:
    """Write ``folder``: the wheel's Python, these binaries, and metadata that say what it is."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder, [name for name in names if not name.endswith(".so")])
    for stale in folder.glob("*.dist-info"):
        shutil.rmtree(stale)
    for binary in binaries:
        (folder / "vllm" / binary.name).symlink_to(binary)
    # vLLM takes its platform from its version's local part.
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        f"Summary: the Python of vLLM {version} over another version's CPU binaries, for tests\n"
    )
