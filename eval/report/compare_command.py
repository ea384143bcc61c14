"""`vllm-flow report A B ...`, from directories to a page, figures and tables, in one readable order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_flow.eval.report.matching import Side, labels, shared_questions
from vllm_flow.eval.tasks.reading import few
from vllm_flow.exits import Refused
from vllm_flow.outputs import real

if TYPE_CHECKING:
    from vllm_flow.eval.report.comparison import Comparison
    from vllm_flow.eval.report.results import Options


def compare(
    paths: Sequence[Path],
    reference: Path | None,
    against: str | None,
    out: Path | None,
    options: Options,
) -> int:
    """Compare runs with one of them; print and write what was found.

    Args:
        reference: one of `paths`, or the end of one that no other has; None for the first.
        against: the reference's policy that all policies of the others are paired with; None for their likes.
        out: None for `compare` in the reference's directory.

    Raises:
        RunError: they cannot be compared; says what differs and the remedy.
    """
    from vllm_flow.eval.report.compare_page import write_page
    from vllm_flow.eval.report.compare_tables import write_tables
    from vllm_flow.eval.report.figures_compare import draw
    from vllm_flow.eval.report.pairs import show_pairs
    from vllm_flow.outputs import check_folder

    first = chosen(paths, reference)
    out = out or paths[first] / "compare"
    check_folder(out)
    compared = comparison(paths, first, against, options)
    write_tables(compared, out)
    figures = draw(compared, out, options)
    page = out / "comparison.html"
    write_page(page, compared, figures, options, note_of(compared))
    show_pairs(compared, options)
    print(f"\n{page}")
    return 0


def chosen(paths: Sequence[Path], reference: Path | None) -> int:
    """Which of the runs is the reference; Refused where none, or more than one, is meant."""
    names = labels(paths)
    if reference is None:
        return 0
    wanted = real(reference)
    tail = reference.parts
    found = [at for at, path in enumerate(paths) if real(path) == wanted] or [
        at for at, path in enumerate(paths) if real(path).parts[-len(tail) :] == tail
    ]
    if len(found) != 1:
        which = "more than one" if found else "none"
        raise Refused(
            f"--pair {reference} is {which} of the runs; name one of them: {', '.join(names)}"
        )
    return found[0]


def comparison(
    paths: Sequence[Path], first: int, against: str | None, options: Options
) -> Comparison:
    """Read the runs, find what they share, and compare it.

    Raises:
        RunError: they cannot be compared.
    """
    from vllm_flow.eval.report.command import read_tasks, refuse_empty
    from vllm_flow.eval.report.compare import pairs_of, unpaired_policies
    from vllm_flow.eval.report.comparison import Comparison
    from vllm_flow.eval.sweep.checked import RunError
    from vllm_flow.eval.sweep.records import Run

    sides = []
    for path, label in zip(paths, labels(paths), strict=True):
        run = Run.open(path)
        items, tasks, unread = read_tasks(run)
        refuse_empty(path, items, unread)
        sides.append(Side(label, path, run.meta, items, tasks, run.answers().to_pylist(), unread))
    reference, others = sides[first], [side for at, side in enumerate(sides) if at != first]
    if against is not None and against not in reference.policies:
        raise Refused(
            f"--against {against}: {reference.label} has no such policy (it has: {few(reference.policies, 12)}); name "
            "one of these"
        )
    questions = {side.label: shared_questions(reference, side) for side in others}
    pairs = pairs_of(reference, others, questions, options, against)
    without = [side for side in others if not any(pair.run == side.label for pair in pairs)]
    if without:
        raise RunError(_no_pair(reference, without[0], against))
    unpaired = unpaired_policies(reference, others, against)
    return Comparison(reference, others, questions, pairs, against, unpaired)


def _no_pair(reference: Side, other: Side, against: str | None) -> str:
    names = f"{reference.label} and {other.label}"
    if against is None and not set(reference.policies) & set(other.policies):
        return (
            f"{names} have no policy in common ({few(reference.policies)} there, {few(other.policies)} here): ask both "
            "under one, or pair every policy with one of the reference by --against POLICY."
        )
    how = " under one policy" if against is None else ""
    return (
        f"{names} have no question that both answered{how}: the same commands of `vllm-flow eval` go on with "
        "unfinished runs, --retry-errors asks again what failed."
    )


def note_of(compared: Comparison) -> str | None:
    """What the runs' data say of themselves, if one of them does."""
    from vllm_flow.eval.report.command import data_note

    return next((note for side in compared.sides if (note := data_note(side.meta))), None)
