"""What the demo measures, as plain records: the fields of `results.json`. (pure)

Knows no engine, no files and no layout of tables or pages; `rows` makes rows of answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_flow.demo.kinds import BY_KEY, KINDS, Kind
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.eval.tasks.base import Item

AGREEMENT = 1.3
"""Largest over smallest of repeated times: on quiet cores 1.05 to 1.2, beside another process 1.5 and
more."""

TRIMMED = 5
"""Measurements from which on a range is told without the lowest and the highest."""

Setting = int | str
"""What a question is asked at: a cliff, or a policy by its name."""


def setting_of(cliff: int | None, policy: str | None) -> Setting:
    """A record's setting; it has one of the two."""
    assert (cliff is None) != (policy is None)
    return policy if cliff is None else cliff  # type: ignore[return-value]


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    kind: str
    """A `Kind`'s key."""
    item: Item
    """As the evaluation's task asks it, with what scoring needs."""
    answer: str
    """What is right, in words for people."""
    chance: float
    """Expected score of guessing."""

    @property
    def id(self) -> str:
        """Unique within a run."""
        return f"{self.kind}/{self.item.id}"

    @property
    def picture(self) -> Path:
        """The picture's file."""
        assert self.item.image is not None
        return Path(self.item.image)

    @property
    def bare(self) -> str:
        """The text without its last line, which only tells the form of the answer."""
        return self.item.text.rsplit("\n", 1)[0]


@dataclass(frozen=True)
class Reading:
    """What was read from an answer by its kind's rule."""

    score: float
    """In [0, 1]; for captions the share of named things that are there (nothing named: 0)."""
    counts: Mapping[str, float]
    """What the kind's measures are ratios of."""
    named: tuple[str, ...] = ()
    """Captions: things mentioned."""
    invented: tuple[str, ...] = ()
    """Of these, not in the picture."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one question at one cliff or under one policy, and what serving it took."""

    question_id: str
    cliff: int | None
    """None under a policy."""
    said: str
    reading: Reading
    prompt_tokens: int
    image_tokens: int
    computed_tokens: int
    """Tokens with keys and values when the request ended."""
    blocks: tuple[int, ...]
    """KV blocks held at the end, per storage group, shallowest first (measured)."""
    policy: str | None = None
    """Its name; None at a cliff."""

    @property
    def setting(self) -> Setting:
        """The cliff, or the policy's name."""
        return setting_of(self.cliff, self.policy)


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
    key_share: float = 1.0
    """Of a layer, what an image row costs in the last one before its cliff; 1: all of it."""

    @property
    def layers(self) -> int:
        """`num_layers`, as the ideals of `vllm_flow.profile.ideal` ask for it."""
        return self.num_layers


@dataclass(frozen=True)
class Score:
    """One measure of one kind at one cliff or under one policy."""

    part: float
    whole: float
    """The measure is `part / whole`: right of asked, found of shown, invented of named."""
    value: Interval
    difference: Interval
    """To the baseline on the same questions."""
    p_value: float
    """Of the hypothesis that the cliff, or the policy, changes nothing; two-sided."""

    @property
    def differs(self) -> bool:
        """Whether the difference to the baseline excludes zero."""
        return self.p_value < 0.05 or not self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements; of many, without the extremes."""

    median: float
    low: float
    high: float
    count: int

    @property
    def agrees(self) -> bool:
        """Whether the measurements tell one number, or were disturbed by something else."""
        return self.high <= AGREEMENT * self.low


@dataclass(frozen=True)
class Row:
    """Everything about one cliff, or one policy."""

    cliff: int | None
    """None for a policy."""
    scores: dict[str, dict[str, Score]]
    """Kind -> measure -> score; kinds that were not asked at this cliff are left out."""
    speedup: Spread | None
    """Prefill time of the baseline over that of this row, per round; None when not timed."""
    speedup_ideal: float
    """The same if time were proportional to rows x layers, for the headline's prompts."""
    blocks: float
    """KV blocks per headline question over all storage groups, mean (measured)."""
    blocks_predicted: float
    blocks_equal: int
    """Requests of all kinds whose blocks equal the prediction in every storage group."""
    requests: int
    layers: float
    """Layers that see the image, on average over its tokens in the headline's prefills: the cliff itself,
    or for a policy the cliff of equal cost."""
    policy: str | None = None
    """Its name; None for a cliff."""
    stages: str | None = None
    """The policy's text in the evaluation's grammar; a preset's stages in this model."""

    @property
    def setting(self) -> Setting:
        """The cliff, or the policy's name."""
        return setting_of(self.cliff, self.policy)

    def score(self, kind: str) -> Score | None:
        """The first measure of a kind; None where it was not asked."""
        return self.scores[kind][BY_KEY[kind].measures[0]] if kind in self.scores else None


@dataclass(frozen=True)
class Results:
    """A whole run of the demo."""

    engine: Engine
    questions: list[Question]
    answers: list[Answer]
    rows: list[Row]
    """By ascending cliff; the last is the baseline."""
    policies: list[Row] = field(default_factory=list)
    """Beside the cliffs, as they were named."""

    @property
    def kinds(self) -> list[Kind]:
        """Kinds that were asked, in their order."""
        asked = {question.kind for question in self.questions}
        return [kind for kind in KINDS if kind.key in asked]

    @property
    def baseline(self) -> Row:
        """The untouched model."""
        return self.rows[-1]

    def of_kind(self, kind: str) -> list[Question]:
        """The questions of a kind."""
        return [question for question in self.questions if question.kind == kind]

    def chance(self, kind: str) -> float:
        """Expected score of guessing."""
        chances = [question.chance for question in self.of_kind(kind)]
        return sum(chances) / len(chances)

    def cliffs_of(self, kind: str) -> list[int]:
        """Ascending cliffs at which a kind was asked."""
        return [row.cliff for row in self.rows if row.cliff is not None and kind in row.scores]
