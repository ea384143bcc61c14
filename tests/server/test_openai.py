"""The OpenAI-compatible server in a process of its own: policies by ``vllm_xargs``, refusals by HTTP 400.

Answers are compared with the oracle, so the whole way of a request is covered: JSON, front end,
engine process, worker and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from tests.engine import attention_oracle, kept_oracle, oracle
from tests.engine.tiny_llava import picture, words
from tests.server.requests import CHAT
from tests.server.serving import NAME
from tests.server.tiny_server import (
    ADAPTER,
    ALIAS,
    MODELS,
    SHAPE,
    TASKS,
    WORD_IDS,
    Tiny,
    logged,
    metrics,
    serve_tiny,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with serve_tiny(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize("cliff", [None, *range(SHAPE.layers + 1)])
def test_answers_are_the_oracles(server: Tiny, cliff: int | None) -> None:
    xargs = None if cliff is None else {"flow_cliff": cliff}
    answer = server.chat(server.body(3, xargs))
    assert answer.status_code == 200, answer.text
    expected = server.expected(3, SHAPE.layers if cliff is None else cliff)
    assert answer.json()["choices"][0]["token_ids"] == expected


def test_a_streamed_answer_is_the_same(server: Tiny) -> None:
    body = server.body(4, {"flow_cliff": 2}, stream=True)
    said: list[int] = []
    with server.running.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    said += choice.get("token_ids") or []
    assert said == server.expected(4, 2)


@pytest.mark.parametrize(
    ("xargs", "named"),
    [
        ({"flow_cliff": SHAPE.layers + 1}, "flow_cliff=5"),
        ({"flow_cliff": -1}, "flow_cliff=-1"),
        ({"flow_cliff": "2"}, "flow_cliff='2'"),
        ({"flow_cliff": 2.5}, "flow_cliff=2.5"),
        ({"flow_cliff": [1, 2]}, "flow_cliff=[1, 2]"),
        ({"flow_cliff": 2**63}, "flow_cliff=9223372036854775808"),
        ({"flow_clif": 2}, "did you mean 'flow_cliff'"),
        ({"flow_cliff": 2, "flow_keep": 3}, "flow_keep=3"),
        # What vLLM's own request models would refuse in other words, or take for a number.
        ({"flow_cliff": None}, "flow_cliff=null: null is not a layer"),
        ({"flow_cliff": {"layer": 2}}, "flow_cliff={'layer': 2}: an object"),
        ({"flow_cliff": True}, "flow_cliff=true: a boolean"),
        ({"flow_cliff": 10**40}, f"flow_cliff={10**40}: there is no such layer"),
        ({"flow_log_attention": [0, 4]}, "flow_log_attention=[0, 4]: there is no layer 4"),
        ({"flow_log_attention": 2}, "flow_log_attention=2: it must be true"),
        ({"flow_log_attention_heat": True}, "send flow_log_attention too"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_nonsense_is_a_400_that_names_it(server: Tiny, xargs: Any, named: str) -> None:
    refused = server.chat(server.body(5, xargs))
    assert refused.status_code == 400, refused.text
    assert named in refused.json()["error"]["message"]
    # The same picture in a good request: nothing of the refused one is in its way.
    assert server.chat(server.body(5, {"flow_cliff": 1})).status_code == 200


@pytest.mark.parametrize("task", TASKS)
def test_a_request_that_names_its_task_gets_the_tasks_layer(server: Tiny, task: str) -> None:
    cliff = TASKS[task]
    answer = server.chat(server.body(11, {"flow_task": task}))
    assert answer.status_code == 200, answer.text
    report = (answer.json()["kv_transfer_params"] or {}).get("vllm_flow")
    assert (None if report is None else report["cliff"]) == (None if cliff == 4 else cliff)
    assert answer.json()["choices"][0]["token_ids"] == server.expected(11, cliff)


@pytest.mark.parametrize(
    ("xargs", "says"),
    [
        (
            {"flow_task": "vqa"},
            "flow_task='vqa': there is no such task; known tasks: 'everything', 'reading', 'yes-no'",
        ),
        ({"flow_task": "yes-no", "flow_cliff": 1}, "flow_cliff is there as well"),
        ({"flow_task": None}, "known tasks"),
        ({"flow_task": ["reading"]}, "known tasks"),
        ({"flow_tsk": "reading"}, "did you mean 'flow_task'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_tasks_are_a_400_that_says_what_would_do(server: Tiny, xargs: Any, says: str) -> None:
    refused = server.chat(server.body(12, xargs))
    assert refused.status_code == 400 and says in refused.json()["error"]["message"], refused.text
    assert server.chat(server.body(12, {"flow_task": "reading"})).status_code == 200


def test_what_a_policy_excludes_is_a_400(server: Tiny) -> None:
    refused = server.chat(server.body(6, {"flow_cliff": [2, 3]}))
    assert refused.status_code == 400
    assert "the prompt has 1 image" in refused.json()["error"]["message"]


def test_evicted_positions_have_no_prompt_logprobs(server: Tiny) -> None:
    """Null in JSON, as the first position's is; the others stay in their places."""
    answer = server.chat(server.body(6, {"flow_cliff": 2}, prompt_logprobs=1, echo=True))
    stock = server.chat(server.body(6, prompt_logprobs=1))
    entries, others = (found.json()["prompt_logprobs"] for found in (answer, stock))
    assert len(entries) == len(others) and others.count(None) == 1
    missing = [place for place, entry in enumerate(entries) if entry is None]
    images = SHAPE.image_tokens
    assert missing == [0, *range(missing[1], missing[1] + images + 1)]
    assert entries[1 : missing[1]] == others[1 : missing[1]]  # before the image nothing changes
    body = {"model": NAME, "prompt": words(9, 6), "prompt_logprobs": 1, "max_tokens": 4}
    said = [
        server.running.post("/v1/completions", {**body, **keys}).json()["choices"][0]
        for keys in ({}, {"vllm_xargs": {"flow_cliff": 2}})
    ]
    assert said[0]["prompt_logprobs"] == said[1]["prompt_logprobs"]
    assert said[0]["prompt_logprobs"].count(None) == 1


