"""Engines on vLLM's FlashInfer backend over the stand-in of its kernels, one for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.engine import flashinfer_standin as standin
from tests.engine.cases import Shape
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine
from vllm_flow.engine.worker import variant_builders

DEVICES = {"native": standin.NATIVE, "xqa": standin.XQA, "blackwell": standin.BLACKWELL}
"""By the kernels that vLLM takes there, see :mod:`tests.engine.flashinfer_standin`."""


@contextmanager
def on(
    device: str, open_engine: OpenEngine, shape: Shape, group_layers: int | None, **options: Any
) -> Iterator[Engine]:
    """An engine that may run meanwhile; the same one for the same arguments."""
    # The session keeps engines by their options; this one goes to no kernel here, and is another for each device.
    capacity = (24 << 20) + 4096 * (1 + list(DEVICES).index(device))
    attention = {"attention_config": {"backend": "FLASHINFER"}, "kv_cache_memory_bytes": capacity}
    with standin.flashinfer(DEVICES[device]):
        yield open_engine(shape, group_layers, **attention, **options)


def runner_of(engine: Engine) -> Any:
    """vLLM's model runner."""
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner


@contextmanager
def one_builder(engine: Engine) -> Iterator[None]:
    """A group's variants are built by vLLM's own builder meanwhile, as other backends' are."""
    builder = runner_of(engine).flow_state.builder
    with mock.patch.object(variant_builders, "PLANNING", ()):
        builder._layer_groups.cache_clear()
        yield
    builder._layer_groups.cache_clear()
