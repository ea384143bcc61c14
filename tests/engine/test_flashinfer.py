"""On vLLM's own FlashInfer backend, over a stand-in of its kernels, answers are the oracle's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.engine import v2_cpu
from tests.engine.cases import GQA, LONG, MISTRAL, mixed, one_image, text_around, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.flashinfer_cases import DEVICES, on, one_builder, runner_of
from tests.engine.harness import STOCK, assert_exact
from tests.engine.options import DRAFTS
from tests.engine.policy_cases import device_mixed, late_mixed, place_mixed
from tests.engine.test_speculative import ASKS, counted
from tests.longer import long_under_v2, some
from vllm_flow.engine.worker import variant_builders


def on_some(*kept: str) -> pytest.MarkDecorator:
    """On every kind of device, of which ``make test`` asks these; Model Runner V2, whose kernels go through an
    interpreter, the last one."""
    return pytest.mark.parametrize("device", some(DEVICES, kept[-1:] if v2_cpu.wanted() else kept))


@on_some("blackwell")
def test_stock_vllm_is_the_oracle(open_engine: OpenEngine, device: str) -> None:
    """What the stand-in is good for: vLLM's classes compute over it what Hugging Face does."""
    asks = [ask.without_policy() for ask in mixed(GQA.layers)]
    with on(device, open_engine, GQA, STOCK) as engine:
        assert_exact(engine, asks, engine.run(asks))
        (backend,) = {g.backend for of_group in runner_of(engine).attn_groups for g in of_group}
    assert backend.get_name() == "FLASHINFER"


@on_some(*DEVICES)
def test_cliffs_in_one_batch_are_exact(open_engine: OpenEngine, device: str) -> None:
    """Two layers in a group, which cliffs 1 and 3 divide; requests join while others decode."""
    asks = mixed(GQA.layers)
    with on(device, open_engine, GQA, 2) as engine:
        for run in (engine.run, engine.run_joining):
            assert_exact(engine, asks, run(asks))
        # The last layer that sees an image has its keys and values alone computed, as elsewhere.
        assert runner_of(engine).flow_state.planner.spares_last_layers


@on_some("blackwell", "native")
def test_with_one_builder_they_are_not(open_engine: OpenEngine, device: str) -> None:
    """What the layers past a cliff plan is what those before it would run by."""
    asks = [two_images(4, 1), one_image(2, 3), one_image(3, before=33)]
    with on(device, open_engine, GQA, 2) as engine:
        with one_builder(engine):
            outputs = engine.run(asks)
        with pytest.raises(AssertionError):
            assert_exact(engine, asks, outputs)
        assert_exact(engine, asks, engine.run(asks))


@long_under_v2
@on_some("xqa")
def test_chunks_and_cached_prefixes_are_exact(open_engine: OpenEngine, device: str) -> None:
    """Six layers in one group, chunks that end inside an image; then the same again, found."""
    asks = mixed(LONG.layers)
    options = {"max_num_batched_tokens": 97, "max_num_seqs": 12, "enable_prefix_caching": True}
    with on(device, open_engine, LONG, 6, **options) as engine:
        assert_exact(engine, asks, engine.run(asks))
        again = engine.run(asks)
        assert_exact(engine, asks, again)
        assert sum(output.num_cached_tokens or 0 for output in again) > 0


@on_some("blackwell")
@pytest.mark.parametrize(
    "asks",
    [
        pytest.param(place_mixed(LONG.layers), id="by place"),
        pytest.param(device_mixed(LONG.layers)[::3], id="by the device"),
        # Of several samples Triton's interpreter cannot choose.
        pytest.param(
            tuple(ask for ask in late_mixed(LONG.layers)[::2] if ask.samples == 1),
            id="after the prefill",
        ),
    ],
)
def test_tokens_that_stay_are_exact(
    open_engine: OpenEngine, device: str, asks: tuple[Any, ...]
) -> None:
    with on(device, open_engine, LONG, 3) as engine:
        assert_exact(engine, asks, engine.run(asks), ties=True)


