"""Hypothesis strategies for request bodies that no server should accept. Sends nothing."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

from vllm_flow.policy_keys import CLIFF_KEY, KEY_PREFIX

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.text(max_size=12),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def not_a_layer(layers: int) -> st.SearchStrategy[Any]:
    """Whatever is no integer from 0 to ``layers`` nor a list of such: wrong types, numbers, depth."""
    return st.one_of(
        st.integers(max_value=-1),
        st.integers(min_value=layers + 1),
        st.sampled_from([2**63, 2**64, -(2**63) - 1, 10**40, 10**300]),
        st.booleans(),
        st.floats(),
        st.sampled_from([math.nan, math.inf, -math.inf, 1.0, -0.0]),
        st.integers(0, layers).map(str),
        st.text(max_size=100),
        st.none(),
        st.lists(JSON, max_size=3).filter(lambda values: not _layer_each(values, layers)),
        st.dictionaries(st.text(max_size=6), JSON, max_size=3),
    )


def _layer_each(values: list[Any], layers: int) -> bool:
    """Whether a list has a layer for each of some images, which a policy may have."""
    return bool(values) and all(type(value) is int and 0 <= value <= layers for value in values)


UNKNOWN_KEYS = st.one_of(
    st.sampled_from(
        ["flow_", "flow_clif", "flow_Cliff", "flow_cliff ", "flow_cliffs", "flow_layer"]
    ),
    st.text(max_size=20).map(KEY_PREFIX.__add__),
).filter(lambda key: key != CLIFF_KEY)


def bad_keys(layers: int) -> st.SearchStrategy[tuple[dict[str, Any], str]]:
    """A ``vllm_xargs`` object and the key that must be named: a bad value, or a key nobody knows."""
    bad = not_a_layer(layers)
    good = st.integers(1, layers)
    return st.one_of(
        bad.map(lambda value: ({CLIFF_KEY: value}, CLIFF_KEY)),
        st.tuples(UNKNOWN_KEYS, JSON).map(lambda pair: ({pair[0]: pair[1]}, pair[0])),
        # Contradictions: a good policy beside a key that nobody knows, or keys of somebody else.
        st.tuples(UNKNOWN_KEYS, good, good).map(
            lambda three: ({CLIFF_KEY: three[1], three[0]: three[2]}, three[0])
        ),
        bad.map(lambda value: ({"other": 1, CLIFF_KEY: value}, CLIFF_KEY)),
    )


def broken(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Bytes that are no JSON: a good body cut short, or with bytes that do not belong there."""
    raw = json.dumps(good).encode()
    cut = st.integers(0, len(raw) - 1).map(lambda at: raw[:at])
    spoilt = st.tuples(
        st.integers(0, len(raw) - 1), st.sampled_from([b'"{', b"\xff", b"\x00", b'",,"', b"\\"])
    ).map(lambda pair: raw[: pair[0]] + pair[1] + raw[pair[0] :])
    return st.one_of(cut, spoilt, st.binary(max_size=40)).filter(_is_no_json_object)


def _is_no_json_object(raw: bytes) -> bool:
    try:
        return not isinstance(json.loads(raw), dict)
    except ValueError:
        return True


DEEP = b"[" * 100_000
ODD_BODIES = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"flow_cliff"',
    "two documents": b"{}{}",
    "deep": DEEP + b"]" * len(DEEP),
    "a deep policy": b'{"vllm_xargs":' + DEEP + b"}",
    "a number too long for Python": b'{"vllm_xargs":{"flow_cliff":1' + b"0" * 5000 + b"}}",
    "a lone surrogate": b'{"model":"\\ud800","prompt":"\\ud800"}',
    "another encoding": json.dumps({"model": "model"}).encode("utf-32-be"),
}

ILL_VALUES = (None, True, -1, 2**70, 1.5, math.nan, "x", [], {}, [None], {"a": {"b": None}})
"""What each field of a request is set to; a few of them are good for some fields."""
