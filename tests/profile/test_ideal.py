"""The ideals: counted another way, and what must hold for any shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.profile.shapes import cliffs, shapes, works
from vllm_flow.grouping import DecoderLayers
from vllm_flow.profile import ideal
from vllm_flow.profile.dimensions import ModelShape, Workload
from vllm_flow.profile.ideal import row_count_ideal


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
