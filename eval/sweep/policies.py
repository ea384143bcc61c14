"""What an evaluation compares: spec text such as `baseline,cliff=0:30:2,fastv` becomes policies. (pure)

Policies are separated by commas:

    baseline | text-only | cliff=N | downsample=N     N may be a range, FIRST:LAST[:STEP], both ends included
    downsample=KxK                                    a picture of K x K patches
    LAYER:KEEP RANK[;LAYER:KEEP RANK ...]             stages, as in flow_stages, with `;` between them
    fastv | horizon-192 | ...                         a preset
    budget=N | budget=SHARE [METHOD ...]              methods at equal cost, see `budgets`
    ... seed=N | seed=FIRST:LAST                      of what draws; a range is a policy per seed
    ... when=decode                                   the image leaves before the second token

Two spellings of one request become one policy, see `policy`. A new kind is one reader in `_READERS`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.eval.sweep import budgets
from vllm_flow.eval.sweep.budgets import DOWNSAMPLE, METHODS, BudgetError
from vllm_flow.eval.sweep.policy import (
    BASELINE,
    TEXT_ONLY,
    Policy,
    PolicySpecError,
    grid_of_budget,
    policy_of,
)
from vllm_flow.policy import WHOLE, FlowPolicy
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import (
    CLIFF_KEY,
    PRESET_KEY,
    SEED_KEY,
    STAGES_KEY,
    WHEN_KEY,
    parse_policy,
)
from vllm_flow.policy_values import MAX_SEED, read_keep
from vllm_flow.presets import PRESETS
from vllm_flow.user_text import whole_number

SYNTAX = (
    "baseline | cliff=N | cliff=FIRST:LAST[:STEP] (both ends included) | text-only | "
    'downsample=N | downsample=FIRST:LAST[:STEP] | downsample=KxK | stages such as "0:50% uniform" or '
    f'"0:284 diversity;20:0" | a preset: {", ".join(PRESETS)} | budget=TOKENS or budget=SHARE, with or '
    f"without some of {', '.join((*METHODS, DOWNSAMPLE))} or an installed package's rank; after these "
    "seed=N, seed=FIRST:LAST or when=decode; separated by commas"
)
MOST_SEEDS = 100
_OPTION = re.compile(r"(seed|when)=(\S*)\Z")
_STAGES = re.compile(r"\d+\s*:")
_SQUARE = re.compile(r"([0-9]{1,4})x([0-9]{1,4})\Z")

__all__ = ["BASELINE", "SYNTAX", "TEXT_ONLY", "Policy", "PolicySpecError", "grid_of_budget"]

Options = Mapping[str, str]
Reader = Callable[[str, "str | None", Options, int, "int | None"], Sequence[Policy]]
"""(part, what follows the `=`, options, layers, side of the full grid) -> policies."""


def parse_policies(
    spec: str | Iterable[str], num_layers: int, full_grid: int | None = None
) -> tuple[Policy, ...]:
    """Policies in the order they are named, each once.

    Args:
        spec: texts as in `SYNTAX`; one text, or several as an option that may be repeated gives.
        num_layers: decoder layers of the model.
        full_grid: side of the square of image tokens, for budgets; None where a picture is no square
            or cannot be reduced.

    Raises:
        PolicySpecError: (a ValueError) names the part that cannot be read and what would do.
    """
    texts = [spec] if isinstance(spec, str) else list(spec)
    parts = [part.strip() for text in texts for part in text.split(",")]
    found: dict[str, Policy] = {}
    grids: set[int | None] = set()
    for part in parts:
        for policy in read(part, num_layers, full_grid):
            grid = policy.grid(full_grid, num_layers) if full_grid else None
            if policy.name not in found and (grid is None or grid not in grids):
                found[policy.name] = policy
                grids.add(grid)
    if not found:
        raise PolicySpecError("", f"name at least one; {SYNTAX}.")
    return tuple(found.values())


def read(part: str, num_layers: int, full_grid: int | None = None) -> Sequence[Policy]:
    """The policies of one part of a spec text.

    Raises:
        PolicySpecError: it cannot be read, or does not fit the model.
    """
    head, options = _split(part)
    if _STAGES.match(head):
        return _flows(part, {STAGES_KEY: head.replace(";", ",")}, options, num_layers)
    if head in PRESETS:
        return _flows(part, {PRESET_KEY: head}, options, num_layers)
    kind, equals, value = (piece.strip() for piece in head.partition("="))
    reader = _READERS.get(kind)
    if reader is None:
        close = difflib.get_close_matches(kind, [*_READERS, *PRESETS], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {SYNTAX}."
        raise PolicySpecError(part, f"there is no such policy; {hint}")
    return reader(part, value if equals else None, options, num_layers, full_grid)


def _split(part: str) -> tuple[str, Options]:
    """A part without the options that follow it, and these."""
    words, options = part.split(), {}
    while len(words) > 1 and (match := _OPTION.match(words[-1])):
        if match[1] in options:
            raise PolicySpecError(part, f"{match[1]} is there twice.")
        options[match[1]] = match[2]
        words.pop()
    return " ".join(words), options


def _no_options(part: str, options: Options) -> None:
    if options:
        name = next(iter(options))
        raise PolicySpecError(part, f"{name} has no meaning here; leave it out.")


def _plain(
    part: str, value: str | None, options: Options, num_layers: int, full_grid: int | None
) -> Sequence[Policy]:
    name = part.split()[0].partition("=")[0]
    if value is not None:
        raise PolicySpecError(part, f"{name} takes no value; write {name!r}.")
    if name == TEXT_ONLY.name:
        return _flows(part, {CLIFF_KEY: 0}, options, num_layers)
    _no_options(part, options)
    return (BASELINE,)


def _cliffs(
    part: str, value: str | None, options: Options, num_layers: int, full_grid: int | None
) -> Sequence[Policy]:
    return [
        policy
        for cliff in _layers(part, "cliff", value, 0, num_layers)
        for policy in _flows(part, {CLIFF_KEY: cliff}, options, num_layers)
    ]


def _downsamplings(
    part: str, value: str | None, options: Options, num_layers: int, full_grid: int | None
) -> Sequence[Policy]:
    _no_options(part, options)
    square = _SQUARE.match(value or "")
    if square:
        side = int(square[1])
        most = f" to {full_grid}x{full_grid}" if full_grid else ""
        if side < 1 or square[1] != square[2] or side > (full_grid or side):
            raise PolicySpecError(part, f"write a square of patches, from 1x1{most}.")
        return (_square(side),)
    # At the number of layers the picture is whole: a control for the way it takes into the engine.
    return [
        Policy(f"downsample={cliff}", "downsample", cliff)
        for cliff in _layers(part, "downsample", value, 1, num_layers)
    ]


def _square(side: int) -> Policy:
    return Policy(f"downsample={side}x{side}", "downsample", side=side)


def _budgets(
    part: str, value: str | None, options: Options, num_layers: int, full_grid: int | None
) -> Sequence[Policy]:
    amount, *named = (value or "").split() or [""]
    total = None if full_grid is None else full_grid * full_grid
    share, count = _budget(part, amount, total)
    strange = [name for name in named if name not in budgets.methods()]
    if strange:
        raise PolicySpecError(
            part, f"{strange[0]!r} is no method; choose from {', '.join(budgets.methods())}."
        )
    seeds = _seeds(part, options) if "seed" in options else budgets.SEEDS
    chosen = dict.fromkeys(named) or [m for m in budgets.DEFAULT if m != DOWNSAMPLE or full_grid]
    if "seed" in options and not any(map(budgets.draws, chosen)):
        raise PolicySpecError(part, "nothing is drawn; leave the seed out, or add random.")
    found: list[Policy] = []
    for method in chosen:
        if method == DOWNSAMPLE:
            if full_grid is None:
                raise PolicySpecError(
                    part, "this model's pictures cannot be reduced; leave it out."
                )
            found += [_square(side) for side in budgets.sides_at(share, full_grid)]
            continue
        try:
            stages = budgets.stages_at(method, share, num_layers, total if count else None)
        except BudgetError as error:
            raise PolicySpecError(part, f"{error}; ask for more, or leave {method} out.") from None
        for seed in seeds if budgets.draws(method) else (0,):
            found.append(policy_of(FlowPolicy((stages,), seed), num_layers))
    return found


def _budget(part: str, amount: str, total: int | None) -> tuple[Fraction, bool]:
    """The budget as a share of an image, and whether it was a number of tokens."""
    try:
        keep = read_keep("budget", amount)
    except PolicyError as error:
        raise PolicySpecError(part, str(error)) from None
    if keep in (0, WHOLE):
        raise PolicySpecError(
            part, "that is text-only, or the baseline; write a budget between them."
        )
    if isinstance(keep, Fraction):
        return keep, False
    if total is None:
        raise PolicySpecError(
            part,
            "the tokens of this model's pictures are not one number; write a share such as 33%.",
        )
    if keep >= total:
        raise PolicySpecError(part, f"a picture has {counted(total, 'token')}; write fewer.")
    return Fraction(keep, total), True


def _flows(
    part: str, keys: Mapping[str, Any], options: Options, num_layers: int
) -> Sequence[Policy]:
    """What a request's keys say, once per seed."""
    when = {WHEN_KEY: options["when"]} if "when" in options else {}
    seeds = _seeds(part, options) if "seed" in options else [None]
    try:
        return [
            policy_of(
                parse_policy(
                    {**keys, **when, **({} if seed is None else {SEED_KEY: seed})}, num_layers
                ),
                num_layers,
            )
            for seed in seeds
        ]
    except PolicyError as error:
        raise PolicySpecError(part, str(error)) from None


