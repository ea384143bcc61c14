"""A policy as an evaluation compares it: its name, what a request carries, how a run keeps it. (pure)

A policy is what is done to the image tokens of a request. One request has one policy with one name, so
that nothing is asked twice: `cliff=0` is `text-only`, a cliff equal to the number of layers is `baseline`,
a preset is its stages. Knows nothing of engines, tasks or files; texts are read by `policies`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_flow.policy import WHOLE, FlowPolicy, Stage
from vllm_flow.policy_keys import CLIFF_KEY, parse_policy, request_keys
from vllm_flow.presets import PRESETS
from vllm_flow.ranks import RANKS

KINDS = ("baseline", "cliff", "text-only", "downsample", "stages")
MOST_LAYERS = 10_000
"""More than any model has: what a record holds was checked when it was written."""


class PolicySpecError(ValueError):
    """A policy's text cannot be read or does not fit the model; says which part and what would."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(f"policy {part!r}: {reason}")


@dataclass(frozen=True)
class Policy:
    """What is done to the image tokens of a request."""

    name: str
    """Unique in a run, and the spec text that gives this policy again."""
    kind: str
    """One of `KINDS`."""
    cliff: int | None = None
    """Layers that see the whole image (`cliff`, `text-only`), or the cliff whose prefill budget the
    policy has (`downsample`); None for the others."""
    stages: FlowPolicy | None = None
    """Of `stages`: anything of the grammar that is no plain cliff."""
    side: int | None = None
    """Of `downsample`, where the square's side is given itself."""

    def request_keys(self) -> dict[str, Any]:
        """The request's extra arguments; empty where vLLM is left to do what it always does."""
        if self.stages is not None:
            return request_keys(self.stages)
        if self.kind in ("cliff", "text-only") and self.cliff is not None:
            return {CLIFF_KEY: self.cliff}
        return {}

    def flow(self) -> FlowPolicy | None:
        """What is evicted; None where nothing is."""
        if self.stages is not None:
            return self.stages
        if self.kind in ("cliff", "text-only") and self.cliff is not None:
            return FlowPolicy.withdrawal(self.cliff)
        return None

    def grid(self, full_grid: int, num_layers: int) -> int | None:
        """Side of the reduced picture in patches, None where the picture is left as it is."""
        if self.kind != "downsample":
            return None
        if self.side is not None:
            return self.side
        return None if self.cliff is None else grid_of_budget(full_grid, self.cliff, num_layers)

    def as_json(self) -> dict[str, Any]:
        """How the run's `run.json` holds it; :meth:`from_json` reads it back."""
        record: dict[str, Any] = {"name": self.name, "kind": self.kind, "cliff": self.cliff}
        if self.stages is not None:
            record["keys"] = request_keys(self.stages)
        if self.side is not None:
            record["side"] = self.side
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Policy:
        """The policy of a record in `run.json`; fields of later versions are left alone."""
        keys = record.get("keys")
        return cls(
            name=record["name"],
            kind=record["kind"],
            cliff=record.get("cliff"),
            stages=parse_policy(keys, MOST_LAYERS) if keys else None,
            side=record.get("side"),
        )


BASELINE = Policy("baseline", "baseline")
TEXT_ONLY = Policy("text-only", "text-only", 0)


def grid_of_budget(full_grid: int, cliff: int, num_layers: int) -> int:
    """Side k of the square of image tokens that costs as many prefill rows as a cliff.

    ``full_grid ** 2`` tokens through `cliff` layers are as many rows as ``full_grid ** 2 * cliff /
    num_layers`` tokens through all of them; k is the root of that, rounded, at least 1.
    """
    if not 1 <= cliff <= num_layers or full_grid < 1:
        raise ValueError(
            f"no budget: full_grid={full_grid}, cliff={cliff}, num_layers={num_layers}"
        )
    return max(1, round(math.sqrt(full_grid * full_grid * cliff / num_layers)))


def policy_of(flow: FlowPolicy | None, num_layers: int) -> Policy:
    """The one policy that stands for what is evicted of every image; None is the baseline."""
    if flow is None:
        return BASELINE
    stages = tuple(stage for stage in simplest(flow.images[0]) if stage.layer < num_layers)
    if not stages:
        return BASELINE
    draws = any(stage.rank is not None and RANKS[stage.rank].draws for stage in stages)
    flow = replace(flow, images=(stages,), seed=flow.seed if draws else 0)
    if flow != FlowPolicy.withdrawal(stages[0].layer):
        return Policy(text_of(flow), "stages", stages=flow)
    cliff = stages[0].layer
    return Policy(f"cliff={cliff}", "cliff", cliff) if cliff else TEXT_ONLY


def simplest(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages without those that let every token that is left stay."""
    kept: list[Stage] = []
    for stage in stages:
        same = kept and type(kept[-1].keep) is type(stage.keep) and kept[-1].keep == stage.keep
        if stage.keep != WHOLE and not same:
            kept.append(stage)
    return tuple(kept)


def text_of(flow: FlowPolicy) -> str:
    """The spec text of what is evicted of every image: `0:71/144 diversity;20:0`."""
    (stages,) = flow.images
    text = ";".join(map(str, stages))
    if stages[0].keep == 0:
        text = f"cliff={stages[0].layer}" if stages[0].layer else TEXT_ONLY.name
    seed = f" seed={flow.seed}" if flow.seed else ""
    return f"{text}{seed}{'' if flow.when == 'prefill' else ' when=' + flow.when}"


def presets_of(flow: FlowPolicy, num_layers: int) -> tuple[str, ...]:
    """Names of the presets that are this policy in a model of so many layers."""
    if not flow.shared or flow.seed or flow.when != "prefill":
        return ()
    (stages,) = flow.images
    return tuple(name for name, one in PRESETS.items() if one.stages(num_layers) == stages)
