"""An adopted object keeps its state, runs our methods first, and is adopted once."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Protocol

import pytest

from vllm_flow.engine.adoption import adopt


class Plain:
    def __init__(self) -> None:
        self.calls = ["built"]

    def work(self) -> list[str]:
        self.calls.append("theirs")
        return self.inner()

    def inner(self) -> list[str]:
        return self.calls


class Mixin:
    calls: list[str]

    def inner(self) -> list[str]:
        self.calls.append("ours")
        return super().inner()


class Interface(ABC):
    @abstractmethod
    def work(self) -> str: ...


class Implementation(Interface):
    def work(self) -> str:
        return "theirs"


class OfInterface(Interface):
    def work(self) -> str:
        return "ours, then " + super().work()


class NotOfInterface:
    def work(self) -> str:
        return "ours, then " + super().work()


class Supports(Protocol):
    """vLLM's interfaces of models are such."""


class ProtocolFirst(Supports, Implementation):
    """vLLM's Transformers backend derives its models so."""


class Slotted:
    __slots__ = ("calls",)


class Derived(Plain):
    def inner(self) -> list[str]:
        return [*super().inner(), "derived"]


def test_calls_that_an_object_makes_on_itself_meet_our_methods() -> None:
    instance = Plain()
    adopt(instance, Mixin)
    assert instance.work() == ["built", "theirs", "ours"]
    assert type(instance).__name__ == "FlowPlain"
    assert isinstance(instance, Plain)
    assert Plain().work() == ["built", "theirs"], "its class is untouched"


def test_objects_of_a_class_stay_of_one_class() -> None:
    """vLLM tells by its type whether another builder's work can be shared."""
    one, other = Plain(), Plain()
    adopt(one, Mixin)
    adopt(other, Mixin)
    assert type(one) is type(other)


def test_a_subclass_of_its_own_class() -> None:
    instance = Plain()
    adopt(instance, Derived)
    assert instance.work() == ["built", "theirs", "derived"]


@pytest.mark.parametrize("ours", [OfInterface, NotOfInterface])
@pytest.mark.parametrize("kind", [Implementation, ProtocolFirst])
def test_whatever_the_first_base(kind: type[Implementation], ours: type) -> None:
    instance = kind()
    adopt(instance, ours)
    assert instance.work() == "ours, then theirs"
    assert isinstance(instance, kind) and isinstance(instance, ours)
    assert kind().work() == "theirs", "its class is untouched"


def test_an_object_without_a_dict_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="Slotted of this vLLM cannot take .* Mixin .*; serve this"):
        adopt(Slotted(), Mixin)


def test_never_twice() -> None:
    instance = Plain()
    adopt(instance, Mixin)
    with pytest.raises(TypeError, match="has the methods of Mixin already"):
        adopt(instance, Mixin)


def test_what_vllm_builds_can_be_adopted() -> None:
    """vLLM's classes keep their state in a ``__dict__``."""
    from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_flow.engine.core.prefix import FlowKVCacheManager
    from vllm_flow.engine.worker.model_call import FlowModel
    from vllm_flow.engine.worker.runner_v1 import FlowRunnerV1
    from vllm_flow.engine.worker.runner_v2 import FlowModelState

    for kind, ours in (
        (KVCacheManager, FlowKVCacheManager),
        (GPUModelRunner, FlowRunnerV1),
        (DefaultModelState, FlowModelState),
        (TransformersMultiModalForCausalLM, FlowModel),
    ):
        assert not inspect.isabstract(kind)
        instance = object.__new__(kind)
        adopt(instance, ours)
        assert isinstance(instance, ours) and isinstance(instance, kind)
