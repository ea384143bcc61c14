"""Qwen3.5, whose layers of linear attention keep a state per request: what states are built from, and when.

An engine in small: steps of 36 tokens, blocks of 64, two storage groups of one layer, six groups of states.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine import v2_cpu
from tests.engine.two_workers import a_core_each
from tests.families.making import picture, words

if TYPE_CHECKING:
    from tests.families.asking import Ask
    from tests.families.making import Checkpoint
    from tests.families.running import Engine, Judge

STEP = 36
TOKENS = 3 if v2_cpu.wanted() else 8
UNIT = 32
"""Pixels of a picture's token, either way."""


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint_of("qwen3_5")


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Iterator[Engine]:
    from tests.families.running import Engine

    yield Engine(checkpoint, group_layers=4, max_num_batched_tokens=STEP, max_num_seqs=8)


@pytest.fixture(scope="module")
def judge(engine: Engine) -> Judge:
    from tests.families.running import Judge

    return Judge(engine)


@pytest.fixture(autouse=True)
def sound(engine: Engine) -> Iterator[None]:
    """Every block is back after each test, those of states among them."""
    from vllm_flow.engine.inspect import check_integrity

    yield
    engine.check_idle()
    check_integrity(engine.llm)


def ask(seed: int, rows: int, columns: int, before: int = 0, cliff: int | None = None) -> Ask:
    """A picture of rows x columns tokens at token ``before`` of a prompt: without words, at the first."""
    from tests.families.asking import Ask

    text = f"{words(before, seed)} <|image_pad|> {words(5, 900 + seed)}".strip()
    return Ask(text, (picture(seed, (rows * UNIT, columns * UNIT)),), cliff)


def run(engine: Engine, judge: Judge, asks: list[Ask]) -> None:
    judge.assert_exact(asks, engine.run(asks, TOKENS))


def one_by_one(engine: Engine, judge: Judge, asks: list[Ask]) -> None:
    for one in asks:
        run(engine, judge, [one])


def test_a_state_begins_at_zero_with_the_first_row_that_is_left(
    engine: Engine, judge: Judge
) -> None:
    """A step of image tokens alone, then four of them and words: blocks of states hold what others left there."""
    one_by_one(engine, judge, [ask(1, 5, 8, cliff=cliff) for cliff in (8, 0, 2, 4, 5)])


def test_a_state_begins_at_zero_in_a_step_that_loses_no_row(engine: Engine, judge: Judge) -> None:
    """A step of image tokens alone, then one of words alone, which are not a prompt's first but a state's."""
    one_by_one(engine, judge, [ask(4, 6, 6, cliff=cliff) for cliff in (8, 0, 2, 5)])


def test_a_step_that_shrinks_to_one_row_is_no_decode(engine: Engine, judge: Judge) -> None:
    """35 image tokens and one word fill a step: one row is left, which nothing came before."""
    one_by_one(engine, judge, [ask(2, 5, 7, cliff=cliff) for cliff in (8, 0, 3, 6)])


def test_a_builders_buffers_are_those_of_captured_steps(engine: Engine, judge: Judge) -> None:
    """A step of one row behind others would go into them, where vLLM's own metadata of it may be."""
    from vllm_flow.engine.replacing import replaced
    from vllm_flow.engine.states import is_state

    core: Any = engine.llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    hook = runner.flow_state.hook
    groups = [group for of_group in runner.attn_groups for group in of_group]
    builders = [g.get_metadata_builder(0) for g in groups if is_state(g.kv_cache_spec)]
    assert all("use_full_cuda_graph" in vars(builder) for builder in builders), "renamed upstream"
    made: list[Any] = []
    stock = hook.arm

    def arm(step: Any) -> None:
        made.extend(() if step is None else step.attn_metadata.values())
        stock(step)

    graphs = [(builder, True) for builder in builders]
    with replaced("use_full_cuda_graph", graphs), replaced("arm", [(hook, arm)]):
        run(engine, judge, [ask(5, 1, 67, before=4, cliff=3)])
    indices = "non_spec_state_indices_tensor"
    of_states = [metadata for metadata in made if hasattr(metadata, indices)]
    assert any(metadata.num_prefills == 0 for metadata in of_states)
    found = {getattr(metadata, indices).data_ptr() for metadata in of_states}
    assert not found & {getattr(builder, indices).data_ptr() for builder in builders}


def test_a_step_without_rows_leaves_a_state_as_it_is(engine: Engine, judge: Judge) -> None:
    """Words, a step of image tokens alone, words."""
    one_by_one(engine, judge, [ask(3, 6, 15, before=4, cliff=cliff) for cliff in (1, 3, 5)])


def test_requests_share_steps_with_others_decodes(engine: Engine, judge: Judge) -> None:
    """More requests than run at once, with and without a policy; prefills of some in decodes of others.

    Between any two steps every block is accounted for.
    """
    from vllm_flow.engine.inspect import check_integrity
    from vllm_flow.engine.replacing import replaced

    shapes = [(5, 8, 0), (4, 3, 3), (5, 7, 0), (6, 15, 4), (2, 2, 9), (3, 8, 1)]
    cliffs = (0, None, 3, 5, 1, 7, 4, 8, 2, 6)
    asks = [
        ask(10 + n, *shapes[n % len(shapes)], cliff=cliff)
        for n, cliff in enumerate(cliffs * (1 if v2_cpu.wanted() else 2))
    ]
    stock = engine.llm.llm_engine.step

    def step() -> Any:
        found = stock()
        check_integrity(engine.llm)
        return found

    with replaced("step", [(engine.llm.llm_engine, step)]):
        run(engine, judge, asks)


