"""The ideals: counted another way, and what must hold for any shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.grouping import DecoderLayers
from vllm_flow.policy import FlowPolicy
from vllm_flow.profile import ideal
from vllm_flow.profile.dimensions import ModelShape, TowerShape, Workload
from vllm_flow.profile.ideal import row_count_ideal
from vllm_flow.ranks import RANKS, after_layer

small = st.integers(1, 12)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads, per_kv, head_dim = draw(small), draw(st.integers(1, 4)), draw(st.integers(1, 16))
    heads = kv_heads * per_kv
    tower = TowerShape(draw(small), draw(small), draw(small), draw(small), draw(small))
    return ModelShape(
        layers=draw(st.integers(1, 40)),
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=draw(small),
        vocab=draw(small),
        tower=draw(st.sampled_from((None, tower))),
        value_bytes=draw(st.sampled_from((2, 4))),
    )


@st.composite
def works(draw: st.DrawFn) -> Workload:
    return Workload(
        draw(st.integers(1, 50)), draw(st.integers(0, 300)), draw(st.integers(1, 30)),
        draw(st.integers(0, 3)),
    )  # fmt: skip


def cliffs(shape: ModelShape) -> st.SearchStrategy[int]:
    return st.integers(0, shape.layers)


@given(shapes(), works(), st.data())
def test_attention_flops_count_every_pair_once(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    """Pairs counted one by one, the image before the text."""
    work = replace(work, image_tokens=work.image_tokens % 12, text_tokens=work.text_tokens % 9 + 1)
    cliff = data.draw(cliffs(shape))
    is_image = [t < work.image_tokens for t in range(work.prompt_tokens)]
    pairs = 0
    for layer in range(shape.layers):
        keys = [t for t in range(work.prompt_tokens) if layer < cliff or not is_image[t]]
        whole = layer < cliff - 1 or cliff == shape.layers
        rows = [t for t in keys if whole or not is_image[t]]
        pairs += sum(key <= query for query in rows for key in keys)
    per_pair = 2 * 2 * shape.heads * shape.head_dim  # scores and values, multiply and add
    assert ideal.prefill_flops(shape, work, cliff).attention == per_pair * pairs


@given(shapes(), works(), st.data())
def test_prefill_ratio_lies_between_one_and_the_quadratic_bound(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    cliff = data.draw(cliffs(shape))
    ratio = ideal.prefill_ratio(shape, work, cliff)
    assert 1 <= ratio <= (work.prompt_tokens / work.text_tokens) ** 2 * shape.layers + 1e-9
    assert ideal.prefill_ratio(shape, work, shape.layers) == 1
    if cliff:  # deeper cliff, more work
        assert ideal.prefill_ratio(shape, work, cliff - 1) >= ratio
    assert ratio <= ideal.prefill_ratio(shape, work, cliff, with_tower=False) + 1e-12


@given(shapes(), works(), st.data())
def test_linear_part_is_the_plans_row_count_ideal(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    cliff = data.draw(cliffs(shape))
    full = ideal.prefill_flops(shape, work, shape.layers).linear
    assert full / ideal.prefill_flops(shape, work, cliff).linear == pytest.approx(
        row_count_ideal(
            num_layers=shape.layers,
            cliff=cliff,
            prompt_tokens=work.prompt_tokens,
            image_tokens=work.image_tokens,
            key_share=shape.key_share,
        )
    )


@given(shapes(), works(), st.data())
def test_keys_alone_cost_less_than_a_layer_and_more_than_none(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    counts = dict(
        num_layers=shape.layers, prompt_tokens=work.prompt_tokens, image_tokens=work.image_tokens
    )
    cliff = data.draw(cliffs(shape))
    spared = row_count_ideal(**counts, cliff=cliff, key_share=shape.key_share)
    assert row_count_ideal(**counts, cliff=cliff) <= spared
    if 0 < cliff < shape.layers:
        assert spared <= row_count_ideal(**counts, cliff=cliff - 1)


@given(shapes(), works(), st.data())
def test_blocks_hold_the_bytes_and_waste_less_than_one_block_per_group(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    divisors = [d for d in range(1, shape.layers + 1) if shape.layers % d == 0]
    group_layers = data.draw(st.sampled_from(divisors))
    block_size = data.draw(st.sampled_from((1, 16, 32)))
    starts = DecoderLayers(shape.layers).group_starts(group_layers)
    cliff = data.draw(st.sampled_from((*starts, shape.layers)))
    blocks = ideal.kv_blocks(work, cliff, starts, block_size)
    block_bytes = block_size * group_layers * shape.token_bytes
    needed = ideal.kv_bytes(shape, work, cliff)
    assert needed <= sum(blocks) * block_bytes < needed + len(starts) * block_bytes


@given(shapes(), works(), st.data())
def test_decode_reads_grow_with_the_cliff_and_the_batch(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    cliff, batch = data.draw(cliffs(shape)), data.draw(st.integers(1, 64))
    ratio = ideal.decode_ratio(shape, work, cliff, batch)
    assert ratio >= 1
    assert ideal.decode_ratio(shape, work, cliff, batch + 1) >= ratio - 1e-12
    assert ideal.decode_ratio(shape, work, shape.layers, batch) == 1


@given(shapes(), works(), st.data())
def test_a_decode_step_reads_the_weights_once_and_every_request(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    cliff, batch = data.draw(cliffs(shape)), data.draw(st.integers(1, 64))
    each = ideal.decode_step_bytes(shape, work, cliff, batch + 1)
    each -= ideal.decode_step_bytes(shape, work, cliff, batch)
    whole = ideal.decode_step_bytes(shape, work, cliff, batch)
    parameters = shape.layers * shape.layer_parameters + shape.head_parameters
    assert whole - batch * each == pytest.approx(parameters * shape.value_bytes)
    # A request's mean context lies between its prompt and its end.
    low = ideal.stored_tokens(shape, work, cliff, work.prompt_tokens)
    high = ideal.stored_tokens(shape, work, cliff, work.prompt_tokens + work.output_tokens)
    assert low * shape.token_bytes * 0.999 <= each <= high * shape.token_bytes * 1.001


@given(shapes(), works(), st.data())
def test_decode_flops_add_up_step_by_step(
    shape: ModelShape, work: Workload, data: st.DataObject
) -> None:
    cliff = data.draw(cliffs(shape))
    whole = ideal.decode_flops(shape, work, cliff)
    shorter = ideal.decode_flops(
        shape, replace(work, output_tokens=max(1, work.output_tokens - 1)), cliff
    )
    if work.output_tokens == 1:
        assert whole.total == 0
        return
    read = 0
    for layer in range(shape.layers):
        dropped = work.image_tokens if layer >= cliff else 0
        read += work.prompt_tokens + work.output_tokens - 1 - dropped
    assert whole.attention - shorter.attention == 4 * shape.heads * shape.head_dim * read


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
        elif last or (chosen is not None and after_layer(RANKS[chosen])):
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


@given(st.floats(0.1, 1e4), st.floats(0, 1), st.floats(1, 50), st.floats(1, 50))
def test_amdahl(total: float, part: float, ratio: float, other: float) -> None:
    prefill = total * part
    decode = (total - prefill) / 2
    assume(prefill + decode <= total)
    got = ideal.end_to_end_ratio(total, ((prefill, ratio), (decode, other)))
    assert 1 - 1e-9 <= got <= max(ratio, other) * (1 + 1e-9)
    left = total - prefill - decode + prefill / ratio + decode / other
    assert math.isclose(total / got, left, rel_tol=1e-9)


def test_bad_numbers_are_refused() -> None:
    shape = ModelShape(4, 8, 2, 2, 4, 8, 8)
    with pytest.raises(ValueError, match="cliff=5"):
        ideal.layer_rows(shape, Workload(1, 1, 1), 5)
    with pytest.raises(ValueError, match="in all"):
        ideal.end_to_end_ratio(1.0, ((0.8, 3.0), (0.3, 2.0)))


def test_parameters_are_llavas() -> None:
    """The count of transformers' own modules, without norms and embeddings."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=96, intermediate_size=40, num_attention_heads=6, num_key_value_heads=2
    )
    counted = sum(
        p.numel() for n, p in LlamaDecoderLayer(config, 0).named_parameters() if "norm" not in n
    )
    assert ModelShape(1, 96, 6, 2, 16, 40, 10).layer_parameters == counted
