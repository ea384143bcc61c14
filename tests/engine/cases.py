"""What is asked of the engine: checkpoint shapes, prompts, batches and engine options, for both model runners.

Plain data; knows neither vLLM nor the oracle. A case with ``quick`` also runs under Model Runner V2, whose kernels go
through an interpreter on CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.engine import v2_cpu
from tests.engine.tiny_llava import IMAGE_TOKEN_ID, Shape, words

MAX_MODEL_LEN = 512
LONG_ANSWER = 32
"""Tokens; fills a block of them whatever it began with."""
ANSWER = 12 if v2_cpu.wanted() else 20
"""Of most answers: steps take the tests' time, most of all those of Model Runner V2, whose kernels a CPU interprets."""


@dataclass(frozen=True)
class Ask:
    """One request. ``images`` are seeds of random pictures, one per ``<image>`` of the prompt."""

    prompt: str
    images: tuple[int, ...] = ()
    cliff: int | None = None
    max_tokens: int = ANSWER
    allowed: tuple[int, ...] | None = None
    samples: int = 1
    """Answers wanted; all are greedy, so all must be the oracle's."""
    stages: str | tuple[str, ...] = ""
    """``flow_stages``, in the place of a cliff; or a stage per image, sent as lists."""
    seed: int = 0
    """``flow_seed``."""
    late: bool = False
    """``flow_when="decode"``."""
    log: bool | tuple[int, ...] = False
    """``flow_log_attention``."""
    heat: bool = False

    @property
    def extra_args(self) -> dict[str, Any] | None:
        keys: dict[str, Any] = {}
        if self.cliff is not None:
            keys["flow_cliff"] = self.cliff
        keys |= self._stage_keys()
        if self.late:
            keys["flow_when"] = "decode"
        if self.log:
            keys["flow_log_attention"] = self.log if self.log is True else list(self.log)
        if self.heat:
            keys["flow_log_attention_heat"] = True
        return keys or None

    def _stage_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        if isinstance(self.stages, tuple):
            parts = [stage.replace(":", " ").split() for stage in self.stages]
            keys = {"flow_cliff": [int(layer) for layer, *_ in parts]}
            if any(len(part) > 2 for part in parts):
                keys["flow_keep"] = [amount for _, amount, *_ in parts]
                (keys["flow_rank"],) = {part[2] for part in parts if len(part) > 2}
        elif self.stages:
            keys = {"flow_stages": self.stages}
        return keys | ({"flow_seed": self.seed} if self.seed else {})

    def without_policy(self) -> Ask:
        return replace(self, cliff=None, stages="", seed=0, late=False)


@dataclass(frozen=True)
class Case:
    """A batch for one engine; ``options`` go to ``LLM`` on top of the harness's."""

    name: str
    shape: Shape
    asks: tuple[Ask, ...]
    group_layers: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    def __str__(self) -> str:
        return self.name


def one_image(seed: int, cliff: int | None = None, before: int = 5, after: int = 7) -> Ask:
    """Text, an image, text; everything follows from the seed."""
    return Ask(f"{words(before, seed)} <image> {words(after, seed + 500)}", (seed,), cliff)


def two_images(seed: int, cliff: int | None = None) -> Ask:
    """An image right after the first token, text, another image, text."""
    prompt = f"<image> {words(6, seed)} <image> {words(9, seed + 500)}"
    return Ask(prompt, (seed, seed + 1), cliff)


def adjacent_images(seed: int, cliff: int | None = None) -> Ask:
    """Two images without text between them."""
    return Ask(f"{words(3, seed)} <image> <image> {words(4, seed + 500)}", (seed, seed + 1), cliff)


def text_around(seed: int, cliff: int | None = None) -> Ask:
    """Text before, between and after two images, each longer than a few tokens."""
    prompt = f"{words(23, seed)} <image> {words(11, seed + 100)} <image> {words(17, seed + 500)}"
    return Ask(prompt, (seed, seed + 1), cliff)


def text_only(seed: int, cliff: int | None = None, count: int = 40) -> Ask:
    return Ask(words(count, seed), (), cliff)


def image_token_as_text(seed: int, cliff: int | None = None) -> Ask:
    """An answer in which the image token's id is the only one allowed beside two words: it is text there."""
    ask = one_image(seed, cliff)
    return Ask(ask.prompt, ask.images, cliff, ask.max_tokens, (IMAGE_TOKEN_ID, 20, 60))