def test_text_alone_with_a_policy_is_served(server: Tiny) -> None:
    body = server.body(7, {"flow_cliff": 0})
    body["messages"][0]["content"] = [{"type": "text", "text": words(9, 7)}]
    answer = server.chat(body)
    assert answer.status_code == 200, answer.text
    prompt = f"{words(9, 7)} "
    expected = oracle.generate(
        server.running.model_dir, prompt, [], SHAPE.layers, 12, tuple(WORD_IDS)
    )
    assert answer.json()["choices"][0]["token_ids"] == list(expected.token_ids)


def test_attention_is_logged_under_the_id_that_the_client_sees(server: Tiny) -> None:
    """JSON's true, a list of layers, and the way from the worker's process to the engine's to the disk."""
    xargs = {"flow_cliff": 2, "flow_log_attention": True, "flow_log_attention_heat": True}
    answer = server.chat(server.body(9, xargs)).json()
    some = server.chat(server.body(10, {"flow_log_attention": [3, 1]})).json()
    silent = server.chat(server.body(9)).json()
    report = {"attention_rows": 12 * SHAPE.layers, "attention_rows_dropped": 0}
    assert answer["kv_transfer_params"]["vllm_flow"].items() >= report.items()
    assert some["kv_transfer_params"]["vllm_flow"] == {
        "attention_rows": 24,
        "attention_rows_dropped": 0,
    }
    rows = logged(server, answer["id"], 12 * SHAPE.layers)
    keys = sorted((row["token"], row["layer"]) for row in rows)
    assert keys == [(token, layer) for token in range(12) for layer in range(SHAPE.layers)]
    assert len(logged(server, answer["id"], len(rows), "heat")) == len(rows)
    assert {row["layer"] for row in logged(server, some["id"], 24)} == {1, 3}
    assert logged(server, silent["id"], 0) == []

    prompt = f"{words(5, 9)} <image> {words(7, 10)} "
    encoded = oracle.encode(server.running.model_dir, prompt, [picture(SHAPE, 9)])
    tokens = answer["choices"][0]["token_ids"]
    attention = attention_oracle.attention_removed(
        server.running.model_dir, encoded, tokens[:-1], 2
    )
    is_image = torch.tensor([*encoded.is_image_T, *[False] * 11])
    for row in rows:
        weights = attention[row["layer"], len(encoded.ids) - 1 + row["token"]]
        assert abs(row["image"] - float(weights[is_image].sum())) < 1e-4
        assert abs(sum(row[name] for name in ("system", "image", "user", "output")) - 1) < 1e-5


@pytest.mark.parametrize(
    ("model", "xargs", "cliff"),
    [
        (ALIAS, None, MODELS[ALIAS]),
        (NAME, None, SHAPE.layers),
        (None, None, SHAPE.layers),
        (ALIAS, {"flow_cliff": 3}, 3),
        (ALIAS, {"flow_cliff": SHAPE.layers}, SHAPE.layers),
        (ALIAS, {"flow_task": "yes-no"}, TASKS["yes-no"]),
        (ADAPTER, None, MODELS[ADAPTER]),
        (ADAPTER, {"flow_cliff": 3}, 3),
    ],
)
def test_each_name_has_its_policy(
    server: Tiny, model: str | None, xargs: dict[str, Any] | None, cliff: int
) -> None:
    """An alias and an adapter; what a request says itself goes first."""
    counted = "baseline" if cliff == SHAPE.layers else f"cliff={cliff}"
    task = (xargs or {}).get("flow_task")
    name = ":".join(filter(None, ("vllm_flow:requests_total", counted, task)))
    before = metrics(server).get(name, 0)
    body = server.body(21, xargs, model=model)
    if model is None:
        del body["model"]
    answer = server.chat(body)
    assert answer.status_code == 200, answer.text
    weights = server.merged if model == ADAPTER else None
    expected = server.expected(21, cliff, weights)
    assert answer.json()["choices"][0]["token_ids"] == expected
    report = (answer.json()["kv_transfer_params"] or {}).get("vllm_flow", {})
    assert report.get("cliff", SHAPE.layers) == cliff
    assert metrics(server)[name] == before + 1


