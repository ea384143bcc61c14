"""Of latent attention: images that leave after the prefill, the attention log, and the last layer before a cliff."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from vllm import SamplingParams

from tests.engine.two_workers import a_core_each
from tests.families import oracle, running
from tests.families.asking import Ask, every_cliff, prompts_of
from tests.families.chats import STRING, asked
from tests.families.making import Checkpoint, picture
from tests.families.running import TOLERANCE as RUN_TOLERANCE
from tests.families.running import TOP, Engine, Judge
from tests.longer import some

NAMES = ("kimi_vl", "kimi_k2_5", "deepseek_vl2")
TOLERANCE = 5e-5
"""Of a probability, as for the log."""


def attention_of(checkpoint: Checkpoint, prompt: oracle.Prompt, answer: list[int]) -> np.ndarray:
    """[L, T, T] averaged over heads, by transformers' own forward."""
    seen: list[torch.Tensor] = []
    layers = checkpoint.decoder(checkpoint.model).layers
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _module, _args, result: seen.append(result[1][0].mean(0))
        )
        for layer in layers
    ]
    try:
        with torch.inference_mode():
            oracle.forward(checkpoint, prompt, answer)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen).numpy()


def assert_logged(engine: Engine, directory: Path, prompt: oracle.Prompt) -> None:
    """What the log says of one request is transformers' attention."""
    checkpoint = engine.checkpoint
    ask, _ = prompts_of(checkpoint)
    params = SamplingParams(
        temperature=0,
        max_tokens=4,
        ignore_eos=True,
        allowed_token_ids=checkpoint.word_ids,
        extra_args={"flow_log_attention": True},
    )
    (output,) = engine.llm.generate([engine.prompt(ask)], params, use_tqdm=False)
    answer = list(output.outputs[0].token_ids)
    attention_LTT = attention_of(checkpoint, prompt, answer)
    scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.flow_logged.log.flush()
    rows = pq.read_table(directory / "mass").to_pylist()
    assert len(rows) == checkpoint.num_layers * len(answer)
    image = prompt.is_image_T.numpy()
    for row in rows:
        weights = attention_LTT[row["layer"], len(prompt.ids) - 1 + row["token"]]
        inside, outside = weights[: len(image)], weights[len(image) :].sum()
        assert abs(row["image"] - inside[image].sum()) < TOLERANCE
        assert abs(row["output"] - outside) < TOLERANCE


@pytest.mark.parametrize("name", some(NAMES, ["kimi_vl"]))
def test_what_reads_the_cache_reads_vectors(
    name: str, checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """Chunks of 32, two layers to a storage group."""
    checkpoint = checkpoint_of(name)
    flow = {"group_layers": 2, "attention_log": str(tmp_path)}
    engine = Engine(
        checkpoint,
        group_layers=2,
        additional_config={"vllm_flow": flow},
        max_num_batched_tokens=32,
    )
    assert engine.spares_last_layers
    assert engine.runner.flow_state.ranker.unreadable is None
    assert engine.runner.flow_state.mover.unmovable is None
    judge, cliffs = Judge(engine), range(checkpoint.num_layers)
    late = [replace(ask, late=True) for ask in every_cliff(checkpoint, list(cliffs))]
    judge.assert_exact(late, engine.run(late, 8))
    assert_logged(engine, tmp_path, judge.prompt(prompts_of(checkpoint)[0]))
    engine.check_idle()


@pytest.mark.long
def test_a_chat_reaches_chunks_of_vision(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    """Kimi-K2.5's pictures, as clients of a server send them."""
    checkpoint = checkpoint_of("kimi_k2_5")
    engine = Engine(checkpoint, group_layers=2)
    shown = picture(1, checkpoint.sizes[0])
    params = SamplingParams(
        temperature=0,
        max_tokens=8,
        logprobs=TOP,
        ignore_eos=True,
        allowed_token_ids=checkpoint.word_ids,
        extra_args={"flow_cliff": 2},
    )
    (output,) = engine.llm.chat(asked("w5 w6", shown), params, chat_template=STRING, use_tqdm=False)
    mark = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    ask = Ask(f"w1 user w2 {mark}\nw5 w6 w3", (shown,), cliff=2)
    assert Judge(engine).error(ask, output) < RUN_TOLERANCE
    engine.check_idle()


DRAFTS = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)


@pytest.mark.long
def test_drafts_are_checked_exactly(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    """Several rows of an answer in a step, behind packed vectors."""
    engine = Engine(checkpoint_of("kimi_vl"), group_layers=2, speculative_config=DRAFTS)
    asks = every_cliff(engine.checkpoint, [None, *range(engine.checkpoint.num_layers)])
    Judge(engine).assert_exact(asks, engine.run(asks, 12))
    engine.check_idle()


def test_connectors_are_refused(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    with pytest.raises(
        ValueError, match="connectors beside latent attention, .*: leave out kv_tra"
    ):
        Engine(checkpoint_of("kimi_vl"), group_layers=2, kv_transfer_config=transfer)


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_workers_are_exact(
    checkpoint_of: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has half of the heads and all vectors. DeepSeek's decoder would take rows that left for the other's."""
    if running._OPEN:
        # Behind engines of Kimi-K2.5 and of drafts in one process it failed, twice of twice, and nobody knows why.
        pytest.skip(
            "needs a process of its own: pytest tests/families/test_latent.py -k two_workers"
        )
    checkpoint = checkpoint_of("kimi_vl")
    alone = Engine(checkpoint, group_layers=2)
    asks = every_cliff(checkpoint, [None, *range(checkpoint.num_layers)])
    asks += [replace(asks[0], stages=kind) for kind in ("1:50% last_image", "2:40% last_prompt")]
    a_core_each(monkeypatch)
    engine = Engine(
        checkpoint,
        group_layers=2,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=80,
    )
    Judge(alone).assert_exact(asks, engine.run(asks, 8))
