"""Captured decode steps: what the layers see of each request, and tokens equal to the oracle's."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport

from tests.engine.cases import GQA, LONG, every_cliff, mixed, one_image, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import assert_exact
from tests.engine.policy_cases import DEVICE, PLACE
from tests.engine_v2.recorded_graphs import recorded_graphs
from vllm_flow.decode_plan import decode_facts
from vllm_flow.engine.worker import decode_graphs
from vllm_flow.engine.worker.decode_graphs import DecodeBuffers, unreplayable
from vllm_flow.engine.worker.runner_v2 import FlowRunnerV2
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.spans import ImageSpans
from vllm_flow.step import ScheduledRequest

LAYERS, BLOCK, BLOCKS = 6, 4, 8
ROWS = 3
"""Most rows of a request in these steps: its token and two drafts."""


@st.composite
def decode_steps(draw: st.DrawFn, rows: int) -> list[ScheduledRequest]:
    """Requests with as many tokens each: one at any place of its prompt or answer, several behind its images."""
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        computed = draw(st.integers(0, BLOCK * BLOCKS - rows))
        image = draw(st.frozensets(st.integers(0, BLOCK * BLOCKS - ROWS - 1), max_size=12))
        layers = sorted(draw(st.sets(st.integers(0, LAYERS - 1), max_size=3)))
        keeps = sorted(draw(st.lists(st.integers(0, 8), min_size=3, max_size=3)), reverse=True)
        stages = [
            Stage(a, k, "uniform" if k else None) for a, k in zip(layers, keeps, strict=False)
        ]
        policy = FlowPolicy((tuple(stages),)) if stages else None
        layout = TokenLayout.of(policy, ImageSpans.from_ranges((p, p + 1) for p in image))
        if rows > 1 and layout is not None:
            computed = max(computed, layout.spans.end)
        requests.append(ScheduledRequest(computed, rows, layout))
    return requests


def buffers_of(num_groups: int) -> tuple[DecodeBuffers, list[torch.Tensor]]:
    """Buffers over block tables in which every entry is another block."""
    size = LAYERS // num_groups
    groups = [
        SimpleNamespace(
            layer_names=[
                f"model.layers.{i}.self_attn.attn" for i in range(g * size, (g + 1) * size)
            ],
            kv_cache_spec=SimpleNamespace(block_size=BLOCK),
        )
        for g in range(num_groups)
    ]
    tables = [(torch.randperm(8 * BLOCKS, dtype=torch.int32) + 1).view(8, BLOCKS) for _ in groups]
    return DecodeBuffers(tables, SimpleNamespace(kv_cache_groups=groups), LAYERS, 8, ROWS), tables


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3]), st.integers(0, 3), st.sampled_from([2, 128]))
def test_every_layer_reads_and_writes_what_the_plan_says(
    data: st.DataObject, num_groups: int, padding: int, of_a_program: int
) -> None:
    """Several steps over the same buffers: nothing of an earlier one may stay. Of requests whose images are behind
    them the host believes that they are longer, as if no draft had been refused."""
    buffers, tables = buffers_of(num_groups)
    for _ in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.integers(1, ROWS))
        requests = data.draw(decode_steps(rows))
        count = len(requests)
        seq_lens = torch.tensor(
            [r.num_computed + rows for r in requests] + [99] * padding, dtype=torch.int32
        )
        plan = plan_step(requests)
        behind = [
            data.draw(st.integers(0, rows - 1))
            if r.layout is None or r.num_computed >= r.layout.spans.end
            else 0
            for r in requests
        ]
        told = [
            replace(r, num_computed=r.num_computed + more)
            for r, more in zip(requests, behind, strict=True)
        ]
        facts = decode_facts(told, LAYERS) if plan is not None else None
        with mock.patch.object(decode_graphs, "REQUESTS", of_a_program):
            buffers.refresh(seq_lens, facts, count, rows)
        for layer in range(LAYERS):
            table = tables[layer // (LAYERS // num_groups)]
            expected = [r.num_computed + rows for r in requests]
            variant = None if plan is None else plan.variant_at(layer)
            if variant is not None:
                expected = [0] * count
                for request, length in zip(variant.requests, variant.seq_lens, strict=True):
                    expected[request] = int(length)
                written = zip(variant.row_requests, variant.positions, strict=True)
            else:
                written = (
                    (index, place)
                    for index, length in enumerate(expected)
                    for place in range(length - rows, length)
                )
            slots = [
                int(table[r, place // BLOCK]) * BLOCK + int(place) % BLOCK for r, place in written
            ]
            found = buffers.slots_LN[layer, : (count + padding) * rows].tolist()
            assert (
                buffers.seq_lens_LR[layer, : count + padding].tolist() == expected + [0] * padding
            )
            assert [slot for slot in found if slot != -1] == slots
            assert [slot != -1 for slot in found] == [
                length > 0 for length in expected + [0] * padding for _ in range(rows)
            ]


def test_a_step_of_nobody_writes_nowhere() -> None:
    buffers, _ = buffers_of(2)
    buffers.refresh(torch.tensor([5, 6], dtype=torch.int32), None, 2)
    assert (buffers.slots_LN[:, :2] >= 0).all()
    assert (buffers.slots_LN[:, 2:] == -1).all()
    buffers.blank(torch.ones(2, dtype=torch.int32))
    assert (buffers.slots_LN == -1).all()
    assert (buffers.seq_lens_LR[:, :2] == 1).all()


def test_what_a_drafter_captures_is_no_call_of_the_model() -> None:
    """Its first step is captured with metadata of a step of the model, which is not called then."""
    armed: list[Any] = []

    class Runner:
        flow_state = SimpleNamespace(hook=SimpleNamespace(arm=armed.append))

        def capture_model(self, *, profile_only: bool = False) -> int:
            self.flow_state.hook.arm("a drafter's")
            return 7

    both = type("Both", (FlowRunnerV2, Runner), {})
    assert both().capture_model(profile_only=True) == 7
    assert armed == ["a drafter's", None]


def test_captured_decode_steps_are_exact(open_engine: OpenEngine) -> None:
    """All cliffs, one image and two, in one batch."""
    engine = open_engine(GQA, 2)
    asks = every_cliff(GQA.layers)
    with recorded_graphs(engine, [1, 4, 16]) as graphs:
        outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    assert len(graphs.replayed) == asks[0].max_tokens - 1


def test_graphs_and_eager_steps_take_turns(open_engine: OpenEngine) -> None:
    """Requests join a running batch: prefills run as they do without graphs, what follows is replayed."""
    engine = open_engine(LONG, 2)
    asks = mixed(LONG.layers)
    with recorded_graphs(engine, [1, 2, 4, 8, 16]) as graphs:
        outputs = engine.run_joining(asks)
    assert_exact(engine, asks, outputs)
    assert len(set(graphs.replayed)) > 2


def test_captured_steps_of_policies_that_keep_tokens_are_exact(open_engine: OpenEngine) -> None:
    """Several stages per request, by place and by the device, beside cliffs and the baseline."""
    engine = open_engine(LONG, 2)
    asks = [replace(one_image(70 + n), stages=stages) for n, stages in enumerate(DEVICE[1:6:2])]
    asks += [replace(two_images(50), stages=PLACE[3]), one_image(41, 3), one_image(42)]
    asks = [replace(ask, max_tokens=8) for ask in asks]
    with recorded_graphs(engine, [1, 4, 16]) as graphs:
        outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    assert len(graphs.replayed) == asks[0].max_tokens - 1


def test_prompts_token_by_token(open_engine: OpenEngine) -> None:
    """A chunk of one token runs as a decode step; an image token among them has no row past the cliff."""
    engine = open_engine(GQA, 2, long_prefill_token_threshold=1)
    asks = [one_image(41, 1), one_image(42, 3), one_image(43, 0, before=0)]
    with recorded_graphs(engine, [1, 4]) as graphs:
        outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    longest = max(len(output.prompt_token_ids or ()) for output in outputs)
    # All but the first token of a prompt, and all but the last of an answer.
    assert len(graphs.replayed) == longest - 1 + asks[0].max_tokens - 1


def test_stock_tokens_without_policy(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 2)
    asks = [one_image(50 + i) for i in range(3)]
    with recorded_graphs(engine, [4]) as graphs:
        outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    assert graphs.replayed == [4] * (asks[0].max_tokens - 1)


def test_steps_padded_for_graphs_of_pieces(open_engine: OpenEngine) -> None:
    """vLLM pads a step before it is known whether rows leave in it; chunks, and requests that join."""
    engine = open_engine(GQA, 2, max_num_batched_tokens=40, max_num_seqs=8)
    asks = [one_image(44, 2), one_image(45, None, before=33), two_images(14, 1)]
    with recorded_graphs(engine, [1, 4, 24, 48], CUDAGraphMode.FULL_AND_PIECEWISE) as graphs:
        outputs = engine.run_joining(asks)
    assert_exact(engine, asks, outputs)
    assert len(set(graphs.padded)) > 2 and graphs.replayed


def test_a_backend_that_plans_on_the_host_is_captured_in_pieces(open_engine: OpenEngine) -> None:
    """What vLLM makes of its default where a model cannot have full graphs."""
    runner = open_engine(GQA, 2).llm.llm_engine.model_executor.driver_worker.worker.model_runner
    support, reason = runner.model_state.get_additional_cg_support()
    assert support == AttentionCGSupport.NEVER and reason is not None
    assert reason.startswith("CPU_ATTN (with vLLM-Flow, FLASH_ATTN and TRITON_ATTN")
    config = CompilationConfig(mode=3, cudagraph_mode="FULL_AND_PIECEWISE")
    config.set_splitting_ops_for_v1(all2all_backend="naive")
    with mock.patch.object(
        CompilationConfig, "adjust_cudagraph_sizes_for_mamba_cache", create=True
    ):
        resolved = config.resolve_cudagraph_mode_and_sizes(
            support, reason, use_v2_model_runner=True
        )
    assert resolved == CUDAGraphMode.PIECEWISE


@pytest.mark.parametrize(
    ("backend", "divided", "reason"),
    [
        ("FLASH_ATTN", None, None),
        ("FLEX_ATTENTION", None, "FLEX_ATTENTION"),
        ("TRITON_ATTN", 16, "TRITON_ATTN dividing KV blocks of 32 .* --block-size 16"),
    ],
)
def test_which_backends_have_full_graphs(
    backend: str, divided: int | None, reason: str | None
) -> None:
    group = SimpleNamespace(
        backend=SimpleNamespace(get_name=lambda: backend),
        kernel_block_size=divided,
        kv_cache_spec=SimpleNamespace(block_size=32),
    )
    found = unreplayable([[group]])
    assert found is None if reason is None else re.match(reason, found or "")


def test_names_of_layers_are_taken_apart_once() -> None:
    """And not for every layer in every captured step."""
    target = [f"once.layers.{layer}.attn" for layer in range(4)]
    first = SimpleNamespace(first_layer=-1, last_layer=1)
    second = SimpleNamespace(first_layer=2, last_layer=3)
    groups = [
        [SimpleNamespace(layer_names=["once.layers.4.attn", *target[:2]], kv_cache_spec=first)],
        [SimpleNamespace(layer_names=target[2:], kv_cache_spec=second)],
    ]
    own = [[SimpleNamespace(layer_names=["once.layers.4.attn"], kv_cache_spec=first)]]
    with mock.patch.object(
        decode_graphs, "extract_layer_index", wraps=decode_graphs.extract_layer_index
    ) as taken:
        for _ in range(3):
            assert decode_graphs.of_drafters(groups) == [groups[0], []]
            assert not decode_graphs.are_drafters(groups) and decode_graphs.are_drafters(own)
    assert taken.call_count == 5
