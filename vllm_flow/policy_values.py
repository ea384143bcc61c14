"""The values of a policy's keys: each read, checked, and refused with a sentence that names the key.

Knows one key at a time; which keys go together is `policy_keys`'.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Any

from vllm_flow.policy import WHOLE, Keep, Stage
from vllm_flow.policy_error import PolicyError
from vllm_flow.ranks import RANKS, TowerRank, merges
from vllm_flow.registry import PluginError
from vllm_flow.user_text import shown, whole_number

KINDS = {
    bool: "a boolean",
    float: "a float",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
"""What a value is, in words that fit JSON and Python."""
KEEP_FORMS = (
    'a number of tokens such as 64, a share such as "25%", or a fraction of them such as "71/144"'
)
MAX_SEED = 2**32 - 1
_STAGE = re.compile(r"\s*([0-9]{1,9})\s*:\s*([0-9./%]+)(?:\s+(\S+))?\s*\Z")


def integer(value: Any) -> bool:
    """Whether a value is an integer. bool is an int in Python, yet `true` is never a number here."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_layer(key: str, value: Any, num_layers: int) -> int:
    """A layer from 0 to ``num_layers``.

    Raises:
        PolicyError: no integer, or out of range.
    """
    allowed = (
        f"it must be an integer from 0 (no layer sees the image) to {num_layers} "
        "(the number of decoder layers: nothing is evicted)."
    )
    if not integer(value):
        kind = KINDS.get(type(value), type(value).__name__)
        raise PolicyError(key, value, f"{kind} is not a layer; {allowed}")
    if not 0 <= value <= num_layers:
        raise PolicyError(key, value, f"there is no such layer; {allowed}")
    return int(value)


def read_keep(key: str, value: Any) -> Keep:
    """Tokens kept of an image, or a share of them.

    Raises:
        PolicyError: neither; or a share above 1, which nobody can keep.
    """
    keep: Keep | None = _keep(value) if isinstance(value, str) else None
    if integer(value):
        keep = int(value)
    if keep is None or keep < 0 or (isinstance(keep, Fraction) and keep > 1):
        reason = f"it must be {KEEP_FORMS}."
        if isinstance(value, float) and 0 < value < 1:
            reason = f'a share is written as text, so that it is exact: "{value * 100:g}%".'
        if isinstance(keep, Fraction) and keep > 1:
            reason = "the share is too large: no more than 100% of an image can be kept."
        raise PolicyError(key, value, reason)
    if not isinstance(keep, Fraction) and keep.bit_length() > 31:
        raise PolicyError(key, value, "no image has so many tokens.")
    if isinstance(keep, Fraction) and keep in (0, 1):
        return WHOLE if keep else 0
    return keep


def _keep(text: str) -> Keep | None:
    text = text.strip()
    if (number := whole_number(text)) is not None:
        return number
    if len(text) > 24 or not re.fullmatch(r"[0-9]+(\.[0-9]+)?%|[0-9]+/[0-9]+", text):
        return None
    try:
        return Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except ZeroDivisionError:
        return None


def read_rank(key: str, value: Any, layer: int, *, written: Any = None) -> str:
    """The name of a rank that can choose at a stage of this layer.

    Args:
        written: what the message shows, where the name is a part of it.

    Raises:
        PolicyError: no such rank, or one of a package that cannot be used; or one that looks at the layer before at
            layer 0, which none precedes; or one that merges embeddings behind layer 0.
    """
    written = value if written is None else written
    if not isinstance(value, str) or value not in RANKS:
        raise PolicyError(key, written, f"{shown(value)} is no rank; {_hint(value, RANKS)}")
    try:
        rank = RANKS[value]
    except PluginError as error:
        raise PolicyError(key, written, f"{error}.") from None
    if layer == 0 and rank.reads_layer:
        raise PolicyError(
            key,
            written,
            f"{value!r} ranks by what the layer before has made, and no layer is before layer 0; "
            "start at layer 1 or deeper, or take another rank.",
        )
    if layer > 0 and merges(rank):
        raise PolicyError(
            key,
            written,
            f"{value!r} merges what enters the decoder, so its stage cannot begin at layer {layer}; start at layer 0, "
            "with further stages behind it, or take another rank.",
        )
    return value