def test_names_of_requests_at_once_are_kept_apart(server: Tiny) -> None:
    """Streamed and not, on one server: each has the policy of the name in its own body."""

    def ask(number: int) -> list[int]:
        model = (NAME, ALIAS)[number % 2]
        body = server.body(22, model=model, stream=number % 3 == 0)
        with httpx.Client(base_url=server.running.url, timeout=120) as client:
            if not body["stream"]:
                found = client.post(CHAT, json=body).json()
                return found["choices"][0]["token_ids"]
            said: list[int] = []
            with client.stream("POST", CHAT, json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line.removeprefix("data: "))["choices"]:
                            said += choice.get("token_ids") or []
            return said

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(12)))
    expected = [server.expected(22, cliff) for cliff in (SHAPE.layers, MODELS[ALIAS])]
    assert expected[0] != expected[1]
    assert answers == [expected[number % 2] for number in range(12)]


@pytest.mark.parametrize("stages", ["1:50% center", "2:30% far_from_mean, 3:0"])
def test_ranks_of_an_installed_package_are_exact(server: Tiny, stages: str) -> None:
    """By name alone, in a server and an engine process that were told of nothing."""
    answer = server.chat(server.body(14, {"flow_stages": stages}))
    assert answer.status_code == 200, answer.text
    found = answer.json()["choices"][0]["token_ids"]
    prompt, pictures = f"{words(5, 14)} <image> {words(7, 15)} ", [picture(SHAPE, 14)]
    expected, kept = kept_oracle.check_greedy(
        server.running.model_dir, prompt, pictures, stages, 0, found, tuple(WORD_IDS)
    )
    assert found == list(expected.token_ids) and kept.gap > 1e-4
    names = "+".join(rank for rank in ("center", "far_from_mean") if rank in stages)
    assert metrics(server)[f"vllm_flow:requests_total:ranks={names}"] == 1
    refused = server.chat(server.body(14, {"flow_stages": "1:50% xyz"}))
    assert refused.status_code == 400
    assert "'dart', 'center', 'far_from_mean'." in refused.json()["error"]["message"]


def test_what_a_policy_did_is_in_its_response_and_in_the_metrics(server: Tiny) -> None:
    before = metrics(server)
    answer = server.chat(server.body(8, {"flow_cliff": 2})).json()
    baseline = server.chat(server.body(8)).json()
    after = metrics(server)
    prompt, image = answer["usage"]["prompt_tokens"], SHAPE.image_tokens
    stored = prompt + 12 - 1
    blocks = [-(-stored // 32), -(-(stored - image) // 32)]
    # Two layers per group, keys and values of two heads of 32 float32 numbers each.
    block_bytes = 2 * 32 * 2 * 2 * 32 * 4
    assert answer["kv_transfer_params"]["vllm_flow"] == {
        "when": "prefill",
        "cliff": 2,
        "stages": [{"layer": 2, "image_tokens_kept": 0, "image_tokens_evicted": image}],
        "image_tokens_evicted": image,
        "prefill_rows_saved": 2 * image,
        "kv_blocks": blocks,
        "kv_blocks_saved": blocks[0] - blocks[1],
        "kv_bytes_saved": (blocks[0] - blocks[1]) * block_bytes,
    }
    assert baseline["kv_transfer_params"] is None
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert {name: value for name, value in grown.items() if value} == {
        "vllm_flow:requests_total:cliff=2": 1,
        "vllm_flow:requests_total:baseline": 1,
        "vllm_flow:stage_image_tokens_total:1:evicted": image,
        "vllm_flow:image_tokens_evicted_total": image,
        "vllm_flow:prefill_rows_saved_total": 2 * image,
        "vllm_flow:prefill_rows_total:image": 2 * SHAPE.layers * image,
        "vllm_flow:prefill_rows_total:text": 2 * SHAPE.layers * (prompt - image),
        "vllm_flow:kv_blocks_saved_total": blocks[0] - blocks[1],
        "vllm_flow:kv_bytes_saved_total": (blocks[0] - blocks[1]) * block_bytes,
    }
