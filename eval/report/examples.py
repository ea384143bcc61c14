"""The report's examples: flipped answers with their pictures, as the page shows them."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flow.eval.report import text
from vllm_flow.eval.report.flips import choose_flips
from vllm_flow.eval.report.results import Policy, TaskResult
from vllm_flow.eval.tasks.base import Item
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.pictures import PictureError

PICTURE = 320
"""Longest side of an example's picture in pixels."""

Answers = Mapping[tuple[str, str, str], str]
"""(task, policy, item id) -> what the model said."""


@dataclass(frozen=True)
class Example:
    """One flipped answer."""

    picture: str | None
    """A data URI; None where the item has no picture or it is not there any more."""
    question: str
    request: str
    """The text's last line where it asks for a form of answer, else empty."""
    truth: list[tuple[str, str]]
    said: list[tuple[str, str, str]]
    """(policy's title, answer, how it scored: right, wrong or part)."""
    strip: list[tuple[str, str, str]]
    """(policy's title, answer, how it scored) along the layer axis."""


def picture_uri(image: str | None, reading: str = "server") -> str | None:
    """An item's picture, scaled down, as a data URI; None where there is none to be had."""
    if image is None:
        return None
    try:
        picture = load_image(image, reading)
    except PictureError:
        return None
    picture.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=86)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def truth_lines(truth: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an item's truth says, shortly: lists by frequency, ids left out."""
    lines = []
    for name, value in truth.items():
        if name.endswith("id") or name in ("question", "image", "has_image", "choices"):
            continue
        if isinstance(value, list):
            counted = Counter(map(str, value)).most_common(6)
            shown = ", ".join(f"{one} ×{n}" if n > 1 else one for one, n in counted)
            value = shown + (", …" if len(set(map(str, value))) > 6 else "")
        lines.append((name, str(value)))
    return lines


def split_request(question: str) -> tuple[str, str]:
    """A question, and its last line where that tells in what form to answer."""
    head, _, tail = question.rpartition("\n")
    return (head, tail) if head and tail.startswith("Answer ") else (question, "")


def grade(score: float | None) -> str:
    """How an answer scored, as the page colours it."""
    return "none" if score is None else "right" if score >= 1 else "wrong" if score <= 0 else "part"


def examples(
    task: TaskResult,
    items: Sequence[Item],
    answers: Answers,
    layers: int | None,
    seed: int,
    reading: str = "server",
) -> dict[str, Any] | None:
    """The flipped answers of a task, both ways; None where no score changed."""
    flips = choose_flips(task, seed=seed)
    if flips is None or task.baseline is None:
        return None
    known = {item.id: item for item in items}
    by_name = {r.policy.name: r.policy for r in task.policies}
    axis = sorted(
        (p for p in by_name.values() if p.layer(layers) is not None),
        key=lambda p: p.layer(layers) or 0,
    )

    def told(policy: Policy, item: str) -> tuple[str, str, str]:
        scored = task.scores[policy.name].get(item)
        said = answers.get((task.name, policy.name, item))
        return (
            text.policy_title(policy),
            said if said else "(nothing)" if said is not None else "(no answer)",
            grade(scored.score if scored else None),
        )

    def example(item: str) -> Example:
        one = known[item]
        assert task.baseline is not None
        return Example(
            picture_uri(one.image, reading),
            *split_request(one.text.strip()),
            truth_lines(one.truth),
            [told(p, item) for p in (task.baseline.policy, by_name[flips.policy])],
            [told(p, item) for p in axis] if len(axis) > 2 else [],
        )

    return {
        "title": text.task_title(task.name),
        "policy": text.policy_title(by_name[flips.policy]),
        "sides": [
            ("lost", flips.lost_in_all, [example(i) for i in flips.lost]),
            ("gained", flips.gained_in_all, [example(i) for i in flips.gained]),
        ],
    }
