"""Refuses options of `vllm-flow eval`, `cliff` and `report` that would have no effect as the command was called. (pure)

What an option does may depend on the run that is there already: a policy that joins others is compared with them, and a
sample that grows must keep its seed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_flow.eval.sweep.policy import BASELINE
from vllm_flow.exits import Refused
from vllm_flow.unread_options import GIVEN, refuse_unread

TWICE = {"max_model_len": "max_model_len", "kv_cache_gib": "kv_cache_memory_bytes"}
"""Options of ours, and the names by which --engine-args may say the same."""


def check_said_once(args: Namespace) -> None:
    """Refuse what --engine-args says as well as an option: one of the two would count.

    Raises:
        Refused: names both.
    """
    for name, theirs in TWICE.items():
        if name in getattr(args, GIVEN, ()) and theirs in args.engine_args:
            option = f"--{name.replace('_', '-')}"
            raise Refused(
                f"{option} has no effect beside {theirs!r} in --engine-args; leave one of the two out"
            )


def check_read(
    args: Namespace, policies: Iterable[str], before: Mapping[str, Any] | None = None
) -> None:
    """Refuse options of `vllm-flow eval` that this run would not read.

    Args:
        policies: the names of those asked.
        before: `run.json` of the run that the command goes on with.

    Raises:
        Refused: names the first of them, and the remedy.
    """
    policies = [*policies]
    if not compared(names_together(policies, before)):
        refuse_unread(
            args,
            ("tolerance",),
            "without a baseline and another policy, which are compared: ask both (--policies baseline,...), or "
            "compare two runs by `vllm-flow report A B --tolerance`",
        )
    if args.time and BASELINE.name not in policies:
        refuse_unread(
            args,
            ("time",),
            "without the baseline, beside whose time those of the others are set: add it to --policies",
        )
    if args.limit is None and not args.time and before is None:
        refuse_unread(args, ("seed",), "without --limit, whose sample it draws: answers are greedy")


def names_together(policies: Iterable[str], before: Mapping[str, Any] | None) -> set[str]:
    """The policies asked, and those that the run had."""
    return {*policies} | {policy["name"] for policy in (before or {}).get("policies", [])}


def compared(policies: Iterable[str]) -> bool:
    """Whether a report of these policies compares any."""
    names = {*policies}
    return BASELINE.name in names and len(names) > 1
