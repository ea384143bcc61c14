"""Checks a request's keys as the client sent them, before vLLM's request models change them.

``vllm_xargs`` is declared as a mapping to strings, numbers and lists: pydantic reads JSON ``true`` as
the number 1, which is a layer, and refuses ``null`` in words that do not say what is allowed. Keys
beside ``vllm_xargs`` are ignored, and of a key that is sent twice, JSON keeps the last. Here each
is HTTP 400 with a sentence. What is wrong only in view of the prompt is left to ``frontend``.

Seams: vLLM's endpoint plugins, which are handed the finished FastAPI application
(``patches/endpoint_plugins.py``), and FastAPI's ``dependency_overrides``, since every route with a
JSON body depends on ``validate_json_request``. FastAPI has parsed the body by then and keeps it.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from vllm_flow.engine.frontend import RefusedRequest, check_keys
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import KEY_PREFIX, PolicyError

XARGS = "vllm_xargs"
STATE = "vllm_flow_settings"


class KeyCheck:
    """An endpoint plugin (``vllm.plugins.endpoint_plugins``) that adds a check and no route."""

    name = "vllm_flow"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.dependency_overrides[validate_json_request] = checked_json_request

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        if engine_client is not None:  # there is none in a server that only renders prompts
            setattr(state, STATE, FlowSettings.of(engine_client.vllm_config))


async def checked_json_request(raw_request: Request) -> None:
    """vLLM's own check of the content type, then ours of the keys."""
    await validate_json_request(raw_request)
    settings = getattr(raw_request.app.state, STATE, None)
    raw = await raw_request.body()
    if settings is None or not raw:
        return
    try:
        check_once(raw)
        check_body(await raw_request.json(), settings)
    except PolicyError as error:
        raise RefusedRequest(str(error), parameter=error.key) from None


def check_body(body: Any, settings: FlowSettings) -> None:
    """Check the keys of a parsed body; whatever else is wrong with it is for vLLM to refuse.

    Raises:
        PolicyError: a ``flow_*`` key beside ``vllm_xargs``; see also
            :func:`vllm_flow.engine.frontend.check_keys`.
    """
    if not isinstance(body, dict):
        return
    for key, value in body.items():
        if key.startswith(KEY_PREFIX):
            reason = f'this key belongs into the object "{XARGS}", and would be ignored here.'
            raise PolicyError(key, value, reason)
    keys = body.get(XARGS)
    if isinstance(keys, dict):
        check_keys(keys, settings)


def check_once(raw: bytes) -> None:
    """Check that no key of ours is sent twice, of which a JSON parser keeps the last.

    Args:
        raw: a body that is valid JSON.

    Raises:
        PolicyError: a ``flow_*`` key, or ``vllm_xargs``, more than once in one object.
    """
    if max(raw.count(b'"' + KEY_PREFIX.encode()), raw.count(b'"' + XARGS.encode())) > 1:
        json.loads(raw, object_pairs_hook=_refuse_repeated)


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and (key.startswith(KEY_PREFIX) or key == XARGS):
            raise PolicyError(key, value, "this key is there more than once; send it once.")
        found[key] = value
    return found
