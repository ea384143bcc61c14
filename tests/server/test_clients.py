"""Random traffic of two clients, one of them hostile: the other's answers are those it gets alone.

And after it, vLLM's counters of requests and ours tell the same number, by policy. A few seconds in ``make
test``; for ``VLLM_FLOW_FUZZ_SECONDS``, from ``VLLM_FLOW_FUZZ_SEED`` on, in ``make fuzz``.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.server.conftest import IMAGE_TOKENS, LAYERS
from tests.server.requests import (
    CHAT,
    COMPLETIONS,
    chat_body,
    data_url,
    picture_of,
    question,
    text_body,
)
from tests.server.serving import NAME, Server
from vllm_flow.engine.core.prefix import SALT_MARK

SECONDS = float(os.environ.get("VLLM_FLOW_FUZZ_SECONDS", "6"))
SEED = int(os.environ.get("VLLM_FLOW_FUZZ_SEED", "1"))
CLIENTS = 4
LEAST = 6
"""Answered requests of each client, however slow the machine is: some of every policy are among them."""
STOPS = ["Yes", "No", "e", "a", " "]


@dataclass(frozen=True)
class Sent:
    """A request, and what it should count as where it is answered with 200."""

    path: str
    body: dict[str, Any]
    cliff: int | None = None
    answers: int = 1
    pictures: int = 1
    leaves: bool = False
    """Its client disconnects after the first words."""
    beams: bool = False
    """Counted as however many requests vLLM makes of it, none of which evicts."""


def good(draw: random.Random) -> Sent:
    """A request of any kind that the server answers."""
    cliff = draw.choice([None, 1, 2, 3, LAYERS])
    index = draw.randrange(300, 400)  # pictures of its own: other tests count what is cached
    kind = draw.choice(["chat", "chat", "stop", "several", "stream", "text", "responses", "beams"])
    kind = draw.choice([kind, "leave"]) if draw.random() < 0.3 else kind
    body = chat_body(index, cliff, max_tokens=draw.randrange(1, 10))
    if kind == "text":
        return Sent(COMPLETIONS, text_body(f"hello {index}", cliff), None, pictures=0)
    if kind == "responses":
        return Sent("/v1/responses", responses_body(index, cliff, draw), cliff)
    if kind == "beams":
        body = chat_body(index, max_tokens=3)
        return Sent(CHAT, {**body, "use_beam_search": True, "n": 2}, None, beams=True)
    if kind == "leave":
        body = chat_body(index, cliff, max_tokens=800, ignore_eos=True, stream=True)
        return Sent(CHAT, body, cliff, leaves=True)
    more: dict[str, Any] = {}
    if kind in ("stop", "stream") or draw.random() < 0.3:
        more["stop"] = draw.sample(STOPS, 2)
    if kind == "several":
        more |= {"n": 3, "temperature": 1, "seed": index}
    if kind == "stream":
        more["stream"] = True
    return Sent(CHAT, {**body, **more}, cliff, answers=more.get("n", 1))


def responses_body(index: int, cliff: int | None, draw: random.Random) -> dict[str, Any]:
    picture = {"type": "input_image", "image_url": data_url(picture_of(question(index)))}
    content = [picture, {"type": "input_text", "text": question(index).text}]
    return {
        "model": NAME,
        "input": [{"role": "user", "content": content}],
        "max_output_tokens": 6,
        "temperature": 0,
        **({} if cliff is None else {"vllm_xargs": {"flow_cliff": cliff}}),
        **({"stop": draw.choice(STOPS)} if draw.random() < 0.7 else {}),
    }


def hostile(draw: random.Random) -> Sent:
    """What a client sends that means harm, or does not know what it does."""
    index = draw.randrange(300, 400)  # pictures of its own: other tests count what is cached
    body = chat_body(index, draw.choice([None, 1, 2]), pictures=draw.choice([1, 2]))
    wrong: dict[str, Any] = draw.choice(
        [
            {"logit_bias": {"9999999": 1}},
            {"vllm_xargs": {"flow_cliff": draw.choice([-1, 0, 7, True, "1", None, 2.5])}},
            {"vllm_xargs": {"flow_cliff": [2, 2, 2]}},
            {"vllm_xargs": {"flow_cliff": 2}, "use_beam_search": True, "n": 2},
            {"vllm_xargs": {"flow_log_attention": True}},
            {"max_tokens": 100_000},
            {"flow_cliff": 0},
            {"metadata": {"flow_cliff": 0}},
            {"cache_salt": SALT_MARK + "mine"},
            {"temperature": -1},
            {"n": 0},
            {"allowed_token_ids": [1 << 40]},
            {"stop": [""] * 5},
            {"messages": []},
            {"structured_outputs": {"json": "{"}},
        ]
    )
    return Sent(CHAT, {**body, **wrong})


def send(server: Server, sent: Sent) -> httpx.Response | None:
    """The answer, read to its end; None where the client left."""
    if not sent.body.get("stream"):
        return server.post(sent.path, sent.body)
    with server.client.stream("POST", sent.path, json=sent.body) as answer:
        for line in answer.iter_lines():
            if sent.leaves and line:
                return None
    return answer


def essence(answer: httpx.Response) -> Any:
    """What must not depend on others: status, words, and what the policy did."""
    body = answer.json()
    choices = [(one["message"]["content"], one["finish_reason"]) for one in body.get("choices", ())]
    return answer.status_code, choices, body.get("kv_transfer_params"), body.get("error")


def victims() -> list[dict[str, Any]]:
    """Requests of somebody who wants nothing but answers."""
    bodies = []
    for number in range(12):
        cliff = (None, 1, 2, 3, LAYERS)[number % 5]
        more: dict[str, Any] = {"stop": ["e"]} if number % 3 == 0 else {}
        if number % 4 == 1:
            more = {"n": 2, "temperature": 1, "top_k": 1}
        pictures = 2 if number % 4 == 2 else 1
        bodies.append(chat_body(80 + 4 * number, cliff, pictures=pictures, **more))
    bodies.append({**bodies[0], "vllm_xargs": {"flow_cliff": -1}})
    return bodies


@pytest.mark.timeout(SECONDS + 600)
def test_fuzz_one_client_cannot_change_anothers_answers(small: Server) -> None:
    bodies = victims()
    alone = [essence(small.post(CHAT, body)) for body in bodies]
    assert [one[0] for one in alone] == [200] * (len(bodies) - 1) + [400]
    over = threading.Event()
    harm: Counter[int] = Counter()

    def attack(seed: int) -> None:
        draw = random.Random(seed)
        while not over.is_set():
            sent = hostile(draw) if draw.random() < 0.7 else good(draw)
            answer = send(small, sent)
            harm[0 if answer is None else answer.status_code] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        attacks = [pool.submit(attack, 1000 * SEED + number) for number in range(CLIENTS)]
        try:
            draw, end = random.Random(SEED), time.monotonic() + SECONDS
            while time.monotonic() < end:
                which = draw.randrange(len(bodies))
                found = essence(small.post(CHAT, bodies[which]))
                assert found == alone[which], (SEED, which, found, alone[which])
        finally:
            over.set()
        for one in attacks:
            one.result()
    assert harm[200] > 0 and harm[400] > 0
    assert not [status for status in harm if status >= 500], harm


def counted(server: Server) -> Counter[str]:
    """vLLM's finished requests, and ours by policy, with what was saved."""
    found: Counter[str] = Counter()
    for (name, labels), value in server.samples().items():
        if name == "vllm:request_success_total":
            found["vLLM's"] += int(value)
        elif name == "vllm_flow:requests_total":
            found[dict(labels)["policy"]] += int(value)
        elif name in (
            "vllm_flow:image_tokens_evicted_total",
            "vllm_flow:prefill_rows_saved_total",
        ):
            found[name.removeprefix("vllm_flow:")] += int(value)
    return found


