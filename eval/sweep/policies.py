"""What an evaluation compares: spec text such as `baseline,cliff=0:30:2` becomes policies. (pure)

A policy is what is done to the image tokens of a request. Two spellings of one request become one
policy with one name, so that nothing is asked twice: `cliff=0` is `text-only`, a cliff equal to the
number of layers is `baseline`. Knows nothing of engines, tasks or files.

A new kind of policy is one reader in `_READERS`, and a field of `Policy` if it needs one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.policy_keys import CLIFF_KEY
from vllm_flow.user_text import whole_number

KINDS = ("baseline", "cliff", "text-only", "downsample")

SYNTAX = (
    "baseline | cliff=N | cliff=FIRST:LAST[:STEP] (both ends included) | text-only | "
    "downsample=N | downsample=FIRST:LAST[:STEP], separated by commas"
)


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
    policy has (`downsample`); None for the baseline."""

    def request_keys(self) -> dict[str, int]:
        """The request's extra arguments; empty where vLLM is left to do what it always does."""
        if self.kind in ("cliff", "text-only") and self.cliff is not None:
            return {CLIFF_KEY: self.cliff}
        return {}

    def grid(self, full_grid: int, num_layers: int) -> int | None:
        """Side of the reduced picture in patches, None where the picture is left as it is."""
        if self.kind != "downsample" or self.cliff is None:
            return None
        return grid_of_budget(full_grid, self.cliff, num_layers)

    def as_json(self) -> dict[str, Any]:
        """How the run's `run.json` holds it; :meth:`from_json` reads it back."""
        return {"name": self.name, "kind": self.kind, "cliff": self.cliff}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Policy:
        """The policy of a record in `run.json`; fields of later versions are left alone."""
        return cls(name=record["name"], kind=record["kind"], cliff=record.get("cliff"))


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


def parse_policies(spec: str | Iterable[str], num_layers: int) -> tuple[Policy, ...]:
    """Policies in the order they are named, each once.

    Args:
        spec: texts as in `SYNTAX`; one text, or several as an option that may be repeated gives.
        num_layers: decoder layers of the model.

    Raises:
        PolicySpecError: (a ValueError) names the part that cannot be read and what would do.
    """
    texts = [spec] if isinstance(spec, str) else list(spec)
    parts = [part.strip() for text in texts for part in text.split(",")]
    found: dict[str, Policy] = {}
    for part in parts:
        for policy in _read(part, num_layers):
            found.setdefault(policy.name, policy)
    if not found:
        raise PolicySpecError("", f"name at least one; {SYNTAX}.")
    return tuple(found.values())


def _read(part: str, num_layers: int) -> Sequence[Policy]:
    kind, equals, value = (piece.strip() for piece in part.partition("="))
    reader = _READERS.get(kind)
    if reader is None:
        close = difflib.get_close_matches(kind, _READERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {SYNTAX}."
        raise PolicySpecError(part, f"there is no such policy; {hint}")
    return reader(part, value if equals else None, num_layers)


def _plain(policy: Policy) -> Callable[[str, str | None, int], Sequence[Policy]]:
    def read(part: str, value: str | None, num_layers: int) -> Sequence[Policy]:
        if value is not None:
            raise PolicySpecError(part, f"{policy.name} takes no value; write {policy.name!r}.")
        return (policy,)

    return read


def _cliffs(part: str, value: str | None, num_layers: int) -> Sequence[Policy]:
    policies = []
    for cliff in _layers(part, value, 0, num_layers):
        if cliff == num_layers:
            policies.append(BASELINE)
        elif cliff == 0:
            policies.append(TEXT_ONLY)
        else:
            policies.append(Policy(f"cliff={cliff}", "cliff", cliff))
    return policies


def _downsamplings(part: str, value: str | None, num_layers: int) -> Sequence[Policy]:
    # At the number of layers the picture is whole: a control for the way it takes into the engine.
    return [
        Policy(f"downsample={cliff}", "downsample", cliff)
        for cliff in _layers(part, value, 1, num_layers)
    ]


_READERS: dict[str, Callable[[str, str | None, int], Sequence[Policy]]] = {
    "baseline": _plain(BASELINE),
    "text-only": _plain(TEXT_ONLY),
    "cliff": _cliffs,
    "downsample": _downsamplings,
}


def _layers(part: str, value: str | None, lowest: int, num_layers: int) -> Sequence[int]:
    """One number, or a range with both ends; each from `lowest` to `num_layers`."""
    pieces = [] if value is None else value.split(":")
    if any(len(piece) > 9 and piece.isdigit() for piece in pieces):
        raise PolicySpecError(part[:40], f"the model has {num_layers} decoder layers.")
    numbers = [number for piece in pieces if (number := whole_number(piece)) is not None]
    if not 1 <= len(pieces) <= 3 or len(numbers) < len(pieces):
        name = part.partition("=")[0].strip()
        raise PolicySpecError(
            part, f"write {name}=16, or a range such as {name}={lowest}:{num_layers}:2."
        )
    first, last = numbers[0], numbers[min(1, len(numbers) - 1)]
    step = numbers[2] if len(numbers) == 3 else 1
    if step == 0:
        raise PolicySpecError(part, "the step of a range must be at least 1.")
    if first > last:
        raise PolicySpecError(part, f"the range is empty; write {last}:{first}.")
    if first < lowest or last > num_layers:
        raise PolicySpecError(
            part,
            f"the model has {num_layers} decoder layers; write numbers from {lowest} to "
            f"{num_layers}.",
        )
    return range(first, last + 1, step)
