"""Start-up as on a CUDA device: which graphs and which pieces, and what of vLLM's defaults there is refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import __version__ as version
from vllm import envs
from vllm.config.compilation import CompilationMode, CUDAGraphMode

from tests.engine.configs import config_of
from tests.engine.tiny_llava import Shape, build
from vllm_flow.engine import refusals
from vllm_flow.engine.support import check_supported
from vllm_flow.engine.worker.passes.pieces import compiles_in_pieces

NGRAM = SimpleNamespace(method="ngram", enable_adaptive_verification=False)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Shape(layers=6), tmp_path_factory.mktemp("models"))


@pytest.fixture
def cuda_config(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As vLLM finishes it on a CUDA device without a flag; the CPU platform has other defaults."""
    config = config_of(model_dir, {})
    compilation = config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.splitting_ops = None
    compilation.set_splitting_ops_for_v1(all2all_backend="naive")
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", True)
    return config


@pytest.mark.parametrize(
    ("graphs", "v2", "message"),
    [
        ("FULL", True, "full CUDA graphs of steps with prompt tokens, .*FULL_AND_PIECEWISE"),
        ("PIECEWISE", True, None),
        ("PIECEWISE", False, None),
        ("FULL_AND_PIECEWISE", True, None),
        ("FULL_AND_PIECEWISE", False, "with Model Runner V1: leave VLLM_USE_V2.*PIECEWISE"),
        ("FULL_DECODE_ONLY", False, "with Model Runner V1: leave VLLM_USE_V2"),
        ("FULL_DECODE_ONLY", True, None),
    ],
)
def test_which_graphs_are_refused(
    cuda_config: Any, monkeypatch: pytest.MonkeyPatch, graphs: str, v2: bool, message: str | None
) -> None:
    cuda_config.compilation_config.cudagraph_mode = CUDAGraphMode[graphs]
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", v2)
    if message is None:
        check_supported(cuda_config, version)
    else:
        with pytest.raises(ValueError, match=message):
            check_supported(cuda_config, version)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_inductor_graph_partition": True}, "leave out use_inductor_graph_partition"),
        ({"splitting_ops": []}, "leave out splitting_ops and fuse_attn_quant"),
    ],
)
def test_how_compiled_code_may_not_be_cut(
    cuda_config: Any, options: dict[str, Any], message: str
) -> None:
    check_supported(cuda_config, version)
    for name, value in options.items():
        setattr(cuda_config.compilation_config, name, value)
    with pytest.raises(ValueError, match=message):
        check_supported(cuda_config, version)


def test_breakable_graphs_are_refused(cuda_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # An engine of another test may have had vLLM remember its environment.
    monkeypatch.setitem(vars(envs), "VLLM_USE_BREAKABLE_CUDAGRAPH", True)
    with pytest.raises(ValueError, match="set VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        check_supported(cuda_config, version)
    cuda_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    check_supported(cuda_config, version)


def test_a_front_end_that_reads_no_policies_is_refused(
    cuda_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_supported(cuda_config, version)
    monkeypatch.setitem(vars(envs), "VLLM_USE_RUST_FRONTEND", True)
    with pytest.raises(ValueError, match="in Rust, .* unset VLLM_USE_RUST_FRONTEND"):
        check_supported(cuda_config, version)


@pytest.mark.parametrize(
    ("part", "changes", "remedy"),
    [
        ("parallel_config", {"all2all_backend": "deepep_low_latency"}, "leave out all2all_backend"),
        (
            "parallel_config",
            {"tensor_parallel_size": 2, "enable_expert_parallel": True},
            "tensor_parallel_size=1, or leave out enable_expert_parallel",
        ),
        ("lora_config", object(), "LoRA beside data parallelism .* set data_parallel_size=1"),
        ("speculative_config", NGRAM, "decoding beside data parallelism .* leave out spec"),
    ],
    ids=["kernels", "spread rows", "adapters", "drafts"],
)
def test_what_engines_that_share_experts_cannot_have(
    cuda_config: Any, monkeypatch: pytest.MonkeyPatch, part: str, changes: Any, remedy: str
) -> None:
    parallel = cuda_config.parallel_config
    parallel.data_parallel_size = 2
    monkeypatch.setattr(type(cuda_config.model_config), "is_moe", True)
    check_supported(cuda_config, version)
    if isinstance(changes, dict):
        vars(parallel).update(changes)
    else:
        monkeypatch.setitem(vars(cuda_config), part, changes)
    refused = [sentence for sentence, applies in refusals.REFUSALS if applies(cuda_config)]
    assert len(refused) == 1 and re.search(remedy, refused[0])
    with pytest.raises(ValueError, match=remedy):
        check_supported(cuda_config, version)
    parallel.data_parallel_size = 1
    assert not any(applies(cuda_config) for _, applies in refusals.REFUSALS)


def test_rows_leave_in_pieces_but_where_other_workers_wait(
    cuda_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a piece without rows; then the layers run eagerly. A stage of a pipeline has pieces of its own."""
    parallel = cuda_config.parallel_config
    assert compiles_in_pieces(cuda_config)
    parallel.pipeline_parallel_size = 2
    assert compiles_in_pieces(cuda_config)
    parallel.pipeline_parallel_size, parallel.data_parallel_size = 1, 2
    assert compiles_in_pieces(cuda_config)
    monkeypatch.setattr(type(cuda_config.model_config), "is_moe", True)
    assert not compiles_in_pieces(cuda_config)
    parallel.data_parallel_size = 1
    assert compiles_in_pieces(cuda_config)


def test_engines_do_not_come_and_go(cuda_config: Any) -> None:
    cuda_config.parallel_config.enable_elastic_ep = True
    with pytest.raises(ValueError, match="leave out enable_elastic_ep"):
        check_supported(cuda_config, version)


def test_routed_experts_are_not_returned(cuda_config: Any) -> None:
    cuda_config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(ValueError, match="leave out enable_return_routed_experts"):
        check_supported(cuda_config, version)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"method": "medusa"}, "by 'medusa', .* set the method of speculative_config to one of"),
        ({"enable_adaptive_verification": True}, "leave enable_adaptive_verification out"),
    ],
)
def test_drafts_under_both_model_runners(
    cuda_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    v2: bool,
    changed: dict[str, Any],
    message: str | None,
) -> None:
    """Under V2 as vLLM starts by itself, with full graphs of decode steps."""
    if not v2:
        cuda_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", v2)
    own = {"method": "ngram", "enable_adaptive_verification": False} | changed
    cuda_config.speculative_config = SimpleNamespace(**own)
    if message is None:
        check_supported(cuda_config, version)
        return
    with pytest.raises(ValueError, match=message):
        check_supported(cuda_config, version)
