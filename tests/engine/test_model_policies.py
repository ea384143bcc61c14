"""Policies by the name under which a request asks for the model: whose wins, and what is refused at start-up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.engine.cases import one_image
from tests.engine.harness import Engine
from tests.engine.options import ADAPTERS
from tests.engine.settings_with import settings_with
from tests.engine.test_default_policies import said
from tests.engine.test_fitting import IMAGE, LAYERS, SETTINGS, request
from tests.engine.test_lora import assert_merged, run
from vllm_flow.cliff_file import Profile
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end import asked_model
from vllm_flow.engine.front_end.default_policies import check_policies, warn_of_obstacles
from vllm_flow.engine.front_end.incoming import settle
from vllm_flow.engine.front_end.settled import noted
from vllm_flow.engine.obstacles import LATE, Misfit
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import FlowPolicy

__all__ = ["said"]

OWN = {
    "small": {"flow_cliff": 8},
    "adapter": {"flow_cliff": 9},
    "whole": {},
    "first": {"flow_cliff": 7},
}
SET = settings_with(
    FlowSettings.read(
        {"model_policies": OWN, "default_policy": {"flow_cliff": 3}}, EngineFacts(LAYERS)
    ),
    served_name="first",
)


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
    asked_model.note(None)
    yield
    asked_model.note(None)


def adapter(name: str) -> Any:
    return SimpleNamespace(lora_name=name)


def settled(
    asked: Any, keys: dict[str, Any] | None = None, settings: Any = SET, **more: Any
) -> Any:
    """The cliff that a request goes on with; None where nothing is evicted of it."""

    def call() -> Any:
        asked_model.note(asked)
        sent = request(keys, IMAGE, **more)
        settle(sent, settings)
        return (sent.sampling_params.extra_args or {}).get("flow_cliff")

    return copy_context().run(call)


@pytest.mark.parametrize(
    ("asked", "keys", "more", "cliff"),
    [
        ("small", None, {}, 8),
        ("whole", None, {}, None),
        ("other", None, {}, 3),
        (None, None, {}, 7),  # the first served name is meant
        ("", None, {}, 7),
        (5, None, {}, 7),
        ("small", {"flow_cliff": 20}, {}, 20),
        ("small", {"flow_cliff": LAYERS}, {}, None),
        ("small", {"flow_task": "reading"}, {}, 5),
        ("small", {"flow_task": "nothing"}, {}, None),
        ("adapter", None, {"lora_request": adapter("adapter")}, 9),
        (None, None, {"lora_request": adapter("adapter")}, 9),  # offline
        (None, None, {"lora_request": adapter("unnamed")}, 3),  # and not the base model's
        ("small", None, {"lora_request": adapter("adapter")}, 8),  # an adapter of a modality's own
        ("other", None, {"lora_request": adapter("adapter")}, 9),
        ("small", None, {"lora_request": None}, 8),
    ],
)
def test_whose_policy_a_request_has(
    asked: Any, keys: dict[str, Any] | None, more: dict[str, Any], cliff: int | None
) -> None:
    profile = Profile({"reading": FlowPolicy.withdrawal(5), "nothing": None}, None)
    assert settled(asked, keys, replace(SET, profile=profile), **more) == cliff


def test_without_the_setting_names_change_nothing() -> None:
    plain = replace(SETTINGS, default_policy=FlowPolicy.withdrawal(3))
    assert {settled(asked, settings=plain) for asked in ("small", None, "x")} == {3}


def test_names_stay_with_their_tasks() -> None:
    """Of requests handled at once, and of a batch's lines, each has its own."""

    async def handled() -> Any:
        await asyncio.sleep(0)
        return asked_model.names(SimpleNamespace(), "first")

    async def all_at_once() -> list[Any]:
        lines = [asked_model.noting(name, handled()) for name in ("a", None, "b")]
        return [*await asyncio.gather(*lines), await handled()]

    assert asyncio.run(all_at_once()) == [["a"], ["first"], ["b"], ["first"]]


