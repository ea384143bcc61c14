"""Places that cannot be written to, and a disk that is nearly full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def unwritable(tmp_path: Path) -> dict[str, Path]:
    """Folders in which nobody, root included, can write a file."""
    file = tmp_path / "file"
    file.write_text("what is here stays")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "below a file": file / "run",
        "a file": file,
        "a device": Path("/dev/null"),
        "no file system for it": Path("/proc/nowhere/run"),
        "a loop of links": tmp_path / "loop" / "run",
        "too long a name": tmp_path / ("long" * 100),
    }


@contextlib.contextmanager
def tiny_disk(path: Path, kilobytes: int, read_only: bool = False) -> Iterator[Path]:
    """A file system of so many kilobytes at `path`; skips the test where none can be mounted."""
    path.mkdir(exist_ok=True)
    options = f"size={kilobytes}k" + (",ro" if read_only else "")
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill the disk of `folder` up to `leave` bytes; the file that does it."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    path = folder / "filler"
    path.write_bytes(bytes(max(0, free - leave)))
    return path
