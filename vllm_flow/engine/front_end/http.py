"""Checks a request's keys as the client sent them, before vLLM's request models change them.

``vllm_xargs`` is declared as a mapping to strings, numbers and lists: pydantic reads JSON ``true`` as
the number 1, which is a layer, and refuses ``null`` in words that do not say what is allowed. Keys
anywhere else are ignored, as are all keys where vLLM makes requests of its own, and of a key that is
sent twice, JSON keeps the last. Here each is HTTP 400 with a sentence. What is wrong only in view of
the prompt is left to ``incoming``.

A name that begins with ``flow_`` is this extension's in every object of a body but those whose names
the client's own data fixes: JSON schemas of tools and answers, and arguments of tool calls.

Seams: vLLM's endpoint plugins, which are handed the finished FastAPI application
(``patches/endpoint_plugins.py``), and FastAPI's ``dependency_overrides``, since every route with a
JSON body depends on ``validate_json_request``. FastAPI has parsed the body by then and keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from vllm import envs
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.logger import init_logger

from vllm_flow.engine.front_end import asked_model
from vllm_flow.engine.front_end.incoming import RefusedRequest, check_keys
from vllm_flow.engine.front_end.refused_streams import RefusedStreams
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy_error import PolicyError, short
from vllm_flow.policy_keys import KEY_PREFIX, is_own
from vllm_flow.user_text import NotJSON, parse_json

logger = init_logger("vllm.vllm_flow.http")

XARGS = "vllm_xargs"
STATE = "vllm_flow_settings"
BEAMS = "use_beam_search"

_CREATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
PLACES: dict[str, tuple[str, ...]] = {
    **{path + end: (XARGS,) for path in _CREATING for end in ("", "/render")},
    "/v1/chat/completions/batch": (XARGS,),
    "/invocations": (XARGS,),
    "/inference/v1/generate": ("sampling_params", "extra_args"),
    "/v1/chat/completions/derender": ("chat_request", XARGS),
    "/v1/completions/derender": ("completion_request", XARGS),
}
"""Of each route that takes keys, the way through its body to their object; other routes take none."""

_CONTAINERS = frozenset(name for place in PLACES.values() for name in place)

_BODIES = ("chat_request", "completion_request")
"""Fields of a body that hold the client's first one: what was rendered."""

_DESCRIBED = ("tools", "functions", "response_format", "structured_outputs", "text")
"""Fields of a body under which JSON schemas stand ..."""
_SCHEMAS = ("parameters", "input_schema", "schema", "json_schema", "json")
"""... as these."""
MOST_PATH = 200
"""Letters kept of the way to an object: more than an answer shows, and no more for every level of a deep body."""


class KeyCheck:
    """An endpoint plugin (``vllm.plugins.endpoint_plugins``) that adds a check, a middleware and no route."""

    name = "vllm_flow"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.dependency_overrides[validate_json_request] = checked_json_request
        app.add_middleware(RefusedStreams)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        if engine_client is None:  # as in a server that only renders prompts
            return
        settings = FlowSettings.of(engine_client.vllm_config)
        setattr(state, STATE, settings)
        if settings is not None:
            unserved = asked_model.check_served(
                settings.model_policies, served_names(args), envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
            )
            if unserved is not None:
                logger.warning("%s", unserved)


def served_names(args: Any) -> list[str]:
    """The names by which clients of a server can ask for its model, and for the adapters that it begins with."""
    adapters = [module.name for module in getattr(args, "lora_modules", None) or ()]
    of_modalities = getattr(args, "default_mm_loras", None) or {}
    return [*(args.served_model_name or [args.model]), *adapters, *of_modalities]


async def checked_json_request(raw_request: Request) -> None:
    """vLLM's own check of the content type, then ours of the keys."""
    await validate_json_request(raw_request)
    raw = await raw_request.body()
    route = getattr(raw_request.scope.get("route"), "path", raw_request.url.path)
    try:
        body = await raw_request.json() if raw else None
    except (ValueError, RecursionError):
        return  # no JSON: for vLLM to refuse
    asked_model.note(body.get("model") if isinstance(body, dict) else None)
    try:
        for sent, where in (
            (raw_request.query_params, "behind the address"),
            (raw_request.headers, "among the headers"),
        ):
            check_beside_the_body(sent, where, PLACES.get(route))
        check_once(raw)
        check_body(body, getattr(raw_request.app.state, STATE, None), PLACES.get(route))
    except PolicyError as error:
        raise RefusedRequest(str(error), parameter=error.key) from None


