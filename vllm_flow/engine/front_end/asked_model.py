"""Under which name a request asks for the model: a served name, or an adapter's.

Where a request is settled (`incoming`) vLLM says which adapter it goes through, but no longer which of several served
names the client wrote. The check of the body (`http`), and that of a batch's lines, note the name in the task that
handles the request; vLLM settles it in that task, or in one made from it, which starts with what was noted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Collection
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_asked: ContextVar[str | None] = ContextVar("flow_asked_model", default=None)


def note(name: Any) -> None:
    """Note what stands as "model" in a body, for the rest of this task."""
    _asked.set(name if isinstance(name, str) and name else None)


async def noting(name: Any, handled: Awaitable[T]) -> T:
    """Await the handling of a request with its name noted; in a task of its own, as a batch has one per line."""
    note(name)
    return await handled


def names(request: Any, served_name: str) -> list[str]:
    """The names by which a request may have a policy, what the client wrote first.

    Args:
        request: vLLM's ``EngineCoreRequest``.
        served_name: the first served name, which a request means that names nothing.
    """
    adapter = getattr(getattr(request, "lora_request", None), "lora_name", None)
    return [name for name in (_asked.get(), adapter) if name] or [served_name]


def check_served(wanted: Collection[str], served: Collection[str], may_come: bool) -> str | None:
    """What to say of names that a server does not serve; None where it serves all of them.

    Args:
        wanted: names in ``model_policies``.
        served: names under which it serves the model, and its adapters.
        may_come: whether adapters can be loaded while it runs, under any name.

    Raises:
        ValueError: a name is not served, nor will ever be.
    """
    strange = [name for name in wanted if name not in served]
    if not strange:
        return None
    told = (
        f"'model_policies' names {', '.join(map(repr, strange))}, which this server does not serve; it serves "
        f"{', '.join(map(repr, served))}"
    )
    if may_come:
        return f"{told}, and adapters that are loaded while it runs."
    raise ValueError(
        f"additional_config['vllm_flow']: {told}. Name one of these, or start it with --served-model-name or "
        "--lora-modules."
    )
