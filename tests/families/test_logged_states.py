"""The attention log beside states that are cached: of Qwen3.5's layers that attend, cold and behind a hit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.families.cached_states import (
    BLOCK,
    ask,
    attention_of,
    every_step,
    scheduler_of,
    shares,
    started,
)

if TYPE_CHECKING:
    from tests.families.making import Checkpoint
    from tests.families.running import Engine, Judge


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def engine(checkpoint_of: Callable[[str], Checkpoint], log: Path) -> Engine:
    return started(checkpoint_of("qwen3_5"), {"group_layers": 4, "attention_log": str(log)})


@pytest.fixture(scope="module")
def judge(engine: Engine) -> Judge:
    from tests.families.running import Judge

    return Judge(engine)


@pytest.mark.parametrize("cliff", (None, 2, 5))
def test_what_is_logged_is_the_attention_of_layers_that_attend(
    engine: Engine, judge: Judge, log: Path, cliff: int | None
) -> None:
    """Cold, then behind a hit; past a cliff a layer's shares are those of the rows that it sees."""
    import pyarrow.parquet as pq
    from vllm import SamplingParams

    one = ask(63, after=9, cliff=cliff)
    prompt = judge.prompt(one)
    params = SamplingParams(
        temperature=0,
        max_tokens=3,
        ignore_eos=True,
        allowed_token_ids=engine.checkpoint.word_ids,
        extra_args={**(one.keys or {}), "flow_log_attention": True},
    )
    scheduler, announced = scheduler_of(engine), set()

    def look() -> None:
        announced.update(map(scheduler.flow_logged.layers_of, scheduler.requests))

    for cached in (0, 2 * BLOCK):
        with every_step(engine, look):
            (output,) = engine.llm.generate([engine.prompt(one)], params, use_tqdm=False)
        assert output.num_cached_tokens == cached and announced == {2}
        answer = list(output.outputs[0].token_ids)
        assert scheduler.flow_logged.log.flush()
        rows = [
            row
            for row in pq.read_table(log / "mass").to_pylist()
            if row["request_id"] == output.request_id
        ]
        attention = attention_of(engine, judge, one, answer)
        assert sorted({row["layer"] for row in rows}) == sorted(attention) == [3, 7]
        assert len(rows) == 2 * len(answer)
        for row in rows:
            gone = cliff is not None and row["layer"] >= cliff
            at = len(prompt.ids) - 1 + row["token"]
            pictured, said = shares(
                attention[row["layer"]], prompt.is_image_T, gone, at, len(answer)
            )
            assert abs((row["image"] or 0) - pictured) < 5e-5 and abs(row["output"] - said) < 5e-5
            assert (pictured > 0.1) != gone
