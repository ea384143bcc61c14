"""Random traffic on a pool that is too small: arrivals, aborts, resets, shared prefixes, every cliff, several samples.

Everything follows from the seed. Knows nothing of pytest; used by the stress test and by the fuzz.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from tests.engine import v2_cpu
from tests.engine.cases import LONG, Ask, text_only
from tests.engine.harness import Engine, assert_exact
from tests.engine.tiny_llava import words
from vllm_flow import ranks
from vllm_flow.ranks.base import Needs

STEP_LIMIT = 5000
"""A run of some dozens of requests takes a few hundred steps; more means that it never ends."""


@dataclass(frozen=True)
class Traffic:
    """What a run went through."""

    steps: int
    finished: int
    aborted: int
    preempted: int
    resets: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, {self.finished} requests equal to the oracle's, "
            f"{self.aborted} aborted, {self.preempted} preemptions, {self.resets} resets"
        )


RANKS = {
    name: list(Needs).index(rank.needs)
    for name, rank in ranks.RANKS.items()
    if not isinstance(rank, ranks.FrameRank)
}
"""What each rank of pictures must see in one step: nothing, an image, or from the first image to the prompt's end."""
AFTER_LAYER = {name for name, rank in ranks.RANKS.items() if rank.reads_layer}
"""Those that need a layer before."""
FIRST_ONLY = {
    name
    for name, rank in ranks.RANKS.items()
    if not getattr(rank, "nested", True) or ranks.merges(rank)
}
"""Those that choose among all tokens of an image, or merge them."""
NORMED = {name for name, rank in ranks.RANKS.items() if isinstance(rank, ranks.HiddenRank)}
"""Those that an engine with pipeline stages refuses."""
FAVOURITES = (
    "1:50% last_image",
    "2:40% diversity, 4:0",
    "1:1/2 uniform, 3:20 last_image",
    "0:30% random",
    "0:40% cls_diverse, 3:0",
    "0:50% visionzip, 4:20% diversity",
)
"""Drawn often, so that requests meet others of their policy in the prefix cache."""


def random_stages(
    rng: np.random.Generator, needs: int, images: int, late: bool = False
) -> str | tuple[str, ...]:
    """Any stages whose ranks look at no more than ``needs``, or a stage per image; or any late ones."""
    if rng.random() < 0.3:
        return str(rng.choice([s for s in FAVOURITES if needs or not ("image" in s or "div" in s)]))
    names = [rank for rank, need in RANKS.items() if need <= needs and rank not in FIRST_ONLY]
    names = ["uniform", "random", "last_prompt"] if late else names

    def stage(layer: int, amount: str, rank: str) -> str:
        rank = "uniform" if layer == 0 and rank in AFTER_LAYER else rank
        return f"{layer}:0" if amount == "0" else f"{layer}:{amount} {rank}"

    if images > 1 and rng.random() < 0.3:
        rank = str(rng.choice([rank for rank in names if rank not in AFTER_LAYER]))
        amounts = [str(rng.choice(["0", "30%", "50"])) for _ in range(images)]
        return tuple(stage(int(rng.integers(LONG.layers + 1)), a, rank) for a in amounts)
    layers = sorted(rng.choice(LONG.layers, size=rng.integers(1, 4), replace=False).tolist())
    shares = sorted(rng.integers(1, 100, size=len(layers)).tolist(), reverse=True)
    unit = "%" if rng.random() < 0.5 else ""
    amounts = [f"{share}{unit}" for share in shares]
    if rng.random() < 0.4:
        amounts[-1] = "0"
    return ", ".join(
        stage(layer, amount, str(rng.choice(names)))
        for layer, amount in zip(layers, amounts, strict=True)
    )


def with_stages(rng: np.random.Generator, ask: Ask, facts: Any) -> Ask:
    """The same request with stages that an engine takes, of which these are the ``EngineFacts``."""
    room = facts.step_tokens
    words_after = len(ask.prompt.split()) - 35 + 1
    whole = len(ask.images) * LONG.image_tokens + words_after
    needs = (room >= LONG.image_tokens) + (room >= whole)
    stages = random_stages(rng, needs, len(ask.images))
    while facts.pipeline and any(name in str(stages) for name in NORMED):
        stages = random_stages(rng, needs, len(ask.images))
    return replace(
        ask, cliff=None, stages=stages, seed=int(rng.integers(2)) * ("random" in str(stages))
    )


