"""An option that a command would not read, as it was called, is refused; defaults and the others are not."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_flow import cli
from vllm_flow.analysis import pointing
from vllm_flow.exits import REFUSED, Refused
from vllm_flow.profile.presets import PRESETS
from vllm_flow.profile.unread import check_read as check_profile
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


EVAL = "eval --model m --data {0} --tasks pope --policies baseline --out {0}/run"
PROFILE = "profile --shape layers=2 --out {0}/p"
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
        (
            f"{CLIFF} --task realworldqa --prompts qwen-vl",
            "--prompts has no effect on realworldqa, which is asked in one wording",
        ),
        (
            f'{CLIFF} --mass-share 5% --engine-args {{{{"tensor_parallel_size":2}}}}',
            "--mass-share has no effect under tensor or pipeline parallelism",
        ),
        (
            f'{CLIFF} --max-model-len 9 --engine-args {{{{"max_model_len":8}}}}',
            "--max-model-len has no effect beside 'max_model_len' in --engine-args",
        ),
        (
            f'{EVAL} --kv-cache-gib 1 --engine-args {{{{"kv_cache_memory_bytes":8}}}}',
            "--kv-cache-gib has no effect beside 'kv_cache_memory_bytes' in --engine-args",
        ),
        (f"{PROFILE} --parts prefill --ttft-ms 5", "--ttft-ms has no effect without load among"),
        (f"{PROFILE} --parts load,capacity --batch 4", "--batch has no effect without prefill or"),
        (f"{PROFILE} --parts capacity --rounds 3", "--rounds has no effect without prefill or"),
        (f"{PROFILE} --parts prefill --decode-batch 1", "--decode-batch has no effect without"),
        (f"{PROFILE} --peer-cliff cliff=2", "--peer-cliff has no effect without peers among"),
        (f"{PROFILE} --parts peers --policies fastv", "--policies has no effect without"),
        (f"{PROFILE} --parts peers --guard", "--guard has no effect without prefill or load or"),
        (f"{PROFILE} --load-format dummy", "--load-format has no effect on a shape"),
        (
            "profile --model shape:layers=2 --out {0}/p --trust-remote-code",
            "--trust-remote-code has no effect on a shape, which has no checkpoint",
        ),
        (
            "profile --preset long --out {0}/p --ttft-ms 5",
            "--ttft-ms has no effect with --preset long, which measures decode",
        ),
        (
            "profile --preset quick --out {0}/p --load-format auto",
            "--load-format has no effect with --preset quick, which is of a shape",
        ),
        ("cam --image x --prompt y --samples 0 --sigma 0.2", "--sigma has no effect with --sam"),
        ("cam --image x --prompt y --samples 0 --seed 0", "--seed has no effect with --samples 0"),
        ("cam --image x --prompt y --answer z --max-tokens 8", "--max-tokens has no effect with"),
        ("models --trust-remote-code", "--trust-remote-code has no effect without a model"),
        ("doctor --trust-remote-code", "--trust-remote-code has no effect without --model"),
    ],
)
def test_commands_refuse_what_they_would_not_read(
    tmp_path: Path,
    words: str,
    option: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("vllm_flow.profile.session.profile", begun)
    monkeypatch.setattr("vllm_flow.profile.command.subprocess", SimpleNamespace(Popen=begun))
    (tmp_path / "q.jsonl").write_text("{}\n")
    assert cli.main(words.format(tmp_path).split()) == REFUSED
    said = capsys.readouterr().err
    assert option in said and re.search("leave (it|one of the two) out", said)
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


RUN = {"policies": [{"name": "cliff=4"}]}
"""A run that has one policy."""


@pytest.mark.parametrize(
    ("words", "policies", "before", "option"),
    [
        ("--tolerance 1%", ("cliff=8",), None, "--tolerance has no effect without a baseline"),
        ("--tolerance 1%", ("baseline",), None, "ask both (--policies baseline,...)"),
        ("--tolerance 1%", ("cliff=8",), RUN, "--tolerance"),
        ("--tolerance 1%", ("baseline",), RUN, None),
        ("--tolerance 1%", ("baseline", "cliff=8"), None, None),
        ("--time 2", ("cliff=8", "cliff=4"), None, "--time has no effect without the baseline"),
        ("--time 2", ("baseline",), None, None),
        ("--seed 0", ("baseline",), None, "--seed has no effect without --limit"),
        ("--seed 0 --limit 5", ("baseline",), None, None),
        ("--seed 0 --time 5", ("baseline",), None, None),
        ("--seed 0", ("baseline",), RUN, None),
        ("", ("cliff=8",), None, None),
    ],
)
def test_what_an_evaluation_reads_depends_on_its_policies_and_on_its_run(
    words: str, policies: tuple[str, ...], before: dict[str, object] | None, option: str | None
) -> None:
    from vllm_flow.eval.sweep.unread import check_read

    argv = f"{EVAL} {words}".split()
    args = parse(cli.build_parser(argv), argv)
    if option is None:
        check_read(args, policies, before)
        return
    with pytest.raises(Refused, match=re.escape(option)):
        check_read(args, policies, before)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_reads_its_own_options(preset: str) -> None:
    for _, line in PRESETS[preset]:
        argv = ["profile", *shlex.split(line)]
        check_profile(parse(cli.build_parser(argv), argv))


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
