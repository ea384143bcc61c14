"""Finds how many layers must see the image so that a task loses no more than you tolerate.

    vllm-flow cliff --model llava-hf/llava-1.5-7b-hf --data DATA --task pope \\
        --tolerance 1% --confidence 95% --out cliff.json

Small, on the demo model and its own questions:

    python -m vllm_flow.demo_model.datasets --out data
    vllm-flow cliff --model demo --data data --task pope --unlabelled --limit 8 --out cliff.json

DATA has a folder per task (DATA/pope), as for `vllm-flow eval`. The answer is the smallest layer found
whose loss of the task's headline score against the baseline is shown to be within the tolerance:
the upper limit of the paired loss is at most the tolerance, at the given confidence.

A quarter of the questions, by picture, explores: bisection over the layers, with small batches first.
The rest confirms: from a few layers deeper than the proposed one down, one test each on all of them, at
the full confidence, until one fails; the last that passed is the answer. So the answer loses more than
the tolerance with a probability of at most 1 - confidence, whatever the curve looks like; that it is the
smallest such layer is likely, not guaranteed. It costs a fraction of asking everything at every layer.

--stages "0:50% uniform" (or a preset's name) searches over the cliff behind these stages; --cliff 20 --rank
diversity over the share of tokens kept up to that cliff, in sixteenths. What is said of layers holds of these
rungs, and the profile has the keys of the policy that was found. Attention is left out.

--unlabelled needs no labels: on a few dozen questions, the divergence KL(baseline || cliff) of the first
answer token's distribution over the whole vocabulary, layer by layer; the answer is the smallest layer
from which on it stays at or below --kl-threshold. DATA may then be a file of JSON lines with "text" and
"image". It says how far answers move, not whether they become worse.

Answers are kept as they come (--answers): killed, the same command goes on from them, and another --tolerance
reads them too.

The file takes one task after the other. A server reads it:

    vllm serve ... --additional-config '{"vllm_flow": {"default_policy": {"profile": "cliff.json"}}}'

and gives a request the cliff of the task it names, "vllm_xargs": {"flow_task": "pope"}; with --default TASK one
that names none gets that task's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.options import positive, positive_number, seed, tolerance
from vllm_flow.unread_options import refuse_unread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vllm-flow cliff`."""
    from vllm_flow.eval.sweep.command import add_engine

    _add_questions(parser.add_argument_group("what is asked"))
    _add_ladder(parser.add_argument_group("what is searched over (default: the cliff)"))
    _add_rule(parser.add_argument_group("the rule"))
    add_engine(parser.add_argument_group("the engine"))
    _add_results(parser.add_argument_group("what comes out"))


def _add_questions(what: Any) -> None:
    from vllm_flow.eval.sweep import conversation, pictures
    from vllm_flow.eval.tasks import task_names
    from vllm_flow.eval.tasks.prompts import STYLES
    from vllm_flow.pictures import READINGS

    what.add_argument("--model", required=True, help="directory, hub name, or `demo`")
    what.add_argument("--data", required=True, type=Path, help="folder with one folder per task")
    what.add_argument(
        "--task",
        default="pope",
        help=f"{', '.join(task_names())} (default: pope); the file's tag".replace("%", "%%"),
    )
    what.add_argument(
        "--limit",
        type=positive,
        help="at most so many questions, spread over the pictures (default: all; with --unlabelled 32)",
    )
    what.add_argument("--seed", type=seed, default=0, help="decides the order of the questions")
    conversation.add_option(what)
    what.add_argument(
        "--prompts",
        choices=STYLES,
        default="llava",
        help="of tasks that have several (default: llava)",
    )
    pictures.add_option(what, "; a file's pictures are left alone")
    what.add_argument(
        "--image-reading",
        choices=READINGS,
        default="server",
        help="of picture files, as vLLM's server reads them (default), or as stored",
    )


def _add_ladder(over: Any) -> None:
    from vllm_flow.eval.sweep.command import positive
    from vllm_flow.ranks import RANKS

    over.add_argument(
        "--stages",
        metavar="TEXT",
        help='the cliff behind these, such as "0:50%% uniform", or a preset',
    )
    over.add_argument("--cliff", type=positive, help="with --rank: the share kept up to this cliff")
    over.add_argument(
        "--rank", choices=tuple(RANKS), help="with --cliff: what chooses the tokens kept"
    )


def _add_rule(rule: Any) -> None:
    rule.add_argument(
        "--tolerance",
        type=tolerance,
        default=0.01,
        metavar="POINTS",
        help="points of the headline score that may be lost (not relative to it), such as 0.5%% (default: 1%%)",
    )
    rule.add_argument("--confidence", type=_confidence, default=0.95, help="default: 95%%")
    rule.add_argument("--unlabelled", action="store_true", help="by divergence, without labels")
    rule.add_argument(
        "--kl-threshold",
        type=positive_number,
        default=0.003,
        help="in nats (default: 0.003, VTW's for LLaVA-1.5-7B)",
    )
    rule.add_argument(
        "--kl-rule",
        choices=("mean", "upper"),
        default="upper",
        help="what must stay below it: the mean, as in VTW, or its upper limit (default)",
    )
    rule.add_argument(
        "--mass-share",
        type=_share,
        default=0.1,
        help="share of attention on the image for the comparison with attention alone (default: 10%%)",
    )


