"""A streamed answer to a request that is refused late ends with the refusal's sentence, on every route."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient

from tests.server.requests import chat_body, data_url, picture_of, question
from tests.server.serving import NAME, Server
from vllm_flow.engine.front_end.incoming import RefusedRequest, refusals
from vllm_flow.engine.front_end.refused_streams import EVENTS, RefusedStreams
from vllm_flow.policy_error import PolicyError

SENTENCE = "flow_cliff=[1, 2]: it has 2 values."


def refuse() -> None:
    with refusals():
        raise PolicyError("flow_cliff", [1, 2], "it has 2 values.")


def application(says: Any) -> TestClient:
    """An application whose routes answer with the stream that `says()` makes."""
    app = FastAPI()
    app.add_middleware(RefusedStreams)

    @app.exception_handler(RefusedRequest)
    async def handled(request: Any, error: RefusedRequest) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    for path in (*EVENTS, "/v1/other"):

        @app.post(path)
        async def answer() -> StreamingResponse:
            return StreamingResponse(says(), media_type="text/event-stream")

    return TestClient(app)


async def breaks_off() -> AsyncIterator[str]:
    yield "event: begun\ndata: {}\n\n"
    refuse()


async def says_something_else() -> AsyncIterator[str]:
    try:
        refuse()
    except RefusedRequest:
        yield "event: error\ndata: 2 validation errors\n\n"
        yield "data: [DONE]\n\n"


@pytest.mark.parametrize("path", sorted(EVENTS))
@pytest.mark.parametrize("says", [breaks_off, says_something_else])
def test_the_last_event_is_the_sentence(path: str, says: Any) -> None:
    found = application(says).post(path)
    *before, last, end = found.text.split("\n\n")
    assert before == (["event: begun\ndata: {}"] if says is breaks_off else []) and end == ""
    kind, _, data = last.partition("\ndata: ")
    event = json.loads(data)
    assert (kind, event["type"]) == ("event: error", "error")
    assert event.get("error", event)["message"].startswith(SENTENCE)


def test_nothing_is_sent_behind_the_sentence() -> None:
    """A server takes no message behind the last one of an answer."""

    async def goes_on(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(RefusedRequest):
            refuse()
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": more})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    sent: list[dict[str, Any]] = []
    asyncio.run(RefusedStreams(goes_on)({"type": "http", "path": "/v1/messages"}, receive, send))
    begun, last = sent
    assert begun["status"] == 200 and not last["more_body"]
    assert SENTENCE in last["body"].decode()


def test_everything_else_goes_through_as_it_is() -> None:
    async def fails() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        raise KeyError("x")

    for says, path in ((fails, "/v1/responses"), (breaks_off, "/v1/other")):
        with pytest.raises((KeyError, RuntimeError)):
            application(says).post(path)

    async def fine() -> AsyncIterator[str]:
        yield "data: 1\n\n"

    assert application(fine).post("/v1/responses").text == "data: 1\n\n"

    def at_once() -> AsyncIterator[str]:
        refuse()
        return fine()

    found = application(at_once).post("/v1/responses")
    assert found.status_code == 400 and found.json()["error"].startswith(SENTENCE)


def test_a_servers_streams_say_why_a_list_does_not_fit(small: Server) -> None:
    shown, text = picture_of(question(20)), question(20).text
    url = data_url(shown)
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    assert base64.b64decode(source["data"])
    parts = {
        "/v1/responses": [
            {"type": "input_image", "image_url": url, "detail": "auto"},
            {"type": "input_text", "text": text},
        ],
        "/v1/messages": [{"type": "image", "source": source}, {"type": "text", "text": text}],
    }
    more = {"model": NAME, "stream": True, "vllm_xargs": {"flow_cliff": [1, 2]}}
    bodies = {
        "/v1/responses": {**more, "max_output_tokens": 4},
        "/v1/messages": {**more, "max_tokens": 4},
        "/v1/chat/completions": {**chat_body(20), **more},
    }
    for path, body in bodies.items():
        if path in parts:
            field = "input" if path == "/v1/responses" else "messages"
            body = {**body, field: [{"role": "user", "content": parts[path]}]}
        with small.client.stream("POST", path, json=body) as answer:
            said = "".join(answer.iter_text())
        assert "it has 2 values and the prompt has 1 image" in said, path
        assert "validation error" not in said, path
    assert small.client.get("/health").status_code == 200