def random_ask(rng: np.random.Generator) -> Ask:
    """One of few beginnings, cut at random, so that prefixes of all lengths are shared."""
    cliff = [None, *range(LONG.layers + 1)][rng.integers(LONG.layers + 2)]
    kind, tokens = rng.integers(8), int(rng.integers(2, 33))
    samples = 2 if rng.random() < 0.1 else 1
    if v2_cpu.wanted():
        samples = 1  # vLLM's top-k kernel is more than Triton's interpreter can do
    if kind == 0:
        prompt = text_only(int(rng.integers(3)), count=90).prompt
        return Ask(prompt, (), cliff, tokens, samples=samples)
    picture = int(rng.integers(2))
    said = words(100, 700 + picture).split()
    before, after = said[:35], said[35 : 36 + int(rng.integers(65))]
    if kind == 1:
        prompt = " ".join([*before, "<image>", *after[:10], "<image>", *after[10:], "w1"])
        return Ask(prompt, (picture, picture + 1), cliff, tokens, samples=samples)
    prompt = " ".join([*before, "<image>", *after])
    return Ask(prompt, (picture,), cliff, tokens, samples=samples)


def as_late(rng: np.random.Generator, ask: Ask) -> Ask:
    """The same request with a policy of the same kind whose images leave after the prefill."""
    if ask.stages:
        stages = random_stages(rng, 0, len(ask.images), late=True)
        seed = int(rng.integers(2)) * ("random" in str(stages))
        return replace(ask, stages=stages, seed=seed, late=True)
    return replace(
        ask,
        cliff=int(rng.integers(LONG.layers)) if ask.cliff is None else ask.cliff,
        max_tokens=1 if rng.random() < 0.1 else ask.max_tokens,
        late=True,
    )


def run(
    engine: Engine,
    seed: int,
    requests: int,
    resets: float = 0,
    stages: float = 0,
    late: float = 0,
    several: bool = True,
) -> Traffic:
    """Send `requests` random requests, abort some, and compare every finished answer with the oracle.

    The block pool is checked after every step. Priorities are random, for engines that heed them.

    Args:
        resets: how probable it is, before each step, that the prefix cache is reset under what runs.
        stages: the part of the requests that keep image tokens, or take them away stage by stage.
        late: the part of the requests with images that evict after the prefill.
        several: whether some want several answers, which vLLM samples by top-k.

    Raises:
        AssertionError: an answer differs, a block is lost, or the traffic does not end.
    """
    rng = np.random.default_rng(seed)
    asks: dict[str, Ask] = {f"{seed}-{index}": random_ask(rng) for index in range(requests)}
    if not several:
        asks = {name: replace(ask, samples=1) for name, ask in asks.items()}
    for name, ask in asks.items() if stages else ():
        if ask.images and rng.random() < stages:
            asks[name] = with_stages(rng, ask, engine.scheduler.flow_settings.engine)
    for name, ask in asks.items() if late else ():
        if ask.images and rng.random() < late:
            asks[name] = as_late(rng, ask)
    waiting, live = list(asks), set[str]()
    outputs: dict[str, Any] = {}
    aborted = set[str]()
    steps = emptied = 0
    prioritised = engine.scheduler.policy.name == "PRIORITY"
    with engine.count_preemptions() as preempted:
        while waiting or live:
            for _ in range(min(len(waiting), int(rng.integers(3)))):
                live.add(waiting[0])
                priority = int(rng.integers(3)) if prioritised else 0
                engine.add(waiting[0], asks[waiting.pop(0)], priority)
            if live and rng.random() < 0.04:
                victim = sorted(live)[rng.integers(len(live))]
                engine.abort(victim)
                live.discard(victim)
                aborted.add(victim)
            if resets and rng.random() < resets:
                assert engine.reset_prefix_cache()
                emptied += 1
            for request_id, output in engine.step().items():
                outputs[request_id] = output
                if output.finished:
                    live.discard(request_id)
            engine.check_blocks()
            steps += 1
            assert steps < STEP_LIMIT, f"seed {seed}: {sorted(live)} never end"
    names = [name for name in asks if name not in aborted]
    assert_exact(engine, [asks[name] for name in names], [outputs[n] for n in names], ties=True)
    engine.check_idle()
    return Traffic(steps, len(names), len(aborted), len(preempted), emptied)