@pytest.mark.timeout(SECONDS + 600)
def test_fuzz_counters_add_up(small: Server) -> None:
    """Stops, aborts, errors, several answers, beams, streams, from several clients at once."""
    settle(small)
    before = counted(small)
    end = time.monotonic() + SECONDS

    left: list[Sent] = []

    def client(seed: int) -> list[Sent]:
        draw, served = random.Random(seed), []
        while time.monotonic() < end or len(served) < LEAST:
            harm = draw.random() < 0.3
            sent = hostile(draw) if harm else good(draw)
            answer = send(small, sent)
            if answer is None:
                left.append(sent)
                continue
            assert answer.status_code == (400 if harm else 200), (seed, sent, answer.text)
            served += [] if harm else [sent]
        return served

    with ThreadPoolExecutor(CLIENTS) as pool:
        seeds = range(1000 * SEED, 1000 * SEED + CLIENTS)
        served = [sent for part in pool.map(client, seeds) for sent in part]
    settle(small)
    grown = counted(small)
    grown.subtract(before)
    policies = {
        name: grown[name]
        for name in grown
        if name in ("baseline", "no-image") or name[:5] == "cliff"
    }
    assert grown["vLLM's"] == sum(policies.values())
    # Who leaves on a busy machine may be noticed once there is no more to be said.
    gone = Counter(_policy_of(sent) for sent in left)
    for policy in gone.keys() & policies.keys() - {"baseline"}:
        asked = sum(sent.answers for sent in served if _policy_of(sent) == policy)
        late = policies[policy] - asked
        assert 0 <= late <= gone[policy], policy
        served += [sent for sent in left if _policy_of(sent) == policy][:late]
    expected: Counter[str] = Counter()
    for sent in served:
        policy = _policy_of(sent)
        if policy == "no-image":
            expected[policy] += sent.answers
        elif policy != "baseline":
            assert sent.cliff is not None
            expected[policy] += sent.answers
            expected["image_tokens_evicted_total"] += IMAGE_TOKENS * sent.answers
            rows = IMAGE_TOKENS * (LAYERS - sent.cliff)
            expected["prefill_rows_saved_total"] += rows * sent.answers
        elif not sent.beams:
            expected["baseline"] += sent.answers
    beams = sum(sent.beams for sent in served)
    surplus = grown["baseline"] - expected.pop("baseline")
    assert beams <= surplus <= beams * 2 * 3 + gone["baseline"]
    assert {name: grown[name] for name in expected} == dict(expected)
    assert len(expected) == 6, f"too little traffic: {expected}"


def _policy_of(sent: Sent) -> str:
    """As the metrics name it."""
    if not sent.pictures:
        return "no-image"
    return "baseline" if sent.cliff in (None, LAYERS) else f"cliff={sent.cliff}"


def settle(server: Server) -> None:
    """Wait until nothing runs; those who left are noticed late."""
    for name in ("num_requests_running", "num_requests_waiting"):
        server.wait_until(f"vllm:{name}", 0)
    time.sleep(0.5)
