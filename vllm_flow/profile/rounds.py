"""The measurements: in every round each system does the same work, in an order that changes.

Rounds alternate between the systems, so that a slow moment of the machine hits all alike, and
ratios are taken within a round. One round before them warms up and is not counted. Decode steps
alternate more finely: see ``turns.py``.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm_flow.counts import counted
from vllm_flow.engine.process import engine_seconds
from vllm_flow.profile import engines, ideal, load, watching
from vllm_flow.profile.dimensions import ModelShape, Workload
from vllm_flow.profile.engines import System
from vllm_flow.profile.findings import Capacity, Prefill, Spread, ratios
from vllm_flow.profile.subject import Subject

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.benchmarks.datasets import SampleRequest

MIB = 1 << 20
_SALTS = itertools.count()


@dataclass
class Bench:
    """Two engines, the systems they serve, and the work."""

    stock: LLM
    flow: LLM
    systems: Sequence[System]
    subject: Subject
    work: Workload
    words: int
    """What the requests' text is asked to be long; with a family's markers, and its tokenizer, it is ``work``'s."""
    limits: load.Limits
    seed: int = 0

    def __post_init__(self) -> None:
        self._requests: list[SampleRequest] = []
        self._prompts: list[dict[str, Any]] = []

    @property
    def shape(self) -> ModelShape:
        return self.subject.shape

    def engine(self, system: System) -> LLM:
        return self.flow if system.extension else self.stock

    def seen(self, system: System) -> ideal.Policy:
        return system.seen(self.shape.layers)

    def requests(self, count: int) -> tuple[list[SampleRequest], list[dict[str, Any]]]:
        """The first ``count`` requests and prompts: the same for every system and round."""
        missing = count - len(self._requests)
        if missing > 0:
            made = load.sample(
                self.stock,
                missing,
                text_tokens=self.words,
                output_tokens=self.work.output_tokens,
                images=self.work.images,
                picture=self.subject.picture,
                seed=self.seed + len(self._requests),
            )
            self._requests += made
            self._prompts += [load.prompt_of(self.stock, request) for request in made]
        return self._requests[:count], self._prompts[:count]

    def unseen(self, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same prompts, of which no engine's prefix cache knows anything."""
        return [{**prompt, "cache_salt": f"profile {next(_SALTS)}"} for prompt in prompts]

    def with_work(self, work: Workload) -> Bench:
        """The same engines with other requests."""
        return replace(self, work=work, seed=self.seed + 1_000_000)

    def rounds(
        self, count: int, what: str, systems: Sequence[System] | None = None
    ) -> Iterator[tuple[int, System]]:
        """(round, system), of all systems or of those given, shuffled within each round; round 0 warms up."""
        shuffler = random.Random(self.seed)
        order = list(self.systems if systems is None else systems)
        with tqdm(
            total=(count + 1) * len(order),
            desc=what,
            unit="run",
            dynamic_ncols=True,
            leave=False,
            disable=None,
        ) as bar:
            for number in range(count + 1):
                shuffler.shuffle(order)
                for system in order:
                    yield number, system
                    bar.update()


def workload_of(
    bench_llm: LLM, text_tokens: int, output_tokens: int, subject: Subject, image_tokens: int
) -> Workload:
    """The work as the engine will see it: what is no image token of one processed request is text."""
    images = subject.images_of(image_tokens)
    request = load.sample(
        bench_llm,
        1,
        text_tokens=text_tokens,
        output_tokens=1,
        images=images,
        picture=subject.picture,
        seed=1,
    )[0]
    prompt = load.prompt_of(bench_llm, request)
    params = load.params_of(System("count", False), 1)
    output = bench_llm.generate(prompt, params, use_tqdm=False)[0]
    total = len(output.prompt_token_ids)
    return Workload(total - image_tokens, image_tokens, output_tokens, images)


def prefill(bench: Bench, batch: int, rounds: int) -> tuple[Prefill, ...]:
    """The same batch's prefill by every system; vision features stay cached after the warm-up."""
    _, prompts = bench.requests(batch)
    seconds: dict[str, list[float]] = defaultdict(list)
    ranking: dict[str, list[float]] = defaultdict(list)
    for number, system in bench.rounds(rounds, f"prefill, batch {batch}"):
        llm = bench.engine(system)
        with watching.ranking_clock(llm) if system.ranks else nullcontext() as clock:
            outputs = llm.generate(bench.unseen(prompts), load.params_of(system, 1), use_tqdm=False)
        if number:
            seconds[system.name].append(engine_seconds(outputs))
            if clock is not None:
                ranking[system.name].append(clock.seconds() / seconds[system.name][-1])

    def row(system: System) -> Prefill:
        seen, own = bench.seen(system), seconds[system.name]
        share = bench.shape.key_share
        return Prefill(
            system=system.name,
            batch=batch,
            seconds=Spread.of(own),
            speedup=ratios(seconds[engines.STOCK], own),
            ideal_rows=ideal.rows_ideal(bench.shape, bench.work, seen, share),
            ideal_whole=ideal.rows_ideal(bench.shape, bench.work, seen),
            ideal_flops=ideal.prefill_ratio(bench.shape, bench.work, seen, with_tower=False),
            ranking=Spread.of(ranking[system.name]) if system.ranks else None,
        )

    return tuple(row(system) for system in bench.systems)


def capacity(bench: Bench) -> tuple[Capacity, ...]:
    """How many requests run at once in the pool when more than fit are waiting.

    Deterministic, so it runs once: more requests than fit are sent; when the first one ends, those
    that run beside it are counted, and the rest is taken back.
    """
    records: list[Capacity] = []
    first: Capacity | None = None
    for system in tqdm(bench.systems, desc="capacity", unit="run", leave=False, disable=None):
        llm, seen = bench.engine(system), bench.seen(system)
        starts = watching.group_starts(llm)
        block_size = llm.llm_engine.vllm_config.cache_config.block_size
        blocks = watching.pool_blocks(llm)
        each = sum(ideal.kv_blocks(bench.work, seen, starts, block_size))
        fits = ideal.concurrent_requests(blocks, each)
        wanted = fits + max(8, fits // 8)
        limit = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        if wanted > limit:
            raise ValueError(
                f"{counted(fits, 'request fits', 'requests fit')} into the pool, more than "
                f"max_num_seqs={limit} lets run; use a smaller --kv-cache-gib."
            )
        record = Capacity(
            system=system.name,
            pool_mib=blocks * block_size * bench.shape.token_bytes * bench.shape.layers
            / len(starts) / MIB,
            running=_running_at_once(bench, llm, system, wanted),
            ideal=fits,
            ratio=1.0,
            ideal_ratio=1.0,
        )  # fmt: skip
        first = first or record
        records.append(
            replace(
                record,
                ratio=record.running / first.running,
                # Of the bytes, so that stock's rounding does not flatter.
                ideal_ratio=ideal.kv_bytes(bench.shape, bench.work, bench.shape.layers)
                / ideal.kv_bytes(bench.shape, bench.work, seen),
            )
        )
    return tuple(records)


def _running_at_once(bench: Bench, llm: LLM, system: System, wanted: int) -> int:
    """Requests that still run, or ended, when the first of them ends: those preempted are not."""
    _, prompts = bench.requests(min(wanted, 8))  # few pictures, prepared once
    for index in range(wanted):
        llm.llm_engine.add_request(
            f"fill-{index}",
            bench.unseen([prompts[index % len(prompts)]])[0],
            load.params_of(system, bench.work.output_tokens),
        )
    ended = 0
    while not ended:
        ended = sum(output.finished for output in llm.llm_engine.step())
    running = ended + len(watching.core_of(llm).scheduler.running)
    llm.llm_engine.abort_request([f"fill-{index}" for index in range(wanted)])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return running
