"""Pipeline parallelism: two workers with half of the layers each, whose storage groups have a share of both halves."""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from vllm import RequestOutput, envs
from vllm.config import ModelConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.engine.core import get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.engine import test_lora, v2_cpu
from tests.engine.cases import LONG, Ask, mixed, one_image
from tests.engine.compiling import allow_compiling, count, counted
from tests.engine.configs import config_of
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import (
    BLOCK_SIZE,
    STOCK,
    Engine,
    assert_exact,
    assert_same,
    tokens_of,
)
from tests.engine.options import ADAPTERS
from tests.engine.piecewise import compile_in_pieces
from tests.engine.policy_cases import behind_mixed
from tests.engine.tiny_llava import Shape, build
from tests.engine.two_workers import a_core_each, cores_of, stages_of
from tests.longer import long_under_v2
from vllm_flow.engine import engine_facts, groups, pipeline, states
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.families import Decoder
from vllm_flow.engine.report import REPORT_KEY
from vllm_flow.engine.settings import FlowSettings

TWO: dict[str, Any] = dict(pipeline_parallel_size=2, distributed_executor_backend="mp")
CHUNKED: dict[str, Any] = dict(
    max_num_batched_tokens=192, max_num_seqs=8, enable_prefix_caching=True
)
IN_STAGES = (
    *("1:50% uniform, 4:20% uniform", "2:40% random, 5:0", "3:50% uniform", "0:30% random, 3:0"),
    *("2:60% uniform, 3:30% uniform", "4:30% uniform"),
)
"""Tokens that are kept on both sides of the border between three layers and three, and right at it."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Shape(layers=6), tmp_path_factory.mktemp("models"))


def cache_configs(config: Any, specs: list[dict[str, Any]], memory: int) -> list[Any]:
    """What vLLM makes of the workers' layers, each with so many bytes for keys."""
    given: list[Any] = [config, specs, [memory] * len(specs)]
    if "global_kv_cache_groups" in inspect.signature(get_kv_cache_configs).parameters:
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")  # from 0.33 on
        every = {name: spec for of_worker in specs for name, spec in of_worker.items()}
        given.append(planning.get_kv_cache_groups(config, every))
    return get_kv_cache_configs(*given)


@pytest.mark.parametrize(
    ("partition", "group_layers", "own"),
    [
        (None, 2, [[[0], [1], [2]], [[3], [4], [5]]]),
        ("2,4", 3, [[[0], [1]], [[2, 3], [4, 5]]]),
        # A stage's last group may lack a layer.
        ("1,5", 6, [[[0]], [[1, 2, 3, 4, 5]]]),
        ("2,4", None, [[[0], [1]], [[2, 3], [4, 5]]]),
    ],
)
def test_vllm_gives_each_worker_a_share_of_every_group(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    partition: str | None,
    group_layers: int | None,
    own: list[list[list[int]]],
) -> None:
    if partition is not None:
        stages_of(monkeypatch, partition)
    options = {} if group_layers is None else {"group_layers": group_layers}
    config = config_of(model_dir, options, **TWO)
    config.cache_config.kv_cache_layout = "LBHNC"  # an engine asks its workers' backends
    settings = FlowSettings.of(config)
    assert settings is not None
    one = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    names = [[f"layers.{n}.attn" for part in parts for n in part] for parts in own]
    specs = [groups.group_specs(dict.fromkeys(of_worker, one), settings) for of_worker in names]
    pages = 6000
    found = cache_configs(config, specs, pages * one.page_size_bytes)
    for of_worker, parts in zip(found, own, strict=True):
        assert [group.layer_names for group in of_worker.kv_cache_groups] == [
            [f"layers.{n}.attn" for n in part] for part in parts
        ]
        starts = [group.kv_cache_spec.first_layer for group in of_worker.kv_cache_groups]
        assert starts == list(settings.group_starts)
    # As many blocks as the worker with most layers has room for: stock vLLM has one group of all its layers.
    layers = max(sum(map(len, parts)) for parts in own)
    assert {of_worker.num_blocks for of_worker in found} == {pages * len(own[0]) // layers}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "beside speculative decoding, .* leave out speculative_config, or set pipeline_parallel_size=1",
        ),
        (
            {"kv_transfer_config": {"kv_role": "kv_both", "kv_connector": "OffloadingConnector"}},
            "beside KV connectors, .* leave out kv_transfer_config",
        ),
        ({"data_parallel_size": 2}, "beside data parallelism, .* set data_parallel_size=1"),
        (
            {"distributed_executor_backend": "external_launcher"},
            "beside torchrun, .* leave out distributed_executor_backend",
        ),
        (
            {"default": {"flow_stages": "2:50% dart"}},
            "default_policy: rank 'dart' looks at hidden states through .*norm, which only the last stage .* rank by "
            "'uniform' or .* or 'feather', or have the server started with pipeline_parallel_size=1",
        ),
        ({"group_layers": 3}, "stages of 3, 3 decoder layers .* use one of 2, 4, 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_was_not_tried_beside_a_pipeline_is_refused(
    model_dir: Path, arguments: dict[str, Any], message: str
) -> None:
    options = {} if "default" not in arguments else {"default_policy": arguments.pop("default")}
    options |= {name: arguments.pop(name) for name in ("group_layers",) if name in arguments}
    with pytest.raises(ValueError, match=message):
        config_of(model_dir, options, **(TWO | arguments))


