"""Ends a streamed answer whose request is refused after the stream has begun with the refusal's sentence.

What is wrong only in view of the prompt, such as a policy for another number of pictures, is found when the request
goes to the engine. By then a streamed answer has its headers, and may have its first events. In chats and completions
vLLM 0.32 then sends the error as an event. But ``/v1/responses`` breaks the connection off, with a traceback in the
log, and ``/v1/messages`` sends a validation error about one of vLLM's own objects.

Seam: ASGI, by a middleware of the finished FastAPI application. The refusal is noted in a list that the middleware puts
into a context variable: the request is settled in the task that the middleware runs in, or in one made from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """Why a request is refused. Not the exception, which would keep the request."""

    sentence: str
    key: str | None


_refused: ContextVar[list[Refusal] | None] = ContextVar("flow_refused", default=None)


def note(sentence: str, key: str | None) -> None:
    """Note the refusal of the request that this task handles."""
    found = _refused.get()
    if found is not None:
        found.append(Refusal(sentence, key))


def response_event(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's event ``error`` of a response; two events come before it, ``created`` and ``in_progress``."""
    return {
        "type": "error",
        "code": "400",
        "message": refusal.sentence,
        "param": refusal.key,
        "sequence_number": 2,
    }


def message_event(refusal: Refusal) -> dict[str, Any]:
    """Anthropic's event ``error``."""
    return {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": refusal.sentence},
    }


EVENTS: dict[str, Callable[[Refusal], dict[str, Any]]] = {
    "/v1/responses": response_event,
    "/v1/messages": message_event,
}


class RefusedStreams:
    """The middleware. Whatever is no streamed answer to a refused request goes through as it is."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = EVENTS.get(scope.get("path", "")) if scope["type"] == "http" else None
        if event is None:
            await self.app(scope, receive, send)
            return
        refused: list[Refusal] = []
        streaming = told = False

        async def tell() -> None:
            nonlocal told
            told = True
            line = f"event: error\ndata: {json.dumps(event(refused[0]))}\n\n"
            await send({"type": "http.response.body", "body": line.encode(), "more_body": False})

        async def checked_send(message: Any) -> None:
            nonlocal streaming
            if message["type"] == "http.response.start":
                headers = dict(message.get("headers", ()))
                streaming = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if not (streaming and refused):
                await send(message)
            elif not told:
                await tell()  # and nothing of what vLLM says instead

        noting = _refused.set(refused)
        try:
            await self.app(scope, receive, checked_send)
        except Exception:
            if not (streaming and refused):
                raise
            if not told:
                await tell()
        finally:
            _refused.reset(noting)
