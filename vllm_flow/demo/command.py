"""Serves a vision-language model and asks it about pictures while its image tokens are evicted.

Model, engine, questions, times, results, in this order: a range of cliffs, and policies beside them, per
request, in one engine; table, figure and page in the folder of results.

    vllm-flow demo --quick
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from vllm_flow import user_text
from vllm_flow.counts import counted
from vllm_flow.demo import material, results_figure, results_page, results_table
from vllm_flow.demo.kinds import HEADLINE
from vllm_flow.demo.measurements import Answer, Question, Results, Setting
from vllm_flow.demo.next_steps import next_steps
from vllm_flow.demo.policies import read_policies
from vllm_flow.demo.results_page import spread_over
from vllm_flow.demo.rows import summarise
from vllm_flow.demo.serving import Asker, EngineOptions, full_grid, start_engine
from vllm_flow.demo_model.naming import DEMO, resolve_model
from vllm_flow.engine.process import quieten
from vllm_flow.eval.sweep.command import add_engine
from vllm_flow.eval.sweep.model_facts import read_shape
from vllm_flow.eval.sweep.policies import PolicySpecError
from vllm_flow.exits import CommandError, Refused, keeping
from vllm_flow.model_names import UnreadModel
from vllm_flow.options import count, positive
from vllm_flow.outputs import check_folder
from vllm_flow.policy import FlowPolicy

QUESTIONS = 24
"""Yes/no questions by default; the other kinds have their share of it."""
FEW_CLIFFS = 6
"""Cliffs, spread over the range, at which kinds are asked that are not asked at all of them."""
STEP = 3
"""Layers between two cliffs; the demo model's storage groups have as many."""
TIMED_BATCH = 2
"""Yes/no questions in a batch whose prefill is timed."""
CONTEXT = 1024
"""Tokens of a request to a model of one's own; the demo model's are half as long."""
WIDTH = 144
"""Least width of the output, so that a row of the table stays one line when it is piped."""
UNBOUNDED = 10_000
"""Characters; wider than any table."""


