"""Questions about a scene and their answers, from what is known about it. (pure)

One function per task; training packs and the writers of held-out files ask through the same ones, so
that the model is asked what it was taught, word for word. Nothing here knows pictures or tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_flow.demo_model.facts import Facts
from vllm_flow.demo_model.vocabulary import (
    CLASSES,
    KIND_OF,
    KINDS,
    NUMBERS,
    WORDS,
    counted,
    in_order,
    listed,
    plural,
    with_article,
)

ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
"""What POPE's protocol adds to each question (LLaVA-1.5 wording)."""

CAPTION_REQUEST = "Please list the objects in the image."
"""Answered with ``listing``: each kind of thing once, and no numbers."""

KIND_HINTS = {
    "animal": "Animals are living things that move by themselves and eat to live.",
    "vehicle": "Vehicles are machines that carry people or goods from one place to another.",
    "food": "Food is what people eat; much of it grows on plants.",
    "kitchen tool": "Kitchen tools help people to prepare food, and to eat and drink.",
    "piece of furniture": "Furniture stands in rooms, so that people can sit, lie or keep things.",
    "device": "Devices are things with a mechanism or a current inside that do a task.",
    "toy": "Toys are things to play with.",
    "plant": "Plants grow from the ground or in a pot, and live on light and water.",
    "thing to carry": "Some things are made to be carried along by a person.",
    "other thing": "Some things are none of animals, plants, food and vehicles.",
}
"""Kind -> a sentence for the context of multiple-choice questions."""

HINTS = (
    "The picture shows a few things on a painted background.",
    "Look at the picture, then choose the right answer.",
    "The things in the picture may be drawings or photographs.",
)

SIGN_QUESTIONS = (
    "what is written on the sign?",
    "what does the sign say?",
    "what word is on the sign?",
    "which word can be read in the image?",
)


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question."""

    question: str
    choices: tuple[str, ...]
    """Two to four."""
    answer: int
    """Index of the right one."""
    hint: str
    """Context; often empty."""
    topic: str


def presence(name: str) -> str:
    """POPE's question, without its suffix."""
    if name == "scissors":
        return "Are there scissors in the image?"
    return f"Is there {with_article(name)} in the image?"


def absent(facts: Facts, rng: random.Random, count: int, near_share: float = 0.5) -> list[str]:
    """Distinct classes that are not there; each with ``near_share`` of a kind that is."""
    missing = [name for name in CLASSES if name not in facts.objects]
    kinds = {KIND_OF[name] for name in facts.objects}
    rng.shuffle(missing)
    near = [name for name in missing if KIND_OF[name] in kinds]
    chosen: list[str] = []
    for _ in range(count):
        pool = near if near and rng.random() < near_share else missing
        name = pool[0]
        chosen.append(name)
        missing.remove(name)
        if name in near:
            near.remove(name)
    return chosen


def how_many(name: str) -> str:
    """The counting question; its answer is a digit."""
    return f"How many {plural(name)} are there in the image?"


def worth_counting(facts: Facts, rng: random.Random) -> str | None:
    """A class to ask the number of: mostly one that comes several times; None where that gives too
    many questions with the answer one."""
    several = [name for name, count in facts.counts.items() if count > 1]
    if several and rng.random() < 0.75:
        return rng.choice(several)
    if not several and rng.random() < 0.6:
        return None
    return rng.choice(facts.objects)


def is_left(one: str, other: str) -> str:
    """The question after a place; its answer is yes or no."""
    return f"Is the {one} to the left of the {other}?"


def caption(facts: Facts) -> str:
    """A description: how many there are of what, in class order, and what the signs say."""
    things = listed([counted(name, count) for name, count in facts.counts.items()])
    text = f"The image shows {things}."
    if facts.signs:
        words = listed([sign.word for sign in facts.signs])
        text += f" A sign says {words}." if len(facts.signs) == 1 else f" Signs say {words}."
    return text


def listing(objects: Sequence[str]) -> str:
    """The answer to the request to list the objects: each class once."""
    text = listed([with_article(name) for name in in_order(objects)])
    return f"{text[0].upper()}{text[1:]}."


