"""Asks benchmark questions under several policies, in the same engines, and keeps every answer.

    vllm-flow eval --model llava-hf/llava-1.5-7b-hf --data DATA --tasks pope,textvqa \\
        --policies baseline,cliff=8:24:4,text-only,downsample=16 --out runs/llava

Small, on the demo model and its own questions:

    python -m vllm_flow.demo_model.datasets --out data
    vllm-flow eval --model demo --data data --tasks pope --policies baseline,cliff=4,cliff=16 --limit 20 \\
        --out runs/demo

DATA has a folder per task (DATA/pope, DATA/textvqa). Each policy answers every question; an item's
policies run side by side, so that its picture is encoded once.

Nothing is lost: answers are written batch by batch. The same command again goes on where a run
was stopped or killed and asks nothing twice; with more policies, tasks or a larger --limit it extends the run. A
run with answers that were asked with other settings is refused. What cannot be answered (a missing picture,
a prompt that is too long) becomes an error row with the reason.

Exit status: 0 when every question has an answer under every policy, 3 when all were asked and some rows are
errors (0 with --errors-ok), 1 when stopped before, 2 when refused.

On several GPUs of one machine, one engine runs on each, or with --engine-args '{"tensor_parallel_size": 2}' on
each two. On a Ray cluster:

    ray job submit --address http://HEAD:8265 -- \\
        vllm-flow eval --model ... --data /shared/data --out /shared/runs/llava

or --ray-address from a machine of the cluster. Every machine needs this package, and the data and
the model under the same paths; only the driver's machine needs the run directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.options import count_or_never, gib, positive, seed, tolerance
from vllm_flow.remote_code import add_option as add_trust
from vllm_flow.user_text import NotJSON, parse_json

BATCH_ITEMS = 32
"""Items in a batch by default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vllm-flow eval`."""
    _add_questions(parser.add_argument_group("what is asked"))
    engine = parser.add_argument_group("the engines")
    engine.add_argument(
        "--engines",
        type=positive,
        help="default: one per GPU, or per tensor_parallel_size of --engine-args GPUs, else one",
    )
    engine.add_argument(
        "--ray-address", help="a Ray cluster (default: RAY_ADDRESS, else this machine)"
    )
    add_engine(engine)
    _add_running(parser.add_argument_group("running"))


def _add_questions(what: Any) -> None:
    from vllm_flow.eval.sweep import conversation, pictures
    from vllm_flow.eval.sweep.policies import SYNTAX
    from vllm_flow.eval.tasks import task_names
    from vllm_flow.eval.tasks.prompts import STYLES
    from vllm_flow.pictures import READINGS

    what.add_argument(
        "--model", required=True, help="directory, hub name, or `demo` for the demo model"
    )
    what.add_argument(
        "--tasks",
        required=True,
        type=_names,
        help=f"comma-separated: {', '.join(task_names())}; NAME-steps asks step by step".replace(
            "%", "%%"
        ),
    )
    what.add_argument("--data", required=True, type=Path, help="folder with one folder per task")
    what.add_argument("--policies", required=True, help=SYNTAX.replace("%", "%%"))
    what.add_argument("--out", required=True, type=Path, help="the run directory")
    what.add_argument(
        "--limit", type=positive, help="at most so many items per task, drawn with --seed"
    )
    what.add_argument("--seed", type=seed, default=0)
    what.add_argument(
        "--tolerance",
        type=tolerance,
        default=0.01,
        metavar="POINTS",
        help="loss that would count as none, in points of the headline metric (not relative to it), such as 0.5%%; "
        "before the run it is told how many questions that needs, and the report takes it (default: 1%%)",
    )
    conversation.add_option(what)
    what.add_argument(
        "--prompts",
        choices=STYLES,
        default="llava",
        help="wording of the questions: LLaVA-1.5's (default), or what the family's authors published, where the "
        "task has it",
    )
    pictures.add_option(what)
    what.add_argument(
        "--image-reading",
        choices=READINGS,
        default="server",
        help="as vLLM's server reads pictures: turned as EXIF says, transparency on white (default), or as "
        "stored, as LLaVA's and OPERA's scripts do",
    )


def _add_running(running: Any) -> None:
    running.add_argument(
        "--batch",
        type=positive,
        default=BATCH_ITEMS,
        help="items of a batch, which is retried and written as a whole; fewer where each is asked under many "
        f"policies (default: {BATCH_ITEMS})",
    )
    running.add_argument(
        "--max-errors",
        type=count_or_never,
        default=100,
        help="stop when more requests than that have failed, -1 for never (default: 100)",
    )
    running.add_argument(
        "--retry-errors", action="store_true", help="ask again what failed in this run before"
    )
    running.add_argument(
        "--time",
        type=positive,
        metavar="ROUNDS",
        help="afterwards time a prefill under every policy, for the report's axis of time",
    )
    running.add_argument(
        "--errors-ok", action="store_true", help="exit with 0, not 3, when some rows are errors"
    )


def add_engine(group: Any) -> None:
    """How an engine is started; the same for every command that asks one.

    Args:
        group: a parser, or a group of one.
    """
    add = group.add_argument
    add("--dtype", help="default: the checkpoint's; float32 for the demo model")
    add("--group-layers", type=positive, help="layers per storage group (default: the engine's)")
    add("--block-size", type=positive, help="tokens per KV block (default: 16, on CPU 32)")
    add_trust(group)
    add("--max-model-len", type=positive)
    add("--kv-cache-gib", type=gib, help="KV-cache pool of an engine")
    add(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, e.g. '{\"gpu_memory_utilization\": 0.8}'",
    )


def run(args: argparse.Namespace) -> int:
    """Run the evaluation: 0 when every request has its answer, 3 when some are errors, 1 when stopped,
    2 when refused."""
    from vllm_flow.eval.sweep.run import evaluate
    from vllm_flow.exits import SOME_ERRORS, Refused

    try:
        errors = evaluate(args)
    except ValueError as error:  # of data, tasks, policies and models
        raise Refused(str(error)) from error
    if not errors or args.errors_ok:
        return 0
    print(
        f"vllm-flow eval: {counted(errors, 'row is an error', 'rows are errors')}, so the exit status is "
        f"{SOME_ERRORS}: --retry-errors asks them again, --errors-ok takes them as they are.",
        file=sys.stderr,
    )
    return SOME_ERRORS


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list")
    return list(dict.fromkeys(names))


def json_object(text: str) -> dict[str, Any]:
    """An option's arguments of `vllm.LLM`, without those that have options of their own."""
    try:
        value = parse_json(text)
    except NotJSON as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    taken = {"model", "additional_config", "seed", "dtype", "block_size", "trust_remote_code"}
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('it must be a JSON object, like {"max_num_seqs": 64}')
    if taken & value.keys():
        name = min(taken & value.keys())
        raise argparse.ArgumentTypeError(f"{name!r} has an option of its own, or is fixed")
    return value
