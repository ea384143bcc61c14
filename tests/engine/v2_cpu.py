"""Makes Model Runner V2 run on CPU: Triton's interpreter, and the CPU backend Triton does not ship.

V2's kernels are written in Triton. Installed before vLLM is imported, this lets V2's logic be
tested without a GPU; Triton's compiler, CUDA graphs and streams stay untested. Knows nothing of
the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from multiprocessing import spawn
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

from tests.engine import interpreter

if TYPE_CHECKING:
    import pytest

T = TypeVar("T")

SWITCH = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's own variable; vLLM chooses its model runner once per process."""


def wanted() -> bool:
    """Whether this process is to run V2."""
    return os.environ.get(SWITCH) == "1"


def reduced(values: Iterable[T], to: Iterable[T]) -> list[T]:
    """Parameters of a test: all under V1, those of `to` under V2, whose interpreter is slow."""
    return list(to) if wanted() else list(values)


class _Driver:
    """What vLLM asks of a Triton backend's driver: whether a device of its kind is there."""

    @staticmethod
    def is_active() -> bool:
        return False


def install() -> None:
    """Switch the interpreter on and announce a CPU backend.

    Raises:
        RuntimeError: vLLM is there already, and has decided that it has no Triton.
    """
    if "vllm" in sys.modules:
        raise RuntimeError("Model Runner V2 on CPU must be set up before vllm is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)  # type: ignore[assignment]
    interpreter.install()


def install_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every process that is spawned from here on, until the test is over.

    A spawned interpreter runs its parent's main module before it unpickles what it is to do, and with that imports
    vLLM; it is told that this module is the main one.
    """
    prepare = spawn.get_preparation_data
    monkeypatch.setattr(
        spawn,
        "get_preparation_data",
        lambda name: prepare(name) | {"init_main_from_name": "tests.engine.v2_cpu"},
    )


if __name__ == "__mp_main__":
    install()
