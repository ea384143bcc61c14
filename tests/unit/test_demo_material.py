"""What the demo asks, and how it reads answers: the evaluation's own questions and rules."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.demo import material
from vllm_flow.demo.kinds import BY_KEY, KINDS, MEASURES, Kind, how_many
from vllm_flow.demo.measurements import Question
from vllm_flow.demo_model.heldout import score_caption
from vllm_flow.demo_model.questions import listing
from vllm_flow.demo_model.vocabulary import CLASSES, counted, listed
from vllm_flow.eval.tasks import Item, get_task
from vllm_flow.eval.tasks.chair import PROMPT

HEADLINE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("questions")


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Question]:
    return material.held_out(HEADLINE, folder)


def test_every_kind_is_asked_once_per_picture(questions: list[Question]) -> None:
    for kind in KINDS:
        asked = [question for question in questions if question.kind == kind.key]
        assert len(asked) == how_many(kind, HEADLINE)
        assert len({question.picture for question in asked}) == len(asked)
        assert all(question.picture.is_file() for question in asked)
    assert len({question.id for question in questions}) == len(questions)


def test_draws_are_alike_every_time(questions: list[Question], tmp_path: Path) -> None:
    again = material.held_out(HEADLINE, tmp_path)
    assert [(q.id, q.item.text, q.answer) for q in again] == [
        (q.id, q.item.text, q.answer) for q in questions
    ]


@pytest.mark.parametrize("key", ["yes_no", "unseen_style"])
def test_yes_and_no_take_turns(questions: list[Question], key: str) -> None:
    labels = Counter(question.answer for question in questions if question.kind == key)
    assert abs(labels["yes"] - labels["no"]) <= 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k.task != "chair"], ids=lambda kind: kind.key)
def test_items_are_those_the_evaluation_reads(
    questions: list[Question], folder: Path, kind: Kind
) -> None:
    items = {item.id: item for item in get_task(kind.task).read(folder / kind.split / kind.data)}
    asked = [question for question in questions if question.kind == kind.key]
    assert all(items[question.item.id] == question.item for question in asked)


def test_captions_are_asked_for_as_chair_does(questions: list[Question]) -> None:
    asked = [question for question in questions if question.kind == "captions"]
    assert {question.item.text for question in asked} == {PROMPT}


def perfect(question: Question) -> str:
    """The right answer in the form the task asks for."""
    if question.kind == "choice":
        return question.answer[0]
    if question.kind == "captions":
        return listing(question.item.truth["objects"])
    return question.answer.capitalize()


def test_right_answers_are_right_and_wrong_ones_wrong(questions: list[Question]) -> None:
    wrong = {"yes": "No", "no": "Yes"}
    for question in questions:
        assert material.read_answer(question, perfect(question)).score == 1, question
        said = wrong.get(question.answer, "nonsense")
        assert material.read_answer(question, said).score == 0, question


def test_counts_are_what_the_measures_need(questions: list[Question]) -> None:
    for question in questions:
        counts = material.read_answer(question, "Yes").counts
        for measure in BY_KEY[question.kind].measures:
            assert set(MEASURES[measure]) <= counts.keys()


def test_guessing_is_worth_one_in_the_options(questions: list[Question]) -> None:
    for question in questions:
        if question.kind == "choice":
            lines = question.item.text.splitlines()
            assert question.chance == 1 / sum(line[1:3] == ". " for line in lines)
            assert question.answer in lines
        elif question.kind in ("yes_no", "unseen_style"):
            assert question.chance == 0.5
        else:
            assert question.chance < 0.05


def test_the_instruction_is_left_out_of_the_bare_question(questions: list[Question]) -> None:
    for question in questions:
        assert "Answer " not in question.bare
        assert question.item.text.startswith(question.bare)


def test_the_picture_is_the_files(questions: list[Question]) -> None:
    from PIL import Image

    with Image.open(questions[0].picture) as image:
        assert material.picture_of(questions[0]).tobytes() == image.convert("RGB").tobytes()


SOME = st.lists(st.sampled_from(CLASSES), unique=True, max_size=5)


@settings(deadline=None)
@given(SOME, st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(1, 5)), max_size=5))
def test_captions_are_scored_by_what_they_name(
    objects: list[str], named: list[tuple[str, int]]
) -> None:
    """Whatever is named, in the singular or in the plural, is there or invented."""
    said = listed([counted(name, count) for name, count in named])
    reading = material.read_caption(said, {"objects": objects})
    names = {name for name, _ in named}
    assert set(reading.named) == names
    assert set(reading.invented) == names - set(objects)
    assert reading.counts == {
        "named": len(names),
        "invented": len(names - set(objects)),
        "shown": len(objects),
        "found": len(names & set(objects)),
    }
    assert reading.invented == score_caption(said, objects).hallucinated


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["yes", "no"])), max_size=40),
    st.integers(1, 12),
)
def test_one_per_picture(rows: list[tuple[int, str]], count: int) -> None:
    """No picture twice, as many as there are, and both labels where every picture has both."""
    items = [
        Item(str(number), "", f"{picture}.png", {"label": label})
        for number, (picture, label) in enumerate(rows)
    ]
    chosen = material.one_per_picture(items, count)
    pictures = [item.image for item in chosen]
    assert len(set(pictures)) == len(pictures) == min(count, len({item.image for item in items}))
    labels: dict[str, set[str]] = {}
    for item in items:
        labels.setdefault(str(item.image), set()).add(item.truth["label"])
    if all(len(both) == 2 for both in labels.values()):
        yes = sum(item.truth["label"] == "yes" for item in chosen)
        assert yes == (len(chosen) + 1) // 2
