"""What is asked about one scene in training: every task, in the wording that the evaluation uses. (pure)"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vllm_flow.demo_model import questions
from vllm_flow.demo_model.facts import Facts
from vllm_flow.demo_model.questions import ANSWER_SUFFIX, CAPTION_REQUEST
from vllm_flow.demo_model.training.packs import Ask
from vllm_flow.eval.tasks import chair, scienceqa, textvqa

LETTERS = "ABCDE"
WEIGHTS = {"choice": 2.0, "word": 1.5, "caption": 0.6, "listing": 0.6, "place": 1.5}
"""Factors on the loss; the other tasks have 1. A caption has many tokens, a choice one letter."""
TASKS = ("presence", "choice", "word", "caption", "count", "listing", "place")


@dataclass(frozen=True)
class TaskAsk(Ask):
    """A question that knows its task."""

    task: str = ""


def asks_of(facts: Facts, rng: random.Random, pairs: int = 2) -> list[TaskAsk]:
    """Presence (``pairs`` times yes and no), two choices, a word, a caption, a count, a place.

    What a scene does not allow is left out. Presence, counting and places come with and without the
    short-answer suffix, so that the bare question works as well.
    """
    asks = _presence(facts, rng, pairs)
    asks += [_choice(facts, rng) for _ in range(2)]
    if len(facts.signs) == 1:
        asks += [_reading(facts, rng)]
    asks += [_ask("caption", chair.PROMPT, questions.caption(facts))]
    if facts.objects:
        asks += _count(facts, rng)
        if rng.random() < 0.3:
            asks += [_ask("listing", CAPTION_REQUEST, questions.listing(facts.objects))]
    if facts.beside():
        asks += [_place(facts, rng)]
    return asks


def _ask(task: str, text: str, answer: str, marks: tuple[tuple[str, str], ...] = ()) -> TaskAsk:
    return TaskAsk(text, answer, weight=WEIGHTS.get(task, 1.0), marks=marks, task=task)


def _suffix(rng: random.Random) -> str:
    return ANSWER_SUFFIX if rng.random() < 0.7 else ""


def _presence(facts: Facts, rng: random.Random, pairs: int) -> list[TaskAsk]:
    there = rng.sample(facts.objects, min(pairs, len(facts.objects)))
    missing = questions.absent(facts, rng, max(1, len(there)))
    return [
        _ask("presence", questions.presence(name) + _suffix(rng), answer)
        for names, answer in ((there, "Yes"), (missing, "No"))
        for name in names
    ]


def _choice(facts: Facts, rng: random.Random) -> TaskAsk:
    """Every option's last token is asked, too, whether the option is right.

    To find out which is right and to name its letter are two steps, and from the letter alone both are
    learnt slowly.
    """
    made = questions.choice(facts, rng)
    text = scienceqa.question_text(made.question, list(made.choices), made.hint)
    marks = []
    for number, name in enumerate(made.choices):
        option = f"\n{LETTERS[number]}. {name}"
        beginning = text[: text.index(option) + len(option)]
        marks.append((beginning, "Yes" if number == made.answer else "No"))
    return _ask("choice", text, LETTERS[made.answer], tuple(marks))


def _reading(facts: Facts, rng: random.Random) -> TaskAsk:
    word = facts.signs[0].word
    tokens = questions.ocr_tokens(word, rng) if rng.random() < 0.4 else None
    question = rng.choice(questions.SIGN_QUESTIONS)
    return _ask("word", textvqa.question_text(question, tokens), word)


def _count(facts: Facts, rng: random.Random) -> list[TaskAsk]:
    name = questions.worth_counting(facts, rng)
    if name is None:
        return []
    return [_ask("count", questions.how_many(name) + _suffix(rng), str(facts.counts[name]))]


def _place(facts: Facts, rng: random.Random) -> TaskAsk:
    left, right = rng.choice(facts.beside())
    yes = rng.random() < 0.5
    text = questions.is_left(left, right) if yes else questions.is_left(right, left)
    return _ask("place", text + _suffix(rng), "Yes" if yes else "No")
