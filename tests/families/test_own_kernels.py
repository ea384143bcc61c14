"""Qwen3.5 by vLLM's own kernels for CPUs, in bfloat16: the other tests put float32 arithmetic in their place.

Rounding hides small errors, so what is shown is less: with a policy answers are as near to the oracle's as without
one, and nearer than to those of a model that sees the picture. In a process of its own, since vLLM
makes its operators once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine import v2_cpu

if TYPE_CHECKING:
    from tests.families.making import Checkpoint
    from tests.families.running import Engine

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(v2_cpu.wanted(), reason="the kernels are the same"),
    pytest.mark.skipif(
        not torch.cpu._is_avx512_bf16_supported(), reason="the processor emulates bfloat16"
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Heads as wide as the kernels take them."""
    from tests.families import making, qwen

    where = tmp_path_factory.mktemp("own_kernels")
    wide = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    return making.save(qwen.qwen3_5(**wide), where / "qwen3_5")


def open_engine(checkpoint: Checkpoint, group_layers: int | None, **options: Any) -> Engine:
    from tests.families.running import Engine

    if "tests.families.gated_delta" in sys.modules:
        pytest.skip("needs a process of its own: pytest tests/families/test_own_kernels.py")
    engine = Engine(
        replace(checkpoint, recurrent=False),  # or other kernels took the place of vLLM's
        group_layers,
        dtype="bfloat16",
        max_num_batched_tokens=320,
        max_num_seqs=8,
        max_model_len=1280,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=True,
        **options,
    )
    engine.checkpoint = checkpoint
    return engine


def errors(
    checkpoint: Checkpoint, judge: Any, asks: list[Any], outputs: list[Any]
) -> list[tuple[float, float]]:
    """Of each answer the mean difference of a logprob from the oracle's, and from one that sees the picture."""
    from tests.families import oracle

    found = []
    layers = checkpoint.num_layers
    for ask, output in zip(asks, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        cliffs = (layers if ask.cliff is None else ask.cliff, layers)
        expected = [
            oracle.logprobs(checkpoint, judge.prompt(ask), answer[:-1], cliff) for cliff in cliffs
        ]
        found.append(
            tuple(
                mean(
                    abs(entry.logprob - float(one[row, token]))
                    for row, entries in enumerate(output.outputs[0].logprobs)
                    for token, entry in entries.items()
                )
                for one in expected
            )
        )
    return found


def test_answers_are_as_near_as_rounding_lets_them(checkpoint: Checkpoint) -> None:
    from tests.families.cached_states import ask
    from tests.families.running import STOCK, Judge, largest_difference

    engine = open_engine(checkpoint, 4)
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    judge = Judge(engine)
    asks = [
        ask(1, (12, 15), before=block - 190, after=30, cliff=cliff) for cliff in (None, 0, 3, 5, 7)
    ]
    for cached in (0, block):
        outputs = engine.run(asks, 6)
        assert {output.num_cached_tokens for output in outputs} == {cached}
        (plain, _), *others = errors(checkpoint, judge, asks, outputs)
        for one, (error, whole) in zip(asks[1:], others, strict=True):
            assert error < 1.3 * plain and error < whole / 1.5, one.keys
    engine.llm.reset_prefix_cache()
    stock = open_engine(checkpoint, STOCK)
    assert largest_difference(engine.run(asks[:1], 6), stock.run(asks[:1], 6)) == 0


def test_adapters_are_as_near(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """LoRA on every projection, those of states among them."""
    from tests.engine.lora import write_adapter
    from tests.families.cached_states import ask
    from tests.families.running import Judge
    from tests.families.test_adapted_states import ADAPTERS, DECODER, run, with_weights

    number, targets = next(iter(ADAPTERS.items()))
    folders = write_adapter(checkpoint.where, tmp_path, number, DECODER, targets)
    engine = open_engine(checkpoint, 4, enable_lora=True, max_loras=2, max_lora_rank=8)
    judge = Judge(engine)
    asks = [ask(1, (12, 15), before=100, after=30, cliff=cliff) for cliff in (None, 0, 3, 5, 7)]
    outputs = run(engine, {number: folders}, [(one, number) for one in asks])
    adapted = with_weights(checkpoint, folders[1])
    (plain, _), *others = errors(adapted, judge, asks, outputs)
    for one, (error, whole) in zip(asks[1:], others, strict=True):
        assert error < 1.3 * plain and error < whole / 1.5, one.keys
