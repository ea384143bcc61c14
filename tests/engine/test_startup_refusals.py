"""Start-up: a sentence for each thing that is not supported, and none for what is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from vllm.config.compilation import CompilationMode

from tests.engine.configs import config_of
from tests.engine.settings_with import settings_with
from tests.engine.tiny_llava import Shape, build
from vllm_flow.engine import families, plugin
from vllm_flow.engine.core.attention.writer import check_log
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.support import FP8, check_version

BOTH = {"kv_role": "kv_both"}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Shape(layers=6), tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"enforce_eager": False, "compilation_config": {"mode": 1}},
            "torch.compile of the whole model, .* leave out the mode",
        ),
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
            "decode context parallelism",
        ),
        ({"kv_cache_dtype": "int8_per_token_head"}, "='int8_per_token_head', .* set it to 'fp8'"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype='nvfp4'"),
        ({"kv_cache_dtype": "turboquant_4bit_nc"}, "kv_cache_dtype='turboquant_4bit_nc'"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "leave out kv_cache_dtype_skip_layers",
        ),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid KV-cache manager"),
        (
            {"enable_prefix_caching": True, "block_size": 32, "prefix_match_unit": 16},
            "found by whole blocks: leave it out",
        ),
        ({"runner": "pooling"}, "pooling models"),
        (
            {"speculative_config": {**DRAFTS, "method": "ngram_gpu"}},
            "speculative decoding by 'ngram_gpu', .* to one of 'ngram'",
        ),
        (
            {"kv_transfer_config": {**BOTH, "kv_connector": "ExampleHiddenStatesConnector"}},
            "'ExampleHiddenStatesConnector', which stores hidden states",
        ),
        (
            {"kv_transfer_config": {**BOTH, "kv_connector": "LMCacheConnectorV1"}},
            "'LMCacheConnectorV1', which knows one block table per request",
        ),
        (
            {
                "kv_transfer_config": {
                    **BOTH,
                    "kv_connector": "MultiConnector",
                    "kv_connector_extra_config": {
                        "connectors": [{**BOTH, "kv_connector": "SimpleCPUOffloadConnector"}]
                    },
                }
            },
            "'SimpleCPUOffloadConnector', which copies blocks",
        ),
        (
            {
                "ec_transfer_config": {
                    "ec_connector": "ECExampleConnector",
                    "ec_role": "ec_producer",
                }
            },
            "encoder-cache connectors",
        ),
        *(
            (
                {"kv_cache_dtype": stored, "default": {"flow_stages": "2:50% last_image"}},
                "default_policy: rank 'last_image' reads keys",
            )
            for stored in FP8
        ),
        ({"offload_group_size": 2}, "prefetched weights, .* with cpu_offload_gb"),
        (
            {"ec_manager_config": {"encoder_cache_manager_cls": "somebody.Else"}},
            "leave out ec_manager_config",
        ),
        ({"hf_overrides": {"is_encoder_decoder": True}}, "encoder-decoder models"),
        ({"hf_overrides": {"is_mm_prefix_lm": True}}, "in both directions .* on a CPU, where"),
        ({"video_pruning_rate": 0.5}, "video pruning"),
        ({"scheduler_cls": "somebody.Else"}, "cannot be combined with scheduler_cls"),
        ({"worker_cls": "somebody.Else"}, "cannot be combined with worker_cls"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_refused(
    model_dir: Path, arguments: dict[str, Any], message: str
) -> None:
    options = (
        {} if (policy := arguments.pop("default", None)) is None else {"default_policy": policy}
    )
    with pytest.raises(ValueError, match=message):
        config_of(model_dir, options, **arguments)


def test_what_vllm_does_without_a_flag_is_supported(model_dir: Path) -> None:
    config = config_of(model_dir, {}, enforce_eager=False)
    assert config.compilation_config.mode != CompilationMode.NONE


def test_an_attention_log_has_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        model_config=SimpleNamespace(enforce_eager=True),
        speculative_config=object(),
    )
    settings = FlowSettings.read({"attention_log": str(tmp_path)}, EngineFacts(6))
    with pytest.raises(ValueError, match="leave out speculative_config"):
        check_log(config, settings)
    config.speculative_config = None
    with pytest.raises(ValueError, match="leave out kv_cache_dtype"):
        check_log(config, settings_with(settings, quantised_keys=True))
    with pytest.raises(ValueError, match=r"pip install 'vllm-flow\[log\]'"):
        check_log(config, settings)
    config.model_config.enforce_eager = False
    with pytest.raises(ValueError, match="enforce_eager=True"):
        check_log(config, settings)
    config.parallel_config.tensor_parallel_size = 2
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        check_log(config, settings)


def test_a_model_that_nobody_tested_is_refused_unless_allowed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "family_of", lambda architecture: None)
    with pytest.raises(ValueError, match=r"not tested with LlavaFor.*'untested_models'\] to true"):
        config_of(model_dir, {})
    logger = mock.MagicMock()
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    config_of(model_dir, {"untested_models": True})
    text, *arguments = logger.warning_once.call_args.args
    said = text % tuple(arguments)
    assert "was not tested with LlavaForConditionalGeneration" in said


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2},
        {"data_parallel_size": 2},
        {"enable_prefix_caching": True},
        {"enable_chunked_prefill": False},
        {"enable_lora": True},
        {"enable_prompt_embeds": True},
        {"cpu_offload_gb": 1.0},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"speculative_config": DRAFTS},
        {"kv_offloading_size": 1.0},
        {"kv_transfer_config": {**BOTH, "kv_connector": "OffloadingConnector"}},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_is_supported_is_accepted(model_dir: Path, arguments: dict[str, Any]) -> None:
    config = config_of(model_dir, {}, **arguments)
    assert config.parallel_config.worker_cls == plugin.WORKER_CLS


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0"])
def test_an_untested_vllm_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match="tested with vLLM >= 0.32.0, < 0.34.0"):
        check_version(version)
