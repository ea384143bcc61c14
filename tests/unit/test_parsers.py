"""A mistake on a command line gets one sentence that names it, and help states every default."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from vllm_flow.cli import COMMANDS, build_parser
from vllm_flow.parsers import Parser

REQUIRED = {
    "eval": ["--model", "m", "--tasks", "t", "--data", "d", "--policies", "p", "--out", "o"],
    "cliff": ["--model", "m", "--data", "d"],
    "demo": [],
}


@pytest.mark.parametrize(
    ("command", "wrong", "says"),
    [
        ("cliff", "--items", "did you mean --limit?"),
        ("cliff", "--tasks", "did you mean --task?"),
        ("eval", "--items", "did you mean --limit?"),
        ("eval", "--tolerence", "did you mean --tolerance?"),
        ("eval", "--limi", "did you mean --limit?"),
        ("demo", "--questions", "did you mean --limit?"),
        ("demo", "--zzzz", "unrecognized arguments: --zzzz 3; see"),
    ],
)
def test_an_option_that_a_command_lacks_is_its_own_error(
    command: str, wrong: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [command, *REQUIRED[command], wrong, "3"]
    with pytest.raises(SystemExit) as end:
        build_parser(argv).parse_args(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith(f"vllm-flow {command}: unrecognized arguments: {wrong} 3")
    assert says in line and line.endswith(f"see vllm-flow {command} --help")


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options_of(sub)
        else:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_every_default(command: str) -> None:
    parser = build_parser([command])._subparsers
    assert parser is not None
    [commands] = parser._group_actions
    assert isinstance(commands.choices, dict)
    one = commands.choices[command]
    formatter = one._get_formatter()
    for action in options_of(one):
        if (
            action.default in (None, argparse.SUPPRESS)
            or action.default is False
            or not action.help
        ):
            continue
        told = formatter._expand_help(action)
        assert "default" in told.lower(), (command, action.option_strings)


def test_defaults_are_written_as_a_user_would() -> None:
    parser = Parser(prog="p")
    parser.add_argument("--share", default="10%", help="a share")
    parser.add_argument("--several", nargs="*", default=[1, 2], help="some")
    parser.add_argument("--seed", type=int, default=0, help="of a draw")
    parser.add_argument("--none", nargs="*", default=[], help="of nothing")
    parser.add_argument("--flag", action="store_true", help="a flag")
    told = " ".join(parser.format_help().split())
    for line in ("a share (default: 10%)", "some (default: 1 2)", "of a draw (default: 0)"):
        assert line in told
    assert told.endswith("of nothing --flag a flag")


@pytest.mark.parametrize("command", ["eval", "cliff", "demo"])
def test_how_many_questions_are_asked_has_one_name(command: str) -> None:
    args = build_parser([command]).parse_args([command, *REQUIRED[command], "--limit", "3"])
    assert args.limit == 3
    for other in ("--items", "--questions"):
        with pytest.raises(SystemExit):
            build_parser([command]).parse_args([command, *REQUIRED[command], other, "3"])
