"""Engines that start quickly: what vLLM does anew for each, in a process that has had one before, is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

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
