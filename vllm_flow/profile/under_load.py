"""One of the measurements: every system under a closed load, its blocks and its host time counted.

Beside throughput and latencies stands what the shapes allow; how rounds alternate is
:mod:`vllm_flow.profile.rounds`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vllm_flow.profile import engines, ideal, load, watching
from vllm_flow.profile.engines import System
from vllm_flow.profile.findings import Load, Spread, ratios
from vllm_flow.profile.rounds import MIB, Bench


def under_load(bench: Bench, concurrency: int, count: int, rounds: int) -> tuple[Load, ...]:
    """``count`` requests, at most ``concurrency`` at once, by every system; the tower runs anew."""
    requests, prompts = bench.requests(count)
    found: dict[str, list[tuple[float, Any, watching.Watch]]] = defaultdict(list)
    for number, system in bench.rounds(rounds, f"load, concurrency {concurrency}"):
        llm = bench.engine(system)
        llm.llm_engine.reset_encoder_cache()  # new pictures are not in it either
        part = len(requests) if number else min(len(requests), 2)
        with watching.watch(llm) as seen:
            seconds, metrics = load.run_load(
                llm,
                system,
                requests[:part],
                bench.unseen(prompts[:part]),
                concurrency=concurrency,
                limits=bench.limits,
            )
        if number:
            found[system.name].append((seconds, metrics, seen))
    stock = found[engines.STOCK]
    return tuple(
        _load_record(bench, system, concurrency, count, found[system.name], stock)
        for system in bench.systems
    )


def _load_record(
    bench: Bench,
    system: System,
    concurrency: int,
    count: int,
    runs: Sequence[tuple[float, Any, watching.Watch]],
    stock: Sequence[tuple[float, Any, watching.Watch]],
) -> Load:
    llm, policy = bench.engine(system), bench.seen(system)
    starts = watching.group_starts(llm)
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    predicted = ideal.kv_blocks(bench.work, policy, starts, block_size)
    held = [blocks for _, _, seen in runs for blocks in seen.blocks]
    block_mib = block_size * bench.shape.token_bytes * bench.shape.layers / len(starts) / MIB
    peak = max(seen.peak_blocks for _, _, seen in runs)
    alive = max(seen.peak_running for _, _, seen in runs)
    per_prefill = ideal.prefill_ratio(bench.shape, bench.work, policy)
    goodput = bool(bench.limits.as_goodput())

    def per_step(name: str) -> Spread:
        return Spread.of(
            1e3 * sum(getattr(step, name) for step in seen.steps) / len(seen.steps)
            for _, _, seen in runs
        )

    return Load(
        system=system.name,
        concurrency=concurrency,
        requests=count,
        requests_per_s=Spread.of(metrics.request_throughput for _, metrics, _ in runs),
        ratio=ratios([s for s, _, _ in stock], [s for s, _, _ in runs]),
        ideal_ratio=Spread.of(
            ideal.end_to_end_ratio(
                s,
                (
                    (seen.seconds(prompt=True), per_prefill),
                    (
                        seen.seconds(prompt=False),
                        ideal.decode_ratio(bench.shape, bench.work, policy, seen.decode_batch()),
                    ),
                ),
            )
            for s, _, seen in stock
        ).median,
        ttft_ms=Spread.of(metrics.median_ttft_ms for _, metrics, _ in runs),
        ttft_p99_ms=Spread.of(dict(metrics.percentiles_ttft_ms)[99] for _, metrics, _ in runs),
        tpot_ms=Spread.of(metrics.median_tpot_ms for _, metrics, _ in runs),
        good_share=Spread.of(
            metrics.request_goodput / metrics.request_throughput if goodput else 1.0
            for _, metrics, _ in runs
        ),
        peak_blocks=peak,
        peak_kv_mib=peak * block_mib,
        ideal_kv_mib=alive * ideal.kv_bytes(bench.shape, bench.work, policy) / MIB,
        blocks_each=max(held),
        blocks_predicted=predicted,
        blocks_exact=len(held) == count * len(runs) and set(held) == {predicted},
        host_share=Spread.of(seen.host_share() for _, _, seen in runs),
        schedule_ms=per_step("schedule"),
        plan_ms=per_step("plan"),
    )
