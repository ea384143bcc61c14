"""Values of command-line options: what a user may write, and one sentence where it is something else. (pure)

Functions for argparse's ``type``. Python's own ``int`` and ``float`` take "1_6", "nan", "-3" and numbers that
end in a traceback three modules later.
"""

from __future__ import annotations

import argparse
import math

from vllm_flow.user_text import whole_number

SEEDS = 2**32
"""Above it numpy, and so vLLM, has none."""
MOST_GIB = 1e6
LEAST_RESAMPLES = 100
MOST_RESAMPLES = 1_000_000
"""The tables of more would fill the memory."""
LEAST_TOLERANCE = 1e-4
"""Points; numbers of questions for less have no end."""
SHOWN = 40
"""Characters of a wrong value that are said again."""


def _shown(text: str) -> str:
    """A wrong value as it is said again: what nobody sees is written out, and takes more room."""
    return repr(text[:SHOWN])[: 2 * SHOWN]


def positive(text: str) -> int:
    """A whole number above 0."""
    value = whole_number(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is no whole number above 0")
    return value


def resamples(text: str) -> int:
    """How often a bootstrap draws."""
    value = whole_number(text)
    if value is None or not LEAST_RESAMPLES <= value <= MOST_RESAMPLES:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} is no number of resamples; write one from {LEAST_RESAMPLES} to {MOST_RESAMPLES}"
        )
    return value


def count(text: str) -> int:
    """A whole number, 0 included."""
    value = whole_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is no whole number of at least 0")
    return value


def count_or_never(text: str) -> int:
    """A whole number, 0 included, or -1."""
    value = -1 if text == "-1" else whole_number(text)
    if value is None:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} is no whole number of at least 0, nor -1 for never"
        )
    return value


def seed(text: str) -> int:
    """What random numbers begin with: a whole number below 2^32."""
    value = whole_number(text)
    if value is None or value >= SEEDS:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} is no seed; write a whole number from 0 to {SEEDS - 1}"
        )
    return value


def pixels(text: str) -> tuple[int, int]:
    """``640x480``: width and height of a picture."""
    width, height = (whole_number(side) for side in text.partition("x")[::2])
    if not (width and height):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a size such as 640x480")
    return width, height


def positives(text: str) -> tuple[int, ...]:
    """Whole numbers above 0 between commas, in the order they are written."""
    found = [whole_number(part.strip()) for part in text.split(",")]
    numbers = tuple(number for number in found if number)
    if len(numbers) < len(found):
        raise argparse.ArgumentTypeError(
            f"{_shown(text)}: write whole numbers above 0, such as 1,8,32"
        )
    return numbers


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = _finite(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is no number above 0")
    return value


def not_negative(text: str) -> float:
    """A finite number of 0 or more."""
    value = _finite(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is no number of 0 or more")
    return value


def _finite(text: str) -> float:
    """The number, or one that is not a number for anything that is none or has no end."""
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def gib(text: str) -> float:
    """A size in GiB."""
    try:
        value = positive_number(text)
    except argparse.ArgumentTypeError:
        value = math.inf
    if value > MOST_GIB:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)}: write a size in GiB above 0, such as 1.5"
        )
    return value


def tolerance(text: str) -> float:
    """A loss that is put up with, as a share: `1%`, `1 point`, `1` and `0.5 points` are percentage points.

    A number below 1 alone is refused: it may be meant as a share.
    """
    number, unit = text.strip(), ""
    for ending in ("%", "points", "point"):
        if number.endswith(ending):
            number, unit = number.removesuffix(ending).rstrip(), ending
            break
    value = _finite(number)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} is no tolerance; write points above 0 and below 100, such as 1% or 0.5%"
        )
    if value < LEAST_TOLERANCE:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)}: no benchmark tells one answer in a million; write {LEAST_TOLERANCE}% or more"
        )
    if not unit and value < 1:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} may be points or a share; write {value:g}% for {value:g} of a point, {100 * value:g}% "
            "for that share"
        )
    return value / 100