def read_seed(key: str, value: Any) -> int:
    """A seed.

    Raises:
        PolicyError: no integer from 0 to 2**32 - 1.
    """
    if not integer(value) or not 0 <= value <= MAX_SEED:
        raise PolicyError(key, value, f"it must be an integer from 0 to {MAX_SEED}.")
    return int(value)


def read_choice(key: str, value: Any, choices: Collection[str]) -> str:
    """One of a few names.

    Raises:
        PolicyError: another value; suggests the closest.
    """
    if not isinstance(value, str) or value not in choices:
        raise PolicyError(key, value, f"there is no such value; {_hint(value, choices)}")
    return value


def _hint(value: Any, choices: Collection[str]) -> str:
    close = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(map(repr, choices))}."


def read_stages(key: str, value: Any, num_layers: int) -> tuple[Stage, ...]:
    """Stages such as ``"0:284 diversity, 20:0"``; those at ``num_layers`` and past it are none.

    Raises:
        PolicyError: not of this form; layers that do not ascend; keeps that grow; a rank that is
            missing, unknown, impossible there, or has nothing to choose.
    """
    form = (
        'write stages as "LAYER:KEEP RANK", by ascending layer and with commas between them, such as '
        '"2:50% last_prompt, 20:0".'
    )
    if not isinstance(value, str) or len(value) > 2000:
        raise PolicyError(key, value, form)
    stages: list[Stage] = []
    for part in value.split(","):
        match = _STAGE.match(part)
        if match is None:
            raise PolicyError(key, value, f"{shown(part.strip())} is no stage; {form}")
        layer = read_layer(key, int(match[1]), num_layers)
        keep = read_keep(key, match[2])
        if keep and match[3] is None:
            raise PolicyError(
                key,
                value,
                f"{shown(part.strip())} keeps tokens and does not say which; name a rank after it: "
                f"{', '.join(map(repr, RANKS))}.",
            )
        if not keep and match[3] is not None:
            raise PolicyError(
                key,
                value,
                f'{shown(part.strip())} keeps nothing that could be ranked; write "{layer}:0".',
            )
        rank = None if match[3] is None else read_rank(key, match[3], layer, written=value)
        stages.append(Stage(layer, keep, rank))
    _check_order(key, value, stages)
    return tuple(stage for stage in stages if stage.layer < num_layers)


def _check_order(key: str, value: Any, stages: Sequence[Stage]) -> None:
    for before, after in zip(stages, stages[1:], strict=False):
        if after.layer <= before.layer:
            raise PolicyError(
                key,
                value,
                f"layer {after.layer} comes after layer {before.layer}; stages go by "
                "ascending layer, one for each.",
            )
        rank = RANKS.get(after.rank or "")
        if isinstance(rank, TowerRank) and not rank.nested:
            raise PolicyError(
                key,
                value,
                f"{after.rank!r} chooses among all tokens of an image, and at layer {after.layer} some may "
                "be gone; make it the first stage, or take another rank.",
            )
        # A number and a share can be compared only when the image's size is known.
        alike = isinstance(after.keep, int) == isinstance(before.keep, int)
        if before.keep == 0:
            raise PolicyError(
                key,
                value,
                f"{str(before)!r} leaves nothing for {str(after)!r}; leave {str(after)!r} out.",
            )
        if alike and after.keep > before.keep:
            raise PolicyError(
                key,
                value,
                f"stage {str(after)!r} keeps more than {str(before)!r} left; tokens that are gone do "
                "not come back.",
            )
