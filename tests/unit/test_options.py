"""Values of command-line options: any text is read or refused in a sentence, never a traceback."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_flow import options

READERS: dict[Callable[[str], Any], Callable[[Any], bool]] = {
    options.positive: lambda value: value >= 1,
    options.count: lambda value: value >= 0,
    options.count_or_never: lambda value: value >= -1,
    options.resamples: lambda value: 100 <= value <= 1_000_000,
    options.seed: lambda value: 0 <= value < 2**32,
    options.pixels: lambda value: len(value) == 2 and min(value) >= 1,
    options.positives: lambda value: len(value) > 0 and min(value) >= 1,
    options.positive_number: lambda value: 0 < value < math.inf,
    options.not_negative: lambda value: 0 <= value < math.inf,
    options.gib: lambda value: 0 < value <= options.MOST_GIB,
    options.tolerance: lambda value: 1e-6 <= value < 1,
}
TEXTS = st.text() | st.text("0123456789x.,-+eE_ infa²٣") | st.integers().map(str)


@pytest.mark.parametrize("read", READERS)
@given(text=TEXTS | st.floats().map(str))
@example(text="\U0001005e" * 60)
def test_any_text_is_read_or_refused(read: Callable[[str], Any], text: str) -> None:
    try:
        value = read(text)
    except argparse.ArgumentTypeError as error:
        assert len(str(error)) < 200 and "\n" not in str(error)
    else:
        assert READERS[read](value)


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (options.positive, "12", 12),
        (options.count, "0", 0),
        (options.seed, "4294967295", 2**32 - 1),
        (options.pixels, "640x480", (640, 480)),
        (options.positives, "8, 1,32", (8, 1, 32)),
        (options.positive_number, "2.5e3", 2500.0),
        (options.not_negative, "0", 0.0),
        (options.gib, "0.06", 0.06),
        (options.tolerance, "1%", 0.01),
        (options.tolerance, "1", 0.01),
        (options.tolerance, " 0.5 % ", 0.005),
        (options.tolerance, "0.25 points", 0.0025),
        (options.tolerance, "1 point", 0.01),
        (options.tolerance, "50", 0.5),
    ],
)
def test_what_is_read(read: Callable[[str], Any], text: str, value: Any) -> None:
    assert read(text) == value


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "text", ["", "-1", "nan", "1_0", "x", "9" * 5000, "1e999", "²", "٣", "\ud800"]
)
def test_what_is_refused(read: Callable[[str], Any], text: str) -> None:
    if read is options.count_or_never and text == "-1":
        return
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        "640",
        "640x",
        "x480",
        "0x480",
        "640x0",
        "640X480",
        "²x3",
        "٣x4",
        "6 x4",
        "1x2x3",
        f"{'9' * 5000}x1",
    ],
)
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 640x480"):
        options.pixels(text)


def test_the_largest_that_is_taken() -> None:
    assert options.gib("1000000") == options.MOST_GIB
    for read, text in ((options.gib, "1000000.1"), (options.seed, "4294967296")):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


@pytest.mark.parametrize("text", ["0.005", "0.5", ".9"])
def test_a_tolerance_that_may_be_a_share_is_refused_with_both_spellings(text: str) -> None:
    value = float(text)
    with pytest.raises(argparse.ArgumentTypeError, match="may be points or a share") as error:
        options.tolerance(text)
    for spelling, meant in ((f"{value:g}%", value / 100), (f"{100 * value:g}%", value)):
        assert f"write {spelling}" in str(error.value) or f", {spelling} for" in str(error.value)
        assert options.tolerance(spelling) == pytest.approx(meant)


@given(st.floats(0.001, 99.9), st.sampled_from(["%", " %", " points"]))
def test_a_tolerance_with_a_unit_is_points(value: float, unit: str) -> None:
    assert options.tolerance(f"{value}{unit}") == pytest.approx(value / 100)
    if value >= 1:
        assert options.tolerance(f"{value}") == options.tolerance(f"{value}%")


@pytest.mark.parametrize("text", ["1e-320%", "0.00009%", "0.00009"])
def test_no_number_of_questions_shows_so_little(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write 0.0001% or more"):
        options.tolerance(text)
    assert options.tolerance("0.0001%") == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "text", ["0", "0%", "100", "100%", "-1%", "% 1", "1%%", "points", "1 %points", "1pp"]
)
def test_no_tolerance(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="above 0 and below 100"):
        options.tolerance(text)


def test_never_is_one_number() -> None:
    assert [options.count_or_never(text) for text in ("-1", "0", "7")] == [-1, 0, 7]
    for text in ("-2", "1_0", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="nor -1 for never"):
            options.count_or_never(text)
