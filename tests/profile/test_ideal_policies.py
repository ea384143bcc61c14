"""The ideals of policies that keep some tokens: rows and blocks, counted one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profile.shapes import shapes, works
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.policy import FlowPolicy
from vllm_flow.profile import ideal
from vllm_flow.profile.dimensions import ModelShape, Workload
from vllm_flow.profile.ideal import row_count_ideal
from vllm_flow.ranks import RANKS

policies = st.sampled_from(
    [
        "fastv",
        "horizon-64",
        "0:64 uniform",
        "1:50% last_image;3:7 random;4:0 seed=2",
        "1:50% question;2:40% dart;4:7 unrotated",
        "cliff=2 when=decode",
    ]
)


def test_what_leaves_with_the_second_token_stays_where_there_is_none() -> None:
    shape, flow = (
        ModelShape(3, 8, 2, 2, 4, 8, 8),
        parse_policies("cliff=2 when=decode", 3)[0].flow(),
    )
    assert flow is not None
    for output_tokens, kept in ((1, (5, 5, 5)), (2, (5, 5, 0))):
        work = Workload(4, 5, output_tokens)
        assert ideal.kept_tokens(shape, work, flow) == kept
        stored = tuple(work.computed_tokens - 5 + n for n in kept)
        assert ideal.kv_blocks(work, flow, (0, 1, 2), 1) == stored


def policy_of(text: str, layers: int) -> FlowPolicy | None:
    """None where it does not fit so few layers, or evicts nothing of them."""
    try:
        return parse_policies(text, layers)[0].flow()
    except ValueError:
        return None


@given(shapes(), works(), policies)
def test_rows_of_a_policy_counted_one_by_one(shape: ModelShape, work: Workload, text: str) -> None:
    """Every layer computes what it keeps; what leaves after it, its keys alone, unless attention chooses.
    After the prefill images leave with the second token."""
    flow = policy_of(text, shape.layers)
    if flow is None:
        return
    each, rows, keys, stored = ideal._sizes(work), 0, 0, 0
    for layer in range(shape.layers):
        kept = [flow.kept(layer, image, size) for image, size in enumerate(each)]
        leaves = flow.when != "decode" or work.output_tokens > 1
        stored += sum(kept) if leaves else work.image_tokens
        after = [flow.kept(layer + 1, image, size) for image, size in enumerate(each)]
        last = layer == shape.layers - 1
        chosen = next((s.rank for s in flow.images[0] if s.layer == layer + 1), None)
        if flow.when == "decode":
            rows += work.prompt_tokens
        elif last or (chosen is not None and RANKS[chosen].reads_layer):
            rows += work.text_tokens + sum(kept)
        else:
            rows += work.text_tokens + sum(after)
            keys += sum(kept) - sum(after)
    assert sum(ideal.layer_rows(shape, work, flow)) == rows
    assert sum(ideal.key_rows(shape, work, flow)) == keys
    whole = shape.layers * work.prompt_tokens
    assert ideal.rows_ideal(shape, work, flow, 0.25) == pytest.approx(whole / (rows + keys / 4))
    assert ideal.kv_bytes(shape, work, flow) == shape.token_bytes * (
        shape.layers * (work.computed_tokens - work.image_tokens) + stored
    )


@given(shapes(), works(), st.data())
def test_a_cliff_is_the_policy_that_keeps_nothing(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    cliff = data.draw(st.integers(0, max(0, shape.layers - 1)))
    flow = FlowPolicy.withdrawal(cliff)
    for count in (ideal.layer_rows, ideal.key_rows, ideal.prefill_flops, ideal.kv_bytes):
        assert count(shape, work, flow) == count(shape, work, cliff)
    starts = tuple(range(shape.layers))
    assert ideal.kv_blocks(work, flow, starts, 16) == ideal.kv_blocks(work, cliff, starts, 16)
    assert ideal.rows_ideal(shape, work, cliff, 0.3) == pytest.approx(
        row_count_ideal(
            num_layers=shape.layers, cliff=cliff, prompt_tokens=work.prompt_tokens,
            image_tokens=work.image_tokens, key_share=0.3,
        )
    )  # fmt: skip


@given(shapes(), works(), policies, st.data())
def test_a_policys_blocks_hold_what_its_layers_keep(
    shape: ModelShape, work: Workload, text: str, data: st.DataObject
) -> None:
    """With a group per layer: its kept tokens, rounded up to blocks."""
    flow = policy_of(text, shape.layers)
    if flow is None:
        return
    block_size = data.draw(st.sampled_from((1, 16, 32)))
    blocks = ideal.kv_blocks(work, flow, tuple(range(shape.layers)), block_size)
    kept = ideal.kept_tokens(shape, work, flow)
    tokens = [work.computed_tokens - work.image_tokens + n for n in kept]
    assert blocks == tuple(-(-n // block_size) for n in tokens)
