"""The command line: what it accepts, and that it says what it refuses."""

from __future__ import annotations

import argparse

import pytest

from vllm_flow import __version__
from vllm_flow.cli import COMMANDS, build_parser, main
from vllm_flow.demo.command import whole_numbers


def test_whole_numbers() -> None:
    assert whole_numbers("0,4,30") == (0, 4, 30)
    assert whole_numbers("7") == (7,)
    assert whole_numbers("0:8:2") == (0, 2, 4, 6, 8)
    assert whole_numbers("3:5") == (3, 4, 5)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1:2:3:4", "0:8:0", "1.5"])
def test_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither a list like"):
        whole_numbers(text)


def test_demo_defaults() -> None:
    args = build_parser(["demo"]).parse_args(["demo"])
    assert args.model is None
    assert str(args.out) == "out/demo"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"vllm-flow {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert f"usage: vllm-flow {name}" in shown
    assert COMMANDS[name].load().__doc__.splitlines()[0] in shown


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
