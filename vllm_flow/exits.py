"""Ends a command that cannot go on: one sentence on standard error, and an exit status.

0 done, 1 stopped on the way (disk, engine, cluster's work), 2 refused before the work, 3 done with errors
among the results (`eval`), 130 interrupted (Ctrl-C), 141 nobody reads the output any more. Faults of the
program itself are not caught: their traceback is what a report needs. A module of an extra that is not
installed is refused with the extra's name (`extras`). (standard library only)
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from vllm_flow import extras

STOPPED = 1
REFUSED = 2
SOME_ERRORS = 3
INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE


OURS = "vllm-flow"
LONGEST = 1200
"""Characters of a sentence."""


class CommandError(Exception):
    """What ends a command and can be mended by its user; the message is the sentence."""

    status = STOPPED


class Refused(CommandError):
    """It cannot begin as asked; nothing was done."""

    status = REFUSED


@contextlib.contextmanager
def keeping(kept: Callable[[], str | None]) -> Iterator[None]:
    """While this is open, a command that ends early also says what is kept.

    Args:
        kept: a clause such as "the answers so far are in RUN"; None where nothing is there yet.
    """
    try:
        yield
    except BaseException as error:
        error._vllm_flow_kept = kept()  # type: ignore[attr-defined]
        raise


def guarded(name: str, call: Callable[[], int | None], by: str = OURS) -> int:
    """The exit status of `call`, the work of `vllm-flow name` (or of another program), however it ends."""
    plain_output()
    heed_lost_interrupts()
    try:
        status = call()
        sys.stdout.flush()  # here, where a full disk can still be told
        return status or 0
    except BrokenPipeError:
        # What is still in the buffer has no reader; Python would complain of it at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except CommandError as error:
        say(f"{by} {name}", str(error), error)
        return error.status
    except BaseException as error:
        if interrupted(error):
            # A second Ctrl-C ends what the first left to tidy up, without a word.
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            say(f"{by} {name}", "interrupted", error)
            return INTERRUPTED
        missing = extras.remedy(error, name)
        if missing is not None:
            say(f"{by} {name}", missing, error)
            return REFUSED
        if not isinstance(error, OSError):
            raise
        say(f"{by} {name}", told(error), error)
        return STOPPED


def run_module(name: str, main: Callable[[], int | None]) -> NoReturn:
    """The end of a process that runs a module: `python -m name`, whose work `main` is."""
    leave(guarded(name, main, "python -m"))


def leave(status: int) -> NoReturn:
    """End the process with `status`."""
    if status == INTERRUPTED:
        # CPython ends `python -m` by SIGINT once a KeyboardInterrupt has gone through an `exec` of text,
        # and libraries are full of it; and nothing should wait for threads that were interrupted.
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be kept
    sys.exit(status)


def say(program: str, sentence: str, error: BaseException) -> None:
    """Print the sentence, and what is kept, as one line."""
    kept = getattr(error, "_vllm_flow_kept", None)
    line = " ".join(sentence.split())
    if len(line) > LONGEST:  # some quote what stands in a file
        line = f"{line[:LONGEST]}..."
    if kept:
        line = f"{line.rstrip('.')}; {kept}"
    with contextlib.suppress(OSError):
        # A terminal has just shown ^C, or a progress bar.
        start = "\n" if sys.stderr.isatty() else ""
        print(f"{start}{program}: {line if line.endswith(('.', '?')) else line + '.'}",
              file=sys.stderr, flush=True)  # fmt: skip


def interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is the error or its origin: one that hits an import or a callback of a library
    may come out as that library's own error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def told(error: OSError) -> str:
    """What the system refused, and on which file."""
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{place}{reason(error)}"


def reason(error: OSError) -> str:
    """The system's word, without a number. pyarrow puts a sentence of its own before it."""
    if error.errno is None:
        return str(error) or type(error).__name__
    return os.strerror(error.errno)


def plain_output() -> None:
    """Let no character of a path or an answer be one that the output's encoding cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def heed_lost_interrupts() -> None:
    """Raise a Ctrl-C again that fell into a finaliser, where Python would print and forget it."""
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _again


def _again(unraisable: sys.UnraisableHookArgs) -> None:
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    # A little later, when this hook is left: here it would be lost once more.
    main = threading.main_thread().ident
    later = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
    later.daemon = True
    later.start()
