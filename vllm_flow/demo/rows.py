"""How a demo's answers become a row per cliff and per policy. (pure)

Statistics are the evaluation's: right/wrong answers by Wilson, Newcombe and McNemar; ratios of counts
by resampling whole questions, of which there is one per picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

import numpy as np

from vllm_flow.block_counts import predict_blocks
from vllm_flow.demo.kinds import BY_KEY, HEADLINE, MEASURES, Kind
from vllm_flow.demo.measurements import (
    TRIMMED,
    Answer,
    Engine,
    Question,
    Results,
    Row,
    Score,
    Setting,
    Spread,
)
from vllm_flow.eval.statistics.bootstrap import compare
from vllm_flow.eval.statistics.intervals import accuracy, paired_difference
from vllm_flow.eval.sweep.budgets import average_tokens
from vllm_flow.eval.sweep.policy import text_of
from vllm_flow.eval.tasks.base import ratio
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.profile.dimensions import Workload
from vllm_flow.profile.ideal import rows_ideal
from vllm_flow.spans import ImageSpans

SWAPS = 1999
"""Of the randomisation tests; the smallest p is 1 / (1 + SWAPS)."""

ENOUGH = 20
"""Questions of a kind below which nothing is said of where it levels off: an exact McNemar test of a
few finds nothing, which looks like levelling off."""

Given = Mapping[Setting, Mapping[str, Answer]]
"""Setting -> question id -> answer; cliffs ascend, policies follow."""

Policies = Mapping[str, FlowPolicy]
"""What the names of policies stand for."""


def flow_of(setting: Setting, engine: Engine, policies: Policies) -> FlowPolicy | None:
    """What a setting evicts; None at the baseline."""
    if isinstance(setting, str):
        return policies[setting]
    return None if setting == engine.num_layers else FlowPolicy.withdrawal(setting)


def predicted_blocks(
    answer: Answer, engine: Engine, policy: FlowPolicy | None = None
) -> tuple[int, ...]:
    """KV blocks per storage group that the answer's request should have held at its end.

    Args:
        policy: what was evicted, where the answer has no cliff.
    """
    # Only the number of image tokens matters once the whole prompt is computed, not their place.
    spans = ImageSpans.from_ranges([(0, answer.image_tokens)])
    if answer.cliff is not None:
        policy = flow_of(answer.cliff, engine, {})
    layout = TokenLayout.of(policy, spans, answer.prompt_tokens)
    return predict_blocks(answer.computed_tokens, layout, engine.group_starts, engine.block_size)


def summarise(
    engine: Engine,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    speedups: Mapping[Setting, Sequence[float]],
    policies: Policies | None = None,
) -> Results:
    """One row per cliff, and one per policy that has answers.

    The headline kind must be answered at every setting, any kind at the baseline, and a kind that is
    asked at a setting completely; KeyError otherwise.

    `speedups` holds, per setting, the baseline's prefill time over the setting's, one per round.
    `policies` says what the names of the answers' policies stand for; their rows come in its order.
    """
    policies = policies or {}
    found: dict[Setting, dict[str, Answer]] = {}
    for answer in answers:
        found.setdefault(answer.setting, {})[answer.question_id] = answer
    cliffs = sorted(setting for setting in found if isinstance(setting, int))
    named = [name for name in policies if name in found]
    given: Given = {setting: found[setting] for setting in (*cliffs, *named)}
    kinds: dict[str, list[str]] = {}
    for question in questions:
        kinds.setdefault(question.kind, []).append(question.id)
    scores = {
        kind: score_kind(BY_KEY[kind], ids, given, engine.num_layers) for kind, ids in kinds.items()
    }

    def row(setting: Setting) -> Row:
        return row_of(
            engine,
            flow_of(setting, engine, policies),
            list(given[setting].values()),
            [given[setting][i] for i in kinds[HEADLINE]],
            {kind: scores[kind][setting] for kind in scores if setting in scores[kind]},
            speedups.get(setting),
        )

    return Results(
        engine,
        list(questions),
        list(answers),
        [row(cliff) for cliff in cliffs],
        [row(name) for name in named],
    )


def row_of(
    engine: Engine,
    policy: FlowPolicy | None,
    answers: Sequence[Answer],
    headline: Sequence[Answer],
    scores: dict[str, dict[str, Score]],
    speedups: Sequence[float] | None,
) -> Row:
    """The row of one setting: `headline` are those of its `answers` that costs are told of."""
    cliff, name = answers[0].cliff, answers[0].policy
    equal = [a.blocks == predicted_blocks(a, engine, policy) for a in answers]
    return Row(
        cliff=cliff,
        scores=scores,
        speedup=spread(speedups) if speedups else None,
        speedup_ideal=ideal_speedup(engine, policy, headline),
        blocks=fmean(sum(answer.blocks) for answer in headline),
        blocks_predicted=fmean(sum(predicted_blocks(a, engine, policy)) for a in headline),
        blocks_equal=sum(equal),
        requests=len(equal),
        layers=layers_that_see(engine, policy, headline),
        policy=name,
        stages=None if name is None or policy is None else text_of(policy),
    )


def layers_that_see(engine: Engine, policy: FlowPolicy | None, answers: Sequence[Answer]) -> float:
    """Layers through which an image token goes in prefill, on average: a cliff's are the cliff."""
    tokens = sum(answer.image_tokens for answer in answers)
    if policy is None or not tokens:
        return float(engine.num_layers)
    left = sum(average_tokens(policy, engine.num_layers, a.image_tokens) for a in answers)
    return float(engine.num_layers * left / tokens)


