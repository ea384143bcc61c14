"""Reads a run directory and says what each policy did to the scores: page, figures, tables.

Writes into RUN/report/: report.html (one file, nothing from outside), the figures as PNG and SVG, and
CSV files with every number behind them. Answers are scored anew, so the report follows the tasks'
present rules. A run that is still going, or was stopped, is reported as far as it got.

    python -m vllm_flow.demo_model.datasets --out data
    vllm-flow eval --model demo --data data --tasks pope --policies baseline,cliff=4,cliff=16 --limit 20 \\
        --out runs/demo
    vllm-flow report runs/demo
    vllm-flow report --pack runs/demo

With `--pack`, writes RUN/pack/ instead: settings, versions, every question and answer, checksums of the data; what a
paper's appendix needs.

With several runs (two models, two checkpoints, two versions of vLLM, one method and a peer's), pairs each with one of
them, the reference, question by question, and writes REFERENCE/compare/comparison.html:

    vllm-flow report runs/a runs/b
    vllm-flow report runs/a runs/b runs/c --pair b
    vllm-flow report runs/ours runs/peer --against cliff=16

Runs that were asked other data or other words are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.options import resamples, seed, tolerance
from vllm_flow.unread_options import refuse_unread
from vllm_flow.user_text import parse_json

if TYPE_CHECKING:
    from vllm_flow.eval.report.results import Options, Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vllm-flow report`."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="what `vllm-flow eval --out` wrote; several are compared",
    )
    parser.add_argument(
        "--out", type=Path, help="where to write (default: RUN/report, RUN/pack or RUN/compare)"
    )
    parser.add_argument(
        "--pair",
        type=Path,
        metavar="RUN",
        help="of several runs: the reference, with which the others are paired (default: the first)",
    )
    parser.add_argument(
        "--against",
        metavar="POLICY",
        help="of several runs: pair every policy of the others with this one of the reference (default: with the one "
        "of the same name)",
    )
    parser.add_argument(
        "--pack", action="store_true", help="write what a paper's appendix needs, not a page"
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="POINTS",
        help="loss that counts as none, in points of the headline metric (not relative to it), such as 1%% or 0.5%% "
        "(default: what the run was begun with, else 1%%)",
    )
    parser.add_argument(
        "--resamples", type=resamples, default=2000, help="of the bootstrap (default: 2000)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of resampling and of the examples")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its core."""
    from vllm_flow.eval.report.results import Options
    from vllm_flow.exits import Refused

    several = len(args.runs) > 1
    if args.pack and several:
        raise Refused("--pack takes one run: give each its own command")
    if not several:
        refuse_unread(args, ("pair", "against"), "on one run: name the others too")
        check_read(args)
    accepted = args.tolerance or begun_with(args.runs)
    options = Options(tolerance=accepted, resamples=args.resamples, seed=args.seed)
    if several:
        from vllm_flow.eval.report.compare_command import compare

        return compare(args.runs, args.pair, args.against, args.out, options)
    (path,) = args.runs
    if args.pack:
        return pack(path, args.out or path / "pack", options)
    from vllm_flow.eval.report.terminal import show

    summary, page = write_report(path, args.out or path / "report", options)
    show(summary, options)
    print(f"\n{page}")
    return 0


def check_read(args: argparse.Namespace) -> None:
    """Refuse a tolerance for a run in which nothing is compared.

    Raises:
        Refused: says what would be; RunError: it is no run.
    """
    from vllm_flow.eval.sweep.records import Run
    from vllm_flow.eval.sweep.unread import compared

    if not compared(policy["name"] for policy in Run.open(args.runs[0]).meta.get("policies", [])):
        refuse_unread(
            args,
            ("tolerance",),
            "on a run without a baseline and another policy, which are compared: ask both by `vllm-flow eval`, or name "
            "a second run",
        )