def default_cliffs(num_layers: int, quick: bool) -> list[int]:
    """Every third layer, in the shallow half every sixth; about six values for a quick look.

    The baseline is left out. Most kinds of questions still need the picture in the shallow half.
    """
    if quick:
        return list(range(0, num_layers, max(STEP, num_layers // 6)))
    half = num_layers // 2
    return [
        cliff for cliff in range(0, num_layers, STEP) if cliff >= half or cliff % (2 * STEP) == 0
    ]


def whole_numbers(text: str) -> tuple[int, ...]:
    """`0,4,30` or `0:30:2` (both ends included) as a tuple, for --cliffs."""
    found = user_text.whole_numbers(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a list like 0,4,30 nor a range like 0:30:2"
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-flow demo``."""
    parser.add_argument("--model", help="directory or hub name (default: demo, the demo model)")
    parser.add_argument(
        "--cliffs",
        type=whole_numbers,
        help="layers that see the whole image, as 0,4,30 or 0:30:2 (default: every third layer, "
        "in the shallow half every sixth)",
    )
    parser.add_argument(
        "--policies",
        metavar="TEXT",
        help="what every question is asked under beside the cliffs: policies as in `vllm-flow eval`, such as "
        "'fastv,0:1/3 uniform,budget=1/3 cliff diversity'; pictures stay as they are",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        help=f"at most so many yes/no questions (default: {QUESTIONS}); other kinds have their share of it",
    )
    parser.add_argument(
        "--rounds", type=count, help="rounds of prefill timing (default: 5; 2 with --quick)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where results go")
    parser.add_argument("--quick", action="store_true", help="few questions, cliffs and rounds")
    add_engine(
        parser.add_argument_group(
            "the engine", f"as in `vllm-flow eval`; --max-model-len is {CONTEXT} if left out"
        )
    )


def run(args: argparse.Namespace) -> int:
    """Run the whole demo; the exit status."""
    console = Console(highlight=False)
    if console.width < WIDTH:
        console.width = WIDTH
    started = time.monotonic()
    if args.model == DEMO:
        args.model = None
    check_folder(args.out)
    quieten(offline=args.model is None)
    build = prompt_of(args)
    options = engine_options(args, console)
    check_asked(args, options)
    questions = material.held_out(
        args.limit or (16 if args.quick else QUESTIONS), args.out / "questions"
    )
    console.print("starting vLLM with the extension (about 20 s)")
    try:
        llm, engine = start_engine(options)
    except (ValueError, OSError) as error:  # as vLLM refuses models and settings
        raise CommandError(f"{options.model} cannot be served: {error}") from error
    cliffs, policies = settings_of(args, engine.num_layers, full_grid(llm))
    asker = Asker(llm, engine, build, policies)
    beside = f" and under {counted(len(policies), 'policy', 'policies')}" if policies else ""
    console.print(
        f"{counted(len(questions), 'question')} of {counted(len({q.kind for q in questions}), 'kind')} at "
        f"{counted(len(cliffs), 'cliff')} each (captions at {min(len(cliffs), FEW_CLIFFS)}){beside}, mixed in one "
        f"engine ({counted(engine.num_layers, 'layer')}, {counted(len(engine.group_starts), 'storage group')})"
    )
    results, written = ask(asker, questions, cliffs, rounds_of(args), args.out, console)
    show(console, results, written, time.monotonic() - started)
    next_steps(console, options, questions[0], args.model is None)
    return 0


def rounds_of(args: argparse.Namespace) -> int:
    """Rounds of prefill timing."""
    if args.rounds is not None:
        return int(args.rounds)
    return 2 if args.quick else 5


def prompt_of(args: argparse.Namespace) -> Callable[[str], str]:
    """What makes a prompt of a question.

    Raises:
        Refused: none can be made for the model, or only by code that may not run.
    """
    if args.model is None:
        return material.demo_prompt()
    try:
        return material.template_prompt(args.model, args.trust_remote_code)
    except ValueError as error:
        raise Refused(str(error)) from error


def settings_of(
    args: argparse.Namespace, num_layers: int, grid: int | None
) -> tuple[list[int], dict[str, FlowPolicy]]:
    """Ascending cliffs with the baseline at the end, and policies by name.

    Raises:
        Refused: one of them does not fit the model, or is none.
    """
    try:
        asked = read_policies(args.policies, num_layers, grid)
    except PolicySpecError as error:
        raise Refused(f"--policies: {error}") from error
    chosen = args.cliffs or default_cliffs(num_layers, args.quick)
    cliffs = sorted({*chosen, *asked.cliffs, num_layers})
    if wrong := [cliff for cliff in cliffs if not 0 <= cliff <= num_layers]:
        raise Refused(
            f"--cliffs {wrong[0]}: this model has {num_layers} decoder layers; write numbers from 0 to {num_layers}"
        )
    return cliffs, asked.policies


def check_asked(args: argparse.Namespace, options: EngineOptions) -> None:
    """Refuse cliffs and policies that do not fit the model, before an engine is there to ask.

    Raises:
        Refused: see :func:`settings_of`; or the model cannot be read.
    """
    if "hf_overrides" in options.engine_args:
        return  # what the model then is, its engine knows
    try:
        num_layers, grid = read_shape(options.model, options.trust_remote_code)
    except ValueError as error:
        raise Refused(str(error)) from error
    settings_of(args, num_layers, grid)


def ask(
    asker: Asker,
    questions: list[Question],
    cliffs: list[int],
    rounds: int,
    out: Path,
    console: Console,
) -> tuple[Results, list[Path]]:
    """Time, ask, and write what is known after each step; the results and their files."""
    speedups = asker.time_prefill(timed_batch(questions), cliffs, rounds) if rounds else {}
    answers: list[Answer] = []
    told: list[Setting] = []
    kept = "cliffs and policies" if asker.policies else "cliffs"
    with keeping(lambda: f"{len(told)} {kept} are in {out}" if told else None):
        for done, found in asker.ask(questions, cliffs, spread_over(cliffs, FEW_CLIFFS)):
            answers += found
            results = summarise(asker.engine, questions, answers, speedups, asker.policies)
            write_numbers(results, out)
            told += done
            for row in (*reversed(results.rows), *results.policies):
                if row.setting in done:
                    console.print(results_table.line(row, results), soft_wrap=True)
        return results, write_all(results, out)


def engine_options(args: argparse.Namespace, console: Console) -> EngineOptions:
    """The engine's options; assembles the demo model where no other is named."""
    pool = None if args.kv_cache_gib is None else int(args.kv_cache_gib * 2**30)
    if args.model is not None:
        return EngineOptions(
            model=resolve_model(args.model),
            dtype=args.dtype or "auto",
            group_layers=args.group_layers,
            max_model_len=args.max_model_len or CONTEXT,
            kv_cache_bytes=pool,
            block_size=args.block_size or smallest_block(),
            trust_remote_code=args.trust_remote_code,
            engine_args=args.engine_args,
        )
    console.print("assembling the demo model (kept in a cache after the first time)")
    try:
        path = resolve_model(DEMO)
    except UnreadModel as error:
        raise CommandError(str(error)) from error
    return EngineOptions(
        model=path,
        dtype=args.dtype or "float32",
        group_layers=args.group_layers or STEP,
        max_model_len=args.max_model_len or CONTEXT // 2,
        kv_cache_bytes=pool or 2**30,
        block_size=args.block_size or 32,  # vLLM's smallest on CPU; its default would hold a prompt
        engine_args=args.engine_args,
    )


def smallest_block() -> int:
    """Tokens of vLLM's smallest KV-cache block on this machine."""
    import torch

    return 16 if torch.cuda.is_available() else 32


def timed_batch(questions: list[Question]) -> list[Question]:
    """The first questions of the headline kind, which have a picture each."""
    return [question for question in questions if question.kind == HEADLINE][:TIMED_BATCH]


def write_all(results: Results, out: Path) -> list[Path]:
    """Write every result file; return their paths, the page first."""
    png, svg = results_figure.draw(results, out)
    results_page.write_page(results, svg, out / "index.html")
    return [out / "index.html", png, svg, *write_numbers(results, out)]


def write_numbers(results: Results, out: Path) -> list[Path]:
    """Write what is known so far as JSON and CSV; return their paths."""
    results_table.write_json(results, out / "results.json")
    results_table.write_csv(results, out / "results.csv")
    return [out / "results.csv", out / "results.json"]


def show(console: Console, results: Results, written: list[Path], seconds: float) -> None:
    """Print the table, what its columns mean and where the files are."""
    table = results_table.table(results)
    # A policy's name may be long; a row of the table stays one line.
    unbounded = console.options.update(max_width=UNBOUNDED)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print()
    console.print(table)
    for note in results_table.notes(results):
        console.print(note, soft_wrap=True)
    console.print(f"\nDone in {seconds:.0f} s. Written:")
    for path in written:
        console.print(f"  {path}", soft_wrap=True)
