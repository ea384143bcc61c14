"""Which answers a scene makes right, worked out from its facts alone."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_flow.demo_model.facts import Facts
from vllm_flow.demo_model.vocabulary import KIND_OF, NUMBERS, plural


def fitting(question: str, topic: str, choices: Sequence[str], facts: Facts) -> list[bool]:
    """For each choice whether it answers the multiple-choice question."""
    if topic == "objects":
        there = "not in" not in question
        return [(choice in facts.objects) == there for choice in choices]
    if topic == "numbers":
        asked = question.split(" are ")[0].removeprefix("How many ")
        (count,) = (count for name, count in facts.counts.items() if plural(name) == asked)
        return [choice == NUMBERS[count - 1] for choice in choices]
    if topic == "words":
        said = {sign.word for sign in facts.signs}
        return [choice in said for choice in choices]
    if topic == "kinds":
        kinds = {KIND_OF[name] for name in facts.objects}
        return [kinds == {choice} for choice in choices]
    assert topic == "places", topic
    side, asked = question.split(" to the ")[1].rstrip("?").split(" of the ")
    middle = {t.name: t.middle for t in facts.things if facts.counts[t.name] == 1}
    sign = -1 if side == "left" else 1
    return [choice in middle and sign * (middle[choice] - middle[asked]) > 0 for choice in choices]
