"""What tests of cached states ask, and how they look into an engine; prompts are counted in blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.engine import v2_cpu
from tests.families.asking import Ask
from tests.families.making import picture, words

if TYPE_CHECKING:
    from tests.families.making import Checkpoint
    from tests.families.running import Engine, Judge

BLOCK = 64
STEP = 160
TOKENS = 2 if v2_cpu.wanted() else 4
UNIT = 32
"""Pixels of a picture's token, either way."""
CLIFFS = (None, 0, 3, 4, 5, 8)


def ask(
    seed: int,
    shape: tuple[int, int] = (6, 19),
    before: int = 6,
    after: int = 5,
    cliff: int | None = None,
    question: int = 0,
) -> Ask:
    """A picture of rows x columns tokens between words; another question differs behind the picture alone."""
    text = f"{words(before, seed)} <|image_pad|> {words(after, 900 + seed + 50 * question)}".strip()
    return Ask(text, (picture(seed, (shape[0] * UNIT, shape[1] * UNIT)),), cliff)


def started(checkpoint: Checkpoint, flow: dict[str, Any], **options: Any) -> Engine:
    """An engine in small with prefix caching as vLLM starts it; ``flow`` are the extension's settings."""
    from tests.families.running import Engine

    return Engine(
        checkpoint,
        group_layers=flow["group_layers"],
        additional_config={"vllm_flow": flow},
        max_num_batched_tokens=STEP,
        max_num_seqs=8,
        enable_prefix_caching=None,  # vLLM's default
        **options,
    )


def run(engine: Engine, judge: Judge, *asks: Ask) -> list[int]:
    """Tokens that each of some requests, sent at once, found in the cache; their answers are exact."""
    outputs = engine.run(asks, TOKENS)
    judge.assert_exact(asks, outputs)
    return [output.num_cached_tokens for output in outputs]


def scheduler_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


def dense(engine: Engine, interval: int | None = None) -> Any:
    """While it lasts, a state is kept wherever a step ends with a block; or one per ``interval`` of tokens."""
    from vllm_flow.engine.replacing import replaced

    coordinator = scheduler_of(engine).kv_cache_manager.coordinator
    return replaced("retention_interval", [(coordinator, interval)])


@contextmanager
def every_step(engine: Engine, look: Callable[[], None]) -> Iterator[None]:
    from vllm_flow.engine.replacing import replaced

    stock = engine.llm.llm_engine.step

    def step() -> Any:
        found = stock()
        look()
        return found

    with replaced("step", [(engine.llm.llm_engine, step)]):
        yield


class Told:
    """What KV-cache events say is stored: pairs of a block of tokens and a group."""

    def __init__(self) -> None:
        self.entries: set[tuple[Any, int]] = set()

    def publish(self, batch: Any) -> None:
        """In the place of the scheduler's publisher."""
        from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.entries.clear()
                continue
            entries = {(block, event.group_idx) for block in event.block_hashes}
            if isinstance(event, BlockStored):
                assert not self.entries & entries, "stored twice"
                self.entries |= entries
            else:
                assert entries <= self.entries, "removed without having been stored"
                self.entries -= entries


def sharing(count: int) -> list[Ask]:
    """Prompts over few pictures, with shared beginnings of every length and every kind of policy."""
    shapes = [((6, 19), 6), ((4, 16), 4), ((5, 8), 100), ((1, 67), 40)]
    stages = ("0:40% diversity", "4:50% last_image", "1:60% uniform, 4:30% last_image")
    asks = []
    for n in range(count):
        shape, before = shapes[n % len(shapes)]
        one = ask(20 + n % len(shapes), shape, before, 20 + 31 * (n % 5), question=n % 3)
        kind = (n * 7) % 8
        if kind < 6:
            asks.append(replace(one, cliff=CLIFFS[kind]))
        else:
            asks.append(replace(one, stages=stages[n % len(stages)]))
    return asks


def attention_of(engine: Engine, judge: Judge, one: Ask, answer: list[int]) -> dict[int, Any]:
    """Layer that attends -> [T, T] averaged over heads, of the rows that it sees, by transformers' own forward."""
    from tests.families import oracle

    checkpoint, seen = engine.checkpoint, {}
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _module, _args, result, index=index: seen.update({index: result[1][0].mean(0)})
        )
        for index, layer in enumerate(checkpoint.decoder(checkpoint.model).layers)
        if hasattr(layer, "self_attn")
    ]
    try:
        cliff = checkpoint.num_layers if one.cliff is None else one.cliff
        oracle.logprobs(checkpoint, judge.prompt(one), answer, cliff)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def shares(
    attention: Any, is_image_T: Any, gone: bool, row: int, answer: int
) -> tuple[float, float]:
    """Of what one row attends to: the share on the picture, and that on the answer so far.

    Args:
        attention: [T, T] of the rows that a layer sees, as of :func:`attention_of`.
        is_image_T: of the prompt's tokens.
        gone: whether the layer sees no image token.
        row: position of the token that attends.
        answer: tokens of the answer.
    """
    prompt = len(is_image_T)
    image = [*is_image_T.tolist(), *[False] * answer]
    seen = [at for at, pictured in enumerate(image) if not (gone and pictured)]
    found = dict(zip(seen, attention[seen.index(row)].tolist(), strict=True))
    pictured = sum(share for at, share in found.items() if image[at])
    return pictured, sum(share for at, share in found.items() if at >= prompt)