@pytest.mark.skipif(v2_cpu.wanted(), reason="scheduling is the same, and V2's interpreter slow")
def test_preempted_requests_build_their_states_anew(engine: Engine, judge: Judge) -> None:
    scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    # Each takes six blocks of states; without a policy three for each of two groups from its 129th token on.
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 20)
    counted = [0]
    stock = scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        return stock(*args, **kwargs)

    scheduler._preempt_request = count
    try:
        asks = [
            ask(30 + n, 6, 19, before=6, cliff=cliff) for n, cliff in enumerate((None, 5, None, 3))
        ]
        run(engine, judge, asks)
    finally:
        del scheduler._preempt_request
        pool.free_blocks(taken)
    assert counted[0], "nothing was preempted: take more blocks"


def test_what_stays_of_a_picture_goes_into_states(engine: Engine, judge: Judge) -> None:
    """Ranks of every kind; by attention, where a layer of attention comes before."""
    from tests.families.test_exact import BESIDE_STATES

    plain = ask(40, 4, 6, before=3)
    run(engine, judge, [replace(plain, stages=stages) for stages in BESIDE_STATES])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"flow_cliff": 4, "flow_when": "decode"}, "taken in the whole image"),
        ({"flow_stages": "3:50% last_image"}, "begin the stage at one of the layers 4, 8"),
        (
            {"flow_log_attention": [3, 5]},
            "layer 5 keeps no keys, .* the layers that attend are 3, 7",
        ),
    ],
)
def test_what_states_cannot_do_is_refused(engine: Engine, keys: dict[str, Any], told: str) -> None:
    from vllm import SamplingParams

    with pytest.raises(ValueError, match=told):
        engine.llm.generate(
            engine.prompt(ask(50, 2, 2, before=2)), SamplingParams(extra_args=keys), use_tqdm=False
        )


def test_savings_are_those_of_the_layers_with_keys(engine: Engine, judge: Judge) -> None:
    """Blocks of states are as many with a policy as without; they are in no footprint."""
    from vllm_flow.engine.inspect import footprints

    asks = [ask(60, 6, 19, before=6, cliff=cliff) for cliff in (None, 7, 4, 3)]
    outputs = engine.run(asks, TOKENS)
    found = list(footprints(engine.llm).values())[-len(asks) :]
    computed = len(outputs[0].prompt_token_ids) + TOKENS - 1
    whole, kept = -(-computed // 64), 1
    by_cliff = {footprint.cliff: footprint.blocks for footprint in found}
    assert by_cliff == {8: (whole,) * 2, 7: (whole, kept), 4: (whole, kept), 3: (kept, kept)}
    reports = {output.kv_transfer_params["vllm_flow"]["cliff"]: output.kv_transfer_params["vllm_flow"]
               for output in outputs[1:]}  # fmt: skip
    page = 32768  # bytes of a block of one layer, padded to a state's
    for cliff, blocks in ((7, whole - 1), (4, whole - 1), (3, 2 * (whole - 1))):
        assert reports[cliff]["kv_blocks_saved"] == blocks
        assert reports[cliff]["kv_bytes_saved"] == blocks * page


DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        (
            {"speculative_config": DRAFTS},
            {},
            "under Model Runner V2" if v2_cpu.wanted() else "on a CPU, where .* wrong inputs",
        ),
        ({}, {"group_layers": 9}, "use one of 1, 2, 3, 4, 5, 6, 7, 8"),
        (
            {},
            {"default_policy": {"flow_cliff": 4, "flow_when": "decode"}},
            "default_policy: images cannot leave this model after the prefill",
        ),
        (
            {},
            {"default_policy": {"flow_stages": "3:50% last_image"}},
            "begin the stage at one of the layers 4, 8",
        ),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_was_not_shown_to_be_exact_beside_states_is_refused(
    checkpoint: Checkpoint, arguments: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    """At start-up."""
    from vllm.engine.arg_utils import EngineArgs

    found = {"max_model_len": 512, **arguments}
    with pytest.raises(ValueError, match=told):
        EngineArgs(
            model=str(checkpoint.where), additional_config={"vllm_flow": options}, **found
        ).create_engine_config()


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_workers_are_exact(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps the states of half of the heads."""
    from tests.families.running import Engine, Judge

    a_core_each(monkeypatch)
    engine = Engine(
        checkpoint,
        group_layers=4,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        worker_extension_cls="tests.families.gated_delta_workers.InWorkers",
        max_num_batched_tokens=STEP,
        max_num_seqs=8,
    )
    asks = [ask(70 + n, 5, 8, before=n, cliff=cliff) for n, cliff in enumerate((None, 0, 3, 5, 7))]
    run(engine, Judge(engine), asks)
    engine.check_idle()
