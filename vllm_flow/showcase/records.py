"""What the demo measures, as plain records, and how answers become a row per cliff. (pure)

Knows no engine, no files and no layout of tables or pages. The fields are those of `results.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from vllm_flow.eval.stats import Interval, PairedDifference, accuracy, paired_difference
from vllm_flow.plan import TokenLayout, predict_blocks, row_count_ideal
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

SPLIT_TITLES = {
    "seen": "new scenes, drawing styles seen in training",
    "unseen_style": "an unseen drawing style",
    "photo": "photographs",
}
"""Splits of the held-out questions, the headline first."""
HEADLINE = "seen"


@dataclass(frozen=True)
class Question:
    """One yes/no question about one picture; `label` is what is right."""

    question_id: str
    image_path: Path
    text: str
    label: str
    split: str


@dataclass(frozen=True)
class Answer:
    """What the model said to one question at one cliff, and what serving it took."""

    question_id: str
    cliff: int
    said: str
    right: bool
    prompt_tokens: int
    image_tokens: int
    computed_tokens: int
    """Tokens with keys and values when the request ended."""
    blocks: tuple[int, ...]
    """KV blocks held at the end, per storage group, shallowest first (measured)."""


@dataclass(frozen=True)
class Scene:
    """A picture whose objects are known."""

    image_path: Path
    objects: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Caption:
    """What the model listed of a scene at one cliff."""

    scene: Scene
    cliff: int
    said: str
    mentioned: tuple[str, ...]
    hallucinated: tuple[str, ...]
    """Mentioned, but not in the picture."""
    missed: tuple[str, ...]
    """In the picture, but not mentioned."""


@dataclass(frozen=True)
class Engine:
    """The engine that answered: what is needed to predict its blocks and to repeat the run."""

    model: str
    dtype: str
    num_layers: int
    group_starts: tuple[int, ...]
    """First layer of each storage group."""
    block_size: int
    """Tokens per KV block of one storage group."""
    vllm: str
    torch: str
    device: str


@dataclass(frozen=True)
class Score:
    """One split at one cliff."""

    correct: int
    total: int
    accuracy: Interval
    against_baseline: PairedDifference


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Row:
    """Everything about one cliff."""

    cliff: int
    scores: dict[str, Score]
    speedup: Spread | None
    """Prefill time of the baseline over that of this cliff, per round; None when not timed."""
    speedup_ideal: float
    """The same if time were proportional to rows x layers."""
    blocks: float
    """KV blocks per request over all storage groups, mean (measured)."""
    blocks_predicted: float
    blocks_equal: int
    """Requests whose blocks equal the prediction in every storage group."""
    requests: int


@dataclass(frozen=True)
class Results:
    """A whole run of the demo."""

    engine: Engine
    questions: list[Question]
    answers: list[Answer]
    rows: list[Row]
    """By ascending cliff; the last is the baseline."""
    captions: list[Caption] = field(default_factory=list)
    """Lists of objects at a few cliffs, for the page."""

    @property
    def splits(self) -> list[str]:
        """Splits that were asked, in the order of `SPLIT_TITLES`."""
        asked = {question.split for question in self.questions}
        return [s for s in SPLIT_TITLES if s in asked] + sorted(asked - SPLIT_TITLES.keys())

    @property
    def baseline(self) -> Row:
        return self.rows[-1]


def predicted_blocks(answer: Answer, engine: Engine) -> tuple[int, ...]:
    """KV blocks per storage group that the answer's request should have held at its end."""
    # Only the number of image tokens matters once the whole prompt is computed, not their place.
    spans = ImageSpans.from_ranges([(0, answer.image_tokens)])
    policy = None if answer.cliff == engine.num_layers else FlowPolicy(answer.cliff)
    layout = TokenLayout.of(policy, spans)
    return predict_blocks(answer.computed_tokens, layout, engine.group_starts, engine.block_size)


def summarise(
    engine: Engine,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    speedups: Mapping[int, Sequence[float]],
    captions: Sequence[Caption] = (),
) -> Results:
    """One row per cliff. Every question must be answered at every cliff, the baseline included.

    `speedups` holds, per cliff, the baseline's prefill time over the cliff's, one per round.
    """
    by_cliff: dict[int, dict[str, Answer]] = {}
    for answer in answers:
        by_cliff.setdefault(answer.cliff, {})[answer.question_id] = answer
    baseline = by_cliff[engine.num_layers]
    rows = []
    for cliff in sorted(by_cliff):
        given = by_cliff[cliff]
        scores = {}
        for split in {question.split for question in questions}:
            ids = [question.question_id for question in questions if question.split == split]
            right = [given[i].right for i in ids]
            scores[split] = Score(
                correct=sum(right),
                total=len(right),
                accuracy=accuracy(sum(right), len(right)),
                against_baseline=paired_difference([baseline[i].right for i in ids], right),
            )
        predicted = [predicted_blocks(answer, engine) for answer in given.values()]
        rows.append(
            Row(
                cliff=cliff,
                scores=scores,
                speedup=spread(speedups[cliff]) if speedups.get(cliff) else None,
                speedup_ideal=ideal_speedup(engine.num_layers, cliff, list(given.values())),
                blocks=mean([sum(answer.blocks) for answer in given.values()]),
                blocks_predicted=mean([sum(blocks) for blocks in predicted]),
                blocks_equal=sum(
                    answer.blocks == blocks
                    for answer, blocks in zip(given.values(), predicted, strict=True)
                ),
                requests=len(given),
            )
        )
    return Results(engine, list(questions), list(answers), rows, list(captions))


def ideal_speedup(num_layers: int, cliff: int, answers: Sequence[Answer]) -> float:
    """The row-count ideal for the mean prompt; exact for a batch of these prompts."""
    return row_count_ideal(
        num_layers=num_layers,
        cliff=cliff,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        image_tokens=sum(answer.image_tokens for answer in answers),
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(median(values), min(values), max(values), len(values))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def equal_from(results: Results, split: str) -> int | None:
    """Shallowest cliff from which on no paired difference to the baseline excludes zero.

    None when only the baseline itself qualifies. An observation about this run, not a proof of
    equality: few questions cannot tell small differences from none.
    """
    found = None
    for row in reversed(results.rows[:-1]):
        paired = row.scores[split].against_baseline
        if paired.p_value < 0.05 or not paired.difference.low <= 0 <= paired.difference.high:
            break
        found = row.cliff
    return found
