"""Values of the operator's settings: each read, or refused in a sentence that names it.

Knows the JSON under ``additional_config["vllm_flow"]`` and the model's number of layers; nothing of engines, and
nothing of vLLM.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_flow.cliff_file import Profile, ProfileError, essential, read_profile
from vllm_flow.counts import counted
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_bounds import contradicts, operators_policy
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import POLICY_KEYS, REQUEST_KEYS, is_own, unknown
from vllm_flow.policy_values import integer
from vllm_flow.user_text import shown

CONFIG_KEY = "vllm_flow"
PROFILE = "profile"


def known(options: Any, names: Sequence[str]) -> None:
    """Refuse what is no JSON object of these options.

    Raises:
        ValueError: as everywhere in this module, names the option and what it must be.
    """
    if not isinstance(options, Mapping):
        raise ValueError(
            f"additional_config[{CONFIG_KEY!r}]={shown(options)}: it must be a JSON object with "
            f"options, {{}} for the defaults."
        )
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known options: {list(names)}."
            raise ValueError(f"{_named(name)}: no such option; {hint}")


def strays(config: Mapping[Any, Any], names: Sequence[str]) -> list[str]:
    """Options of these names, and request keys, that stand beside ``vllm_flow`` and not in it, where nobody
    reads them.

    Args:
        config: ``additional_config``, which other extensions have settings in, too.

    Raises:
        ValueError: ``vllm_flow`` in another spelling, which no other extension's name would be.
    """
    for name in config:
        letters = "".join(letter for letter in str(name).casefold() if letter.isalnum())
        if name != CONFIG_KEY and letters == CONFIG_KEY.replace("_", ""):
            raise ValueError(
                f"additional_config[{name!r}]: vLLM-Flow would not read it; did you mean {CONFIG_KEY!r}?"
            )
    return [name for name in config if name in names or is_own(name)]


def place_of(name: str) -> str:
    """Where an option belongs that stands beside ``vllm_flow``; a request key, into the default policy."""
    if is_own(name):
        return f"{{{CONFIG_KEY!r}: {{'default_policy': {{{name!r}: ...}}}}}}"
    return f"{{{CONFIG_KEY!r}: {{{name!r}: ...}}}}"


def layers(options: Mapping[str, Any], name: str, num_layers: int) -> int | None:
    """A number of layers, None where it is left out."""
    found = options.get(name)
    if found is not None and not integer(found):
        raise ValueError(
            f"{_named(name)}={shown(found)}: it must be an integer, a number of "
            f"the model's {counted(num_layers, 'decoder layer')}."
        )
    return found


def flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false."""
    found = options.get(name, default)
    if not isinstance(found, bool):
        raise ValueError(f"{_named(name)}={shown(found)}: it must be true or false.")
    return found


def directory(options: Mapping[str, Any], name: str) -> str | None:
    """The name of a directory, which need not exist; a ``~`` that no shell has replaced is."""
    found = options.get(name)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise ValueError(f"{_named(name)}={shown(found)}: it must name a directory.")
    return None if found is None else os.path.expanduser(found)


def size(options: Mapping[str, Any], name: str, default: int) -> int:
    """A number of bytes."""
    found = options.get(name, default)
    if not integer(found) or found < 1:
        raise ValueError(
            f"{_named(name)}={shown(found)}: it must be an integer of at least 1, in bytes."
        )
    return int(found)


