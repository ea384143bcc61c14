"""What `vllm-flow score` is given: pipes, odd numbers, damaged files, answers that say nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.eval import files
from tests.eval.conftest import Command
from tests.eval.test_scienceqa import official as scienceqa_files
from tests.eval.test_score_command import CAPTIONS, check_chair, scienceqa
from tests.eval.test_score_pope import CATEGORIES, pope_answers
from tests.eval.test_textvqa import official as textvqa_files
from vllm_flow.cli import main


# ScienceQA: the split is 11 (no image), 4 and 5; the answers are B, A, C.
@pytest.fixture
def piped() -> Iterator[Callable[[str], Path]]:
    """Makes pipes that give a text once and then nothing, as `<(cat FILE)` and `/dev/stdin` do."""
    ends = []

    def pipe(content: str) -> Path:
        end, start = os.pipe()
        ends.append(end)
        os.write(start, content.encode())
        os.close(start)
        return Path(f"/dev/fd/{end}")

    yield pipe
    for end in ends:
        os.close(end)


Piped = Callable[[str], Path]


@pytest.mark.parametrize("listed", [False, True])
def test_a_pipe_is_read_once(command: Command, coco: Path, piped: Piped, listed: bool) -> None:
    text = json.dumps(CAPTIONS) if listed else "\n".join(map(json.dumps, CAPTIONS))
    pipe = piped(text)
    check_chair(command.scores("chair", "--annotations", coco.parent, "--captions", pipe))
    empty = piped("")
    message = command.refuses("chair", "--annotations", coco.parent, "--captions", empty)
    assert "no answers in it (a pipe can be read only once)" in message


def test_every_file_may_be_a_pipe(command: Command, labels: Path, piped: Piped) -> None:
    """Each option that names a file, given as a pipe, scores as the file does."""
    call = [str(part) for part in scienceqa(command, [{"question_id": "4", "text": "A. b"}])]
    whole = command.scores(*call)
    for n, part in enumerate(call):
        if Path(part).is_file():
            pipe = piped(Path(part).read_text())
            assert command.scores(*call[:n], str(pipe), *call[n + 1 :]) == whole
    rows = [r | {"category": c} for c in CATEGORIES for r in pope_answers(labels, c)]
    pipe = piped("\n".join(map(json.dumps, rows)))
    assert command.scores("pope", "--labels", labels, "--answers", pipe)["metrics"]["f1"] > 0.5


ODD_NUMBERS = ["42²", "٤٢", "1_6", " 7", "-7", "7.0", "9" * 19]


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_an_image_id_that_is_no_number(command: Command, coco: Path, number: str) -> None:
    path = files.json_lines(command.folder / "c.jsonl", [{"image_id": number, "caption": "A cat."}])
    message = command.refuses("chair", "--annotations", coco.parent, "--captions", path)
    assert "line 1: 'image_id' is" in message and "not a COCO image id" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '{"image_id": ' + "9" * 5000 + ', "caption": "A cat."}',
            "line 1: not JSON (a number of more",
        ),
        ("[" * 100_000, "not JSON (nested too deeply)"),
        ('{"image_id": 7, "caption": ' + "[" * 100_000, "line 1: not JSON (nested too deeply)"),
        ('{"image_id": 7, "caption": "\\ud800"}', "line 1: not JSON (half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("which", ["captions", "annotations"])
def test_json_that_python_stumbles_over(
    command: Command, coco: Path, content: str, says: str, which: str
) -> None:
    path = files.json_lines(command.folder / "c.jsonl", CAPTIONS)
    bad = path if which == "captions" else coco.parent / "annotations/captions_val2014.json"
    bad.write_text(content)
    message = command.refuses("chair", "--annotations", coco.parent, "--captions", path)
    assert bad.name in message and len(message) < 400
    assert (says if which == "captions" else says.replace("line 1: ", "")) in message


def test_answers_that_name_no_letter_are_told(command: Command) -> None:
    rows = [{"question_id": n, "text": text} for n, text in (("4", "(A) b"), ("5", "(C) d"))]
    scores = command.scores(*scienceqa(command, rows))
    assert scores["metrics"]["accuracy"] == 0.0
    assert re.search(
        "answers that name no letter in a form that the official rule reads .*: 2 of 2",
        command.errors,
    )
    rows[0]["text"] = "A"
    command.scores(*scienceqa(command, rows))
    assert re.search("answers that name no letter .*: 1 of 2", command.errors)
    rows[1]["text"] = "C"
    command.scores(*scienceqa(command, rows))
    assert "name no letter" not in command.errors


def test_answers_that_say_neither_yes_nor_no_are_told(command: Command, labels: Path) -> None:
    said = {"NO", "No!", "", "It isn't.", "(B) text"}
    rows = [
        r | {"category": c, "text": "Yes."} for c in CATEGORIES for r in pope_answers(labels, c)
    ]
    for row, text in zip(rows, sorted(said), strict=False):
        row["text"] = text
    path = files.json_lines(command.folder / "answers.jsonl", rows)
    scores = command.scores("pope", "--labels", labels, "--answers", path)
    assert {item["parsed"] for item in scores["items"]} == {"yes"}
    assert re.search("answers that say neither yes nor no .*: 5 of 12", command.errors)


def test_captions_that_name_nothing_are_told(command: Command, coco: Path) -> None:
    path = files.json_lines(
        command.folder / "c.jsonl", [CAPTIONS[0], {"image_id": 8, "caption": "?"}]
    )
    command.scores("chair", "--annotations", coco.parent, "--captions", path)
    assert "answers that name no object, and so invent none: 1 of 2" in command.errors


KEYS = st.sampled_from(
    ["question_id", "text", "prompt", "category", "image", "label", "choices", "answer", "hint", "test",
     "question", "image_id", "answers", "caption", "annotations", "images", "categories", "id", "name",
     "category_id", "data", "4"]
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 9)
    | st.floats()
    | st.sampled_from(["", "7", "no", "A"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


def damaged(value: Any, key: str, new: Any, nth: list[int]) -> Any:
    """`value` with the nth occurrence of `key` set to `new`, or taken away where that is None."""
    if isinstance(value, list):
        return [damaged(one, key, new, nth) for one in value]
    if not isinstance(value, dict):
        return value
    changed = {}
    for name, one in value.items():
        if name == key:
            nth[0] -= 1
            if nth[0] == -1:
                if new is not None:
                    changed[name] = new
                continue
        changed[name] = damaged(one, key, new, nth)
    return changed


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
@given(st.sampled_from(["pope", "scienceqa", "textvqa", "chair"]), st.integers(0, 20), KEYS, VALUES,
       st.integers(0, 2))  # fmt: skip
def test_damaged_files_never_give_a_traceback(
    command: Command, task: str, which: int, key: str, new: Any, nth: int
) -> None:
    """Any value of any file replaced by another, or missing: figures, or one sentence and status 2."""
    folder = command.folder / task
    answers = folder / "answers.jsonl"
    files.pope_labels(folder)
    scienceqa_files(folder)
    textvqa_files(folder)
    files.coco(folder, {"val": {7: (["dog"], ["A man."]), 8: (["cat"], [])}})
    calls: dict[str, tuple[list[dict], list[object], list[str]]] = {
        "pope": (
            [r | {"category": c, "prompt": "", "image": None} for c in CATEGORIES for r in pope_answers(folder, c)],
            ["--labels", folder, "--answers", answers],
            ["coco_pope_random.json"],
        ),
        "scienceqa": (
            [{"question_id": "4", "prompt": "<image>", "text": "A"}],
            ["--problems", folder / "problems.json", "--splits", folder / "pid_splits.json",
             "--answers", answers],
            ["problems.json", "pid_splits.json"],
        ),
        "textvqa": (
            [{"question_id": "ff", "prompt": "what is it?", "text": "A"}],
            ["--annotations", folder / "TextVQA_0.5.1_val.json", "--answers", answers],
            ["TextVQA_0.5.1_val.json"],
        ),
        "chair": (
            [{"image_id": 7, "caption": "A dog."}],
            ["--annotations", folder, "--captions", answers],
            ["instances_val2014.json", "captions_val2014.json"],
        ),
    }  # fmt: skip
    rows, arguments, inputs = calls[task]
    files.json_lines(answers, rows)
    names = ["answers.jsonl", *inputs]
    path = folder / names[which % len(names)]
    text = path.read_text()
    lines = [json.loads(text)] if path.suffix == ".json" and "pope" not in path.name else [
        json.loads(line) for line in text.splitlines()
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(one) for one in damaged(lines, key, new, [nth])))
    command.capsys.readouterr()
    status = main(["score", task, *map(str, arguments)])
    output, errors = command.capsys.readouterr()
    assert (status == 0 and output) or (status == 2 and not output and errors.count("\n") == 1)
