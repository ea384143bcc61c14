"""More than 300 malformed bodies: each is refused, none is a server error, and the server goes on.

What vLLM 0.32 itself answers with 5xx is excluded by name in ``stock_error``.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from tests.server import malformed
from tests.server.conftest import LAYERS, STRONGEST
from tests.server.requests import CHAT, COMPLETIONS, chat_body, text_body
from tests.server.serving import Server
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import REQUEST_KEYS

BATCH = 25
JSON_TYPE = {"content-type": "application/json"}
GOOD = {CHAT: chat_body(0, 2, max_tokens=2), COMPLETIONS: text_body("hello", 2)}
MODEL = {CHAT: ChatCompletionRequest, COMPLETIONS: CompletionRequest}
"""What vLLM reads a body into."""

drawn = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Watched:
    """Posts bodies, and after every batch of them asks what a good request is answered."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.sent = 0
        self.known = self._good_answers()

    def post(self, path: str, body: Any) -> httpx.Response:
        """Post an object, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.server.client.post(path, content=raw, headers=JSON_TYPE)
        self.sent += 1
        if self.sent % BATCH == 0:
            self.check()
        return answer

    def refused(self, path: str, body: Any) -> str:
        """Post what must be refused; returns the sentence."""
        return sentence(self.post(path, body))

    def check(self) -> None:
        assert self._good_answers() == self.known

    def _good_answers(self) -> list[Any]:
        bodies = [(CHAT, chat_body(1)), (CHAT, chat_body(1, 2)), (COMPLETIONS, text_body("hello"))]
        answers = [
            self.server.post(path, {**body, "return_token_ids": True}) for path, body in bodies
        ]
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        return [answer.json()["choices"][0]["token_ids"] for answer in answers]


def sentence(answer: httpx.Response) -> str:
    """The message of a refusal: 4xx and a JSON error."""
    assert 400 <= answer.status_code < 500, answer.text
    body = answer.json()
    if "detail" in body:  # FastAPI's own, where Python's JSON reader gives up
        return body["detail"]
    error = body["error"]
    assert error["code"] == answer.status_code
    assert error["message"]
    return error["message"]


@pytest.fixture(scope="module")
def watched(small: Server) -> Watched:
    return Watched(small)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@settings(drawn, max_examples=60)
@given(drawn_keys=malformed.bad_keys(LAYERS))
def test_bad_keys_are_refused_by_name(
    watched: Watched, path: str, drawn_keys: tuple[dict[str, Any], str]
) -> None:
    keys, named = drawn_keys
    answer = watched.post(path, {**GOOD[path], "vllm_xargs": keys})
    assert answer.status_code == 400, answer.text
    said = sentence(answer)
    assert said.startswith(f"{PolicyError(named, 1, '').key}="), said
    assert (
        f"it must be an integer from 0 (no layer sees the image) to {LAYERS}" in said
        or "a list needs one value per image of the prompt." in said
        or any(f"did you mean {key!r}?" in said for key in REQUEST_KEYS)
        or f"known keys: {', '.join(map(repr, REQUEST_KEYS))}." in said
    ), said


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@settings(drawn, max_examples=30)
@given(keys=malformed.JSON.filter(lambda keys: keys is not None and not isinstance(keys, dict)))
def test_what_is_no_object_of_keys_is_refused(watched: Watched, path: str, keys: Any) -> None:
    assert "vllm_xargs" in watched.refused(path, {**GOOD[path], "vllm_xargs": keys})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@settings(drawn, max_examples=15)
@given(key=st.just("flow_cliff") | malformed.UNKNOWN_KEYS, value=malformed.JSON)
def test_a_key_in_the_wrong_place_is_refused(
    watched: Watched, path: str, key: str, value: Any
) -> None:
    """vLLM ignores fields that it does not know, and the policy with them."""
    said = watched.refused(path, {**GOOD[path], key: value})
    assert (
        said.startswith(f"{PolicyError(key, 1, '').key}=")
        and 'into the object "vllm_xargs"' in said
    )


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("twice", "named"),
    [
        ('"vllm_xargs": {"flow_cliff": 2, "flow_cliff": 3}', "flow_cliff=3"),
        ('"vllm_xargs": {"flow_cliff": true, "flow_cliff": 3}', "flow_cliff=3"),
        ('"vllm_xargs": {"flow_cliff": 2}, "vllm_xargs": {}', "vllm_xargs={}"),
    ],
)
def test_a_key_sent_twice_is_refused(watched: Watched, path: str, twice: str, named: str) -> None:
    rest = json.dumps({key: value for key, value in GOOD[path].items() if key != "vllm_xargs"})
    said = watched.refused(path, f"{rest[:-1]}, {twice}}}".encode())
    assert said.startswith(named) and "more than once" in said


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_the_operator_forbade_is_refused(watched: Watched, path: str) -> None:
    said = watched.refused(path, {**GOOD[path], "vllm_xargs": {"flow_cliff": 0}})
    assert said.startswith("flow_cliff=0: the operator")
    assert f"an integer from {STRONGEST} to {LAYERS}" in said


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_is_no_json_is_refused(watched: Watched, path: str) -> None:
    @settings(drawn, max_examples=40)
    @given(malformed.broken(GOOD[path]))
    def check(raw: bytes) -> None:
        watched.refused(path, raw)

    check()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("kind", malformed.ODD_BODIES)
def test_odd_bodies_are_refused(watched: Watched, path: str, kind: str) -> None:
    watched.refused(path, malformed.ODD_BODIES[kind])


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/xml"])
def test_another_content_type_is_refused(small: Server, content_type: str) -> None:
    raw = json.dumps(GOOD[CHAT]).encode()
    sentence(small.client.post(CHAT, content=raw, headers={"content-type": content_type}))


GOOD_URL = GOOD[CHAT]["messages"][0]["content"][0]["image_url"]["url"]


BROKEN_URLS = (
    *("", "x", "data:", "data:image/png;base64,", "data:image/png;base64,AAAA", "http://["),
    *(GOOD_URL[:-40], GOOD_URL[:200], GOOD_URL[:60] + "!!!!", "data:image/png;base64,####"),
    *("data:text/plain;base64,aGVsbG8=", "ftp://localhost/x.png", None, 3, [], {}, {"url": "x"}),
)
STOCK_ERROR_URLS = ("data:,x", GOOD_URL.replace(";base64", ""), "file:///etc/hostname")
"""vLLM 0.32 itself answers 501 to data URLs without base64, and 500 to files (``MediaConnector``)."""


@pytest.mark.parametrize(
    ("cliff", "url"),
    [
        *((cliff, url) for cliff in (None, 2, 0, "2") for url in BROKEN_URLS),
        *((cliff, url) for cliff in (0, "2") for url in STOCK_ERROR_URLS),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_broken_picture_is_refused(watched: Watched, cliff: Any, url: Any) -> None:
    body = chat_body(0, cliff)
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    said = watched.refused(CHAT, body)
    # The policy is looked at first, which costs nothing.
    assert said.startswith("flow_cliff=") == (cliff in (0, "2"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"vllm_xargs": {"flow_cliff": [2, 3]}}, "the prompt has 1 image"),
        ({"cache_salt": "\x00vllm-flow\x00cliff=2\x00"}, "cache_salt"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_excludes_a_policy_is_refused(
    watched: Watched, more: dict[str, Any], named: str
) -> None:
    assert named in watched.refused(CHAT, {**GOOD[CHAT], **more})


def test_too_many_pictures_are_refused(watched: Watched) -> None:
    assert "2 image" in watched.refused(CHAT, chat_body(0, 2, pictures=3))


def stock_error(field: str, value: Any) -> bool:
    """Whether vLLM 0.32 itself answers 5xx, as a server without the extension does.

    - ``structured_outputs``: a validator that runs before the types are checked calls ``.get`` on
      whatever it is (``check_structured_outputs_count``).
    - ``stream_interval`` beyond 64 bits is not checked and cannot be sent to the engine.
    - ``truncate_prompt_tokens`` of one (``true``) cuts the image's placeholder off the prompt.
    """
    return (
        (field == "structured_outputs" and not isinstance(value, dict | None))
        or (field == "stream_interval" and value == 2**70)
        or (field == "truncate_prompt_tokens" and value is True)
    )


@pytest.mark.parametrize(
    ("path", "every"),
    [(CHAT, 3), *(pytest.param(path, 1, marks=pytest.mark.long) for path in (CHAT, COMPLETIONS))],
)
def test_ill_typed_fields_are_no_server_error(watched: Watched, path: str, every: int) -> None:
    """Every field that the server documents, set to each of the ill values, or every third, beside a good policy."""
    document = watched.server.client.get("/openapi.json").json()
    fields = document["components"]["schemas"][MODEL[path].__name__]["properties"]
    assert len(fields) > 40
    wrong, refused = [], 0
    for number, field in enumerate(fields):
        for value in malformed.ILL_VALUES[number % every :: every]:
            if stock_error(field, value):
                continue
            answer = watched.post(path, {**GOOD[path], field: value})
            if answer.status_code >= 500:
                wrong.append((field, value, answer.text))
            elif answer.status_code != 200:
                sentence(answer)
                refused += 1
    assert not wrong
    assert refused > 300 / every


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bodies_against_the_schema_are_refused(watched: Watched, path: str) -> None:
    """Schemathesis draws what the server's own OpenAPI document does not allow. What vLLM's model of a request takes
    nevertheless (``"1"`` for 1) may be answered."""
    schema = schemathesis.openapi.from_url(f"{watched.server.url}/openapi.json")
    cases = schema[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @settings(drawn, max_examples=25)
    @given(cases)
    def check(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and any(stock_error(field, body[field]) for field in body):
            return
        answer = watched.post(path, body)
        if answer.status_code == 200:
            MODEL[path].model_validate(body)
        else:
            sentence(answer)

    check()


def test_the_server_is_well_afterwards(watched: Watched) -> None:
    """The last test of this module: nothing is left of all that."""
    watched.check()
    server = watched.server
    assert server.client.get("/health").status_code == 200
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        server.wait_until(f"vllm:{name}", 0)
    assert server.metric("vllm_flow:image_tokens_evicted_total") > 0