def one_of(options: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    """One of some words, the first by default."""
    found = options.get(name, choices[0])
    if found not in choices:
        raise ValueError(
            f"{_named(name)}={shown(found)}: it must be one of {', '.join(map(repr, choices))}."
        )
    return str(found)


def policy(options: Mapping[str, Any], name: str, num_layers: int) -> FlowPolicy | None:
    """A policy by its request keys, the same for every image."""
    keys = options.get(name)
    if keys is None:
        return None
    if not isinstance(keys, Mapping):
        raise ValueError(
            f'{_named(name)}={shown(keys)}: it must hold request keys, such as {{"flow_cliff": 16}}.'
        )
    strange = [key for key in keys if key not in POLICY_KEYS]
    if strange:
        raise ValueError(
            f"{_named(name)}: {strange[0]!r} is no request key of a policy; "
            f"{unknown(strange[0], POLICY_KEYS) if strange[0] not in REQUEST_KEYS else 'leave it out.'}"
        )
    try:
        return operators_policy(keys, num_layers)
    except PolicyError as error:
        raise ValueError(f"{_named(name)}: {error}") from None


def model_policies(
    options: Mapping[str, Any], name: str, num_layers: int
) -> dict[str, FlowPolicy | None]:
    """Policies by the names under which requests ask for the model."""
    found = options.get(name, {})
    if not isinstance(found, Mapping) or not all(
        model and isinstance(model, str) for model in found
    ):
        raise ValueError(
            f"{_named(name)}={shown(found)}: it must hold policies by served names or adapters, such as "
            '{"small": {"flow_cliff": 16}}.'
        )
    policies = {}
    for model, keys in found.items():
        if isinstance(keys, Mapping) and PROFILE in keys:
            raise ValueError(
                f"{_named(name)}[{model!r}]: a profile is of all models that are served, and belongs to "
                "'default_policy'; write request keys."
            )
        if not isinstance(keys, Mapping):
            raise ValueError(
                f'{_named(name)}[{model!r}]={shown(keys)}: it must hold request keys, such as {{"flow_cliff": 16}}, or '
                "none of them for no policy."
            )
        try:
            policies[model] = policy({model: keys}, model, num_layers)
        except ValueError as error:
            raise ValueError(
                str(error).replace(_named(model), f"{_named(name)}[{model!r}]", 1)
            ) from None
    return policies


def bound(options: Mapping[str, Any], name: str, num_layers: int) -> FlowPolicy | None:
    """A policy as the most that others may evict, None where there is no bound.

    One that evicts nothing is a bound like any other, though as a request's policy it would be none.
    """
    found = policy(options, name, num_layers)
    if found is None and options.get(name):
        return FlowPolicy.withdrawal(num_layers)
    return found


def check_effects(options: Mapping[str, Any]) -> None:
    """Refuse options that beside the others, or without them, would have no effect."""
    if options.get("attention_log") is None:
        for name in ("attention_log_max_bytes", "attention_log_kernel"):
            if name in options:
                raise ValueError(
                    f"{_named(name)}={shown(options[name])}: no attention is logged, so it would have no effect; name "
                    f"a directory in 'attention_log', or leave {name!r} out."
                )
    if options.get("max_policy") and options.get("allow_request_policy") is False:
        raise ValueError(
            f"{_named('max_policy')}: 'allow_request_policy' is false, so no request has a policy that it could "
            "bound; leave one of the two out."
        )


def check_bounded(
    default: FlowPolicy | None,
    tasks: Mapping[str, FlowPolicy | None],
    models: Mapping[str, FlowPolicy | None],
    bound: FlowPolicy | None,
    num_layers: int,
) -> None:
    """Refuse policies of the operator's own that evict more than he lets requests evict.

    Args:
        tasks: the policies of the profile, by task: a request that names the task asks for its policy.
        models: by the name that a request asks for.
    """
    if bound is None:
        return
    # Tasks first: where a profile says no default, it is its only task's, and the task is what can be mended.
    where, of_models = _named("default_policy"), _named("model_policies")
    named = [(where, f" of the task {task!r}", policy) for task, policy in tasks.items()]
    named += [(where, "", default)]
    named += [(f"{of_models}[{model!r}]", "", policy) for model, policy in models.items()]
    for option, of_task, policy in named:
        if policy is not None and contradicts(policy, bound, num_layers):
            raise ValueError(
                f"{option}: \"{policy}\"{of_task} evicts more than 'max_policy' lets any request "
                f'evict, which is "{bound}"; let one evict less, or the other more.'
            )


def profile(options: Mapping[str, Any], num_layers: int) -> Profile | None:
    """The profile that ``default_policy`` names, None where it names none."""
    keys = options.get("default_policy")
    if not isinstance(keys, Mapping) or PROFILE not in keys:
        return None
    if len(keys) > 1:
        other = next(key for key in keys if key != PROFILE)
        raise ValueError(
            f"{_named('default_policy')}: {other!r} beside {PROFILE!r}; name one of them. A "
            'profile may have a "default" of its own.'
        )
    try:
        return read_profile(keys[PROFILE], num_layers)
    except ProfileError as error:
        raise ValueError(f"{_named('default_policy')}: {error}") from None


def with_profile_read(options: Any) -> Any:
    """The options with the content of the profile in the place of its path.

    Called at start-up, so that every process of the engine, on whichever machine, goes by what the
    file held then. The content without its evidence, since each process reads it per request.
    """
    keys = options.get("default_policy") if isinstance(options, Mapping) else None
    if not isinstance(keys, Mapping) or not isinstance(keys.get(PROFILE), str):
        return options
    try:
        content = essential(keys[PROFILE])
    except ProfileError as error:
        raise ValueError(f"{_named('default_policy')}: {error}") from None
    return {**options, "default_policy": {**keys, PROFILE: content}}


def _named(option: Any) -> str:
    return f"additional_config[{CONFIG_KEY!r}][{option!r}]"
