"""Over HTTP: ``flow_*`` keys in their place work on every route, and anywhere else they are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import IMAGE_TOKENS, LAYERS
from tests.server.requests import CHAT, COMPLETIONS, chat_body, data_url, picture_of, question
from tests.server.serving import NAME, Server
from tests.server.test_keys import GENERATE
from vllm_flow.policy_keys import CLIFF_KEY


def evicted(server: Server) -> float:
    return server.metric("vllm_flow:image_tokens_evicted_total")


def refused(server: Server, path: str, body: dict[str, Any]) -> str:
    before = evicted(server)
    answer = server.post(path, body)
    assert answer.status_code == 400, (path, answer.text)
    assert evicted(server) == before
    return answer.text


def bodies() -> dict[str, dict[str, Any]]:
    """A good body for each route that takes keys, without any."""
    chat = chat_body(3)
    messages = chat["messages"]
    url = data_url(picture_of(question(3)))
    source = {"type": "base64", "media_type": "image/png", "data": url.split(",")[1]}
    return {
        CHAT: chat,
        f"{CHAT}/batch": {**chat, "messages": [messages, messages]},
        COMPLETIONS: {"model": NAME, "prompt": "hello", "max_tokens": 2},
        "/v1/responses": {
            "model": NAME,
            "max_output_tokens": 2,
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": url}]},
                {"role": "user", "content": "What is it?"},
            ],
        },
        "/v1/messages": {
            "model": NAME,
            "max_tokens": 2,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": source},
                        {"type": "text", "text": "What is it?"},
                    ],
                }
            ],
        },
    }


@pytest.mark.parametrize("path", bodies())
def test_keys_in_their_place_work_on_every_route(small: Server, path: str) -> None:
    body = bodies()[path]
    before = evicted(small)
    answer = small.post(path, {**body, "vllm_xargs": {CLIFF_KEY: 2}})
    assert answer.status_code == 200, answer.text
    pictures = {COMPLETIONS: 0, f"{CHAT}/batch": 2}.get(path, 1)
    assert evicted(small) - before == pictures * IMAGE_TOKENS
    for wrong in ({CLIFF_KEY: 2}, {"metadata": {CLIFF_KEY: 2}}, {"extra_args": {CLIFF_KEY: 2}}):
        assert "vllm_xargs" in refused(small, path, {**body, **wrong})


def test_generate_takes_them_in_its_sampling_parameters(small: Server) -> None:
    """Rendered by the server, its keys included, and then generated from."""
    wanted = {"vllm_xargs": {CLIFF_KEY: 2}}
    rendered = small.post(f"{CHAT}/render", {**chat_body(5), **wanted}).json()
    assert rendered["sampling_params"]["extra_args"] == {CLIFF_KEY: 2}
    before = evicted(small)
    answer = small.post(GENERATE, rendered)
    assert answer.status_code == 200, answer.text
    assert answer.json()["kv_transfer_params"]["vllm_flow"]["cliff"] == 2
    assert evicted(small) - before == IMAGE_TOKENS
    back = {"generate_response": answer.json(), "chat_request": {**chat_body(5), **wanted}}
    again = small.post(f"{CHAT}/derender", back)
    assert again.status_code == 200 and again.json()["choices"][0]["message"]["content"], again.text
    parameters = {**rendered["sampling_params"], "extra_args": None}
    plain = {**rendered, "sampling_params": parameters}
    for wrong in (
        {**plain, **wanted},
        {**plain, CLIFF_KEY: 2},
        {**plain, "sampling_params": {**parameters, CLIFF_KEY: 2}},
        {**plain, "extra_args": {CLIFF_KEY: 2}},
    ):
        assert 'extra_args\\" of \\"sampling_params' in refused(small, GENERATE, wrong)
    true = {**plain, "sampling_params": {**parameters, "extra_args": {CLIFF_KEY: True}}}
    assert "a boolean is not a layer" in refused(small, GENERATE, true)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_routes_that_generate_nothing_say_so(small: Server, path: str) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}]}
    assert small.post(path, body).status_code == 200
    assert "no use of such keys" in refused(small, path, {**body, "vllm_xargs": {CLIFF_KEY: 2}})


def test_a_key_in_the_address_is_refused(small: Server) -> None:
    body = bodies()[CHAT]
    assert "vllm_xargs" in refused(small, f"{CHAT}?{CLIFF_KEY}=2", body)
    assert small.post(f"{CHAT}?other=2", body).status_code == 200


@pytest.mark.parametrize("name", [CLIFF_KEY, "Flow-Cliff", "flow_clif"])
def test_a_key_among_the_headers_is_refused(small: Server, name: str) -> None:
    answer = small.client.post(CHAT, json=bodies()[CHAT], headers={name: "2"})
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert said.startswith(f"{name.lower()}='2'") and said.endswith(
        f'"vllm_xargs", and would be ignored among the headers. (parameter={name.lower()})'
    )


def test_headers_of_others_pass(small: Server) -> None:
    """A gateway's own, with our word in them."""
    names = ("flow-id", "x-flow-cliff", "workflow_name")
    answer = small.client.post(CHAT, json=bodies()[CHAT], headers=dict.fromkeys(names, "2"))
    assert answer.status_code == 200, answer.text


def test_a_key_that_cannot_be_written_is_named(small: Server) -> None:
    """JSON may hold half of a character, which no answer can."""
    raw = json.dumps({**bodies()[CHAT], "vllm_xargs": {"flow_half": 1}}).replace("half", "\\ud800")
    answer = small.client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("'flow_\\ud800'=1: vLLM-Flow does not know")


def test_a_task_is_named_in_its_place_and_where_there_is_a_profile(small: Server) -> None:
    body = chat_body(0)
    assert "vllm_xargs" in refused(small, CHAT, {**body, "flow_task": "reading"})
    said = refused(small, CHAT, {**body, "vllm_xargs": {"flow_task": "reading"}})
    assert "flow_task='reading': this engine has no profile" in said


@pytest.mark.parametrize("key", [{CLIFF_KEY: 1}, {CLIFF_KEY: LAYERS}])
def test_beam_search_with_a_policy_is_a_400(small: Server, key: dict[str, int]) -> None:
    body = {**chat_body(7), "use_beam_search": True, "n": 2}
    assert "beam search" in refused(small, CHAT, {**body, "vllm_xargs": key})
    text = {"model": NAME, "prompt": "hello", "max_tokens": 2, "use_beam_search": True, "n": 2}
    assert "beam search" in refused(small, COMPLETIONS, {**text, "vllm_xargs": key})
    answer = small.post(CHAT, body)
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 2
