"""Ours and the peers on one checkpoint, in one process, batch by batch, round by round.

The vision tower is left out on both sides: the peers get its features ready-made, the engines have
them in their encoder cache. Same threads, same weights, same greedy decoding.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from vllm_flow.profile import engines, load, peers, watching
from vllm_flow.profile.engines import System
from vllm_flow.profile.findings import Ratio, Spread, ratios
from vllm_flow.profile.ideal import image_row_cost
from vllm_flow.profile.peers import Batch, Pruning
from vllm_flow.profile.rounds import MIB, Bench

HF = "transformers, "
OURS = "vLLM-Flow, "
STOCK = "vLLM"


@dataclass(frozen=True)
class Peer:
    """One system of the comparison at one batch size."""

    name: str
    batch: int
    row_share: float
    """Rows x layers of the prefill over the unpruned ones: the work it does. Ours counts the last layer's
    image rows, of which it computes the keys and values alone, by what these cost."""
    prefill_per_s: Spread
    """Prompt tokens/s, counted before pruning."""
    decode_per_s: Spread
    """Output tokens/s after the first."""
    prefill_speedup: Ratio
    """Over unpruned transformers, round by round."""
    kv_mib: float
    """Keys and values at the end, all requests; an engine's in whole blocks."""
    same_as: str | None
    """The system whose outputs it must have, None where the semantics are its own."""
    same_tokens: float | None
    """Share of the requests with the very same tokens as ``same_as``."""


def peer_systems(
    num_layers: int, cliff: int, key_share: float
) -> tuple[tuple[Pruning, ...], tuple[System, ...]]:
    """Prunings on transformers, and ours: with VTW's and the mask's answers, and at the others' work."""
    prunings = (
        peers.none(),
        peers.key_mask(cliff),
        peers.vtw(cliff),
        peers.fastv(2, 0.5),
        peers.pyramid_drop(num_layers),
    )
    own = [pruning for pruning in prunings if pruning.stages and pruning.stages != ((cliff, 0.0),)]
    cliffs = {cliff, *(pruning.equal_work_cliff(num_layers, key_share) for pruning in own)}
    ours = [System(f"cliff={c}", extension=True, cliff=c) for c in sorted(cliffs)]
    return prunings, (System(engines.STOCK, extension=False), *ours)


def compare(
    bench: Bench, model: Any, processor: Any, *, batches: Sequence[int], cliff: int, rounds: int
) -> tuple[Peer, ...]:
    """Every system at every batch size."""
    found: list[Peer] = []
    for batch in batches:
        found += _at_batch(bench, model, processor, batch, cliff, rounds)
    return tuple(found)


def _at_batch(
    bench: Bench, model: Any, processor: Any, batch: int, cliff: int, rounds: int
) -> list[Peer]:
    prunings, systems = peer_systems(bench.shape.layers, cliff, bench.shape.key_share)
    _, prompts = bench.requests(batch)
    inputs = Batch.of(
        model,
        processor,
        [prompt["prompt"] for prompt in prompts],
        [prompt["multi_modal_data"]["image"] for prompt in prompts],
    )
    out = bench.work.output_tokens
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    tokens: dict[str, tuple[tuple[int, ...], ...]] = {}
    memory: dict[str, float] = {}
    order: list[Pruning | System] = [*prunings, *systems]
    shuffler = random.Random(batch)
    with tqdm(
        total=(rounds + 1) * len(order), desc=f"peers, batch {batch}", leave=False, disable=None
    ) as bar:
        for number in range(rounds + 1):
            shuffler.shuffle(order)
            for one in order:
                if isinstance(one, Pruning):
                    name = HF + one.name
                    run = peers.generate(model, inputs, one, out if number else 2)
                    spent = (run.prefill_seconds, run.decode_seconds)
                    tokens[name], memory[name] = run.tokens, run.kv_bytes / MIB
                else:
                    name = _engine_name(one)
                    llm = bench.engine(one)
                    with watching.watch(llm) as seen:
                        answers = llm.generate(
                            bench.unseen(prompts),
                            load.params_of(one, out if number else 2),
                            use_tqdm=False,
                        )
                    spent = (seen.seconds(prompt=True), seen.seconds(prompt=False))
                    tokens[name] = tuple(tuple(a.outputs[0].token_ids) for a in answers)
                    memory[name] = _kv_mib(bench, llm, seen)
                if number:
                    seconds[name].append(spent)
                bar.update()
    return _records(bench, batch, cliff, seconds, tokens, memory)


def _records(
    bench: Bench,
    batch: int,
    cliff: int,
    seconds: Mapping[str, Sequence[tuple[float, float]]],
    tokens: Mapping[str, tuple[tuple[int, ...], ...]],
    memory: Mapping[str, float],
) -> list[Peer]:
    """What was timed, said and stored, by name, as a record for each."""
    prunings, systems = peer_systems(bench.shape.layers, cliff, bench.shape.key_share)
    out = bench.work.output_tokens
    base = [prefill for prefill, _ in seconds[HF + "none"]]
    records = []
    for entry in (*prunings, *systems):
        name = HF + entry.name if isinstance(entry, Pruning) else _engine_name(entry)
        twin = _twin(entry, bench.shape.layers, cliff)
        same = None
        if twin is not None and name != twin:
            same = sum(a == b for a, b in zip(tokens[name], tokens[twin], strict=True)) / batch
        records.append(
            Peer(
                name=name,
                batch=batch,
                row_share=_row_share(entry, bench),
                prefill_per_s=Spread.of(
                    batch * bench.work.prompt_tokens / prefill for prefill, _ in seconds[name]
                ),
                decode_per_s=Spread.of(batch * (out - 1) / decode for _, decode in seconds[name]),
                prefill_speedup=ratios(base, [prefill for prefill, _ in seconds[name]]),
                kv_mib=memory[name],
                same_as=twin if same is not None else None,
                same_tokens=same,
            )
        )
    return records


def _engine_name(system: System) -> str:
    return OURS + system.name if system.extension else STOCK


def _twin(entry: Pruning | System, num_layers: int, cliff: int) -> str | None:
    """Whose outputs an entry must have: the mask's for cliff and VTW, unpruned for stock."""
    if isinstance(entry, System):
        seen = entry.layers_seen(num_layers)
        names = {num_layers: HF + "none", cliff: HF + peers.key_mask(cliff).name}
        return names.get(seen)
    if entry.stages == ((cliff, 0.0),):
        return HF + peers.key_mask(cliff).name
    return HF + "none" if not entry.stages else None


def _row_share(entry: Pruning | System, bench: Bench) -> float:
    layers, work = bench.shape.layers, bench.work
    if isinstance(entry, Pruning):
        cost = entry.image_row_cost(layers)
    else:
        cost = image_row_cost(layers, entry.layers_seen(layers), bench.shape.key_share)
    rows = layers * work.text_tokens + cost * work.image_tokens
    return rows / (layers * work.prompt_tokens)


def _kv_mib(bench: Bench, llm: Any, seen: watching.Watch) -> float:
    groups = len(seen.blocks[0])
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    each = block_size * bench.shape.token_bytes * bench.shape.layers / groups
    return sum(sum(blocks) for blocks in seen.blocks) * each / MIB
