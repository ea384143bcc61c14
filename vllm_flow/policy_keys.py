"""A request's flat keys: how a policy is written, and which of them go together.

Knows nothing of vLLM, torch or prompts: keys are read from the plain mapping that arrives as
``SamplingParams.extra_args`` (offline) or ``vllm_xargs`` (OpenAI-compatible server). What is wrong only
in view of the prompt is left to the front end. The grammar, with examples: docs/policies.md.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from vllm_flow.counts import counted
from vllm_flow.log_keys import LOG_KEYS
from vllm_flow.policy import FlowPolicy, Stage, When, keep_text, stages_text
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_values import (
    read_choice,
    read_keep,
    read_layer,
    read_rank,
    read_seed,
    read_stages,
)
from vllm_flow.presets import PRESETS
from vllm_flow.ranks import RANKS
from vllm_flow.registry import PluginError

KEY_PREFIX = "flow_"
CLIFF_KEY = "flow_cliff"
KEEP_KEY = "flow_keep"
RANK_KEY = "flow_rank"
STAGES_KEY = "flow_stages"
PRESET_KEY = "flow_preset"
SEED_KEY = "flow_seed"
WHEN_KEY = "flow_when"
TASK_KEY = "flow_task"
FORMS = (STAGES_KEY, CLIFF_KEY, PRESET_KEY)
"""Each begins a way to write a policy; a request uses one of them."""
POLICY_KEYS = (CLIFF_KEY, KEEP_KEY, RANK_KEY, STAGES_KEY, PRESET_KEY, SEED_KEY, WHEN_KEY)
"""Keys that decide what is evicted."""
REQUEST_KEYS = (*POLICY_KEYS, TASK_KEY, *LOG_KEYS)
"""Every request key this version understands; any other ``flow_*`` key is an error."""
BASELINE = "baseline"
MOST_IMAGES = 4096
"""Entries of a list with one value per image."""


def is_own(key: Any) -> bool:
    """Whether a key is this extension's, or was meant to be: with the prefix in letters of any kind, or a known
    key but for capitals, hyphens, spaces and what nobody sees."""
    if not isinstance(key, str):
        return False
    return _unstyled(key).startswith(KEY_PREFIX) or _letters(key) in _BY_LETTERS


def unknown(key: str, known: Collection[str] = REQUEST_KEYS) -> str:
    """What to say of a key that is ours and none of ``known``: the one that was meant, or all of them."""
    letters = _letters(key)
    meant = _BY_LETTERS.get(letters) or _WITHOUT_PREFIX.get(letters)
    meant = meant or _BY_LETTERS.get(letters.removeprefix("vllm"))
    close = [meant] if meant else difflib.get_close_matches(_unstyled(key), known, n=1)
    close = [name for name in close if name in known]
    return f"did you mean {close[0]!r}?" if close else f"known keys: {quoted(known)}."


def _unstyled(key: str) -> str:
    return unicodedata.normalize("NFKC", key[:80]).casefold().strip()


def _letters(key: str) -> str:
    return "".join(letter for letter in _unstyled(key) if letter.isalnum())


def _is_misnamed(key: Any) -> bool:
    """Whether a key among a request's own was meant for us though it lacks the prefix, or has more than it.

    ``cliff`` is nobody else's; ``keep``, ``rank`` and their like may be.
    """
    letters = _letters(key) if isinstance(key, str) else ""
    return letters == "cliff" or letters.startswith("vllmflow")


_BY_LETTERS = {_letters(key): key for key in REQUEST_KEYS}
_WITHOUT_PREFIX = {letters.removeprefix("flow"): key for letters, key in _BY_LETTERS.items()}


def parse_policy(keys: Mapping[str, Any] | None, num_layers: int) -> FlowPolicy | None:
    """Read a policy from a request's extra arguments.

    Args:
        keys: the request's extra arguments; keys without the ``flow_`` prefix belong to others
            and are left alone, but for those that are ours in another spelling (:func:`is_own`).
        num_layers: number of decoder layers of the model.

    Returns:
        The policy, or None for the baseline: no key of a policy, or one that evicts nothing from
        any image.

    Raises:
        PolicyError: (a ValueError) an unknown ``flow_*`` key, a value out of its range, or keys that
            do not go together.
    """
    if not keys:
        return None
    for key, value in keys.items():
        if key not in REQUEST_KEYS and (is_own(key) or _is_misnamed(key)):
            raise PolicyError(key, value, f"vLLM-Flow does not know this key; {unknown(key)}")
    _check_together(keys)
    if STAGES_KEY in keys:
        images: tuple[tuple[Stage, ...], ...] = (
            read_stages(STAGES_KEY, keys[STAGES_KEY], num_layers),
        )
    elif PRESET_KEY in keys:
        preset = PRESETS[read_choice(PRESET_KEY, keys[PRESET_KEY], PRESETS)]
        images = (preset.stages(num_layers),)
    elif CLIFF_KEY in keys:
        images = _per_image(keys, num_layers)
    else:
        return None
    when = cast(When, read_choice(WHEN_KEY, keys.get(WHEN_KEY, "prefill"), ("prefill", "decode")))
    policy = FlowPolicy(images, read_seed(SEED_KEY, keys.get(SEED_KEY, 0)), when)
    _check_ranks(policy, keys)
    _check_late(policy)
    if SEED_KEY in keys and not any(RANKS[rank].draws for rank in policy.ranks):
        drawing = quoted([name for name, rank in RANKS.usable().items() if rank.draws])
        raise PolicyError(
            SEED_KEY, keys[SEED_KEY], f"nothing is drawn; leave it out, or rank by {drawing}."
        )
    return policy if any(images) else None


def request_keys(policy: FlowPolicy) -> dict[str, Any]:
    """The flat keys a client sends for a policy; :func:`parse_policy` reads them back."""
    keys: dict[str, Any]
    if not policy.shared:
        keys = {CLIFF_KEY: [stages[0].layer for stages in policy.images]}
        if not policy.only_withdraws:
            keys[KEEP_KEY] = [_keep_value(stages[0]) for stages in policy.images]
    else:
        (stages,) = policy.images
        if len(stages) == 1:
            keys = {CLIFF_KEY: stages[0].layer}
            if not policy.only_withdraws:
                keys[KEEP_KEY] = _keep_value(stages[0])
        else:
            keys = {STAGES_KEY: stages_text(stages)}
    if KEEP_KEY in keys:
        (keys[RANK_KEY],) = policy.ranks
    if policy.seed:
        keys[SEED_KEY] = policy.seed
    if policy.when != "prefill":
        keys[WHEN_KEY] = policy.when
    return keys


def policy_label(keys: Mapping[str, Any] | None) -> str:
    """What metrics call the policy of a request's settled keys: one of few names.

    Clients choose seeds, shares and stages, and each name is a time series for ever. So a single cliff
    is named, and of other policies the ranks, up to two: of more there are thousands of choices.
    """
    keys = keys or {}
    late = " when=decode" if keys.get(WHEN_KEY) == "decode" else ""
    if isinstance(keys.get(CLIFF_KEY), int) and KEEP_KEY not in keys:
        return f"cliff={keys[CLIFF_KEY]}{late}"
    text = f"{keys.get(RANK_KEY, '')} {keys.get(STAGES_KEY, '')}"
    ranks = [rank for rank in RANKS if re.search(rf"\b{rank}\b", text)]
    if len(ranks) > 2:
        return f"ranks=several{late}"
    if ranks:
        return f"ranks={'+'.join(ranks)}{late}"
    return f"cliffs{late}" if CLIFF_KEY in keys or STAGES_KEY in keys else BASELINE


def _keep_value(stage: Stage) -> int | str:
    return stage.keep if isinstance(stage.keep, int) else keep_text(stage.keep)


def _check_together(keys: Mapping[str, Any]) -> None:
    """Refuse keys that contradict each other, and those that nothing would come of."""
    forms = [key for key in FORMS if key in keys]
    if len(forms) > 1:
        raise PolicyError(
            forms[1], keys[forms[1]], f"{forms[0]} is there as well; send one of them."
        )
    own = {CLIFF_KEY: (KEEP_KEY, RANK_KEY, SEED_KEY, WHEN_KEY), STAGES_KEY: (SEED_KEY, WHEN_KEY)}
    allowed = own.get(forms[0], (WHEN_KEY,)) if forms else ()
    for key in (KEEP_KEY, RANK_KEY, SEED_KEY, WHEN_KEY):
        if key not in keys or key in allowed:
            continue
        if not forms:
            reason = f"nothing says from which layer on; send {CLIFF_KEY} too."
        elif forms[0] == STAGES_KEY:
            reason = f"the stages say it themselves; write it into {STAGES_KEY}, or leave it out."
        else:
            reason = f"{forms[0]} settles it; leave it out, or write {STAGES_KEY}."
        raise PolicyError(key, keys[key], reason)


def _check_ranks(policy: FlowPolicy, keys: Mapping[str, Any]) -> None:
    """Refuse ranks that two packages have, also those that a preset names."""
    for name in sorted(policy.ranks):
        try:
            RANKS.check(name)
        except PluginError as error:
            form = next(key for key in FORMS if key in keys)
            raise PolicyError(form, keys[form], f"{error}.") from None


def _check_late(policy: FlowPolicy) -> None:
    """Refuse ranks that cannot choose any more once the prompt is computed."""
    if policy.when == "prefill":
        return
    late = [name for name, rank in RANKS.usable().items() if rank.late]
    early = next((name for name in sorted(policy.ranks) if name not in late), None)
    if early is not None:
        raise PolicyError(
            WHEN_KEY,
            policy.when,
            f"{early!r} chooses while the image is computed, parts of which may be found in the cache "
            f"or be computed in steps of their own; rank by {quoted(late)}, or leave {WHEN_KEY} out.",
        )


def _per_image(keys: Mapping[str, Any], num_layers: int) -> tuple[tuple[Stage, ...], ...]:
    """The one stage of ``flow_cliff``, ``flow_keep`` and ``flow_rank``, image by image for lists."""
    cliffs = _values(CLIFF_KEY, keys[CLIFF_KEY], lambda v: read_layer(CLIFF_KEY, v, num_layers))
    keeps = _values(KEEP_KEY, keys.get(KEEP_KEY, 0), lambda v: read_keep(KEEP_KEY, v))
    listed = [isinstance(keys.get(key), (list, tuple)) for key in (CLIFF_KEY, KEEP_KEY)]
    if all(listed) and len(cliffs) != len(keeps):
        raise PolicyError(
            KEEP_KEY,
            keys[KEEP_KEY],
            f"it has {counted(len(keeps), 'value')} and {CLIFF_KEY} has {len(cliffs)}; each has one per image.",
        )
    count = max(len(cliffs), len(keeps))
    cliffs, keeps = _stretched(cliffs, count), _stretched(keeps, count)
    if any(keeps) != (RANK_KEY in keys):
        raise PolicyError(
            RANK_KEY if RANK_KEY in keys else KEEP_KEY,
            keys[RANK_KEY] if RANK_KEY in keys else keys[KEEP_KEY],
            f"no token is kept that could be ranked; leave it out, or send {KEEP_KEY}."
            if RANK_KEY in keys
            else f"nothing says which tokens; send {RANK_KEY} too: {quoted(RANKS)}.",
        )
    images = []
    for cliff, keep in zip(cliffs, keeps, strict=True):
        rank = read_rank(RANK_KEY, keys[RANK_KEY], cliff) if keep else None
        images.append((Stage(cliff, keep, rank),))
    if not any(listed):
        # A stage that no layer reaches is none; in a list it holds an image's place.
        return (images[0] if cliffs[0] < num_layers else (),)
    return tuple(images)


def _values(key: str, value: Any, read: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [read(value)]
    if not 1 <= len(value) <= MOST_IMAGES:
        raise PolicyError(key, value, "a list needs one value per image of the prompt.")
    for item in value:
        try:
            read(item)
        except PolicyError as error:
            reason = str(error).partition(": ")[2]
            raise PolicyError(key, value, f"in the list, {reason}") from None
    return [read(item) for item in value]


def _stretched(values: Sequence[Any], count: int) -> list[Any]:
    return list(values) * count if len(values) == 1 else list(values)


def quoted(names: Collection[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(map(repr, names))
