"""An option that a command would not read, as it was called, is refused; defaults and the others are not."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from vllm_flow import cli
from vllm_flow.analysis import pointing
from vllm_flow.exits import REFUSED, Refused
from vllm_flow.unread_options import parse, refuse_unread


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    commands = made.add_subparsers(dest="command", required=True)
    one = commands.add_parser("one")
    one.add_argument("file", nargs="?", default="x")
    one.add_argument("--share", type=float, default=0.5)
    one.add_argument("--all-of-it", action="store_true")
    return made


def test_what_was_written_is_known_also_where_it_is_the_default() -> None:
    args = parse(parser(), ["one", "--share", "0.5"])
    assert args.given == {"command", "share"} and args.all_of_it is False and args.file == "x"
    again = parser()
    assert parse(again, ["one", "y", "--all"]).given == {"command", "file", "all_of_it"}
    # The parser is as it was.
    assert vars(again.parse_args(["one"])) == {
        "command": "one", "file": "x", "share": 0.5, "all_of_it": False,
    }  # fmt: skip


def test_what_was_not_written_is_not_refused() -> None:
    args = parse(parser(), ["one", "--all-of-it"])
    refuse_unread(args, ("share", "file"), "here")
    refuse_unread(argparse.Namespace(share=1), ("share",), "here")  # not of the command line
    with pytest.raises(Refused, match="^--all-of-it has no effect beside that; leave it out$"):
        refuse_unread(args, ("share", "all_of_it"), "beside that")


CLIFF = "cliff --model m --data {0} --out {0}/c.json"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (f"{CLIFF} --unlabelled --tolerance 1%", "--tolerance has no effect with --unlabelled"),
        (f"{CLIFF} --unlabelled --exhaustive", "--exhaustive has no effect with --unlabelled"),
        (f"{CLIFF} --kl-threshold 0.1", "--kl-threshold has no effect without --unlabelled"),
        (f"{CLIFF} --kl-rule upper", "--kl-rule has no effect without --unlabelled"),
        (f"{CLIFF} --no-attention --mass-share 5%", "--mass-share has no effect with --no-att"),
        (f"{CLIFF} --stages fastv --mass-share 5%", "--mass-share has no effect with --stages"),
        (
            f"{CLIFF} --data {{0}}/q.jsonl --unlabelled --prompts llava",
            "--prompts has no effect on a file",
        ),
        ("cam --image x --prompt y --samples 0 --sigma 0.2", "--sigma has no effect with --sam"),
        ("cam --image x --prompt y --samples 0 --seed 0", "--seed has no effect with --samples 0"),
        ("cam --image x --prompt y --answer z --max-tokens 8", "--max-tokens has no effect with"),
        ("models --trust-remote-code", "--trust-remote-code has no effect without a model"),
        ("doctor --trust-remote-code", "--trust-remote-code has no effect without --model"),
    ],
)
def test_commands_refuse_what_they_would_not_read(
    tmp_path: Path, words: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text("{}\n")
    assert cli.main(words.format(tmp_path).split()) == REFUSED
    said = capsys.readouterr().err
    assert option in said and "leave it out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_the_pointing_game_does_too() -> None:
    with pytest.raises(Refused, match="--sigma has no effect without noisy copies"):
        pointing.main(["--sigma", "0.1"])


@pytest.mark.parametrize(
    ("words", "rounds"),
    [("--quick", 2), ("", 5), ("--quick --rounds 4", 4), ("--rounds 0", 0), ("--quick --rounds 0", 0)],
)  # fmt: skip
def test_the_demos_rounds_are_those_that_were_asked_for(words: str, rounds: int) -> None:
    from vllm_flow.demo.command import rounds_of

    argv = ["demo", *words.split()]
    assert rounds_of(cli.build_parser(argv).parse_args(argv)) == rounds