def _add_results(out: Any) -> None:
    out.add_argument(
        "--out", type=Path, default=Path("cliff.json"), help="the profile (default: cliff.json)"
    )
    out.add_argument(
        "--default",
        metavar="TASK",
        help="of the file's tasks: whose policy requests get that name none (default: the only one's; with several, "
        "no policy)",
    )
    out.add_argument(
        "--answers",
        type=Path,
        metavar="DIR",
        help="where answers are kept, from which the same command goes on after a stop (default: beside --out)",
    )
    out.add_argument(
        "--exhaustive",
        action="store_true",
        help="afterwards ask everything at every layer, and say what that sweep finds",
    )
    out.add_argument(
        "--no-attention",
        action="store_true",
        help="leave out what attention alone would say (left out under tensor or pipeline parallelism)",
    )


def run(args: argparse.Namespace) -> int:
    """Find the cliff: 0 when the profile is written, 1 when stopped, 2 when refused."""
    from vllm_flow.cliff_file import (
        ProfileError,
        check_default,
        lacks_default,
        load_profile,
        merged,
        with_default,
        write_profile,
    )
    from vllm_flow.eval.cliff import figure, table
    from vllm_flow.eval.cliff.record import folder_of
    from vllm_flow.exits import Refused, keeping
    from vllm_flow.outputs import check_file, check_folder

    check_read(args)
    check_file(args.out)
    folder = folder_of(args)
    check_folder(folder, f"--answers {folder}")

    begun: list[bool] = []  # before that another command is what it takes
    going = f"the same command goes on from what is in {folder}"
    with keeping(lambda: going if begun else None):
        try:
            before = load_profile(args.out)[1] if args.out.exists() else None
            check_default(before, args.task, args.default)
            from vllm_flow.eval.cliff.find import find

            found = find(args, before, lambda: begun.append(True))
            content = with_default(merged(before, found), args.default)
        except ProfileError as error:
            raise Refused(f"{args.out}: {error}") from error
        except ValueError as error:  # of data, tasks and models
            raise Refused(str(error)) from error
        write_profile(args.out, content)
        entry, num_layers = found["tasks"][args.task], found["num_layers"]
        table.show(args.task, entry, num_layers)
        figures = figure.draw(args.task, entry, num_layers, args.out)
    if lacks_default(content):
        print(
            f"{args.out} has {counted(len(content['tasks']), 'task')} and no default: "
            "requests that name no task get no policy. --default TASK gives them a task's."
        )
    print(f"Written: {args.out}, {', '.join(str(path) for path in figures)}")
    return 0


def check_read(args: argparse.Namespace) -> None:
    """Refuse options that this kind of search does not read.

    Raises:
        Refused: names the first of them.
    """
    from vllm_flow.eval.sweep.engine_args import workers_of
    from vllm_flow.eval.sweep.unread import check_said_once

    if args.unlabelled:
        refuse_unread(
            args, ("tolerance", "exhaustive"), "with --unlabelled, which has --kl-threshold"
        )
        if args.data.is_file():
            refuse_unread(args, ("prompts",), "on a file of questions, which are asked as they are")
    else:
        refuse_unread(args, ("kl_threshold", "kl_rule"), "without --unlabelled")
    check_said_once(args)
    _check_prompts(args)
    if args.no_attention:
        refuse_unread(args, ("mass_share",), "with --no-attention")
    elif workers_of(args.engine_args) > 1:
        refuse_unread(
            args,
            ("mass_share",),
            "under tensor or pipeline parallelism, where attention is left out",
        )
    elif args.stages is not None or args.cliff is not None:
        refuse_unread(
            args, ("mass_share",), "with --stages or --cliff, beside which attention is left out"
        )


def _check_prompts(args: argparse.Namespace) -> None:
    """Refuse prompts of a family for a task of which it published none."""
    from vllm_flow.eval.tasks import get_task
    from vllm_flow.exits import Refused

    if args.data.is_file() or args.prompts == "llava":
        return
    try:
        task = get_task(args.task)
    except ValueError as error:
        raise Refused(str(error)) from error
    if task.asked_as(args.prompts) is task:
        refuse_unread(args, ("prompts",), f"on {args.task}, which is asked in one wording")


def _share(text: str) -> float:
    """`0.5%` or `0.005`."""
    value = _number(text)
    if value is None or not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share between 0 and 1; write 0.5% or 0.005"
        )
    return value


def _confidence(text: str) -> float:
    value = _number(text)
    if value is None or not 0.5 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no confidence between 50% and 100%, both left out; write 95% or 0.95"
        )
    return value


def _number(text: str) -> float | None:
    """A number, or one of percent; None for other texts."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