def refusal_of(line: str, settings: FlowSettings) -> str | None:
    """Why a line of ``vllm run-batch``, a request as JSON, is refused; None if it is not.

    The runner calls vLLM's handlers without HTTP (``patches/run_batch.py``).
    """
    try:
        request = parse_json(line)
        check_once(line.encode("utf-8", "surrogatepass"))
        place = PLACES.get(request.get("url"))
        check_body(request.get("body"), settings, place)
        beside = {name: value for name, value in request.items() if name != "body"}
        for key, value, where in _strays(beside, None, "beside the body"):
            raise PolicyError(
                key, value, _belongs(None if place is None else ("body", *place), where)
            )
    except NotJSON as error:  # vLLM's own reader has read it, which is another
        return f"this line is no JSON that can be checked: {error}."
    except PolicyError as error:
        return str(error)
    return None


def check_body(
    body: Any, settings: FlowSettings | None, place: Sequence[str] | None = (XARGS,)
) -> None:
    """Check the keys of a parsed body; whatever else is wrong with it is for vLLM to refuse.

    Args:
        settings: None where there is no engine, which leaves the values to the one that gets them.
        place: the way to the object that holds keys, see :data:`PLACES`; None where none does.

    Raises:
        PolicyError: a ``flow_*`` key anywhere else, or beside beam search; see also
            :func:`vllm_flow.engine.front_end.incoming.check_keys`.
    """
    if not isinstance(body, dict):
        return
    keys: Any = body if place is not None else None
    for step in place or ():
        keys = keys.get(step) if isinstance(keys, dict) else None
    if isinstance(keys, dict):
        if settings is not None:
            check_keys(keys, settings)
        own = next(filter(is_own, keys), None)
        if own is not None and body.get(BEAMS) not in (None, False):
            reason = (
                "beam search makes requests of its own, which would not carry this key; leave out "
                f'"{BEAMS}", or the key.'
            )
            raise PolicyError(own, keys[own], reason)
    for key, value, where in _strays(body, keys, "in the body itself"):
        raise PolicyError(key, value, _belongs(place, where))


def check_beside_the_body(sent: Mapping[str, str], where: str, place: Sequence[str] | None) -> None:
    """Refuse keys among a request's queries or headers, where vLLM reads none.

    Args:
        where: what to say of these.

    Raises:
        PolicyError: names the first.
    """
    for key in filter(is_own, sent):
        raise PolicyError(key, sent[key], _belongs(place, where))


def _belongs(place: Sequence[str] | None, where: str) -> str:
    if place is None:
        return "this route makes no use of such keys; leave it out."
    *outer, last = place
    return (
        f'this key belongs into the object "{last}"'
        + "".join(f' of "{name}"' for name in reversed(outer))
        + f", and would be ignored {where}."
    )


def _strays(body: dict[str, Any], keys: Any, top: str) -> Iterator[tuple[str, Any, str]]:
    """Every ``flow_*`` key of a body that does not stand in the object ``keys``, its value, and where it stands.

    Args:
        top: what to say of one that stands in ``body`` itself.
    """
    waiting: list[tuple[Any, str | None, str]] = [(body, None, "")]
    while waiting:
        node, field, path = waiting.pop()
        if isinstance(node, list):
            waiting += [
                (item, field, f"{path}[{number}]"[-MOST_PATH:])
                for number, item in enumerate(node)
                if isinstance(item, (dict, list))
            ]
            continue
        for key, value in node.items():
            if node is not keys and is_own(key):
                yield key, value, f"in {short(path)}" if path else top
            if isinstance(value, (dict, list)) and not _clients_own(node, key, field):
                within = key if field is None and key not in _BODIES else field
                waiting.append((value, within, f"{path}.{key}".lstrip(".")[-MOST_PATH:]))


def _clients_own(node: dict[str, Any], key: str, field: str | None) -> bool:
    """Whether the names under ``node[key]`` are those of the client's data.

    Args:
        field: the field of the body under which ``node`` stands, None for the body itself.
    """
    if field in _DESCRIBED:
        return key in _SCHEMAS
    return (
        field is not None
        and (key == "input" and node.get("type") == "tool_use")
        or (key == "arguments" and field in ("messages", "input") and "name" in node)
    )


def check_once(raw: bytes) -> None:
    """Check that no key of ours is sent twice, of which a JSON parser keeps the last.

    Args:
        raw: a body that is valid JSON, in any of JSON's encodings, or nothing.

    Raises:
        PolicyError: a ``flow_*`` key, or an object that may hold one, more than once in one object.
    """
    text = raw.decode(json.detect_encoding(raw), "surrogatepass")
    if KEY_PREFIX in text or "\\u" in text:  # a letter may be written as an escape
        json.loads(text, object_pairs_hook=_refuse_repeated)


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and (key.startswith(KEY_PREFIX) or key in _CONTAINERS):
            raise PolicyError(key, value, "this key is there more than once; send it once.")
        found[key] = value
    return found
