"""A task asked step by step: the model reasons first, and only its last line is scored.

`NAME-steps` beside `NAME` in one run shows whether a picture leaves too early when reasoning comes back to it.
Every task can be asked so whose questions end in a request for a word, a phrase or a letter. In its
place stands what MMMU-Pro's prompts ask (MMMU-Benchmark/MMMU, mmmu-pro/prompts.yaml): to think step by step, and to
give the answer in a last line `Answer: ...`. What stands there is scored by the task's own rule.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from vllm_flow.eval.tasks.base import Item, Metrics, Scored, Task, Totals
from vllm_flow.eval.tasks.prompts import LETTER, SHORT, short_answer
from vllm_flow.eval.tasks.reading import DataError

STEPS = "steps"

REASON = (
    "\nThink step by step before you answer. The last line of your response must have the form "
    "'Answer: X' (without quotes), where X is "
)
REQUESTS: Mapping[str, str] = MappingProxyType(
    {
        SHORT: REASON + "a single word or phrase.",
        "\nAnswer the question with a single word.": REASON + "a single word.",
        short_answer("", "qwen2-vl"): REASON + "a single word or phrase.",
        "\nAnswer:": REASON + "the letter of the right option.",
        short_answer("", "qwen-vl"): REASON + "a single word or phrase.",
        LETTER: REASON + "the letter of the right option.",
        " Please answer yes or no.": REASON + "yes or no.",
        "\nPlease select the correct answer from the options above.": REASON
        + "the letter of the right option.",
    }
)
"""What a question ends in -> what it ends in when asked step by step."""

_LINE = re.compile(
    r"^[\s*_#>`-]*(?:the )?(?:final )?answer[\s*_]*(?::|is\b:?)[\s*_`]*(?P<answer>.*?)[\s*_`]*$",
    re.IGNORECASE | re.MULTILINE,
)


def final_answer(text: str) -> str | None:
    """What the last line `Answer: ...` gives, without emphasis, quotes and a full stop; None without one.

    >>> final_answer("There are two cats.\\n**Answer:** B.")
    'B'
    """
    found = [match["answer"] for match in _LINE.finditer(text)]
    if not found:
        return None
    answer = found[-1].strip("'\"‘’“” ")
    return answer.removesuffix(".").strip("'\"‘’“” ")


def step_by_step(question: str) -> str | None:
    """A question with the request at its end replaced; None where it ends in none of `REQUESTS`."""
    for request, instead in REQUESTS.items():
        if question.endswith(request):
            return question.removesuffix(request) + instead
    return None


@dataclass(frozen=True)
class Steps(Task):
    """Another task's questions, asked step by step."""

    task: Task
    name: str
    headline: str
    higher_is_better: bool
    image_preparation: Literal["conversation", "pad", "plain"]
    unclear: str
    binary: bool
    full_marks: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Collection[str]] = field(default_factory=dict)
    max_tokens: int = 1024

    def read(self, data: Path) -> list[Item]:
        items = []
        for item in self.task.read(data):
            text = step_by_step(item.text)
            if text is None:
                raise DataError(
                    f"{self.name}: the question {item.id} does not end in a request for a word, a phrase or a "
                    f"letter, so it cannot be asked step by step; ask {self.task.name}"
                )
            items.append(replace(item, text=text))
        return items

    def score(self, item: Item, text: str) -> Scored:
        answer = final_answer(text)
        scored = self.task.score(item, answer or "")
        return replace(scored, unclear=scored.unclear or answer is None)

    def metrics(self, totals: Totals) -> Metrics:
        return self.task.metrics(totals)

    def bundle(self, item: Item) -> tuple[str, int]:
        return self.task.bundle(item)

    def together(self, scored: Iterable[Scored]) -> list[Scored]:
        return self.task.together(scored)

    def asked_as(self, style: str) -> Task:
        own = self.task.asked_as(style)
        return self if own is self.task else replace(self, task=own)


def with_steps(task: Task) -> Steps:
    """The task, asked step by step."""
    return Steps(
        task=task,
        name=f"{task.name}-{STEPS}",
        headline=task.headline,
        higher_is_better=task.higher_is_better,
        image_preparation=task.image_preparation,
        full_marks=task.full_marks,
        parts=task.parts,
        unclear="have no last line `Answer: ...` (then the rule is given an empty answer)"
        + (f", or {task.unclear}" if task.unclear else ""),
        binary=task.binary,
    )
