"""What is asked about one scene in training: every task, in the wording that the evaluation uses. (pure)"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vllm_flow.demo.classes import ANSWER_SUFFIX, CAPTION_REQUEST
from vllm_flow.demo.grown import questions
from vllm_flow.demo.grown.facts import Facts
from vllm_flow.demo.training.packs import Ask
from vllm_flow.eval.tasks import chair, scienceqa, textvqa

LETTERS = "ABCDE"
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
    asks += [_reading(facts, rng)] if len(facts.signs) == 1 else []
    asks += [TaskAsk(chair.PROMPT, questions.caption(facts), task="caption")]
    if facts.objects:
        asks += _count(facts, rng)
        if rng.random() < 0.3:
            asks += [TaskAsk(CAPTION_REQUEST, questions.listing(facts.objects), task="listing")]
    pairs_beside = facts.beside()
    if pairs_beside:
        left, right = rng.choice(pairs_beside)
        yes = rng.random() < 0.5
        text = questions.is_left(left, right) if yes else questions.is_left(right, left)
        asks += [TaskAsk(text + _suffix(rng), "Yes" if yes else "No", task="place")]
    return asks


def _suffix(rng: random.Random) -> str:
    return ANSWER_SUFFIX if rng.random() < 0.7 else ""


def _presence(facts: Facts, rng: random.Random, pairs: int) -> list[TaskAsk]:
    there = rng.sample(facts.objects, min(pairs, len(facts.objects)))
    missing = questions.absent(facts, rng, max(1, len(there)))
    return [
        TaskAsk(questions.presence(name) + _suffix(rng), "Yes", task="presence") for name in there
    ] + [
        TaskAsk(questions.presence(name) + _suffix(rng), "No", task="presence") for name in missing
    ]


def _choice(facts: Facts, rng: random.Random) -> TaskAsk:
    made = questions.choice(facts, rng)
    text = scienceqa.question_text(made.question, list(made.choices), made.hint)
    return TaskAsk(text, LETTERS[made.answer], task="choice")


def _reading(facts: Facts, rng: random.Random) -> TaskAsk:
    word = facts.signs[0].word
    tokens = questions.ocr_tokens(word, rng) if rng.random() < 0.4 else None
    return TaskAsk(
        textvqa.question_text(rng.choice(questions.SIGN_QUESTIONS), tokens), word, task="word"
    )


def _count(facts: Facts, rng: random.Random) -> list[TaskAsk]:
    name = questions.worth_counting(facts, rng)
    if name is None:
        return []
    text = questions.how_many(name) + _suffix(rng)
    return [TaskAsk(text, str(facts.counts[name]), task="count")]
