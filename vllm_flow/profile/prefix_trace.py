"""Prefix-cache hits of a replayed multi-turn trace, beside stock vLLM's for the same traffic.

``python -m vllm_flow.profile.prefix_trace`` replays conversations about pictures, turn by turn, once
with the extension off and then with each policy, and prints the prompt tokens that were found in
the cache. With ``--pools 24 32 48`` it does so on pools of that many blocks of tokens, which evict.
Everything but the answers of the trace is fixed, so the figures are the same in every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_flow.counts import counted
from vllm_flow.exits import run_module
from vllm_flow.grouping import DecoderLayers
from vllm_flow.options import positive
from vllm_flow.outputs import check_file

CONVERSATIONS = 12
PICTURES = 4
"""Fewer than conversations, so that pictures are asked about again."""
BLOCK_SIZE = 32
AT_ONCE = 3
"""Requests at a time on a pool that evicts, so that they fit and nothing is preempted."""
GROUP_LAYERS = 2
REPLIES = ("Yes", "No", "I see it near the middle of the picture.", "There is none.")
"""What the model is taken to have said: replayed, so that every run's prompts are the same."""


@dataclass(frozen=True)
class Turn:
    """One request of the trace."""

    conversation: int
    picture: int
    prompt: str


@dataclass(frozen=True)
class Row:
    """Hits of one run of the trace."""

    policy: str
    prompt_tokens: int
    cached_tokens: int
    of_stock: float
    """Cached tokens as a share of stock vLLM's."""
    least: int
    """The smallest difference to stock's hit of the same request, in tokens."""
    most: int
    pool: int | None = None
    """Blocks of tokens that the pool holds for every layer; None where nothing is evicted."""


def trace(turns: int) -> list[Turn]:
    """The requests in order: every conversation's first turn, then every second turn, and so on.

    A later turn's prompt is the whole conversation so far. Two thirds of the conversations open
    with the same question.
    """
    from vllm_flow.demo_model.prompt import ANSWER_END, build_prompt
    from vllm_flow.demo_model.questions import presence
    from vllm_flow.demo_model.vocabulary import CLASSES

    def question(conversation: int, turn: int) -> str:
        opening = turn == 0 and conversation % 3
        return presence(CLASSES[0 if opening else (7 * conversation + 5 * turn) % len(CLASSES)])

    prompts = [build_prompt(question(index, 0)) for index in range(CONVERSATIONS)]
    requests = []
    for turn in range(turns):
        for index in range(CONVERSATIONS):
            requests.append(Turn(index, index % PICTURES, prompts[index]))
            reply = REPLIES[(index + turn) % len(REPLIES)]
            prompts[index] += (
                f"{reply}{ANSWER_END}\n<|im_start|>user\n{question(index, turn + 1)}{ANSWER_END}\n"
                "<|im_start|>assistant\n"
            )
    return requests


def replay(llm: Any, requests: Iterable[Turn], cliff_of: Callable[[Turn], int | None]) -> list[Any]:
    """Run the trace from an empty cache, one turn of all conversations per batch."""
    from PIL import Image
    from vllm import SamplingParams

    from vllm_flow.demo_model.heldout import load_scenes

    scenes = load_scenes("seen")[:PICTURES]
    pictures = [Image.open(scene.image_path).convert("RGB") for scene in scenes]
    llm.reset_prefix_cache()
    outputs = []
    requests = list(requests)
    for start in range(0, len(requests), CONVERSATIONS):
        batch = requests[start : start + CONVERSATIONS]
        outputs += llm.generate(
            [
                {"prompt": turn.prompt, "multi_modal_data": {"image": pictures[turn.picture]}}
                for turn in batch
            ],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=2,
                    extra_args=None if cliff_of(turn) is None else {"flow_cliff": cliff_of(turn)},
                )
                for turn in batch
            ],
            use_tqdm=False,
        )
    return outputs


def compare(
    policy: str, found: Sequence[Any], stock: Sequence[Any], pool: int | None = None
) -> Row:
    """The hits of one run beside stock's of the same requests."""
    differences = [
        output.num_cached_tokens - other.num_cached_tokens
        for output, other in zip(found, stock, strict=True)
    ]
    cached = sum(output.num_cached_tokens for output in found)
    of_stock = cached / max(1, sum(other.num_cached_tokens for other in stock))
    return Row(
        policy,
        sum(len(output.prompt_token_ids) for output in found),
        cached,
        of_stock,
        min(differences),
        max(differences),
        pool,
    )


