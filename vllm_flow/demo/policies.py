"""What `--policies` asks beside the cliffs: its text becomes cliffs and named policies. (pure)

The grammar is the evaluation's. Knows no engine; what a policy costs and saved is `rows`'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vllm_flow.eval.sweep.budgets import DOWNSAMPLE
from vllm_flow.eval.sweep.policies import PolicySpecError, parse_policies
from vllm_flow.eval.sweep.policy import presets_of
from vllm_flow.policy import FlowPolicy


@dataclass(frozen=True)
class Asked:
    """What a text of policies adds to a run."""

    cliffs: tuple[int, ...] = ()
    """Plain cliffs among them, which are cliffs like all others; the baseline is asked anyway."""
    policies: dict[str, FlowPolicy] = field(default_factory=dict)
    """Name -> policy, as they were named: a preset's name, or the text that gives it again."""


def read_policies(text: str | None, num_layers: int, full_grid: int | None = None) -> Asked:
    """The cliffs and policies of a text such as ``fastv,budget=1/3 uniform diversity``.

    A budget that names no method means all of the evaluation's but reduced pictures.

    Args:
        full_grid: side of the square of image tokens, where a picture is one: budgets may then be
            numbers of tokens.

    Raises:
        PolicySpecError: (a ValueError) says what cannot be read, does not fit the model, or is no
            policy of image tokens.
    """
    if text is None:
        return Asked()
    for part in text.split(","):
        if DOWNSAMPLE in re.split(r"[\s=]+", part):
            raise PolicySpecError(
                part.strip(), f"the demo asks pictures as they are; leave {DOWNSAMPLE} out."
            )
    cliffs: list[int] = []
    policies: dict[str, FlowPolicy] = {}
    for policy in parse_policies(text, num_layers, full_grid):
        flow = policy.flow()
        if flow is None:
            continue
        if policy.cliff is not None:
            cliffs.append(policy.cliff)
        else:
            presets = presets_of(flow, num_layers)
            policies[presets[0] if presets else policy.name] = flow
    return Asked(tuple(cliffs), policies)
