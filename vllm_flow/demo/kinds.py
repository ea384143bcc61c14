"""The kinds of questions that the demo asks, and what is counted in their answers. (pure)

Four tasks of the evaluation, one of them on a second set of pictures. Knows no questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of questions."""

    key: str
    title: str
    """Heading of its section on the page."""
    short: str
    """In the legend and as heading of a column."""
    what: str
    """After a number, in a sentence."""
    task: str
    """Whose prompts are used, and whose rule for reading answers: a name in `vllm_flow.eval.tasks`."""
    data: str
    """Folder of its questions, as `vllm_flow.demo_model.datasets` names them."""
    split: str
    """Of the demo's held-out pictures."""
    share: float
    """Questions per question of the headline kind."""
    max_tokens: int
    """Output tokens. Enough for the answers asked for; the official limits are for free talk."""
    rule: str
    """How answers are read, for the notes."""
    measures: tuple[str, ...] = ("right",)
    """Keys of `MEASURES`; the first is drawn, and compared with the baseline in sentences."""
    binary: bool = True
    """Whether every answer is right or wrong: intervals and tests differ."""
    every_cliff: bool = True
    """Whether it is asked at every cliff, or at a few: for what takes long or is shown by the way."""


KINDS: tuple[Kind, ...] = (
    Kind(
        key="yes_no",
        title="Yes or no",
        short="yes/no",
        what="yes/no questions",
        task="pope",
        data="pope",
        split="seen",
        share=1,
        max_tokens=4,
        rule="POPE's prompt and rule",
    ),
    Kind(
        key="choice",
        title="Multiple choice",
        short="choice",
        what="multiple-choice questions",
        task="scienceqa",
        data="scienceqa",
        split="seen",
        share=5 / 6,
        max_tokens=6,
        rule="ScienceQA's, as LLaVA asks and reads it",
    ),
    Kind(
        key="words",
        title="Words on signs",
        short="words",
        what="questions for the word on a sign",
        task="textvqa-no-ocr",
        data="textvqa",
        split="seen",
        share=5 / 6,
        max_tokens=6,
        rule="TextVQA's, without OCR tokens",
        binary=False,
    ),
    Kind(
        key="captions",
        title="Captions",
        short="captions",
        what="captions",
        task="chair",
        data="chair",
        split="seen",
        share=0.5,
        max_tokens=64,
        rule="CHAIR's prompt, at most 64 tokens",
        measures=("found", "invented"),
        binary=False,
        every_cliff=False,
    ),
    Kind(
        key="unseen_style",
        title="Yes or no, in a drawing style that training did not show",
        short="unseen",
        what="yes/no questions in an unseen drawing style",
        task="pope",
        data="pope",
        split="unseen_style",
        share=1 / 3,
        max_tokens=4,
        rule="as yes/no",
        every_cliff=False,
    ),
)
"""In the order of the table; the first is the headline."""

BY_KEY: Mapping[str, Kind] = {kind.key: kind for kind in KINDS}
HEADLINE = KINDS[0].key

MEASURES: Mapping[str, tuple[str, str]] = {
    "right": ("points", "answers"),
    "found": ("found", "shown"),
    "invented": ("invented", "named"),
}
"""Measure -> the counts of an answer whose sums it is the ratio of: share of right answers, share of
the things in the pictures that captions name, share of the things named that are not there."""


def how_many(kind: Kind, headline: int) -> int:
    """Questions of a kind where the headline kind has so many; at least one."""
    return max(1, round(kind.share * headline))
