"""How commands end: sentences, statuses, what is kept, and files that are complete or as they were."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.places import fill, tiny_disk, unwritable
from vllm_flow.exits import (
    INTERRUPTED,
    REFUSED,
    STOPPED,
    UNREAD,
    CommandError,
    Refused,
    guarded,
    keeping,
)
from vllm_flow.outputs import OutputError, check_file, check_folder, write_text, write_whole

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


@pytest.fixture(autouse=True)
def own_handlers() -> object:
    """`guarded` may take away the handler of Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (CommandError("the engine\nended"), STOPPED, "the engine ended."),
        (Refused("no such thing."), REFUSED, "no such thing."),
        (Refused("did you mean 'a'?"), REFUSED, "did you mean 'a'?"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted."),
        (OSError(errno.ENOSPC, "x", "/a/b"), STOPPED, "/a/b: No space left on device."),
        (OSError(errno.EROFS, "Error writing. Detail: ..."), STOPPED, "Read-only file system."),
        (OSError("3 requested and 0 written"), STOPPED, "3 requested and 0 written."),
    ],
)
def test_a_command_ends_in_one_sentence(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, says: str
) -> None:
    assert guarded("demo", raising(error)) == status
    assert capsys.readouterr().err == f"vllm-flow demo: {says}\n"


def test_an_interrupt_inside_another_error_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def call() -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'x'") from None

    assert guarded("eval", call) == INTERRUPTED
    assert capsys.readouterr().err == "vllm-flow eval: interrupted.\n"


def test_faults_of_the_program_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded("eval", lambda: 1 // 0)


def test_what_is_kept_is_said_where_something_is(capsys: pytest.CaptureFixture[str]) -> None:
    for kept, says in ((None, "interrupted."), ("rows are in x", "interrupted; rows are in x.")):
        with pytest.raises(KeyboardInterrupt) as caught, keeping(lambda kept=kept: kept):
            raise KeyboardInterrupt
        assert guarded("eval", raising(caught.value)) == INTERRUPTED
        assert capsys.readouterr().err == f"vllm-flow eval: {says}\n"


def run_python(code: str, **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, **more
    )


def test_output_that_nobody_reads_ends_quietly() -> None:
    code = (
        "import sys; from vllm_flow.exits import guarded\n"
        "sys.exit(guarded('x', lambda: [print('y' * 9999) for _ in range(99)] and 0))"
    )
    child = run_python(code, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert (child.wait(), child.stderr.read()) == (UNREAD, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_has_no_room_is_told() -> None:
    code = (
        "import sys; from vllm_flow.exits import guarded\n"
        "sys.exit(guarded('x', lambda: print('y') or 0))"
    )
    with open("/dev/full", "w") as full:
        child = run_python(code, stdout=full)
        said = child.communicate()[1]
    assert said.startswith("vllm-flow x: No space left on device.\n")
    assert child.returncode not in (0, None)


def test_an_interrupt_in_a_finaliser_is_not_lost() -> None:
    """Python prints and forgets what is raised in `__del__`."""
    code = """
import signal, time
from vllm_flow.exits import guarded, leave
class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)
def call():
    Slow()
    time.sleep(30)
    return 0
leave(guarded("x", call))
"""
    child = run_python(code)
    assert child.communicate(timeout=20)[1] == "vllm-flow x: interrupted.\n"
    assert child.returncode == INTERRUPTED


def test_the_status_is_ours_where_python_would_end_by_the_signal(tmp_path: Path) -> None:
    """An interrupt that goes through `exec` marks a `python -m`, which CPython then kills at its end."""
    code = """
from vllm_flow.exits import guarded, leave
def call():
    exec("raise KeyboardInterrupt")
    return 0
leave(guarded("x", call))
"""
    (tmp_path / "marked.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "marked"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == "vllm-flow x: interrupted.\n"
    assert done.returncode == INTERRUPTED


def test_a_second_interrupt_ends_what_the_first_left_to_tidy_up() -> None:
    code = """
import atexit, signal, time
from vllm_flow.exits import guarded, leave
def call():
    signal.raise_signal(signal.SIGINT)
    return 0
atexit.register(time.sleep, 60)
leave(guarded("x", call))
"""
    child = run_python(code)
    assert child.stderr is not None
    assert child.stderr.readline() == "vllm-flow x: interrupted.\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=20)[1] == ""
    assert child.returncode == -signal.SIGINT


# Files.


def test_the_look_leaves_nothing_behind(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "b.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "here").mkdir()
    check_folder(tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    for what, place in unwritable(tmp_path).items():
        with pytest.raises(OutputError, match=r"--out .* cannot be written \(.+\): ") as caught:
            check_folder(place)
        assert str(place) in str(caught.value), what
    with pytest.raises(OutputError, match="it is a folder"):
        check_file(tmp_path)
    assert (tmp_path / "file").read_text() == "what is here stays"


def test_a_read_only_disk_is_told(tmp_path: Path) -> None:
    with (
        tiny_disk(tmp_path / "disk", 64, read_only=True) as disk,
        pytest.raises(OutputError, match="Read-only file system"),
    ):
        check_folder(disk / "run")


def test_a_full_disk_is_told_and_files_stay_as_they_were(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", 64) as disk:
        write_text(disk / "page.html", "before")
        filler = fill(disk, leave=8192)
        with pytest.raises(OutputError, match="No space left on device.*: make room"):
            check_folder(disk / "run")
        with pytest.raises(OutputError, match="page.html cannot be written"):
            write_text(disk / "page.html", "after" * 9999)
        assert (disk / "page.html").read_text() == "before"
        assert {path.name for path in disk.iterdir()} == {"page.html", "filler"}
        filler.unlink()
        write_text(disk / "page.html", "after")
        assert (disk / "page.html").read_text() == "after"


def test_a_write_that_fails_leaves_no_draft(tmp_path: Path) -> None:
    def write(draft: Path) -> None:
        draft.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x.json", write)
    assert not list(tmp_path.iterdir())


def test_devices_and_links_are_written_through(tmp_path: Path) -> None:
    """A device must not be replaced by a file, nor a link by what it leads to."""
    write_text(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    reader = os.open(tmp_path / "pipe", os.O_RDWR) if os.mkfifo(tmp_path / "pipe") is None else -1
    check_file(tmp_path / "pipe")
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