def open_engine(model: Path, group_layers: int | None, pool: int | None = None) -> Any:
    """An engine on the small demo model.

    Args:
        group_layers: None is stock vLLM.
        pool: blocks of tokens that the pool holds for every layer, plenty if None.
    """
    import vllm

    options: dict[str, Any] = {}
    groups = 1
    if group_layers is not None:
        options["additional_config"] = {"vllm_flow": {"group_layers": group_layers}}
        groups = len(DecoderLayers(num_layers(model)).groups(group_layers))
    if pool is not None:
        # vLLM keeps one block to itself.
        options |= {"num_gpu_blocks_override": groups * pool + 1, "max_num_seqs": AT_ONCE}
    return vllm.LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024 if pool is None else min(1024, pool * BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=True,
        **options,
    )


def num_layers(model: Path) -> int:
    """Decoder layers of a checkpoint."""
    config = json.loads((model / "config.json").read_text())
    return int(config["text_config"]["num_hidden_layers"])


def measure_evicting(
    model: Path, turns: int, pool: int, cliffs: Sequence[int], engines: list[Any]
) -> Iterable[Row]:
    """The same on a pool that evicts: without a policy for every number of storage groups.

    Args:
        engines: takes what is opened. Closing one would take the process groups of all.
    """
    requests = trace(turns)
    engines.append(open_engine(model, None, pool))
    stock = replay(engines[-1], requests, lambda turn: None)
    yield compare("stock vLLM", stock, stock, pool)
    layers = num_layers(model)
    for size in (size for size in range(layers, 0, -1) if layers % size == 0):
        flow = open_engine(model, size, pool)
        engines.append(flow)
        name = f"no policy, {layers // size} storage group{'s' * (size < layers)}"
        yield compare(name, replay(flow, requests, lambda turn: None), stock, pool)
        for cliff in cliffs if size == GROUP_LAYERS else ():
            found = replay(flow, requests, lambda turn, cliff=cliff: cliff)  # type: ignore[misc]
            yield compare(
                f"cliff {cliff}, {counted(layers // size, 'storage group')}", found, stock, pool
            )


def measure(model: Path, turns: int, group_layers: int, cliffs: Sequence[int]) -> list[Row]:
    """Replay the trace on stock vLLM, on the extension without a policy, with each cliff, and mixed."""
    requests = trace(turns)
    stock = replay(open_engine(model, None), requests, lambda turn: None)
    flow = open_engine(model, group_layers)
    rows = [
        compare("stock vLLM", stock, stock),
        compare("no policy", replay(flow, requests, lambda turn: None), stock),
    ]
    for cliff in cliffs:
        found = replay(flow, requests, lambda turn, cliff=cliff: cliff)  # type: ignore[misc]
        rows.append(compare(f"cliff {cliff}", found, stock))
    mixed = replay(flow, requests, lambda turn: cliffs[turn.conversation % len(cliffs)])
    rows.append(compare("one of these cliffs per conversation", mixed, stock))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.profile.prefix_trace", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--turns", type=positive, default=4, help="questions per conversation")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument(
        "--pools",
        type=positive,
        nargs="+",
        metavar="BLOCKS",
        help="pools that evict, in blocks of tokens that they hold for every layer",
    )
    args = parser.parse_args(argv)
    if args.json:
        check_file(args.json, "--json")

    from vllm_flow.engine.process import quieten

    quieten(offline=True)
    from vllm_flow.demo_model.assemble import assemble_small

    model, cliffs = assemble_small(), (0, 1, 2, 3, 4, 5)
    if args.pools:
        engines: list[Any] = []
        rows = [
            row
            for pool in args.pools
            for row in measure_evicting(model, args.turns, pool, cliffs, engines)
        ]
    else:
        rows = measure(model, args.turns, GROUP_LAYERS, cliffs)
    print(
        f"{CONVERSATIONS} conversations of {counted(args.turns, 'turn')} about {PICTURES} pictures, "
        f"{BLOCK_SIZE}-token blocks\n"
    )
    pool = "| blocks in the pool " if args.pools else ""
    print(f"{pool}| policy | prompt tokens | cached | of stock's | per request, against stock's |")
    print("|---|---|---|---|---|" + "---|" * bool(pool))
    for row in rows:
        pool = f"| {row.pool} " if args.pools else ""
        print(
            f"{pool}| {row.policy} | {row.prompt_tokens} | {row.cached_tokens} "
            f"| {row.of_stock:.3f} | {row.least:+d} ... {row.most:+d} |"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    run_module("vllm_flow.profile.prefix_trace", main)