def test_a_policy_that_does_not_fit_is_told_by_the_models_name(said: list[str]) -> None:
    asked_model.note("small")
    sent = request(None, IMAGE, text=0)
    settle(sent, SET)
    assert noted(sent.sampling_params).skipped == Misfit.PROMPT_END
    [line] = said
    assert line.startswith("model_policies['small'], \"8:0\", is not applied to a request")


REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([1], r"\['model_policies'\]=\[1\]: it must hold policies by served names or adapters"),
    "no name": ({"": {}}, "it must hold policies by served names"),
    "no keys": ({"a": 7}, r"\['model_policies'\]\['a'\]=7: it must hold request keys"),
    "unknown key": ({"a": {"flow_clif": 1}}, r"\['a'\]: 'flow_clif' is no request key of a policy"),
    "bad value": ({"a": {"flow_cliff": 99}}, r"\['model_policies'\]\['a'\]: flow_cliff=99: there is no such layer"),
    "profile": ({"a": {"profile": "cliff.json"}}, r"\['a'\]: a profile is of all models that are served"),
    "several images": ({"a": {"flow_cliff": [1, 2]}}, r"\['a'\]: flow_cliff=\[1, 2\]: requests have any number"),
    "beyond the bound": ({"a": {"flow_cliff": 1}}, r"\['a'\]: \"1:0\" evicts more than 'max_policy' lets any"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_wrong_is_refused_by_name(fault: str) -> None:
    options, told = REFUSED[fault]
    with pytest.raises(ValueError, match=told):
        FlowSettings.read(
            {"model_policies": options, "max_policy": {"flow_cliff": 2}}, EngineFacts(LAYERS)
        )


def test_it_is_checked_like_the_default(said: list[str]) -> None:
    by_keys = {"model_policies": {"a": {"flow_preset": "fastv"}}}
    with pytest.raises(ValueError, match=r"model_policies\['a'\]: rank 'last_prompt' reads keys"):
        check_policies(
            settings_with(FlowSettings.read(by_keys, EngineFacts(LAYERS)), quantised_keys=True)
        )
    late = {"model_policies": {"a": {"flow_cliff": 2, "flow_when": "decode"}, "b": {}}}
    found = settings_with(
        FlowSettings.read(late, EngineFacts(LAYERS)), obstacles={LATE: "of this or that"}
    )
    warn_of_obstacles(found)
    [line] = said
    assert line.startswith(
        "model_policies['a'], \"2:0 when=decode\", cannot be applied by this engine"
    )
    assert "By the model asked for: 'a' \"2:0 when=decode\", 'b' \"no policy\"." in found.summary


def test_names_that_a_server_does_not_serve() -> None:
    served = ["first", "second", "adapter"]
    assert asked_model.check_served(["adapter", "first"], served, False) is None
    told = "'model_policies' names 'x', which this server does not serve; it serves 'first', 'second', 'adapter'"
    with pytest.raises(ValueError, match=f"{told}. Name one of these"):
        asked_model.check_served(["x", "first"], served, False)
    assert (
        asked_model.check_served(["x"], served, True)
        == f"{told}, and adapters that are loaded while it runs."
    )


def test_adapters_offline(together: Engine) -> None:
    """By the names in their requests; the oracle with the adapter's weights and the cliff that its name has."""
    plain, cliffs = one_image(821), {1: 2, 0: 4, 2: None}
    config = together.llm.llm_engine.vllm_config
    options = {
        "model_policies": {
            f"adapter {ADAPTERS[0]}": {"flow_cliff": 2},
            config.model_config.served_model_name: {"flow_cliff": 4},
        }
    }
    with mock.patch.dict(config.additional_config["vllm_flow"], options):
        outputs = run(together, [(plain, number) for number in cliffs])
        keys = run(together, [(replace(plain, cliff=3), 1)])
    assert_merged(together, [(replace(plain, cliff=c), n) for n, c in cliffs.items()], outputs)
    assert_merged(together, [(replace(plain, cliff=3), 1)], keys)
