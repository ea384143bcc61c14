"""A ``flow_*`` key anywhere but in its place is refused, by drawn bodies and by vLLM's table of routes."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.conftest import LAYERS
from tests.server.requests import CHAT, COMPLETIONS
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end import http
from vllm_flow.engine.front_end.http import PLACES, check_beside_the_body, check_body, check_once
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import CLIFF_KEY, REQUEST_KEYS

SETTINGS = FlowSettings.read({}, EngineFacts(LAYERS))
GENERATE = "/inference/v1/generate"
KEYS = st.sampled_from([*REQUEST_KEYS, "flow_", "flow_anything"])
NAMES = st.sampled_from(["a", "type", "messages", "input", "parameters", "extra_body", "metadata"])
NODES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)
SCHEMA = {"type": "object", "properties": {CLIFF_KEY: {"type": "integer"}}, "required": [CLIFF_KEY]}
CLIENTS_OWN = (
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]},
    {"tools": [{"name": "f", "input_schema": SCHEMA}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
    {"messages": [{"content": [{"type": "tool_use", "name": "f", "input": {CLIFF_KEY: 2}}]}]},
    {"messages": [{"role": "user", "content": '{"flow_cliff": 1}'}], "prompt": "flow_cliff"},
    {"chat_request": {"tools": [{"name": "f", "input_schema": SCHEMA}]}},
)
"""Names that the client's own data fixes, and words that are no keys."""
MISPLACED = (
    {CLIFF_KEY: 1},
    {"extra_body": {"vllm_xargs": {CLIFF_KEY: 1}}},
    {"extra_args": {CLIFF_KEY: 1}},
    {"parameters": {CLIFF_KEY: 1}},
    {"metadata": {CLIFF_KEY: 1}},
    {"chat_template_kwargs": {CLIFF_KEY: 1}},
    {"mm_processor_kwargs": {CLIFF_KEY: 1}},
    {"kv_transfer_params": {"vllm_flow": {CLIFF_KEY: 1}}},
    {"stream_options": {"flow_log_attention": True}},
    {"tools": [{"type": "function", "function": {"name": "f", CLIFF_KEY: 1}}]},
    {"response_format": {"type": "text", CLIFF_KEY: 1}},
    {"sampling_params": {CLIFF_KEY: 1}},
    {"vllm_xargs": {"inner": {CLIFF_KEY: 1}}},
    {"FLOW_CLIFF": 1},
    {"vllm-xargs": {"flow-cliff": 1}},
    {"messages": [{"role": "user", "content": "x", "Flow_Stages": "2:0"}]},
    {"messages": [{"role": "user", "content": "x", CLIFF_KEY: 1}]},
    {"messages": [{"content": [{"type": "text", "text": "x", "flow_task": "vqa"}]}]},
    {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "u", CLIFF_KEY: 0}}]}]},
)


