"""Parsers of command lines: a mistake gets one sentence, help states every default. (standard library only)"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

ALIKE = (
    ("--limit", "--items", "--questions"),
    ("--tasks", "--task"),
    ("--data", "--labels", "--annotations"),
    ("--answers", "--captions"),
    ("--cliffs", "--cliff", "--policies"),
)
"""Options of different commands for much the same thing."""


class Help(argparse.RawDescriptionHelpFormatter):
    """States the default of each option whose help does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        without = default is None or default is False or default == argparse.SUPPRESS
        if not text or "default" in text.lower() or without:
            return text
        values = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(str(value) for value in values)
        return f"{text} (default: {shown.replace('%', '%%')})" if shown else text


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations of options, which would be others' as soon as there are more of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": Help, **kwargs})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """All arguments are known: those of a sub-command that are not are its own error, not the whole's."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End with the message and where help is, without pages of usage before it."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _meant(self, written: str) -> str:
        name = written.partition("=")[0]
        known = self._option_string_actions
        alike = [other for names in ALIKE if name in names for other in names if other in known]
        close = alike or get_close_matches(name, known, n=1)
        return f"; did you mean {close[0]}?" if close else ""
