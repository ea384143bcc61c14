"""Whatever vLLM hands to a method of its own, ours in its place takes too, and takes alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA
from vllm.entrypoints.launchers import run_batch as upstream_run_batch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core_client import EngineCoreClient

from tests.engine.overriding import (
    MIXED_BEFORE,
    WITHOUT_SUPER,
    Override,
    RunnerV1,
    RunnerV2,
    adopted_names,
    lost_supers,
    misfits,
    our_classes,
    overrides,
    replaced,
    without_upstream,
)
from vllm_flow.engine import plugin
from vllm_flow.engine.core.connectors import FlowConnector
from vllm_flow.engine.front_end import processor_cache
from vllm_flow.engine.front_end.processor_cache import SentPictures
from vllm_flow.engine.worker.attention.tap import AttentionTap
from vllm_flow.patches import (
    core_client,
    endpoint_plugins,
    ledger,
    logprobs,
    pieces,
    renderer,
    run_batch,
)


@pytest.mark.parametrize("override", list(overrides()), ids=str)
def test_an_override_takes_what_upstream_takes(override: Override) -> None:
    assert misfits(override.ours, override.theirs) == []


def test_what_we_call_behind_us_is_there() -> None:
    """A method that vLLM renames would be nobody's override, and never run."""
    assert lost_supers() == []
    assert without_upstream() == set()


@pytest.mark.parametrize(
    ("upstream", "name", "ours"),
    [
        (RunnerV1, "_build_attention_metadata", "FlowRunnerV1"),
        (RunnerV1, "_dummy_run", "FlowRunner"),
        (RunnerV2, "sample_tokens", "FlowRunner"),
        (KVConnectorBase_V1, "build_connector_meta", "FlowConnector"),
        (Scheduler, "_try_schedule_encoder_inputs", "_FlowScheduling"),
    ],
)
def test_a_method_that_vllm_renames_is_missed(
    monkeypatch: pytest.MonkeyPatch, upstream: type, name: str, ours: str
) -> None:
    monkeypatch.setattr(upstream, f"{name}_renamed", getattr(upstream, name), raising=False)
    monkeypatch.delattr(upstream, name)
    lost = [text for text in lost_supers() if text.startswith(f"{ours}.")]
    assert lost and all(f": {name} of " in text for text in lost)


def test_what_we_replace_is_there() -> None:
    """And what comes to it is written down with it."""
    assert replaced() == {
        f"{kind}.{name}" for kind, names in WITHOUT_SUPER.items() for name in names
    }


def test_overrides_of_every_kind_are_found() -> None:
    found = {str(override).split(" over ")[0] for override in overrides()}
    assert {
        "FlowKVCacheManager.get_computed_blocks",
        "FlowAttentionManager.allocate_new_blocks",
        "FlowRunnerV1._build_attention_metadata",
        "FlowModelState.prepare_attn",
        "FlowRunner._dummy_run",
        "_FlowScheduling.schedule",
        "FlowWorker.init_device",
        "FlowBlockPool.cache_full_blocks",
        "FlowModel.__call__",
        "FlowConnector.request_finished_all_groups",
    } <= found


def test_every_class_that_is_mixed_in_is_compared() -> None:
    known = {kind.__name__ for kind in MIXED_BEFORE}
    derived = {
        kind.__name__
        for kind in our_classes()
        if any(base.__module__.startswith("vllm.") for base in kind.__mro__)
    }
    assert adopted_names() <= known | derived
    assert known <= adopted_names()


def test_a_connector_is_told_of_a_request_through_us() -> None:
    """By no method that vLLM adds, either."""
    told = {
        name
        for kind in (KVConnectorBase_V1, SupportsHMA)
        for name, method in vars(kind).items()
        if inspect.isfunction(method)
        and {"request", "scheduler_output"} & inspect.signature(method).parameters.keys()
    }
    # Asked of what it loads, which is nothing of a request that evicts.
    of_loads = {"get_loaded_kv_cache_group_ids", "get_external_cache_hit_sources"}
    assert told - vars(FlowConnector).keys() == of_loads


@pytest.fixture
def all_patches() -> Iterator[None]:
    """Those too that wait for a process of their own."""
    plugin.register()
    endpoint_plugins.apply(lambda: None)
    renderer.apply()
    core_client.apply()
    logprobs.apply(lambda entries, own: entries)
    run_batch.apply(lambda line: None, lambda request, handled: handled)
    pieces.apply(lambda run, backend: run)
    yield
    for patch in (endpoint_plugins, renderer, core_client, logprobs, run_batch, pieces):
        patch.revert()


@pytest.mark.parametrize("target", ledger.TARGETS, ids=lambda target: target.name)
def test_a_patch_takes_what_upstream_takes(all_patches: None, target: ledger.Target) -> None:
    assert upstream_run_batch.handle_endpoint_request is not None  # loaded, so that it is patched
    wrapper = target.find()
    assert misfits(wrapper, wrapper._vllm_flow_original) == []


@pytest.mark.parametrize("name", ["add_request", "add_request_async"])
def test_a_client_is_wrapped_as_it_is_called(name: str) -> None:
    client = EngineCoreClient.__new__(type("Client", (EngineCoreClient,), {"shutdown": None}))
    cache = SentPictures.__new__(SentPictures)
    processor_cache.pass_through(client, SimpleNamespace(mm_processor_cache=cache))
    assert misfits(vars(client)[name], getattr(EngineCoreClient, name)) == []


def test_an_attention_layer_is_wrapped_as_it_is_called() -> None:
    tap = AttentionTap.__new__(AttentionTap)
    assert misfits(partial(tap._forward, *[None] * 5), Attention.forward) == []


def theirs(self: Any, request: Any, limit: int | None = None, *, deep: bool = False) -> None: ...


def with_rest(self: Any, request: Any, *args: Any, **kwargs: Any) -> None: ...


def same(self: Any, request: Any, limit: int | None = None, *, deep: bool = False) -> None: ...


def lacks_one(self: Any, request: Any, *, deep: bool = False) -> None: ...


def swapped(self: Any, limit: int | None, request: Any = None, *, deep: bool = False) -> None: ...


def renamed(self: Any, asked: Any, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("ours", "wrong"),
    [
        (with_rest, []),
        (same, []),
        (lacks_one, ["limit: 'int | None' = None"]),
        (swapped, ["request: 'Any'", "limit: 'int | None' = None"]),
        (renamed, ["request: 'Any'", "asked is needed"]),
    ],
)
def test_what_does_not_fit_is_named(ours: Callable[..., Any], wrong: list[str]) -> None:
    assert misfits(ours, theirs) == wrong