def _seeds(part: str, options: Options) -> Sequence[int]:
    numbers = [whole_number(piece) for piece in options["seed"].split(":")]
    known = [number for number in numbers if number is not None and number <= MAX_SEED]
    if not 1 <= len(numbers) <= 2 or len(known) < len(numbers) or known[0] > known[-1]:
        raise PolicySpecError(part, "write seed=3, or a range such as seed=0:4.")
    if known[-1] - known[0] >= MOST_SEEDS:
        raise PolicySpecError(part, f"at most {MOST_SEEDS} seeds at a time.")
    return range(known[0], known[-1] + 1)


_READERS: Mapping[str, Reader] = {
    BASELINE.name: _plain,
    TEXT_ONLY.name: _plain,
    "cliff": _cliffs,
    DOWNSAMPLE: _downsamplings,
    "budget": _budgets,
}


def _layers(part: str, name: str, value: str | None, lowest: int, num_layers: int) -> Sequence[int]:
    """One number, or a range with both ends; each from `lowest` to `num_layers`."""
    pieces = [] if value is None else value.split(":")
    if any(len(piece) > 9 and piece.isdigit() for piece in pieces):
        raise PolicySpecError(part[:40], f"the model has {counted(num_layers, 'decoder layer')}.")
    numbers = [number for piece in pieces if (number := whole_number(piece)) is not None]
    if not 1 <= len(pieces) <= 3 or len(numbers) < len(pieces):
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
            f"the model has {counted(num_layers, 'decoder layer')}; write numbers from {lowest} to "
            f"{num_layers}.",
        )
    return range(first, last + 1, step)
