"""LoRA on Qwen3.5: on layers that attend, on those with a state, and past cliffs on the rows that are left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engine import v2_cpu
from tests.engine.lora import TARGETS, write_adapter

if TYPE_CHECKING:
    from vllm import RequestOutput

    from tests.families.making import Checkpoint
    from tests.families.running import Ask, Engine

DECODER = "model.language_model."
OF_STATES = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
"""Projections of a layer with a state, as they are named in an adapter."""
ADAPTERS = {4: (*TARGETS, *OF_STATES), 2: TARGETS, 3: ("in_proj_qkv", "out_proj")}
"""Of every projection, of those beside the states alone, and of some of a state's."""
TOKENS = 2 if v2_cpu.wanted() else 6
Pair = tuple["Ask", int]
"""A request, and its adapter's number: 0 for none."""


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint_of("qwen3_5")


@pytest.fixture(scope="module")
def adapters(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Path, Path]]:
    """Folders of each adapter, and of the checkpoint with it merged in."""
    root = tmp_path_factory.mktemp("lora")
    return {
        number: write_adapter(checkpoint.where, root, number, DECODER, targets)
        for number, targets in ADAPTERS.items()
    }


@pytest.fixture(scope="module")
def merged(checkpoint: Checkpoint, adapters: dict[int, tuple[Path, Path]]) -> dict[int, Checkpoint]:
    """What answers of each adapter are compared with."""
    return {0: checkpoint} | {
        n: with_weights(checkpoint, into) for n, (_, into) in adapters.items()
    }


def with_weights(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """transformers' model with the weights of a folder in the place of its own."""
    from safetensors.torch import load_file

    model = copy.deepcopy(checkpoint.model)
    found = load_file(folder / "model.safetensors")
    assert model.load_state_dict(found, strict=True)
    return replace(checkpoint, model=model)


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    from tests.families.running import Engine

    return Engine(
        checkpoint,
        group_layers=4,
        max_num_batched_tokens=160,
        max_num_seqs=8,
        enable_prefix_caching=None,
        enable_lora=True,
        # vLLM's CPU kernels send rows without an adapter through the last slot, which must stay empty.
        max_loras=len(ADAPTERS) + 1,
        max_lora_rank=8,
    )


def run(
    engine: Engine, adapters: dict[int, tuple[Path, Path]], pairs: Sequence[Pair]
) -> list[RequestOutput]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from tests.families.running import TOP

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            logprobs=TOP,
            ignore_eos=True,
            allowed_token_ids=engine.checkpoint.word_ids,
            extra_args=ask.keys,
        )
        for ask, _ in pairs
    ]
    wanted = [
        LoRARequest(f"adapter {number}", number, str(adapters[number][0])) if number else None
        for _, number in pairs
    ]
    prompts = [engine.prompt(ask) for ask, _ in pairs]
    return engine.llm.generate(prompts, params, use_tqdm=False, lora_request=wanted)


def assert_merged(
    engine: Engine,
    merged: dict[int, Checkpoint],
    pairs: Sequence[Pair],
    outputs: Sequence[RequestOutput],
) -> None:
    from tests.families.running import Judge

    judge = Judge(engine)
    for (ask, number), output in zip(pairs, outputs, strict=True):
        judge.checkpoint = merged[number]
        judge.assert_exact([ask], [output])


def test_a_batch_of_three_adapters_and_none(
    engine: Engine, adapters: dict[int, tuple[Path, Path]], merged: dict[int, Checkpoint]
) -> None:
    """With and without a policy, each with a picture of its own or shared; more than run at once."""
    from tests.families.cached_states import ask

    cliffs = (None, 3) if v2_cpu.wanted() else (None, 0, 3, 5)
    pairs = [
        (ask(1, before=6 + n, cliff=cliff), number)
        for n, cliff in enumerate(cliffs)
        for number in merged
    ]
    outputs = run(engine, adapters, pairs)
    assert_merged(engine, merged, pairs, outputs)
    # Else an engine that ignored the adapters would pass.
    first = {tuple(output.outputs[0].token_ids) for output in outputs[: len(merged)]}
    assert len(first) == len(merged)


def test_an_adapter_has_states_of_its_own_in_the_cache(
    engine: Engine, adapters: dict[int, tuple[Path, Path]], merged: dict[int, Checkpoint]
) -> None:
    from tests.families.cached_states import ask

    one = ask(2, before=20, cliff=5)
    found = []
    for number in (4, 4, 2, 0):
        outputs = run(engine, adapters, [(one, number)])
        assert_merged(engine, merged, [(one, number)], outputs)
        found.append(outputs[0].num_cached_tokens)
    assert found == [0, 128, 0, 0]