@pytest.mark.parametrize("loaded_while_it_runs", [False, True])
def test_a_server_starts_with_names_that_it_serves(
    loaded_while_it_runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its aliases, and the adapters that it begins with; others where they may come."""
    # vLLM reads the environment once an engine has started.
    monkeypatch.setitem(vars(http.envs), "VLLM_ALLOW_RUNTIME_LORA_UPDATING", loaded_while_it_runs)
    said: list[str] = []
    monkeypatch.setattr(http.logger, "warning", lambda text, *values: said.append(text % values))
    lora = [SimpleNamespace(name="adapter", path="x")]
    args = SimpleNamespace(
        model="path",
        served_model_name=["a", "b"],
        lora_modules=lora,
        default_mm_loras={"image": "y"},
    )
    names = ["a", "b", "adapter", "image"]

    def start(args: Any, *wanted: str) -> Any:
        found = replace(SETTINGS, model_policies=dict.fromkeys(wanted))
        monkeypatch.setattr(FlowSettings, "of", lambda config: found)
        state = SimpleNamespace()
        engine = SimpleNamespace(vllm_config=None)
        asyncio.run(http.KeyCheck().init_state(engine, state, args))
        return getattr(state, http.STATE)

    assert start(args, *names).model_policies.keys() == set(names) and not said
    bare = SimpleNamespace(model="path", served_model_name=None, lora_modules=None)
    start(bare, "path")
    if loaded_while_it_runs:
        start(args, "a", "c")
        assert said[0].startswith("'model_policies' names 'c', which this server does not serve")
        return
    with pytest.raises(ValueError, match="names 'c', .*; it serves 'a', 'b', 'adapter', 'image'"):
        start(args, "a", "c")
    with pytest.raises(ValueError, match="names 'a', .*; it serves 'path'"):
        start(bare, "a")


def objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for item in node.values() if isinstance(node, dict) else node:
        if isinstance(item, (dict, list)):
            yield from objects(item)


@settings(deadline=None, derandomize=True, database=None, max_examples=80)
@given(st.dictionaries(NAMES, NODES, min_size=1), KEYS, NODES, st.integers(0), st.data())
def test_a_key_in_any_object_of_a_body_is_found(
    body: dict[str, Any], key: str, value: Any, which: int, data: Any
) -> None:
    body = copy.deepcopy(body)
    place = data.draw(st.sampled_from([*PLACES.values(), None]))
    check_body(body, SETTINGS, place)  # nothing of ours: accepted
    if place is not None:
        good = {CLIFF_KEY: 1}
        for step in reversed(place):
            good = {step: good}
        body = {**body, **good}
        check_body(body, SETTINGS, place)
    found = list(objects(body))
    chosen = found[which % len(found)]
    # In its place, a known key may have a good value.
    chosen["flow_unknown" if CLIFF_KEY in chosen else key] = value
    with pytest.raises(PolicyError):
        check_body(body, SETTINGS, place)


@pytest.mark.parametrize("body", CLIENTS_OWN, ids=json.dumps)
def test_names_in_the_clients_own_data_are_its_own(body: dict[str, Any]) -> None:
    for place in (*PLACES.values(), None):
        check_body(body, SETTINGS, place)


@pytest.mark.parametrize("body", MISPLACED, ids=json.dumps)
@pytest.mark.parametrize(
    ("place", "says"),
    [
        (PLACES[CHAT], 'into the object "vllm_xargs", and'),
        (PLACES[GENERATE], 'into the object "extra_args" of "sampling_params"'),
        (None, "this route makes no use of such keys"),
    ],
)
def test_the_sentence_says_where_a_key_belongs(body: dict[str, Any], place: Any, says: str) -> None:
    for known in (SETTINGS, None):
        with pytest.raises(PolicyError, match=r"^(?i:flow[_-])") as refused:
            check_body(body, known, place)
        assert says in str(refused.value)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({CLIFF_KEY: 1}, "in the body itself"),
        ({"metadata": {CLIFF_KEY: "1"}}, "in metadata"),
        ({"extra_body": {"vllm_xargs": {CLIFF_KEY: 1}}}, "in extra_body.vllm_xargs"),
        ({"messages": [{}, {"content": [{CLIFF_KEY: 1}]}]}, "in messages[1].content[0]"),
        ({"a\nb": {CLIFF_KEY: 1}}, r"in 'a\nb'"),
    ],
    ids=json.dumps,
)
def test_the_sentence_says_where_a_key_stood(body: dict[str, Any], where: str) -> None:
    with pytest.raises(PolicyError) as refused:
        check_body(body, SETTINGS)
    assert str(refused.value).endswith(
        f'belongs into the object "vllm_xargs", and would be ignored {where}.'
    )
    with pytest.raises(PolicyError, match="would be ignored behind the address"):
        check_beside_the_body({CLIFF_KEY: "1"}, "behind the address", ("vllm_xargs",))
    deep: Any = {CLIFF_KEY: 1}
    for level in range(3000):
        deep = {"a": deep} if level % 2 else [deep]
    with pytest.raises(PolicyError) as refused:
        check_body({"b": deep}, SETTINGS)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text",
    [
        '{"vllm_xargs": {"flow_cliff": 1, "flow_cliff": 2}}',
        r'{"vllm_xargs": {"flow_cliff": 1, "\u0066low_cliff": 2}}',
        '{"vllm_xargs": {"flow_cliff": 1}, "vllm_xargs": {}}',
        '{"sampling_params": {"extra_args": {"flow_cliff": 1}, "extra_args": {}}}',
        r'{"sampling_params": {"\u0065xtra_args": {"flow_cliff": 1}, "extra_args": {}}}',
        '{"sampling_params": {"extra_args": {"flow_cliff": 1}}, "sampling_params": {}}',
    ],
)
def test_a_key_that_is_sent_twice_is_refused(text: str, encoding: str) -> None:
    with pytest.raises(PolicyError, match="more than once"):
        check_once(text.encode(encoding))
    check_once(json.dumps({"vllm_xargs": {CLIFF_KEY: 1}, "x": "flow_"}).encode(encoding))


@pytest.mark.parametrize("beams", [True, 1, "true", "yes"])
@pytest.mark.parametrize(
    "key", [{CLIFF_KEY: 1}, {CLIFF_KEY: LAYERS}, {"flow_log_attention": False}]
)
def test_beam_search_takes_no_keys(beams: Any, key: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="use_beam_search"):
        check_body({"use_beam_search": beams, "vllm_xargs": key}, SETTINGS)
    for without in (False, None):
        check_body({"use_beam_search": without, "vllm_xargs": key}, SETTINGS)
    check_body({"use_beam_search": beams, "vllm_xargs": {"other": 1}}, SETTINGS)


def test_every_route_whose_model_takes_keys_has_a_place() -> None:
    """The table against vLLM's routes: a new one fails here."""
    from vllm.entrypoints.anthropic.api_router import router as anthropic
    from vllm.entrypoints.openai.chat_completion.api_router import router as chat
    from vllm.entrypoints.openai.completion.api_router import router as completion
    from vllm.entrypoints.openai.responses.api_router import router as responses
    from vllm.entrypoints.scale_out.factories import register_scale_out_api_routers
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
        DerenderChatRequest,
        DerenderChatStreamRequest,
        DerenderCompletionRequest,
        DerenderCompletionStreamRequest,
    )

    app = FastAPI()
    app.state.args = SimpleNamespace(enable_scale_out=True, tokens_only=False)
    for router in (anthropic, chat, completion, responses):
        app.include_router(router)
    register_scale_out_api_routers(app, ("generate",))
    found: dict[str, tuple[str, ...]] = {}
    for route in app.routes:
        for parameter in getattr(getattr(route, "dependant", None), "body_params", ()):
            fields = getattr(parameter.field_info.annotation, "model_fields", {})
            if "vllm_xargs" in fields:
                found[route.path] = ("vllm_xargs",)
            elif "sampling_params" in fields:
                found[route.path] = ("sampling_params", "extra_args")
    assert found.keys() >= {CHAT, COMPLETIONS, "/v1/responses", "/v1/messages", GENERATE}
    # The first takes fields that its model does not name, the second is there under another flag; the others'
    # models are unions, whose members have the client's request in a field.
    for model, field in (
        (DerenderChatRequest, "chat_request"),
        (DerenderChatStreamRequest, "chat_request"),
        (DerenderCompletionRequest, "completion_request"),
        (DerenderCompletionStreamRequest, "completion_request"),
    ):
        assert field in model.model_fields
    assert {path for path in PLACES if path.endswith("/derender")} <= {r.path for r in app.routes}
    assert {
        **found,
        f"{CHAT}/derender": ("chat_request", "vllm_xargs"),
        f"{COMPLETIONS}/derender": ("completion_request", "vllm_xargs"),
        "/v1/chat/completions/batch": ("vllm_xargs",),
        "/invocations": ("vllm_xargs",),
    } == PLACES
