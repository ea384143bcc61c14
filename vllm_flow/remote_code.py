"""Code that comes with a model: the option that lets it run, and one sentence where it is missing. (pure)"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OPTION = "--trust-remote-code"

_NEEDED = re.compile(r"custom code|requires you to execute")
"""Of transformers' refusals, whichever of its classes finds code beside a configuration, a tokenizer or a
processor. vLLM's own advice to allow code is no sign: it is given for models without code as well."""


def add_option(group: Any, what: str = "a model") -> None:
    """Declare the option in a parser or a group of one; ``what`` brings the code."""
    group.add_argument(
        OPTION,
        action="store_true",
        help=f"{what} that brings its configuration, tokenizer or processor as code: run that code",
    )


def refusal(error: BaseException | None) -> str | None:
    """What to say of a model whose loading failed for lack of the option; None where it failed otherwise.

    vLLM raises errors of its own from transformers', so the whole chain of causes is read.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if _NEEDED.search(str(error)):
            return (
                "it brings code of its own, which runs only if you say so: look at its Python files, "
                f"then add {OPTION}."
            )
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def named() -> Iterator[None]:
    """Raise :func:`refusal`'s sentence, as a ``ValueError``, in the place of an error that it is about."""
    try:
        yield
    except Exception as error:
        if needed := refusal(error):
            raise ValueError(needed) from None
        raise
