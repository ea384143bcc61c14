"""Gemma 3 on CUDA: pictures whose tokens see one another, at every cliff, beside transformers' own forward.

``tests/families`` runs the same on CPU, through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from vllm import RequestOutput

from tests.families import gemma, oracle, running
from tests.families.asking import Ask, every_cliff, prompts_of
from tests.families.making import Checkpoint, save
from tests.families.running import STOCK, Engine, Judge
from tests.gpu.backends import DEFAULT, EAGER, SHARED, triton, v1
from tests.gpu.test_cuda_exactness import replays

TOKENS = 8
STAGES = ("0:40% diversity", "1:60% uniform, 3:30% uniform", "2:50% diversity, 3:0")
SMALL: dict[str, Any] = {"max_num_batched_tokens": 64}
"""Chunks that hold a picture and little more, in which a second one often does not fit."""
EXECUTIONS = [pytest.param(EAGER, id="eager"), pytest.param(DEFAULT, id="default")]

CheckpointOf: TypeAlias = "Callable[[int], Checkpoint]"


@pytest.fixture(scope="session")
def gemma_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointOf]:
    """``gemma_of(head_dim)``."""
    built: dict[int, Checkpoint] = {}
    root: Path = tmp_path_factory.mktemp("gemma3")

    def get(head_dim: int) -> Checkpoint:
        if head_dim not in built:
            built[head_dim] = save(gemma.gemma3(head_dim), root / str(head_dim))
        return built[head_dim]

    yield get
    running.close_all()


def asks_of(checkpoint: Checkpoint) -> list[Ask]:
    """Both prompts without a policy, at every cliff and after the prefill, and the first one under stages."""
    cliffs = [None, *range(checkpoint.num_layers + 1)]
    first, _ = prompts_of(checkpoint)
    staged = [replace(first, stages=stages) for stages in STAGES]
    late = [replace(ask, late=True) for ask in every_cliff(checkpoint, (0, 2))]
    return [*every_cliff(checkpoint, cliffs), *staged, *late]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_every_cliff_is_exact(gemma_of: CheckpointOf, execution: dict[str, Any]) -> None:
    """In float32: in chunks, then from the prefix cache; decode steps in graphs where there are some."""
    checkpoint = gemma_of(64)
    options = triton(**SMALL, **execution, enable_prefix_caching=True)
    engine = Engine(checkpoint, 2, **options)
    judge, asks = Judge(engine), asks_of(checkpoint)
    with replays(engine) as sizes:  # type: ignore[arg-type]
        for _ in range(2):
            judge.assert_exact(asks, engine.run(asks, TOKENS))
    assert bool(sizes) == (bool(execution) and not v1())
    engine.check_idle()


def test_without_a_policy_answers_are_stocks(gemma_of: CheckpointOf) -> None:
    checkpoint = gemma_of(64)
    plain = every_cliff(checkpoint, [None])
    stock = Engine(checkpoint, STOCK, **triton())
    Judge(stock).assert_exact(plain, stock.run(plain, TOKENS))


def worst_error(judge: Judge, asks: Sequence[Ask], outputs: Sequence[RequestOutput]) -> float:
    """Largest difference of a best logprob to the oracle's, which reads the engine's own tokens."""
    worst = 0.0
    checkpoint = judge.checkpoint
    for ask, output in zip(asks, outputs, strict=True):
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        cliff = checkpoint.num_layers if ask.cliff is None else ask.cliff
        right = oracle.logprobs(checkpoint, judge.prompt(ask), tokens[:-1], cliff)
        assert answer.logprobs is not None
        for row, entries in enumerate(answer.logprobs):
            best = max(entries, key=lambda token: entries[token].logprob)
            worst = max(worst, abs(entries[best].logprob - float(right[row, best])))
    return worst


def test_the_backend_that_vllm_chooses_errs_no_more_than_stock(gemma_of: CheckpointOf) -> None:
    """In half precision, with heads as wide as the published models': stock's error is the yardstick."""
    checkpoint = gemma_of(256)
    options = {**SHARED, **SMALL, "dtype": "bfloat16"}
    plain, asks = every_cliff(checkpoint, [None]), every_cliff(checkpoint, range(5))
    stock = Engine(checkpoint, STOCK, **options)
    yardstick = worst_error(Judge(stock), plain, stock.run(plain, TOKENS))
    engine = Engine(checkpoint, 2, **options)
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    backends = {group.backend.get_name() for groups in runner.attn_groups for group in groups}
    judge = Judge(engine)
    found = [worst_error(judge, part, engine.run(part, TOKENS)) for part in (plain, asks)]
    print(
        f"{sorted(backends)}: stock {yardstick:.2e}, the same {found[0]:.2e}, cliffs {found[1]:.2e}"
    )
    assert found[0] <= 2 * yardstick and found[1] <= 4 * yardstick, (backends, yardstick, found)
