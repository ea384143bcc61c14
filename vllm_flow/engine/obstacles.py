"""Tells the front end, before the first request, what this engine's workers found that they cannot do.

Seams: ``collective_rpc`` of vLLM's clients, answered by our worker. An engine in this process or behind a
synchronous client is asked when its client is made. An asynchronous client is asked with the first
question that vLLM has for the engine, which it asks before it looks at the first request.

What a worker cannot do would end the engine with the first request that needs it; the front end refuses
such requests (:func:`vllm_flow.engine.front_end.fitting.fitted`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from vllm_flow import ranks

RANKS = "ranks"
"""Ranks by attention: the keys in the cache cannot be read."""
HIDDEN = "hidden"
"""Ranks by hidden states: the model's keys or final norm are not where they are looked for."""
UNROTATED = "unrotated"
"""Ranks by attention without positions: where the model turns queries and keys is not known."""
TOWER = "tower"
"""Ranks by the vision tower's class token: nobody reads its attention in this engine."""
RECEIVED = "received"
"""Ranks by the attention among the vision tower's patches: nobody reads it in this engine."""
TILES = "tiles"
"""Ranks that share a budget out among tiles: nobody says of which one a token is, or reads the tower's first layer."""
FRAMES = "frames"
"""Ranks by a video's frames: nobody says how many it was encoded in."""
MERGING = "merging"
"""Ranks that merge tokens: an image has more embeddings than those that enter the decoder, or other ones."""
ADDED = "added rank "
"""With a rank's name: the workers do not have a package's rank that the front end has."""
LATE = "late"
"""Eviction after the prefill: the rows of the cache cannot be moved."""
METHOD = "flow_obstacles"
"""Of a worker: obstacle -> reason; called with what the front end has in the way of packages' ranks."""
_FIELD = "flow_obstacles"
"""On the front end's ``VllmConfig``."""


class Misfit(str, Enum):
    """Kinds of obstacles: the values of a counter's label, so they are few, and none depends on a request."""

    ENGINE = "engine"
    """No request of this engine could have it."""
    STEP = "step"
    """What its rank must see together has no room in one step."""
    PROMPT_END = "prompt_end"
    """The prompt ends with a picture."""
    PICTURE = "picture"
    """It does not go with pictures of these sizes, or in these pieces."""
    VIDEO = "video"
    EMBEDDINGS = "embeddings"
    """The prompt, or a picture that is to be ranked by the vision tower, came as embeddings."""
    MODALITY = "modality"
    """An input that no policy reaches."""
    STREAMING = "streaming"
    KV_TRANSFER = "kv_transfer"
    LOG = "attention_log"
    """What the request wants logged cannot be told."""
    BOUND = "max_policy"
    """It evicts more of these pictures than the operator allows."""


class Obstacle(Exception):
    """Why a request cannot have a policy, with the remedy; ``key`` is at fault, or the policy's own."""

    def __init__(self, kind: Misfit, reason: str, key: str | None = None) -> None:
        self.kind, self.key = kind, key
        super().__init__(reason)


def known(vllm_config: Any) -> Mapping[str, str]:
    """Obstacle -> reason, as far as the engine of this configuration has said; empty before."""
    found: Mapping[str, str] = getattr(vllm_config, _FIELD, {})
    return found


def added_ranks() -> dict[str, str]:
    """Ranks of other packages in this process's environment -> their packages; nothing is imported."""
    return {name: " and ".join(map(str, found)) for name, found in ranks.RANKS.added.items()}


def missing_ranks(wanted: Mapping[str, str]) -> dict[str, str]:
    """Of a front end's :func:`added_ranks` those that this process's environment has not: obstacle -> reason."""
    here = added_ranks()
    return {
        ADDED + name: f"the front end has that of {package}, a worker {here.get(name, 'none')}"
        for name, package in wanted.items()
        if here.get(name) != package
    }


def merged(answers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What one worker cannot do, the engine cannot."""
    found: dict[str, str] = {}
    for answer in answers:
        found = {**answer, **found}
    return found


def ask(client: Any, vllm_config: Any, heard: Callable[[], None] = lambda: None) -> None:
    """Have what the workers say noted in the front end's configuration.

    Args:
        client: vLLM's ``EngineCoreClient`` of any kind, whose engine runs the extension.
        vllm_config: which the front end goes by.
        heard: called once it is noted.
    """
    from vllm.v1.engine.core_client import AsyncMPClient

    if not isinstance(client, AsyncMPClient):
        _note(vllm_config, client.collective_rpc(METHOD, args=(added_ranks(),)), heard)
        return
    reference = weakref.ref(client)  # the client is to be freed as soon as it is dropped

    async def get_supported_tasks_async() -> Any:
        client = reference()
        assert client is not None
        if not hasattr(vllm_config, _FIELD):
            answers = await client.collective_rpc_async(METHOD, args=(added_ranks(),))
            _note(vllm_config, answers, heard)
        return await type(client).get_supported_tasks_async(client)

    client.get_supported_tasks_async = get_supported_tasks_async


def _note(
    vllm_config: Any, answers: Sequence[Mapping[str, str]], heard: Callable[[], None]
) -> None:
    first = not hasattr(vllm_config, _FIELD)  # vLLM's factories call each other
    setattr(vllm_config, _FIELD, merged(answers))
    if first:
        heard()