@pytest.mark.parametrize(
    ("partition", "told"),
    [
        (None, "3 storage groups of 2 layers, some of each pipeline stage (3, 3 layers)."),
        (
            "4,2",
            "2 storage groups of 3 layers, some of each pipeline stage (4, 2 layers).",
        ),
        (
            "3,2,1",
            "1 storage group of 6 layers, some of each pipeline stage (3, 2, 1 layers).",
        ),
    ],
)
def test_start_up_tells_the_groups(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, partition: str | None, told: str
) -> None:
    if partition is not None:
        stages_of(monkeypatch, partition)
    stages = 2 if partition is None else len(partition.split(","))
    config = config_of(model_dir, {}, **TWO | {"pipeline_parallel_size": stages})
    settings = FlowSettings.of(config)
    assert settings is not None and told in settings.summary


def test_start_up_tells_what_blocks_leave_empty() -> None:
    settings = FlowSettings.read({}, EngineFacts(32, pipeline=(11, 11, 10)))
    assert settings.storage == (
        "6 storage groups of 6 layers, some of each pipeline stage (11, 11, 10 layers), whose blocks take 9% more "
        "memory than one group's"
    )


def test_a_worker_with_other_layers_than_its_stages_is_refused() -> None:
    stage = SimpleNamespace(rank_in_group=1)
    with mock.patch("vllm.distributed.parallel_state.get_pp_group", lambda: stage):
        deep = Decoder(nn.Identity(), [nn.Identity()] * 4, None, first_layer=2)
        pipeline.check_stage(deep, (2, 4))
        pipeline.check_stage(deep, ())
        with pytest.raises(
            ValueError, match="layers 3 to 5 for those of pipeline stage 1, .* layers 2 to 5: serve"
        ):
            pipeline.check_stage(deep, (3, 3))
        plain = replace(deep, call="plain")
        with pytest.raises(
            ValueError, match=r"pipeline parallelism of Identity, .*\['untested_models'\] to true"
        ):
            pipeline.check_stage(plain, (2, 4))
        pipeline.check_stage(plain, (2, 4), untested=True)
        pipeline.check_stage(plain, ())


