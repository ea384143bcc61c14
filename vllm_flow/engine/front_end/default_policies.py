"""The operator's policies: whose a request has, those that none could have, and the requests that they stay away from.

A client that asks for what does not fit is told; of a default policy, a task's or a name's, it knows nothing. So
the operator is told: at start-up where the configuration shows it, as soon as the workers have said what they
cannot do, and by a warning and a counter (``metrics``) where one request is at fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.logger import init_logger

from vllm_flow.engine.front_end import asked_model
from vllm_flow.engine.front_end.fitting_engine import CONFIGURED, TOLD, unfit
from vllm_flow.engine.obstacles import Misfit
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import FlowPolicy

logger = init_logger("vllm.vllm_flow.default_policies")

_told: set[tuple[str, Misfit]] = set()
"""Of which policies the log has said why they stay away, as `str` writes them."""


def check_policies(settings: FlowSettings) -> None:
    """Refuse an operator's policy that no request of this engine could have.

    Raises:
        ValueError: names the policy, the reason and the remedy.
    """
    for named, policy in _policies(settings):
        found = next(unfit(policy, settings.engine, CONFIGURED), None)
        if found is not None:
            raise ValueError(f"{named}: {found.sentence}")


def warn_of_obstacles(settings: FlowSettings) -> None:
    """Say which of the operator's policies the workers cannot apply, once they have said what they cannot do."""
    for named, policy in _policies(settings):
        for found in unfit(policy, settings.engine, TOLD):
            logger.warning(
                '%s, "%s", cannot be applied by this engine: %s Requests with images are answered without it.',
                named,
                policy,
                found.sentence,
            )


def of_request(request: Any, task: Any, settings: FlowSettings) -> tuple[FlowPolicy | None, str]:
    """The operator's policy for a request that sends none, and what it is called.

    That of the task which it names; else of the model which it asks for, by the name that it asks for; else the
    default.

    Args:
        request: vLLM's ``EngineCoreRequest``.
    """
    if task is not None and settings.profile is not None:
        return settings.profile.of_task(task), _named(task)
    for name in (
        asked_model.names(request, settings.engine.served_name) if settings.model_policies else ()
    ):
        if name in settings.model_policies:
            return settings.model_policies[name], _of_model(name)
    return settings.default_policy, _named("")


def tell_skipped(policy: FlowPolicy, named: str, kind: Misfit, reason: str) -> None:
    """Say, once for each policy and kind of reason, that a request does not get an operator's policy.

    Args:
        named: what it is called.
    """
    if (str(policy), kind) in _told:
        return
    _told.add((str(policy), kind))
    logger.warning(
        '%s, "%s", is not applied to a request: %s Further ones are only counted, by '
        'vllm_flow:default_policy_skipped_total{reason="%s"}.',
        named,
        policy,
        reason,
        kind.value,
    )


def _policies(settings: FlowSettings) -> Iterator[tuple[str, FlowPolicy]]:
    """What each of the operator's policies is called, and the policy."""
    if settings.default_policy is not None:
        yield _named(""), settings.default_policy
    for model, policy in settings.model_policies.items():
        if policy is not None and policy != settings.default_policy:
            yield _of_model(model), policy
    for task, policy in ({} if settings.profile is None else settings.profile.policies).items():
        if policy is not None and policy != settings.default_policy:
            yield _named(task), policy


def _named(task: str) -> str:
    return f"default_policy of the task {task!r}" if task else "default_policy"


def _of_model(name: str) -> str:
    return f"model_policies[{name!r}]"