def every_cliff(layers: int) -> tuple[Ask, ...]:
    """All cliffs with one image and with two, the same prompts throughout."""
    asks = (one_image(1), two_images(2))
    return tuple(Ask(ask.prompt, ask.images, cliff) for ask in asks for cliff in range(layers + 1))


def mixed(layers: int) -> tuple[Ask, ...]:
    """One batch of everything: several cliffs, baseline, text-only with and without a policy."""
    middle = layers // 2
    return (
        replace(one_image(11, middle), max_tokens=LONG_ANSWER),
        one_image(12, None, before=33),
        text_only(13),
        two_images(14, 1),
        one_image(16, 0, before=0, after=2),
        text_only(17, middle, count=70),
        one_image(18, layers),
        two_images(28, layers - 1),
        adjacent_images(21, middle),
        two_images(23, None),
        image_token_as_text(25, middle),
        Ask(f"{words(4, 26)} <image>", (26,), None),
    )


GQA = Shape("llama", layers=4, heads=4, kv_heads=2, head_dim=32, grid=5, seed=1)
MHA = Shape("llama", layers=3, heads=2, kv_heads=2, head_dim=64, grid=4, seed=2)
MISTRAL = Shape("mistral", layers=7, heads=4, kv_heads=1, head_dim=64, grid=8, seed=3)
QWEN = Shape("qwen2", layers=4, heads=2, kv_heads=2, head_dim=80, grid=6, seed=4)
LONG = Shape("llama", layers=6, heads=4, kv_heads=2, head_dim=32, grid=12, seed=5)
"""144 image tokens, more than four blocks: chunks fall inside an image."""

NEXT = Shape("llama", layers=4, heads=4, kv_heads=2, head_dim=32, grid=4, seed=6, tiles=True)
"""LLaVA-NeXT: wide pictures and tall ones, whose numbers of tokens differ."""

SIGLIP = Shape("llama", layers=4, heads=4, kv_heads=2, head_dim=32, grid=6, seed=7, siglip=True)
SIGLIP_NEXT = replace(SIGLIP, grid=4, seed=8, tiles=True)
"""Without a class token."""

SHAPES = (GQA, MHA, MISTRAL, QWEN, LONG, NEXT)

CLIFFS = tuple(
    Case(
        f"every-cliff-{shape.family}-{shape.head_dim}{'-tiles' if shape.tiles else ''}",
        shape,
        every_cliff(shape.layers),
        groups,
        quick=quick,
    )
    for shape, groups, quick in (
        (GQA, 2, True),
        (MHA, 1, False),
        (MISTRAL, 4, False),  # the last group has three layers, and a block room for four
        (QWEN, 2, True),
        (NEXT, 2, False),
    )
)

GROUPS = tuple(
    Case(f"groups-of-{groups}", LONG, mixed(LONG.layers), groups) for groups in (1, 2, 3, 6)
)

CHUNKS = tuple(
    Case(
        f"chunks-of-{budget}-groups-of-{groups}",
        LONG,
        mixed(LONG.layers),
        groups,
        # A chunked prefill shares its budget with the decodes, so fewer sequences mean longer chunks.
        {"max_num_batched_tokens": budget, "max_num_seqs": seqs},
        quick=budget == 97,
    )
    for budget, seqs, groups in ((32, 1, 2), (32, 4, 3), (48, 3, 1), (97, 12, 2), (200, 12, 6))
)

SCHEDULERS = (
    Case("not-asynchronous", LONG, mixed(LONG.layers), 2, {"async_scheduling": False}, quick=True),
    Case("not-chunked", LONG, mixed(LONG.layers), 2, {"enable_chunked_prefill": False}),
    Case("asynchronous", LONG, mixed(LONG.layers), 2, {"async_scheduling": True}),
    Case(
        "not-asynchronous-chunks-of-64",
        LONG,
        mixed(LONG.layers),
        3,
        {"async_scheduling": False, "max_num_batched_tokens": 64, "max_num_seqs": 8},
    ),
)

EXACT = (*CLIFFS, *GROUPS, *CHUNKS, *SCHEDULERS)

QUICK = tuple(case for case in EXACT if case.quick)

FEW = (QUICK[0], QUICK[2])
"""A request per cliff, and chunks."""

KINDS = (*CLIFFS, *GROUPS[:2], CHUNKS[0], CHUNKS[3], *SCHEDULERS[1:3])
"""Every shape; a group per layer and a cliff inside a group; chunks of a block and across pictures; schedulers."""
