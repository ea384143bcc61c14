"""What a user may write as a number or as JSON, and that everything else has a sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.policy_keys import parse_policy
from vllm_flow.user_text import (
    LONGEST,
    SHOWN,
    NotJSON,
    as_written,
    parse_json,
    shown,
    whole_number,
    whole_numbers,
)


@given(st.integers(0, 10**LONGEST - 1))
def test_whole_numbers(number: int) -> None:
    assert whole_number(str(number)) == number


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "+1", "1_6", " 16", "16 ", "42²", "²", "４２", "٤٢", "1.0", "0x1", "9" * 5000],
)
def test_no_whole_numbers(text: str) -> None:
    assert whole_number(text) is None


def test_the_largest_numbers() -> None:
    assert whole_number("9" * 18) == 10**18 - 1 < 2**63
    assert whole_number("1" + "0" * 18) is None
    assert whole_numbers("999999,0:") is None and whole_numbers("0,999999") == (0, 999_999)
    assert whole_numbers("1000000") is None and whole_numbers("999999:1000000") is None


@given(st.text(max_size=8))
def test_a_number_or_none(text: str) -> None:
    assert whole_number(text) in (None, *([int(text)] if text.isdecimal() else []))


def test_lists_and_ranges() -> None:
    assert whole_numbers("8,0,4,4") == (0, 4, 8)
    assert whole_numbers("0:30:10") == (0, 10, 20, 30) and whole_numbers("2:4") == (2, 3, 4)
    for bad in (
        "",
        ",",
        "a",
        "1,",
        "4:2",
        "0:9:0",
        "1:2:3:4",
        "1_6",
        "2²",
        "-1",
        "0:99999999",
        "9" * 5000,
    ):
        assert whole_numbers(bad) is None, bad


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES, st.booleans())
def test_json(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ('{"a": 1', "delimiter at column 8", 1),
        ('{"a":\n 1,}', "at column", 2),
        ("", "Expecting value at column 1", 1),
        ("[" * 100_000, "nested too deeply", None),
        ('{"a":' * 100_000, "nested too deeply", None),
        ("9" * 5000, "more than 4300 digits", None),
        ('{"a": "\\ud800"}', "half of a surrogate pair", None),
        ('{"\\uDFFF": 1}', "half of a surrogate pair", None),
    ],
)
def test_no_json(text: str, says: str, line: int | None) -> None:
    with pytest.raises(NotJSON, match=says) as refused:
        parse_json(text)
    assert refused.value.line == line
    assert ("column" in str(refused.value)) == (line is not None)


def test_pairs_of_surrogates_are_text() -> None:
    assert parse_json('"\\ud83d\\ude00 \\u00e9"') == "😀 é"
    assert parse_json('"\\\\ud800"') == "\\ud800"


@given(st.text(alphabet='{}[]",:\\u0d8 1e-', max_size=40) | st.text(max_size=20))
def test_any_text(text: str) -> None:
    try:
        parse_json(text)
    except NotJSON as error:
        assert str(error) and "\n" not in str(error)


@given(VALUES)
def test_a_value_is_shown_as_its_writer_knows_it(value: object) -> None:
    """Read back by Python, with JSON's names of what has no such name there."""
    names = {"true": True, "false": False, "null": None, "inf": float("inf")}
    text = as_written(value)
    assert eval(text, {"__builtins__": {}}, names) == value  # noqa: S307
    assert "\n" not in text
    assert shown(value) == text or (
        len(text) > SHOWN == len(shown(value)) and text.startswith(shown(value)[:-3])
    )


def test_what_a_message_has_no_room_for_is_cut() -> None:
    """However much, and however deep: a message cannot be made to end in another error."""
    longest = "x" * (SHOWN - 2)
    assert shown(longest) == repr(longest)
    assert shown(longest + "x") == repr(longest)[:-3] + "..."
    assert shown([7] * 10**6) == f"[{'7, ' * 25}7..."
    assert as_written([7] * 50, most=40) == f"[{'7, ' * 40}...]"
    assert as_written({str(n): n for n in range(3)}, most=1) == "{'0': 0, ...}"
    assert shown({"a": 10**5000}) == "{'a': <integer of 16610 bits>}"
    assert shown(2**256 - 1) == str(2**256 - 1) and shown(2**256) == "<integer of 257 bits>"
    assert shown({"a": [True, False, None, "True"]}) == "{'a': [true, false, null, 'True']}"
    deep: object = []
    for _ in range(2000):
        deep = {"": deep}
    assert shown(deep).startswith("{'': {'': ")
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"flow_cliff=\[{77}\.\.\.: "):
        parse_policy({"flow_cliff": deep}, 32)