@on_some("xqa")
def test_drafts_are_exact(open_engine: OpenEngine, device: str) -> None:
    """Several tokens of a request in a decode: as a decode where the kernels take that, else as a prompt's."""
    options = {"speculative_config": DRAFTS, "max_num_seqs": 16}
    with on(device, open_engine, LONG, 3, **options) as engine, counted(engine) as drafted:
        assert_exact(engine, ASKS, engine.run(ASKS), ties=True)
    assert 0 < drafted.accepted < drafted.tokens


@on_some("native")
def test_more_runs_than_requests(open_engine: OpenEngine, device: str) -> None:
    """Two requests in a step at most, and text in three runs each: the layer is computed whole."""
    asks = [text_around(5, 2), text_around(6, 3)]
    with on(device, open_engine, GQA, 2, max_num_seqs=2) as engine:
        assert_exact(engine, asks, engine.run(asks))


@on_some("blackwell")
def test_one_key_head_and_groups_of_uneven_size(open_engine: OpenEngine, device: str) -> None:
    asks = [one_image(seed, cliff) for seed, cliff in enumerate((0, 1, 3, 5, 6, None))]
    with on(device, open_engine, MISTRAL, 4) as engine:
        assert_exact(engine, asks, engine.run(asks))


def common(length: int, table: torch.Tensor) -> CommonAttentionMetadata:
    """One request with all its tokens in the step."""
    starts = torch.tensor([0, length], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([length], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([length], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=length,
        max_query_len=length,
        max_seq_len=length,
        block_table_tensor=table,
        slot_mapping=torch.arange(length),
    )


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_variants_builder_overwrites_nothing(open_engine: OpenEngine, device: str) -> None:
    """Of what vLLM's own handed out; and it takes no scratch of its own."""
    with on(device, open_engine, GQA, 2) as engine:
        group = runner_of(engine).attn_groups[0][0]
        own = variant_builders.another(group)
        tables = [torch.tensor([[1, 2, 3]], dtype=torch.int32) + 4 * n for n in range(2)]
        first = group.build_metadata(common(70, tables[0]))
        before = read(first)
        own.build_metadata(common(40, tables[1]))
        assert read(first) == before
        group.build_metadata(common(40, tables[1]))
        assert read(first) != before, "as with one builder, or the test shows nothing"
        stock, beside = group.get_metadata_builder(0), own.get_metadata_builder(0)
        assert type(beside) is type(stock) and beside is not stock
        assert beside._get_workspace_buffer() is stock._get_workspace_buffer()
        assert beside.kv_cache_spec == stock.kv_cache_spec
        assert beside.reorder_batch_threshold == stock.reorder_batch_threshold
        assert variant_builders.plans_prompts(group) == (device != "blackwell")
        assert variant_builders.decodes_without_plan(group) == (device != "native")


def read(metadata: Any) -> list[Any]:
    """What a prefill's kernel would see."""
    prefill = metadata.prefill
    if hasattr(prefill, "wrapper"):
        wrapper = prefill.wrapper
        return [wrapper._int_workspace_buffer.tolist(), wrapper._indices.tolist()]
    return [prefill.cum_seq_lens_kv.tolist(), prefill.seq_lens.tolist()]


def test_a_step_has_a_builder_per_variant_and_keeps_them(open_engine: OpenEngine) -> None:
    """One cliff in a group of six layers: what is past it, and the last layer before it; later steps make no more."""
    with on("native", open_engine, LONG, 6) as engine:
        pool = runner_of(engine).flow_state.builder._builders._own
        ask = replace(one_image(41, 3), max_tokens=4)
        engine.run([ask])
        known = dict(pool)
        engine.run([ask, replace(ask, cliff=None)])
        assert pool == known and len(known) == 2
