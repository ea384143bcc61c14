"""Scores answer files by the benchmarks' official rules.

Answers are in LLaVA's format, one JSON object per line with question_id, prompt and text; captions are
objects with image_id and caption. Answers that do not fit the questions are refused.

    python -m vllm_flow.demo_model.datasets --out data --tasks chair
    echo '{"image_id": 528, "caption": "A dog on a chair."}' > captions.jsonl
    vllm-flow score chair --annotations data/chair --captions captions.jsonl --json out/chair.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from vllm_flow.eval.tasks.base import Scored, Task
    from vllm_flow.eval.tasks.chair import Chair

VARIANTS = {
    "pope": ("pope-coco", "pope-aokvqa", "pope-gqa"),
    "scienceqa": ("scienceqa-full",),
    "textvqa": ("textvqa-no-ocr",),
    "chair": ("chair-opera",),
}
"""Tasks of `vllm-flow eval` whose answers take the same files."""


@dataclass
class Result:
    """Scored answers and what a reader must know of them."""

    task: Task
    scored: list[Scored]
    notes: list[str] = field(default_factory=list)
    """What is out of the ordinary, for standard error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-flow score``."""
    from vllm_flow.eval.scoring.lmms_samples import add_parser
    from vllm_flow.eval.scoring.plain_answers import add_parsers

    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    pope = _add(tasks, "pope", "yes/no questions about objects: F1 per category and mean")
    place = pope.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--labels", type=Path, metavar="DIR",
        help="has coco_pope_*.json, aokvqa_pope_seem_*.json or gqa_pope_seem_*.json",
    )  # fmt: skip
    _add_data(place)
    pope.add_argument(
        "--answers",
        required=True,
        nargs="+",
        metavar="FILE",
        help="one file for all categories, or CATEGORY=FILE for each",
    )
    pope.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="question file with question_id, image, text, category (llava_pope_test.jsonl)",
    )
    scienceqa = _add(tasks, "scienceqa", "multiple choice: accuracy and IMG accuracy")
    _add_data(scienceqa)
    scienceqa.add_argument(
        "--problems", type=Path, metavar="FILE", help="problems.json, instead of --data"
    )
    scienceqa.add_argument(
        "--splits", type=Path, metavar="FILE", help="pid_splits.json, with --problems"
    )
    scienceqa.add_argument("--split", default="test", help="of these, which one (default: test)")
    scienceqa.add_argument("--answers", type=Path, required=True, metavar="FILE")
    textvqa = _add(tasks, "textvqa", "reading in images: soft accuracy over ten annotators")
    place = textvqa.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--annotations", type=Path, metavar="FILE", help="TextVQA_0.5.1_val.json, instead of --data"
    )
    _add_data(place)
    textvqa.add_argument("--answers", type=Path, required=True, metavar="FILE")
    chair = _add(
        tasks,
        "chair",
        "objects a caption invents: CHAIR_s, CHAIR_i, recall; every token made singular, or WordNet's lemmas by part "
        "of speech (chair-opera)",
    )
    place = chair.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--annotations",
        type=Path,
        metavar="DIR",
        help="has COCO's {instances,captions}_{train,val}2014.json",
    )
    _add_data(place)
    chair.add_argument("--captions", type=Path, required=True, metavar="FILE")
    for task in (pope, scienceqa, textvqa, chair, *add_parsers(tasks), add_parser(tasks)):
        task.add_argument("--json", type=Path, metavar="OUT", help="write metrics and items there")


def _add(tasks: Any, name: str, told: str) -> Any:
    return tasks.add_parser(name, aliases=VARIANTS[name], help=told)


def _add_data(parser: Any) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="what vllm-flow eval reads for the task: official files or the hub's parquet",
    )


def run(args: argparse.Namespace) -> int:
    """Score, write, show; 2 where the files are not as they must be."""
    from vllm_flow.counts import counted
    from vllm_flow.eval.scoring.plain_answers import score_plain
    from vllm_flow.eval.scoring.tables import show
    from vllm_flow.eval.tasks.base import measured, partly_measured, sum_counts
    from vllm_flow.eval.tasks.reading import DataError
    from vllm_flow.exits import Refused
    from vllm_flow.outputs import check_file
    from vllm_flow.registry import PluginError

    if args.json is not None:
        check_file(args.json, "--json")
    try:
        result = SCORERS.get(args.task, score_plain)(args)
        totals = sum_counts(result.task.together(result.scored))
        values = result.task.metrics(totals)
        shown = measured(result.task, values, result.scored)
        metrics = {name: float(values[name]) for name in shown}
    except (DataError, PluginError) as error:
        raise Refused(str(error)) from error
    if args.json is not None:
        write_json(args.json, result.task.name, metrics, result.scored)
    parts = partly_measured(result.task, shown, result.scored)
    for note in [*result.notes, *parts, *unclear_note(result)]:
        print(f"vllm-flow score: note: {note}", file=sys.stderr)
    show(result.task, metrics, result.scored)
    if args.json is not None:
        print(f"metrics and {counted(len(result.scored), 'item')}: {args.json}")
    return 0


def score_pope(args: argparse.Namespace) -> Result:
    from vllm_flow.eval.scoring.pope_answers import pope_answers
    from vllm_flow.eval.tasks import get_task
    from vllm_flow.eval.tasks.pope import CATEGORIES
    from vllm_flow.eval.tasks.reading import DataError, read_records

    task = get_task(args.task)
    items = task.read(args.labels or args.data)
    answers = {}
    for category, path in (answer_file(text, CATEGORIES) for text in args.answers):
        if category in answers:
            raise DataError(
                f"--answers: two files for {category or 'all categories'}; "
                "give one file, or CATEGORY=FILE for each category"
            )
        answers[category] = read_records(path)
    questions = read_records(args.questions, "questions") if args.questions else None
    pairs = pope_answers(items, answers, questions)
    scored = [task.score(item, text) for item, text in pairs if text is not None]
    absent = [c for c in CATEGORIES if not any(item.group == c for item in items)]
    note = f"no label file for {', '.join(absent)}: the means are over the other categories"
    return Result(task, scored, [note] if absent else [])


def score_scienceqa(args: argparse.Namespace) -> Result:
    from vllm_flow.eval.scoring.answer_files import scienceqa_answers
    from vllm_flow.eval.tasks.reading import DataError, few, read_records
    from vllm_flow.eval.tasks.scienceqa import ScienceQA, official_items, only_pictures, unanswered

    files = (args.problems, args.splits)
    if (args.data is None) == (None in files) or (args.data and any(files)):
        raise DataError("give --data, or both --problems and --splits")
    task = ScienceQA(split=args.split, images_only=False)
    if args.data is None:
        items = official_items(args.problems, args.splits, args.split, None)
    else:
        items = replace(task, images_only=only_pictures(args.data, args.split)).read(args.data)
    pairs = scienceqa_answers(items, read_records(args.answers))
    scored = [unanswered(i) if text is None else task.score(i, text) for i, text in pairs]
    missing = [item.id for item, text in pairs if text is None]
    note = (
        f"questions without an answer: {len(missing)} of {len(items)}, which count as wrong, outside of the "
        f"IMG accuracy: {few(missing)}"
    )
    return Result(task, scored, [note] if missing else [])


def score_textvqa(args: argparse.Namespace) -> Result:
    from vllm_flow.eval.scoring.answer_files import textvqa_answers
    from vllm_flow.eval.tasks.reading import read_records
    from vllm_flow.eval.tasks.textvqa import TASK, annotation_rows, item

    if args.data is not None:
        items = replace(TASK, ocr=False).read(args.data)  # answers are joined by the question alone
    else:
        items = [item(row, None, None) for row in annotation_rows(args.annotations)]
    pairs = textvqa_answers(items, read_records(args.answers))
    scored = [TASK.score(question, text) for question, text in pairs if text is not None]
    note = (
        f"questions without an answer: {len(items) - len(scored)} of {len(items)}; the accuracy is over the "
        "answered ones, as in the official evaluation"
    )
    return Result(TASK, scored, [note] if len(scored) < len(items) else [])


def score_chair(args: argparse.Namespace) -> Result:
    from vllm_flow.eval.scoring.answer_files import captions_by_image
    from vllm_flow.eval.tasks import get_task
    from vllm_flow.eval.tasks.chair import truth_of
    from vllm_flow.eval.tasks.reading import DataError, directory, few, read_records

    task = cast("Chair", get_task(args.task))
    captions = captions_by_image(read_records(args.captions))
    truth = truth_of(directory(args.annotations or args.data), task, captions.keys())
    unknown = [image for image in captions if image not in truth]
    if unknown:
        raise DataError(
            f"{args.captions}: images that are not in the annotations: {len(unknown)} of {len(captions)} "
            f"(those of train2014 need train's two files too): {few(unknown)}"
        )
    scored = [
        task.score(task.item(image, truth[image], None), caption)
        for image, caption in captions.items()
    ]
    return Result(task, scored)


def score_lmms_eval(args: argparse.Namespace) -> Result:
    from vllm_flow.eval.scoring.lmms_samples import score_samples

    return score_samples(args)


def unclear_note(result: Result) -> list[str]:
    """What to say of answers in which the rule found nothing that it looks for."""
    answered = [one for one in result.scored if one.parsed is not None or one.unclear]
    count = sum(one.unclear for one in answered)
    return [f"answers that {result.task.unclear}: {count} of {len(answered)}"] if count else []


SCORERS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "lmms-eval": score_lmms_eval,
    **{
        name: scorer
        for task, scorer in {
            "pope": score_pope,
            "scienceqa": score_scienceqa,
            "textvqa": score_textvqa,
            "chair": score_chair,
        }.items()
        for name in (task, *VARIANTS[task])
    },
}


def answer_file(text: str, categories: Sequence[str]) -> tuple[str | None, Path]:
    """`random=FILE` as a category and a path; anything else as a path for all categories."""
    category, equals, path = text.partition("=")
    return (category, Path(path)) if equals and category in categories else (None, Path(text))


def write_json(path: Path, task: str, metrics: dict[str, float], scored: Sequence[Scored]) -> None:
    """Write metrics and items."""
    from vllm_flow.outputs import write_text

    items: list[dict[str, Any]] = []
    for one in scored:
        item = {"id": one.id, "parsed": one.parsed, "score": one.score}
        items.append(item | ({"group": one.group} if one.group else {}))
    text = json.dumps({"task": task, "metrics": metrics, "items": items}, indent=1)
    write_text(path, text + "\n")
