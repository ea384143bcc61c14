"""What the finder climbs: policies from the one that keeps least to the baseline, one rung at a time. (pure)

The search knows rungs by number and takes the lowest that loses no more than tolerated. Rungs are cliffs, as
in the paper; or cliffs behind stages that are given; or shares kept up to a cliff that is given.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vllm_flow.eval.cliff.evidence import CliffError
from vllm_flow.eval.sweep.budgets import attention_from
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.sweep.policy import BASELINE, Policy, policy_of
from vllm_flow.policy import FlowPolicy, Stage, keep_text, stages_text
from vllm_flow.policy_keys import CLIFF_KEY
from vllm_flow.ranks import RANKS

STEPS = 16
"""Shares between nothing and everything that a search over the keep may find."""
LAYERS = "layers that see the image"


@dataclass(frozen=True)
class Ladder:
    """Policies by what they keep, least first; the last is the baseline."""

    policies: tuple[Policy, ...]
    labels: tuple[str, ...]
    """What a table calls each rung."""
    what: str = LAYERS
    """What goes up from rung to rung."""
    given: str = ""
    """What all rungs but the baseline have in common; empty for plain cliffs."""

    @property
    def top(self) -> int:
        """The baseline's rung."""
        return len(self.policies) - 1

    def keys(self, rung: int, num_layers: int) -> dict[str, Any]:
        """What a profile says of a rung: a request's keys, of the baseline a cliff that evicts nothing."""
        return self.policies[rung].request_keys() or {CLIFF_KEY: num_layers}

    def about(self) -> dict[str, Any]:
        """What the evidence says of it; nothing for plain cliffs, whose rungs are layers."""
        if not self.given:
            return {}
        return {"ladder": {"what": self.what, "given": self.given, "labels": list(self.labels)}}


def ladder_of(args: Namespace, num_layers: int) -> Ladder:
    """The ladder that the command's options name.

    Raises:
        CliffError, PolicySpecError: options that do not go together or cannot be read.
    """
    if args.stages is not None:
        if args.cliff is not None or args.rank is not None:
            raise CliffError(
                "--stages searches over the cliff behind them, --cliff and --rank over the share kept before "
                "it; give one or the other."
            )
        return cliffs_after(args.stages, num_layers)
    if (args.cliff is None) != (args.rank is None):
        missing = "--rank" if args.rank is None else "--cliff"
        raise CliffError(
            f"{missing} is missing: to search over the share of tokens kept, give the cliff and the rank that "
            "chooses before it."
        )
    if args.cliff is not None:
        return keeps_before(args.cliff, args.rank, num_layers)
    policies = [policy_of(FlowPolicy.withdrawal(n), num_layers) for n in range(num_layers)]
    return Ladder((*policies, BASELINE), tuple(map(str, range(num_layers + 1))))


def cliffs_after(text: str, num_layers: int) -> Ladder:
    """Cliffs behind stages that stay as they are: at rung n everything is gone from layer n on."""
    found = parse_policies(text, num_layers)
    flow = found[0].flow()
    if len(found) > 1 or flow is None or found[0].stages is None:
        raise CliffError(
            f"--stages {text!r} must be one policy that keeps a part of the image, such as "
            '"0:50% uniform" or fastv.'
        )
    (stages,) = flow.images
    if stages[-1].keep == 0:
        kept = stages_text(stages[:-1])
        raise CliffError(
            f"--stages {text!r} withdraws at layer {stages[-1].layer}, which is what is searched for; write "
            f'--stages "{kept.replace(",", ";")}".'
        )
    rungs = []
    for layer in range(num_layers):
        before = tuple(stage for stage in stages if stage.layer < layer)
        rungs.append(
            policy_of(FlowPolicy(((*before, Stage(layer)),), flow.seed, flow.when), num_layers)
        )
    labels = (*map(str, range(num_layers + 1)), "whole")
    return Ladder((*rungs, found[0], BASELINE), labels, LAYERS, f"{stages_text(stages)}")


def keeps_before(cliff: int, rank: str, num_layers: int) -> Ladder:
    """Shares kept up to a cliff: at rung i, i / STEPS of the tokens."""
    first = attention_from(num_layers) if RANKS[rank].reads_layer else 0
    if not first < cliff <= num_layers:
        raise CliffError(
            f"--cliff {cliff}: it must be in {first + 1} ... {num_layers}, the layers where {rank!r} can have "
            "chosen before."
        )
    shares = [Fraction(step, STEPS) for step in range(1, STEPS)]
    rungs = [policy_of(FlowPolicy.withdrawal(first), num_layers)]
    rungs += [
        policy_of(FlowPolicy(((Stage(first, share, rank), Stage(cliff)),)), num_layers)
        for share in shares
    ]
    if cliff < num_layers:
        rungs.append(policy_of(FlowPolicy.withdrawal(cliff), num_layers))
    labels = ("0%", *map(keep_text, shares), *(["100%"] if cliff < num_layers else []), "whole")
    start = f" from layer {first}" if first else ""
    return Ladder(
        (*rungs, BASELINE), labels, "image tokens kept", f"{rank}{start}, none from layer {cliff}"
    )


def label_of(evidence: Mapping[str, Any], rung: int) -> str:
    """What the evidence calls a rung."""
    labels = evidence.get("ladder", {}).get("labels")
    return labels[rung] if labels else str(rung)


def answer_of(entry: Mapping[str, Any]) -> int:
    """The rung that was found."""
    return int(entry["evidence"].get("rung", entry.get(CLIFF_KEY, 0)))


def top_of(entry: Mapping[str, Any], num_layers: int) -> int:
    """The baseline's rung."""
    ladder = entry["evidence"].get("ladder")
    return len(ladder["labels"]) - 1 if ladder else num_layers
