"""As vLLM starts without a flag: compiled, but for the steps in which rows leave; tokens are the oracle's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine import v2_cpu
from tests.engine.cases import MHA, mixed, one_image
from tests.engine.compiling import allow_compiling, counted_calls
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from vllm_flow.engine.families import decoder_of


def test_only_steps_in_which_rows_leave_are_eager(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with and without policies join a running batch; the first step of all evicts."""
    allow_compiling(monkeypatch, inductor=not v2_cpu.wanted())
    engine = open_engine(MHA, 1, enforce_eager=False)
    # A decode of one row comes before any other compiled step of a request.
    first = [one_image(31, 1)]
    with counted_calls(engine) as calls:
        assert_exact(engine, first, engine.run(first))
    assert (calls.eager, calls.compiled) == (1, first[0].max_tokens - 1)

    asks = mixed(MHA.layers)
    asks = v2_cpu.reduced(asks, to=asks[1:5])
    evicting = [ask for ask in asks if ask.images and ask.cliff not in (None, MHA.layers)]
    with counted_calls(engine) as calls:
        outputs = engine.run_joining(asks)
    assert_exact(engine, asks, outputs)
    # Each of them joins alone, with its whole prompt.
    assert calls.eager == len(evicting)
    assert calls.compiled > 2 * len(asks)

    stages = ("1:50% last_image, 2:20% last_prompt", "0:40% diversity", "1:1/3 uniform, 2:0")
    ranked = [replace(one_image(35 + n), stages=text) for n, text in enumerate(stages)]
    assert_exact(engine, ranked, engine.run(ranked))


@pytest.mark.skipif(v2_cpu.wanted(), reason="without Inductor nothing is left to it")
def test_eager_steps_run_with_the_kernels_of_an_engine_that_never_compiles(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_compiling(monkeypatch, inductor=True)
    engine = open_engine(MHA, 1, enforce_eager=False)
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    activation = decoder_of(runner.model, runner.model_config).layers[0].mlp.act_fn
    seen: list[str] = []

    def note(*_: object) -> None:
        seen.append(activation._forward_method.__name__)

    hook = activation.register_forward_pre_hook(note)
    try:
        asks = [one_image(33, 1)]
        assert_exact(engine, asks, engine.run(asks))
    finally:
        hook.remove()
    assert seen == ["forward_cpu"]
    assert activation._forward_method.__name__ == "forward_native"