def begun_with(runs: Sequence[Path]) -> float:
    """The tolerance that runs were begun with, a share; of older ones the default.

    Raises:
        RunError: one is no run.
        Refused: they were begun with different ones.
    """
    from vllm_flow.eval.report.results import Options
    from vllm_flow.eval.report.text import tolerance_text
    from vllm_flow.eval.sweep.records import Run
    from vllm_flow.exits import Refused

    found = [Run.open(path).meta.get("tolerance", Options.tolerance) for path in runs]
    if len(set(found)) > 1:
        told = " and ".join(map(tolerance_text, found))
        raise Refused(f"the runs were begun with tolerances of {told}; say which with --tolerance")
    return float(found[0])


def pack(path: Path, out: Path, options: Options) -> int:
    """Write a run's result pack and say where."""
    from vllm_flow.eval.report.pack import write_pack

    meta, items, _, answers, summary = summarised(path, out, options)
    files = write_pack(out, meta, items, summary, answers, options)
    print(f"{counted(len(files), 'file')} of the result pack: {out}")
    return 0


def summarised(
    path: Path, out: Path, options: Options
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[dict[str, Any]], Summary]:
    """What `run.json` says of a run, its items and tasks by name, its answers, and what they come to.

    Raises:
        RunError: there is no run, or it is damaged, or it has no items yet.
        OutputError: nothing could be written to ``out``, which is told before the work.
    """
    from vllm_flow.eval.report.summary import summarise
    from vllm_flow.eval.sweep.records import Run
    from vllm_flow.outputs import check_folder

    opened = Run.open(path)
    check_folder(out)
    items, tasks, unread = read_tasks(opened)
    refuse_empty(path, items, unread)
    answers = opened.answers().to_pylist()
    summary = summarise(opened.meta, items, answers, tasks, options, unread)
    return opened.meta, items, tasks, answers, summary


def refuse_empty(path: Path, items: Mapping[str, Any], unread: Mapping[str, str]) -> None:
    """RunError where there is nothing to report."""
    from vllm_flow.eval.sweep.records import RunError

    if not items:
        reasons = "; ".join(unread.values()) or "it has no items yet"
        raise RunError(f"{path}: nothing to report: {reasons}")


def write_report(path: Path, out: Path, options: Options | None = None) -> tuple[Summary, Path]:
    """Write the report of the run at `path` into the directory `out`; the summary and the page.

    Raises:
        RunError: there is no run, or it is damaged, or it has no items yet.
        OutputError: the report cannot be written.
    """
    from vllm_flow.eval.report.cost_page import equal_cost
    from vllm_flow.eval.report.figures import draw_all
    from vllm_flow.eval.report.page import write_page
    from vllm_flow.eval.report.results import Options
    from vllm_flow.eval.report.tables import write_tables

    options = options or Options(tolerance=begun_with([path]))
    meta, items, tasks, answers, summary = summarised(path, out, options)
    write_tables(summary, answers, out)
    figures = draw_all(summary, out, options)
    equal = equal_cost(path, meta, summary, items, tasks, answers, out, options)
    said = {
        (row["task"], row["policy"], row["item_id"]): row["answer"]
        for row in answers
        if row["answer"] is not None
    }
    page = out / "report.html"
    note = data_note(meta)
    write_page(page, summary, meta, items, said, figures, options, note, equal)
    return summary, page


def read_tasks(opened: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Items and tasks by name, and why the others cannot be had.

    A task is tried on an empty answer, so that missing language data is told before the work.
    """
    from vllm_flow.eval.sweep.records import RunError
    from vllm_flow.eval.tasks import get_task

    items: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    unread: dict[str, str] = {}
    for name in opened.meta.get("tasks", []):
        try:
            found, task = opened.items(name), get_task(name)
            if found:
                task.score(found[0], "a dog.")
        except (RunError, ValueError, KeyError, LookupError, RuntimeError) as error:
            unread[name] = str(error)
        else:
            items[name], tasks[name] = found, task
    return items, tasks, unread


def data_note(meta: Mapping[str, Any]) -> str | None:
    """What the data directory says of itself (`about.json`, "note"), if it is still there."""
    try:
        about = parse_json((Path(str(meta["data"])) / "about.json").read_text(encoding="utf-8"))
        return str(about["note"])
    except (KeyError, TypeError, OSError, ValueError):
        return None
