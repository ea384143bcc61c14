"""Parameters of which a few stand for the rest: the others are marked, and run by ``make test-long``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import pytest

from tests.engine import v2_cpu

T = TypeVar("T")


def some(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The values as parameters of a test; those that are not ``kept`` carry the mark ``long``."""
    found = [
        value if value in kept else pytest.param(value, marks=pytest.mark.long) for value in values
    ]
    assert any(value in kept for value in values), "nothing is left for make test"
    return found


def long_under_v2(test: T) -> T:
    """A test that ``make test`` has under Model Runner V1 alone: V2's interpreter is slow."""
    return pytest.mark.long(test) if v2_cpu.wanted() else test
