"""How a demo's answers become a row per cliff. (pure)

Statistics are the evaluation's: right/wrong answers by Wilson, Newcombe and McNemar; ratios of counts
by resampling whole questions, of which there is one per picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

import numpy as np

from vllm_flow.demo.kinds import BY_KEY, HEADLINE, MEASURES, Kind
from vllm_flow.demo.measurements import (
    TRIMMED,
    Answer,
    Engine,
    Question,
    Results,
    Row,
    Score,
    Spread,
)
from vllm_flow.eval.statistics.bootstrap import compare
from vllm_flow.eval.statistics.intervals import accuracy, paired_difference
from vllm_flow.eval.tasks.base import ratio
from vllm_flow.layout import TokenLayout, predict_blocks
from vllm_flow.policy import FlowPolicy
from vllm_flow.profile.ideal import row_count_ideal
from vllm_flow.spans import ImageSpans

SWAPS = 1999
"""Of the randomisation tests; the smallest p is 1 / (1 + SWAPS)."""

ENOUGH = 20
"""Questions of a kind below which nothing is said of where it levels off: an exact McNemar test of a
few finds nothing, which looks like levelling off."""

Given = Mapping[int, Mapping[str, Answer]]
"""Cliff -> question id -> answer."""


def predicted_blocks(answer: Answer, engine: Engine) -> tuple[int, ...]:
    """KV blocks per storage group that the answer's request should have held at its end."""
    # Only the number of image tokens matters once the whole prompt is computed, not their place.
    spans = ImageSpans.from_ranges([(0, answer.image_tokens)])
    policy = None if answer.cliff == engine.num_layers else FlowPolicy.withdrawal(answer.cliff)
    layout = TokenLayout.of(policy, spans)
    return predict_blocks(answer.computed_tokens, layout, engine.group_starts, engine.block_size)


def summarise(
    engine: Engine,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    speedups: Mapping[int, Sequence[float]],
) -> Results:
    """One row per cliff.

    The headline kind must be answered at every cliff, any kind at the baseline, and a kind that is
    asked at a cliff completely; KeyError otherwise.

    `speedups` holds, per cliff, the baseline's prefill time over the cliff's, one per round.
    """
    given: dict[int, dict[str, Answer]] = {}
    for answer in answers:
        given.setdefault(answer.cliff, {})[answer.question_id] = answer
    kinds: dict[str, list[str]] = {}
    for question in questions:
        kinds.setdefault(question.kind, []).append(question.id)
    scores = {
        kind: score_kind(BY_KEY[kind], ids, given, engine.num_layers) for kind, ids in kinds.items()
    }
    rows = []
    for cliff in sorted(given):
        headline = [given[cliff][i] for i in kinds[HEADLINE]]
        equal = [a.blocks == predicted_blocks(a, engine) for a in given[cliff].values()]
        rows.append(
            Row(
                cliff=cliff,
                scores={kind: scores[kind][cliff] for kind in scores if cliff in scores[kind]},
                speedup=spread(speedups[cliff]) if speedups.get(cliff) else None,
                speedup_ideal=ideal_speedup(engine, cliff, headline),
                blocks=fmean(sum(answer.blocks) for answer in headline),
                blocks_predicted=fmean(sum(predicted_blocks(a, engine)) for a in headline),
                blocks_equal=sum(equal),
                requests=len(equal),
            )
        )
    return Results(engine, list(questions), list(answers), rows)


def score_kind(
    kind: Kind, ids: Sequence[str], given: Given, baseline: int
) -> dict[int, dict[str, Score]]:
    """Cliff -> measure -> score, at the cliffs where any of the questions was answered."""
    cliffs = [c for c in sorted(given) if c == baseline or any(i in given[c] for i in ids)]
    counts = {cliff: [given[cliff][i].reading.counts for i in ids] for cliff in cliffs}
    scored = _right_or_wrong if kind.binary else _ratios
    return scored(kind, counts, baseline)


Counts = Mapping[int, Sequence[Mapping[str, float]]]
"""Cliff -> the counts of each question, in the same order."""


def _right_or_wrong(kind: Kind, counts: Counts, baseline: int) -> dict[int, dict[str, Score]]:
    (measure,) = kind.measures
    part, _ = MEASURES[measure]
    right = {cliff: [one[part] == 1 for one in rows] for cliff, rows in counts.items()}
    found = {}
    for cliff, flags in right.items():
        paired = paired_difference(right[baseline], flags)
        found[cliff] = {
            measure: Score(
                part=sum(flags),
                whole=len(flags),
                value=accuracy(sum(flags), len(flags)),
                difference=paired.difference,
                p_value=paired.p_value,
            )
        }
    return found


def _ratios(kind: Kind, counts: Counts, baseline: int) -> dict[int, dict[str, Score]]:
    names = sorted({name for measure in kind.measures for name in MEASURES[measure]})
    # [cliffs, questions, counts]
    table = np.array([[[one[n] for n in names] for one in rows] for rows in counts.values()])
    sums = table.sum(axis=1)
    whole = np.array([[[one[n] for n in names] for one in counts[baseline]]])
    compared = compare(
        names,
        np.broadcast_to(whole, table.shape),
        table,
        lambda totals: {
            measure: ratio(*(totals[name] for name in MEASURES[measure]))
            for measure in kind.measures
        },
        swaps=SWAPS,
    )
    found: dict[int, dict[str, Score]] = {cliff: {} for cliff in counts}
    for measure in kind.measures:
        part, over = (names.index(name) for name in MEASURES[measure])
        for row, cliff in enumerate(counts):
            one = compared[measure][row]
            found[cliff][measure] = Score(
                part=float(sums[row, part]),
                whole=float(sums[row, over]),
                value=one.treatment,
                difference=one.difference,
                p_value=one.p_value,
            )
    return found


def ideal_speedup(engine: Engine, cliff: int, answers: Sequence[Answer]) -> float:
    """The row-count ideal for the mean prompt; exact for a batch of these prompts."""
    return row_count_ideal(
        num_layers=engine.num_layers,
        cliff=cliff,
        key_share=engine.key_share,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        image_tokens=sum(answer.image_tokens for answer in answers),
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and range; of five or more the extremes are left out, which one disturbance makes."""
    told = sorted(values)[1:-1] if len(values) >= TRIMMED else values
    return Spread(median(values), min(told), max(told), len(values))


def enough(results: Results, kind: str) -> bool:
    """Whether there are questions enough to say from where on no difference is to be seen."""
    return len(results.of_kind(kind)) >= ENOUGH


def equal_from(results: Results, kind: str) -> int | None:
    """Shallowest cliff from which on no paired difference to the baseline excludes zero.

    Among the cliffs at which the kind was asked, by its first measure. None when only the baseline
    itself qualifies, or where there are too few questions. An observation about this run, not a
    proof of equality: few questions cannot tell small differences from none.
    """
    found = None
    if not enough(results, kind):
        return None
    for row in reversed(results.rows[:-1]):
        score = row.score(kind)
        if score is None:
            continue
        if score.differs:
            break
        found = row.cliff
    return found


def level_text(results: Results, kind: str) -> str:
    """The same in a few words."""
    if not enough(results, kind):
        return "too few to compare"
    level = equal_from(results, kind)
    return "up to the last cliff a difference" if level is None else f"from cliff {level}"