@pytest.mark.parametrize(
    ("owner", "name", "value", "sentence"),
    [
        (
            "model_config",
            "is_mm_prefix_lm",
            True,
            "pipeline parallelism beside pictures whose tokens see one another, which nobody has tried: set "
            "pipeline_parallel_size=1.",
        ),
        (ModelConfig, "use_mla", True, "beside latent attention, "),
        (engine_facts, "keys_differ", lambda *_: True, "beside layers whose keys differ in size, "),
        (states, "attending", lambda _: (1, 3), "beside layers without keys of their own, "),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_no_option_asks_for_is_refused_beside_a_pipeline(
    model_dir: Path, owner: Any, name: str, value: Any, sentence: str
) -> None:
    config = config_of(model_dir, **TWO)
    assert pipeline.reason_against(config) is None
    if owner == "model_config":
        owner = config.model_config
    with mock.patch.object(owner or type(config), name, value):
        found = pipeline.reason_against(config)
    assert found is not None and sentence in found
    assert found.endswith("set pipeline_parallel_size=1.")


def asked(layers: int) -> list[Ask]:
    """Every cliff, also right at a border between stages, and what stays on both sides of it."""
    late = v2_cpu.reduced((1, 3, 4), to=(3,))
    in_stages = v2_cpu.reduced(IN_STAGES, to=IN_STAGES[:3])
    return [
        *mixed(layers),
        *(one_image(80 + cliff, cliff) for cliff in range(layers + 1)),
        *(replace(one_image(90 + n), stages=stages) for n, stages in enumerate(in_stages)),
        *(replace(one_image(100 + cliff, cliff), late=True) for cliff in late),
    ]


def assert_pipeline_is_exact(engine: Engine) -> list[RequestOutput]:
    """In chunks that end inside images, and from what the prefix cache has of them."""
    asks = asked(engine.shape.layers)
    outputs = engine.run(asks)
    assert_exact(engine, asks, outputs)
    again = [
        asks[0],
        one_image(81, 1),
        one_image(84, 4),
        replace(one_image(90), stages=IN_STAGES[0]),
    ]
    found = engine.run(again)
    assert_exact(engine, again, found)
    assert all(output.num_cached_tokens for output in found)
    assert_choices_are_exact(engine)
    return outputs


def assert_choices_are_exact(engine: Engine) -> None:
    """What a device chooses on any stage, in batches of several such requests, and where the prefix cache has some."""
    asks = v2_cpu.reduced(behind_mixed(), to=behind_mixed()[1:14:3])
    compared = assert_exact(engine, asks, engine.run(asks), ties=True)
    compared += assert_exact(engine, asks[:3], engine.run(asks[:3]), ties=True)
    assert compared >= 0.8 * len(asks)


@long_under_v2
@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_stages_are_exact(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    a_core_each(monkeypatch)
    engine = open_engine(LONG, 2, **TWO, **CHUNKED)
    outputs = assert_pipeline_is_exact(engine)
    # Three groups of one layer of each stage: those past the cliff on the first stage hold no image.
    for cliff, output in zip(range(LONG.layers + 1), outputs[12:], strict=False):
        stored = len(output.prompt_token_ids or ()) + len(output.outputs[0].token_ids) - 1
        whole = cdiv(stored, BLOCK_SIZE)
        packed = cdiv(stored - LONG.image_tokens, BLOCK_SIZE)
        report = output.kv_transfer_params and output.kv_transfer_params[REPORT_KEY]
        free = max(3 - cliff, 0)
        if report is None:
            assert cliff == LONG.layers
            continue
        assert report["kv_blocks"] == [whole] * (3 - free) + [packed] * free, cliff
        page = BLOCK_SIZE * 2 * LONG.kv_heads * LONG.head_dim * 4
        assert report["kv_bytes_saved"] == free * (whole - packed) * 2 * page


@pytest.mark.parametrize("first", [True, False])
def test_stages_of_a_test_are_no_others(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """Though vLLM keeps what the environment has as the first engine of a process starts, which may be within."""
    if first:
        envs.disable_envs_cache()
    with monkeypatch.context() as during:
        stages_of(during, "2,4")
        envs.enable_envs_cache()
        assert envs.VLLM_PP_LAYER_PARTITION == os.environ["VLLM_PP_LAYER_PARTITION"] == "2,4"
    assert envs.VLLM_PP_LAYER_PARTITION is None
    allow_compiling(monkeypatch, inductor=False)
    assert envs.VLLM_CPU_CI_ENV is True


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
@pytest.mark.parametrize(
    ("partition", "group_layers", "options"),
    [
        ("2,4", 3, TWO),
        ("5,1", 6, TWO),
        (None, 4, TWO),
        (None, 3, TWO | {"pipeline_parallel_size": 3}),
        (None, 2, TWO | {"tensor_parallel_size": 2}),
    ],
)
def test_any_stages_are_exact(
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
    partition: str | None,
    group_layers: int,
    options: dict[str, Any],
) -> None:
    a_core_each(monkeypatch)
    workers = options["pipeline_parallel_size"] * options.get("tensor_parallel_size", 1)
    cores_of(monkeypatch, workers)
    if partition is not None:
        stages_of(monkeypatch, partition)
    assert_pipeline_is_exact(open_engine(LONG, group_layers, **options, **CHUNKED))


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_stages_that_are_compiled_are_exact(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CPU compiles, a stage in one piece: it runs eagerly in steps in which rows leave before its end.

    Each worker measures its memory, both ways to run.
    """
    a_core_each(monkeypatch)
    allow_compiling(monkeypatch, inductor=False)
    measured = dict(
        kv_cache_memory_bytes=None, gpu_memory_utilization=0.15, num_gpu_blocks_override=1536
    )
    engine = open_engine(LONG, 2, enforce_eager=False, **measured, **TWO, **CHUNKED)
    plain = [one_image(30)]  # a prefill and decodes: calls of different size
    assert_exact(engine, plain, engine.run(plain))
    engine.llm.collective_rpc(count)
    assert_pipeline_is_exact(engine)
    first, last = engine.llm.collective_rpc(counted)
    assert first.model == last.model and 0 < first.eager < last.eager < last.model


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_rows_leave_in_the_pieces_of_any_stage(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves before a stage's first layer leaves in its first piece; no layer runs eagerly."""
    a_core_each(monkeypatch)
    compile_in_pieces(monkeypatch)
    engine = open_engine(LONG, 2, enforce_eager=False, **TWO)
    plain = [one_image(30)]  # a prefill and decodes: calls of different size
    assert_exact(engine, plain, engine.run(plain))
    engine.llm.collective_rpc(count)
    asks = [
        *mixed(LONG.layers),
        *(one_image(80 + cliff, cliff) for cliff in range(LONG.layers + 1)),
        *(replace(one_image(90 + n), stages=stages) for n, stages in enumerate(IN_STAGES)),
    ]
    assert_exact(engine, asks, engine.run(asks))
    for calls in engine.llm.collective_rpc(counted):
        assert calls.model and calls.eager == 0
    # What the first stage has chosen leaves in the pieces of the second.
    engine.llm.collective_rpc(count)
    chosen = [
        replace(one_image(220 + n), stages=stages)
        for n, stages in enumerate(("2:50% last_prompt, 4:0", "3:30% diversity, 5:9 uniform"))
    ]
    assert_exact(engine, chosen, engine.run(chosen))
    first, second = engine.llm.collective_rpc(counted)
    assert first.eager and second.model and second.eager == 0


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_rows_of_several_adapters_leave_on_any_stage(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_core_each(monkeypatch)
    adapters = dict(enable_lora=True, max_loras=len(ADAPTERS) + 1, max_lora_rank=8)
    engine = open_engine(LONG, 2, **TWO, **CHUNKED, **adapters)
    behind = [replace(one_image(807), stages=IN_STAGES[2]), one_image(808, 4), one_image(809, 5)]
    pairs = [
        *test_lora.mixed(),
        *((ask, adapter) for ask in behind for adapter in (0, *ADAPTERS)),
    ]
    outputs = test_lora.run(engine, pairs)
    test_lora.assert_merged(engine, pairs, outputs)
    assert len({tokens_of(output) for output in outputs[-3:]}) == 3


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_without_a_policy_stages_are_stock_vllms(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too few blocks for all of them: some are preempted, then and with policies."""
    a_core_each(monkeypatch)
    few = TWO | {"kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 8}
    stock = open_engine(
        LONG, STOCK, worker_cls="tests.engine.receiving_worker.ReceivingWorker", **few
    )
    engine = open_engine(LONG, 2, **few)
    asks = asked(LONG.layers)
    plain = [ask.without_policy() for ask in asks]
    assert_same(engine.run(plain), stock.run(plain))
    with engine.count_preemptions() as preempted:
        outputs = engine.run(asks)
    assert preempted
    assert_exact(engine, asks, outputs)
