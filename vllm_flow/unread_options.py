"""Options that a command would pass over as it was called are refused: nothing is ignored silently. (pure)

A value cannot tell whether a user wrote it or it is the default, so what was written is found out by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_flow.exits import Refused

GIVEN = "given"
"""On a command's arguments: the names of those that its user wrote."""


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """A command's arguments, with the names of those that stand in `argv`, and as `argv` what follows its name."""
    args = parser.parse_args(argv)
    with _without_defaults(parser):
        given = frozenset(vars(parser.parse_args(argv)))
    setattr(args, GIVEN, given)
    args.argv = tuple(argv[1:])
    return args


def refuse_unread(args: argparse.Namespace, names: Sequence[str], beside: str) -> None:
    """Refuse options that have no effect as the command was called.

    Args:
        names: as `args` has them.
        beside: why: ``with --unlabelled, which needs no labels``.

    Raises:
        Refused: names the first of them that was written.
    """
    for name in names:
        if name in getattr(args, GIVEN, ()):
            option = f"--{name.replace('_', '-')}"
            raise Refused(f"{option} has no effect {beside}; leave it out")


@contextmanager
def _without_defaults(parser: argparse.ArgumentParser) -> Iterator[None]:
    """While this is open, the parser's arguments are set only where they are written."""
    actions = list(_actions(parser))
    before = [action.default for action in actions]
    try:
        for action in actions:
            action.default = argparse.SUPPRESS
        yield
    finally:
        for action, default in zip(actions, before, strict=True):
            action.default = default


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)
