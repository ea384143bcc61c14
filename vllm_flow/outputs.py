"""Writing results: looked at before the work, and each file complete or as it was.

(standard library only)
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from vllm_flow.exits import CommandError, reason

PROBE_BYTES = 16384
"""Less room than this is none."""


class OutputError(CommandError):
    """Something cannot be written; the message names the place and why."""

    def __init__(self, place: str, error: OSError | str) -> None:
        why = error if isinstance(error, str) else reason(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room, or name another place" if full else "name another place"
        super().__init__(f"{place} cannot be written ({why}): {remedy}")


def check_folder(folder: Path, place: str | None = None) -> None:
    """Look whether results can be written below `folder`, which need not be there; leaves nothing.

    Args:
        place: what messages call it; `--out FOLDER` by default.

    Raises:
        OutputError: they cannot.
    """
    place = place or f"--out {folder}"
    made: list[Path] = []
    try:
        for path in (*reversed(folder.absolute().parents), folder.absolute()):
            if not path.is_dir():
                path.mkdir()
                made.append(path)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vllm-flow-") as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except FileExistsError:
        raise OutputError(place, "a file stands where a folder must be") from None
    except OSError as error:
        raise OutputError(place, error) from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another command may use it by now
                path.rmdir()


def check_file(path: Path, option: str = "--out") -> None:
    """The same for one file.

    Raises:
        OutputError: it cannot be written; names `option`.
    """
    if path.is_dir():
        raise OutputError(f"{option} {path}", "it is a folder, and must be a file")
    if special(path):
        if not os.access(path, os.W_OK):
            raise OutputError(f"{option} {path}", "Permission denied")
        return
    check_folder(real(path).parent, f"{option} {path}")


def write_whole(path: Path, write: Callable[[Path], object], durable: bool = False) -> Path:
    """Let `write` fill a file beside `path` and put it in its place; the same path.

    The folder is made. A pipe or a device is written to as it is.

    Args:
        write: writes the file whose path it is given, which ends as `path` does.
        durable: wait until the disk has it, so that it outlasts a crash of the machine.

    Raises:
        OutputError: it cannot be written; `path` is as it was.
    """
    if special(path):
        try:
            write(path)
        except OSError as error:
            raise OutputError(str(path), error) from None
        return path
    final = real(path)
    draft = final.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        if durable:
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        draft.replace(final)
    except OSError as error:
        raise OutputError(str(path), error) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """`write_whole` for UTF-8 text."""
    return write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def real(path: Path) -> Path:
    """The absolute path without links; unlike `Path.resolve`, one for a loop of links as well."""
    return Path(os.path.realpath(path))


def special(path: Path) -> bool:
    """Whether something that is neither a file nor a folder is there: a device, a pipe, a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()
