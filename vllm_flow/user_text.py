"""Numbers and JSON that a user wrote, read and shown so that nothing in them ends in a traceback. (pure)

Python's own readers leave gaps: `str.isdigit` is true of "²", which `int` refuses; `int` takes "1_6", other
alphabets' digits, and no number of more than 4300 digits; `json.loads` raises other errors than its own for
deep nesting and long numbers, and lets half of a surrogate pair through, which no file and no terminal takes;
and `repr` raises them as well.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

LONGEST = 18
"""Digits of a whole number that a user may write: each fits into 64 bits."""
SHOWN = 80
"""Characters of a value that a message shows."""


class NotJSON(ValueError):
    """A text is no JSON that can be used; the message says why, in a few words, without the text."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason if column is None else f"{reason} at column {column}")
        self.line = line
        """The line it is wrong in, counted from 1; None where no one line is to blame."""


def whole_number(text: str) -> int | None:
    """A whole number >= 0 in plain digits; None for anything else."""
    if text.isascii() and text.isdigit() and len(text) <= LONGEST:
        return int(text)
    return None


def whole_numbers(text: str) -> tuple[int, ...] | None:
    """`0,4,8`, or `0:30:2` with both ends included, as sorted numbers, each once; None for anything else.

    Numbers of a million and above are slips of the finger, and a range up to them fills the memory.
    """
    ranged = ":" in text
    found = [whole_number(part) for part in text.split(":" if ranged else ",")]
    numbers = [number for number in found if number is not None and number < 1_000_000]
    if len(numbers) < len(found):
        return None
    if not ranged:
        return tuple(sorted(set(numbers)))
    if len(numbers) > 3 or numbers[2:] == [0]:
        return None
    return tuple(range(numbers[0], numbers[1] + 1, *numbers[2:])) or None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        NotJSON: it is no JSON, or none that can be used: nested too deeply, a number too long, text that
            cannot be written down.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise NotJSON(error.msg, error.lineno, error.colno) from None
    except RecursionError:
        raise NotJSON("nested too deeply") from None
    except UnicodeEncodeError:
        raise NotJSON("half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    except ValueError:  # what int() raises beyond 4300 digits
        raise NotJSON("a number of more than 4300 digits") from None
    return value


def shown(value: Any) -> str:
    """A value as a message shows it, cut so that a hostile one cannot fill the log."""
    text = as_written(value, most=SHOWN // 2)  # of whose items each takes two characters or more
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def as_written(value: Any, *, most: int | None = None, depth: int = SHOWN) -> str:
    """A value as its writer knows it, whether that was Python or JSON: `true`, `false` and `null`, all else in
    Python's words.

    Args:
        most: items of a list or an object, all others are left out.
        depth: levels of lists and objects in one another, all others are left out.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 256:
        # repr of an enormous integer is slow and, past 4300 digits, an error of its own.
        return f"<integer of {value.bit_length()} bits>"
    if not isinstance(value, (list, tuple, dict)):
        return repr(value)

    def inside(one: Any) -> str:
        return as_written(one, most=most, depth=depth - 1)

    found = []
    if depth and isinstance(value, dict):
        found = [f"{inside(key)}: {inside(one)}" for key, one in islice(value.items(), most)]
    elif depth:
        found = [inside(one) for one in value[:most]]
    text = ", ".join(found) + ", ..." * (len(value) > len(found))
    return f"{{{text}}}" if isinstance(value, dict) else f"[{text}]"
