"""Engines in a process that has had one: what vLLM would do anew is left out, and what it would keep is not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from vllm import envs
from vllm.triton_utils import dispatcher


@contextmanager
def quickly() -> Iterator[None]:
    """While an engine starts.

    It collects garbage a dozen times, and looks into every module of the process for kernels to be replaced by
    those of the CPU; whoever imported one since the first engine has the replacement.
    """
    stock = dispatcher.register_kernels

    def register(overrides: Mapping[str, Callable[..., Any]]) -> None:
        known = {name: replacement for name, (_, replacement) in dispatcher._registry.items()}
        new = {name: kernel for name, kernel in overrides.items() if known.get(name) is not kernel}
        if new:
            stock(new)

    with (
        mock.patch("gc.collect"),
        mock.patch.object(dispatcher, "register_kernels", register),
    ):
        yield


def during_the_test(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Set a variable of vLLM's, for engines that start from here on and for their workers, until the test is over."""
    # vLLM keeps what it reads as it starts the first engine of a process: let it read before this is set.
    envs.enable_envs_cache()
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(envs, name, envs.environment_variables[name](), raising=False)
