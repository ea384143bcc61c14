"""Requests of policies that keep tokens, and a naive model that chooses one token at a time."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from vllm_flow.last_layer import LastLayer, spare_last_layers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.ranks import RANKS, PositionRank
from vllm_flow.ranks.base import Draw
from vllm_flow.spans import ImageSpans
from vllm_flow.step import Ranking, ScheduledRequest

LAYERS = 6


@dataclass(frozen=True)
class Case:
    """A request of ``length`` tokens, ``prompt`` of them its prompt, with a score per position."""

    length: int
    prompt: int
    images: tuple[tuple[int, ...], ...]
    policy: FlowPolicy
    scores: tuple[float, ...]

    @property
    def layout(self) -> TokenLayout | None:
        images = [ImageSpans.from_ranges((p, p + 1) for p in image) for image in self.images]
        return TokenLayout.of(self.policy, images, self.prompt)

    def left(self, layer: int) -> set[int]:
        """Image tokens that a layer sees."""
        found: set[int] = set()
        for index, image in enumerate(self.images):
            tokens = list(image)
            for stage in self.policy.stages_of(index):
                if stage.layer <= layer:
                    keep = min(stage.kept(len(image)), len(tokens))
                    tokens = self.chosen(stage, index, tokens, keep)
            found |= set(tokens)
        return found

    def chosen(self, stage: Stage, image: int, tokens: list[int], keep: int) -> list[int]:
        if keep in (0, len(tokens)):
            return tokens[:keep]
        rank = RANKS[stage.rank or ""]
        if isinstance(rank, PositionRank):
            picked = rank.choose(len(tokens), keep, Draw(self.policy.seed, image, stage.layer))
            return [tokens[at] for at in picked]
        return sorted(sorted(tokens, key=lambda p: -self.scores[p])[:keep])

    def alive(self, layer: int) -> list[int]:
        evicted = {p for image in self.images for p in image} - self.left(layer)
        return [p for p in range(self.length) if p not in evicted]


WITH_TEXT = st.lists(st.sampled_from([1, 1, 1, 1, 2, 3]), max_size=9)
"""From each token of an image to the next one; text is where that is more than one."""


@st.composite
def cases(draw: st.DrawFn, ranks: tuple[str, ...] = tuple(RANKS)) -> Case:
    """Images with text between them and inside of them, under any policy."""
    images, at = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 3))):
        gaps = draw(st.integers(0, 9).map(lambda more: [1] * more) | WITH_TEXT)
        image = [at + int(step) for step in np.cumsum([0, *gaps])]
        images.append(tuple(image))
        at = image[-1] + 1 + draw(st.integers(0, 3))
    prompt = at + draw(st.integers(1, 3))

    def stages() -> tuple[Stage, ...]:
        layers = sorted(draw(st.sets(st.integers(0, LAYERS - 1), min_size=1, max_size=3)))
        keeps = [draw(st.integers(0, 10) | st.fractions(0, 1, max_denominator=9)) for _ in layers]
        made = []
        for layer, keep in zip(layers, keeps, strict=True):
            keep = 0 if keep == 0 else 10 if keep == 1 and isinstance(keep, Fraction) else keep
            names = [n for n in ranks if layer or not RANKS[n].reads_layer]
            made.append(Stage(layer, keep, draw(st.sampled_from(names)) if keep else None))
        return tuple(made)

    own = [stages() for _ in images] if draw(st.booleans()) and len(images) > 1 else [stages()]
    scores = draw(st.permutations(range(prompt)))
    length = prompt + draw(st.integers(0, 4))
    policy = FlowPolicy(tuple(own), draw(st.integers(0, 3)))
    return Case(length, prompt, tuple(images), policy, tuple(map(float, scores)))


def choosing() -> st.SearchStrategy[Case]:
    """Those of which the device chooses what stays."""
    ranks = tuple(name for name, rank in RANKS.items() if not isinstance(rank, PositionRank))
    return cases(ranks).filter(lambda case: case.layout is not None and case.layout.chooses)


def apply(plan, layer: int, batch: list[tuple[Case, int]], starts: list[int]) -> list[int]:
    """Rows of the step that are alive in a layer, once the choices up to it are made."""
    rows = np.arange(plan.num_rows)
    for variant in plan.variants:
        if variant.first_layer > layer or variant.gather is None:
            continue
        gather = variant.gather.copy()
        for ranking in variant.rankings:
            part = slice(ranking.target, ranking.target + ranking.choice.keep)
            gather[part] = ranking.source + made(ranking, rows, batch, starts)
        rows = rows[gather]
    return rows.tolist()


def made(
    ranking: Ranking, rows: np.ndarray, batch: list[tuple[Case, int]], starts: list[int]
) -> np.ndarray:
    """Which of the rows before stay, as a device would find it."""
    case, computed = batch[ranking.request]
    choice = ranking.choice
    at = rows[ranking.source : ranking.source + choice.left] - starts[ranking.request] + computed
    assert at[0] >= choice.start and at[-1] < choice.stop
    assert starts[ranking.request] + choice.start - computed == ranking.first_row
    text = np.isin(at - choice.start, choice.text)
    score = np.array([case.scores[p] for p in at])
    if choice.picks is not None:
        score = np.zeros(len(at))
        score[np.flatnonzero(~text)[list(choice.picks)]] = 1
    score[text] = np.inf
    return np.sort(np.argsort(-score, kind="stable")[: choice.keep])


def alive_after(case: Case, prefix: int, layer: int) -> set[int]:
    """What a layer sees of a request that began with a prefix.

    Of an image in which the prefix ends, all that stays is stored: which tokens those are does not matter
    any more, and the layout's first ones stand for them.
    """
    found, layout = set(case.alive(layer)), case.layout
    for stage in layout.stages if layout is not None else ():
        for choice in stage.choices:
            if stage.layer <= layer and choice.start < prefix < choice.stop:
                extent = set(range(choice.start, choice.stop))
                evicted = layout.evicted(layer)
                found = found - extent | {p for p in extent if not evicted.is_image(p)}
    return found


def check_step(batch: list[tuple[Case, int, int]], prefixes: list[int], spares: bool) -> None:
    """One step, tokens ``[computed, end)`` of each request, against the naive model in every layer.

    Args:
        spares: the plan is the one in which rows leave a layer earlier, all but their keys and values.
    """
    requests = [ScheduledRequest(a, b - a, case.layout) for case, a, b in batch]
    plan = plan_step(requests)
    starts = np.concatenate(([0], np.cumsum([b - a for _, a, b in batch]))).tolist()
    if plan is None:
        assert all(case.layout is None for case, _, _ in batch)
        return
    if spares:
        plan = spare_last_layers(plan, requests)
    for layer in range(LAYERS):
        variant = plan.variant_at(layer)
        alive = [
            alive_after(case, prefix, layer)
            for (case, _, _), prefix in zip(batch, prefixes, strict=True)
        ]
        expected = [
            (starts[r] + p - a, r, sum(q in alive[r] for q in range(p)))
            for r, (_, a, b) in enumerate(batch)
            for p in range(a, b)
            if p in alive[r]
        ]
        if variant is None:
            assert len(expected) == plan.num_rows
            continue
        rows = apply(plan, layer, [(case, a) for case, a, _ in batch], starts)
        found = list(
            zip(rows, variant.row_requests.tolist(), variant.positions.tolist(), strict=True)
        )
        if isinstance(variant, LastLayer):
            last = variant.last
            parts = (last.rows, last.row_requests, last.positions)
            found += zip(*(part.tolist() for part in parts), strict=True)
            assert sorted(found) == expected
            continue
        assert found == expected
        stored = [sum(q < batch[r][2] for q in alive[r]) for r in variant.requests]
        assert variant.seq_lens.tolist() == stored
        for ranking in variant.rankings if variant.first_layer == layer else ():
            check_ranking(ranking, layer, batch, starts)


def check_ranking(
    ranking: Ranking, layer: int, batch: list[tuple[Case, int, int]], starts: list[int]
) -> None:
    """The query row and the slots it sees in the layer before the choice."""
    case, computed, _ = batch[ranking.request]
    choice, before = ranking.choice, case.alive(layer - 1) if layer else list(range(case.length))
    requests = [ScheduledRequest(a, b - a, c.layout) for c, a, b in batch]
    plan = plan_step(requests)
    assert plan is not None
    rows = apply(plan, layer - 1, [(c, a) for c, a, _ in batch], starts)
    position = rows[ranking.query] - starts[ranking.request] + computed
    if choice.by_prompt:
        assert position == case.prompt - 1
        question = range(max(map(max, case.images)) + 1, case.prompt)
        assert ranking.question == len(question)
        first = ranking.query + 1 - ranking.question
        asked = [
            row - starts[ranking.request] + computed for row in rows[first : ranking.query + 1]
        ]
        assert asked == list(question)
        assert ranking.question_row == starts[ranking.request] + question[0] - computed
    elif not choice.text:
        assert position == max(p for p in before if p in case.images[choice.image])
    assert ranking.first_key == sum(p < choice.start for p in before)
    if not choice.text or choice.by_prompt:
        assert ranking.visible == before.index(position) + 1


@st.composite
def chunks(draw: st.DrawFn, case: Case) -> list[int]:
    """Ends of a request's chunks from a prefix on, as the scheduler would let them be."""
    layout = case.layout
    ends = [0]
    starts = [n for n in range(case.length) if layout is None or layout.may_end_at(n)]
    ends = [draw(st.sampled_from(starts))]
    while ends[-1] < case.length:
        wanted = draw(st.integers(1, case.length - ends[-1]))
        cut = wanted if layout is None else layout.shortened_chunk(ends[-1], wanted)
        if cut == 0:  # it waits for a step that has room
            assert layout is not None
            cut = next(stop for start, stop in layout.atomic if start == ends[-1]) - ends[-1]
        ends.append(ends[-1] + cut)
    return ends
