"""Engines that compile as vLLM does by default, and which of their steps ran compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.harness import Engine
from tests.engine.starting import during_the_test
from vllm_flow.engine.families import decoder_of


def allow_compiling(monkeypatch: pytest.MonkeyPatch, inductor: bool) -> None:
    """Undo what the suites set to start engines quickly; without Inductor, Dynamo's trace runs as it is."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    during_the_test(monkeypatch, "VLLM_CPU_CI_ENV", "0" if inductor else "1")


@dataclass
class Calls:
    """Of the whole model, and those among them in which the layers' own code ran."""

    model: int = 0
    eager: int = 0

    @property
    def compiled(self) -> int:
        return self.model - self.eager


@contextmanager
def counted_calls(engine: Engine) -> Iterator[Calls]:
    """How often the model is called meanwhile.

    Hooks that are registered after compilation are seen by the modules' own code alone.
    """
    calls, hooks = _counted(engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


_of_worker: list[Calls] = []


def count(worker: Any) -> None:
    """The same in a worker that is a process of its own, until it ends; for vLLM's ``collective_rpc``."""
    _of_worker.append(_counted(worker.model_runner)[0])


def counted(worker: Any) -> Calls:
    """Since :func:`count`."""
    return _of_worker[-1]


def _counted(runner: Any) -> tuple[Calls, list[Any]]:
    """Calls of a runner's model from here on, and the hooks that count them."""
    decoder = decoder_of(runner.model, runner.model_config)
    # What vLLM compiles may be around the decoder that the family names, or a part of it.
    compiled = [
        module
        for module in runner.model.modules()
        if not getattr(module, "do_not_compile", True) and decoder.layers[0] in module.modules()
    ]
    assert any(m.compiled or getattr(m, "aot_compiled_fn", None) is not None for m in compiled)
    calls = Calls()

    def of_model(*_: object) -> None:
        calls.model += 1

    def of_layer(*_: object) -> None:
        calls.eager += 1

    return calls, [
        runner.model.register_forward_pre_hook(of_model),
        decoder.layers[0].register_forward_pre_hook(of_layer),
    ]
