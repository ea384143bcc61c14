"""Layouts and plans of policies that keep tokens, against a naive model that chooses one token at a time.

The naive model gives every image token a score of its own and makes every choice on it, whichever rank asks: what a
device would do, in Python. Ranks by place choose by their own rule among the tokens left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.boundaries import packed_boundary
from vllm_flow.decode_plan import decode_facts
from vllm_flow.grouping import storage_groups
from vllm_flow.last_layer import LastLayer, spare_last_layers
from vllm_flow.layout import TokenLayout, evicted_at, predict_blocks, stored_blocks
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


@st.composite
def cases(draw: st.DrawFn, ranks: tuple[str, ...] = tuple(RANKS)) -> Case:
    """Images with text between them and inside of them, under any policy."""
    images, at = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 3))):
        gaps = draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 3]), max_size=9))
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
            names = [n for n in ranks if layer or n not in ("last_image", "last_prompt")]
            made.append(Stage(layer, keep, draw(st.sampled_from(names)) if keep else None))
        return tuple(made)

    own = [stages() for _ in images] if draw(st.booleans()) and len(images) > 1 else [stages()]
    scores = draw(st.permutations(range(prompt)))
    length = prompt + draw(st.integers(0, 4))
    policy = FlowPolicy(tuple(own), draw(st.integers(0, 3)))
    return Case(length, prompt, tuple(images), policy, tuple(map(float, scores)))


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
    if choice.rank == "last_prompt":
        assert position == case.prompt - 1
    elif not choice.text:
        assert position == max(p for p in before if p in case.images[choice.image])
    assert ranking.first_key == sum(p < choice.start for p in before)
    if not choice.text or choice.rank == "last_prompt":
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
        cut = wanted if layout is None else layout.next_cut(ends[-1], wanted)
        if cut == 0:  # it waits for a step that has room
            assert layout is not None
            cut = next(stop for start, stop in layout.whole if start == ends[-1]) - ends[-1]
        ends.append(ends[-1] + cut)
    return ends


@settings(max_examples=60, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=3), st.booleans(), st.data())
def test_every_layer_of_every_step_matches_the_naive_model(
    batch: list[Case], spares: bool, data: st.DataObject
) -> None:
    ends = [data.draw(chunks(case)) for case in batch]
    for step in range(max(map(len, ends)) - 1):
        now = [
            (case, own[step], own[step + 1])
            for case, own in zip(batch, ends, strict=True)
            if step + 1 < len(own)
        ]
        check_step(now, [own[0] for own in ends if step + 1 < len(own)], spares)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 5), st.sampled_from([1, 2, 3, 6]))
def test_blocks_and_boundaries_match_the_naive_model(
    case: Case, block_size: int, group_layers: int
) -> None:
    layout = case.layout
    if layout is None:
        assert all(len(case.alive(layer)) == case.length for layer in range(LAYERS))
        return
    starts = storage_groups(LAYERS, group_layers)
    ends = [n for n in range(case.length + 1) if layout.may_end_at(n)]
    assert ends[0] == 0 and case.length in ends
    chosen_of = [range(c.start + 1, c.stop) for stage in layout.stages for c in stage.choices]
    for tokens in range(case.length + 1):
        if any(tokens in extent for extent in chosen_of):
            continue  # what is stored of it, the next test says
        expected = tuple(
            -(-sum(p < tokens for p in case.alive(start)) // block_size) for start in starts
        )
        assert predict_blocks(tokens, layout, starts, block_size) == expected
        if tokens >= case.prompt:
            gone = layout.evicted_tokens()
            assert stored_blocks(tokens, gone, starts, block_size) == expected
    for stage in layout.stages:
        full: list[int] = []
        for num_blocks in range(1, case.length // block_size + 1):
            boundary = packed_boundary(stage.evicted, num_blocks, block_size)
            if boundary.completed is not None:
                full = [*full[: boundary.completed], boundary.completed]
            assert full == list(range(boundary.full_blocks))
    for n in range(case.length + 1):
        assert layout.last_end(n, block_size) == max(
            e
            for e in range(0, n + 1, block_size)
            if layout.may_end_at(e) and e <= (n if layout.shareable is None else layout.shareable)
        )


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_a_prefix_that_may_end_has_all_that_stays(case: Case, data: st.DataObject) -> None:
    """Of an image in which it ends, that is more than the tokens before its end, which leave."""
    layout = case.layout
    if layout is None:
        return
    end = data.draw(st.sampled_from([n for n in range(case.prompt) if layout.may_end_at(n)]))
    for layer in range(LAYERS):
        made = [c for s in layout.stages if s.layer <= layer for c in s.choices]
        inside = {p for c in made if c.start < end < c.stop for p in range(c.start, c.stop)}
        stays = [p for p in case.alive(layer) if p < end or p in inside]
        evicted = layout.evicted(layer)
        assert len(stays) == end - (0 if evicted is None else evicted.count_before(end))
        # And nothing of that image is stored any more.
        assert all(evicted is not None and evicted.is_image(p) for p in inside if p >= end)


@settings(max_examples=50, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=4), st.data())
def test_decode_facts_say_what_the_plan_says(batch: list[Case], data: st.DataObject) -> None:
    requests = []
    for case in batch:
        token = data.draw(st.integers(0, case.length + 3))
        layout = case.layout
        if layout is not None and any(start <= token < stop for start, stop in layout.whole):
            token = case.prompt  # a scheduler computes these together
        requests.append(ScheduledRequest(token, 1, layout))
    plan, facts = plan_step(requests), decode_facts(requests, LAYERS)
    assert facts.shape[1:] == (2, len(requests)) and (np.diff(facts[:, 0], axis=0) >= 0).all()
    for layer in range(LAYERS):
        variant = None if plan is None else plan.variant_at(layer)
        for index, request in enumerate(requests):
            missing = max(
                (int(gone) for first, gone in facts[:, :, index] if first <= layer), default=0
            )
            seen = max(0, request.num_computed + 1 - missing)
            if variant is None:
                assert seen == request.num_computed + 1
            elif index in variant.requests:
                at = variant.requests.tolist().index(index)
                assert seen == variant.seq_lens[at] == variant.positions[at] + 1
            else:
                assert seen == 0


@pytest.mark.parametrize("tokens", [64, 576, 2880])
def test_a_layout_is_made_of_few_ranges_or_looked_up(tokens: int) -> None:
    """The same prompt again, as front end, scheduler and worker ask for it, shares its stages."""
    policy = FlowPolicy(((Stage(2, Fraction(1, 2), "uniform"), Stage(9)),))
    image = ImageSpans.from_ranges([(35, 35 + tokens)])
    one, other = TokenLayout.of(policy, [image], 700), TokenLayout.of(policy, [image], 900)
    assert one is not None and other is not None and one.stages is other.stages
    assert [evicted_at(one.evicted_tokens(), layer) for layer in (0, 2, 9)] == [
        0,
        tokens - tokens // 2,
        tokens,
    ]


def test_what_is_computed_in_parts_cannot_be_ranked() -> None:
    policy = FlowPolicy(((Stage(2, 3, "last_image"),),))
    layout = TokenLayout.of(policy, [ImageSpans.from_ranges([(4, 12)])], 15)
    assert layout is not None and layout.whole == ((4, 12),)
    assert [layout.next_cut(0, n) for n in (4, 5, 11, 12)] == [4, 4, 4, 12]
    assert layout.next_cut(4, 7) == 0
    assert [n for n in range(16) if not layout.may_end_at(n)] == [5, 6]
    with pytest.raises(ValueError, match="tokens 4 to 12 must be computed in one step"):
        plan_step([ScheduledRequest(0, 11, layout)])
    with pytest.raises(ValueError, match="in one step"):
        plan_step([ScheduledRequest(6, 9, layout)])


def test_a_rank_by_the_whole_prompt_reaches_from_the_first_image_to_its_end() -> None:
    policy = FlowPolicy(((Stage(2, 3, "last_prompt"),),))
    images = [ImageSpans.from_ranges([r]) for r in ((4, 12), (14, 20))]
    layout = TokenLayout.of(policy, images, 25)
    assert layout is not None and layout.whole == ((4, 25), (14, 25)) and layout.shareable == 4
    assert [n for n in range(26) if not layout.may_end_at(n)] == [5, 6, 15, 16]
    # Others find the text before the images, and who has the same prompt finds the rest.
    assert layout.last_end(25, 2) == 4
    same, other = (replace(layout, digest=digest) for digest in (b"same", b"other"))
    assert same.last_end(25, 2) == 24 and same.last_end(17, 2) == 14
    assert same.key(b"x", 4) == other.key(b"x", 4) == b"x"
    assert len({same.key(b"x", 5), other.key(b"x", 5), same.key(b"y", 5), b"x"}) == 4
    with pytest.raises(ValueError, match="how long"):
        TokenLayout.of(policy, images)
