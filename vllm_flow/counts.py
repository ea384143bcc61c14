"""Writes how many of something there are, in words: one in the singular. (pure)"""

from __future__ import annotations


def counted(count: int, one: str, more: str | None = None) -> str:
    """`1 image`, `2 images`; with words for more than one, `1 answer is`, `2 answers are`.

    Args:
        more: left out, `one` with an s.
    """
    return f"{count} {one if count == 1 else more or one + 's'}"