def score_kind(
    kind: Kind, ids: Sequence[str], given: Given, baseline: int
) -> dict[Setting, dict[str, Score]]:
    """Setting -> measure -> score, at those where any of the questions was answered."""
    asked = [s for s in given if s == baseline or any(i in given[s] for i in ids)]
    counts = {setting: [given[setting][i].reading.counts for i in ids] for setting in asked}
    scored = _right_or_wrong if kind.binary else _ratios
    return scored(kind, counts, baseline)


Counts = Mapping[Setting, Sequence[Mapping[str, float]]]
"""Setting -> the counts of each question, in the same order."""


def _right_or_wrong(kind: Kind, counts: Counts, baseline: int) -> dict[Setting, dict[str, Score]]:
    (measure,) = kind.measures
    part, _ = MEASURES[measure]
    right = {setting: [one[part] == 1 for one in rows] for setting, rows in counts.items()}
    found = {}
    for setting, flags in right.items():
        paired = paired_difference(right[baseline], flags)
        found[setting] = {
            measure: Score(
                part=sum(flags),
                whole=len(flags),
                value=accuracy(sum(flags), len(flags)),
                difference=paired.difference,
                p_value=paired.p_value,
            )
        }
    return found


def _ratios(kind: Kind, counts: Counts, baseline: int) -> dict[Setting, dict[str, Score]]:
    names = sorted({name for measure in kind.measures for name in MEASURES[measure]})
    # [settings, questions, counts]
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
    found: dict[Setting, dict[str, Score]] = {setting: {} for setting in counts}
    for measure in kind.measures:
        part, over = (names.index(name) for name in MEASURES[measure])
        for row, setting in enumerate(counts):
            one = compared[measure][row]
            found[setting][measure] = Score(
                part=float(sums[row, part]),
                whole=float(sums[row, over]),
                value=one.treatment,
                difference=one.difference,
                p_value=one.p_value,
            )
    return found


def ideal_speedup(
    engine: Engine, policy: int | FlowPolicy | None, answers: Sequence[Answer]
) -> float:
    """The row-count ideal for a batch of these prompts, stage by stage; of a cliff or a policy."""
    return rows_ideal(
        engine,
        [Workload(a.prompt_tokens - a.image_tokens, a.image_tokens, 1) for a in answers],
        engine.num_layers if policy is None else policy,
        engine.key_share,
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