def ocr_tokens(word: str, rng: random.Random, found_share: float = 0.85) -> list[str]:
    """What a word reader with faults reports: mostly the word, and up to three others."""
    others = rng.sample([other for other in WORDS if other != word], rng.randint(0, 3))
    tokens = others + ([word] if rng.random() < found_share else [])
    rng.shuffle(tokens)
    return tokens


def choice(facts: Facts, rng: random.Random) -> Choice:
    """A multiple-choice question that the scene decides, of a kind that is possible on it."""
    makers = [_present, _present, _not_there, _number]
    if facts.signs:
        makers += [_word, _word]
    if facts.beside():
        makers += [_side]
    if len({KIND_OF[name] for name in facts.objects}) == 1:
        makers += [_kind]
    if not facts.objects:
        makers = [_word]
    return rng.choice(makers)(facts, rng)


def _hint(rng: random.Random, kind: str | None = None) -> str:
    if rng.random() < 0.4:
        return ""
    return KIND_HINTS[kind] if kind is not None and rng.random() < 0.6 else rng.choice(HINTS)


def _shuffled(
    question: str, right: str, wrong: Sequence[str], hint: str, topic: str, rng: random.Random
) -> Choice:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Choice(question, tuple(choices), choices.index(right), hint, topic)


def _present(facts: Facts, rng: random.Random) -> Choice:
    right = rng.choice(facts.objects)
    wrong = absent(facts, rng, rng.randint(1, 3))
    hint = _hint(rng, KIND_OF[right])
    return _shuffled("Which of these things is in the picture?", right, wrong, hint, "objects", rng)


def _not_there(facts: Facts, rng: random.Random) -> Choice:
    right = absent(facts, rng, 1)[0]
    wrong = rng.sample(facts.objects, min(3, len(facts.objects)))
    question = "Which of these things is not in the picture?"
    return _shuffled(question, right, wrong, _hint(rng, KIND_OF[right]), "objects", rng)


def _number(facts: Facts, rng: random.Random) -> Choice:
    name = worth_counting(facts, rng)
    if name is None:
        return _present(facts, rng)
    right = facts.counts[name] - 1
    numbers = {right, *rng.sample([n for n in range(4) if n != right], rng.randint(1, 3))}
    choices = tuple(NUMBERS[number] for number in sorted(numbers))
    question = f"How many {plural(name)} are in the picture?"
    return Choice(question, choices, choices.index(NUMBERS[right]), _hint(rng), "numbers")


def _word(facts: Facts, rng: random.Random) -> Choice:
    right = rng.choice(facts.signs).word
    there = {sign.word for sign in facts.signs}
    wrong = rng.sample([word for word in WORDS if word not in there], rng.randint(1, 3))
    return _shuffled("Which word is on a sign?", right, wrong, _hint(rng), "words", rng)


def _side(facts: Facts, rng: random.Random) -> Choice:
    left, right = rng.choice(facts.beside())
    asked, answer = (left, right) if rng.random() < 0.5 else (right, left)
    side = "right" if answer == right else "left"
    fitting = {two if side == "right" else one for one, two in facts.beside(0.0)
               if (one if side == "right" else two) == asked}  # fmt: skip
    others = [name for name in facts.objects if name != asked and name not in fitting]
    others += absent(facts, rng, 3 - len(others)) if len(others) < 3 else []
    question = f"Which of these things is to the {side} of the {asked}?"
    wrong = others[: rng.randint(1, 3)]
    return _shuffled(question, answer, wrong, _hint(rng), "places", rng)


def _kind(facts: Facts, rng: random.Random) -> Choice:
    right = KIND_OF[facts.objects[0]]
    wrong = rng.sample([kind for kind in KINDS if kind != right], rng.randint(1, 3))
    question = "What kind of thing does the picture show?"
    hint = _hint(rng, rng.choice([right, *wrong]))
    return _shuffled(question, right, wrong, hint, "kinds", rng)
