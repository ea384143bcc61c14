"""Start-up: inert without the key, our classes with it, a sentence for what is not supported."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from vllm.config.compilation import CompilationMode
from vllm.engine.arg_utils import EngineArgs

from tests.engine.harness import asynchronous_on_cpu
from tests.engine.tiny_llava import Shape, build
from vllm_flow.cliff_file import FORMAT
from vllm_flow.engine import families, plugin
from vllm_flow.engine.attention.writer import check_log
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.support import FP8, check_version
from vllm_flow.policy import FlowPolicy

BOTH = {"kv_role": "kv_both"}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Shape(layers=6), tmp_path_factory.mktemp("models"))


def config_of(model_dir: Path, options: Any = None, **arguments: Any) -> Any:
    """A finished VllmConfig; ``options`` go under the extension's key unless None."""
    arguments = {"enforce_eager": True, "max_model_len": 512, **arguments}
    if options is not None:
        arguments["additional_config"] = {"vllm_flow": options}
    return EngineArgs(model=str(model_dir), **arguments).create_engine_config()


def test_without_the_key_nothing_is_selected(model_dir: Path) -> None:
    config = config_of(model_dir)
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls.startswith("vllm.v1.worker.")
    assert FlowSettings.of(config) is None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_key_selects_our_classes(model_dir: Path, asynchronous: bool) -> None:
    with asynchronous_on_cpu(asynchronous):
        config = config_of(model_dir, {}, async_scheduling=asynchronous)
    expected = plugin.ASYNC_SCHEDULER_CLS if asynchronous else plugin.SCHEDULER_CLS
    assert config.scheduler_config.scheduler_cls == expected
    assert config.parallel_config.worker_cls == plugin.WORKER_CLS
    scheduler = config.scheduler_config
    room = scheduler.max_num_batched_tokens - (scheduler.max_num_seqs - 1)
    assert FlowSettings.of(config) == FlowSettings(num_layers=6, group_layers=1, step_tokens=room)
    plugin.configure(config)  # a config may be finished more than once
    assert config.scheduler_config.scheduler_cls == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "must be a JSON object"),
        (True, "must be a JSON object"),
        ({"group_layer": 2}, "did you mean 'group_layers'"),
        ({"cliff": 2}, "no such option"),
        ({"group_layers": 4}, "use one of 1, 2, 3, 6"),
        ({"group_layers": 0}, "use one of 1, 2, 3, 6"),
        ({"group_layers": 2.0}, "must be an integer"),
        ({"group_layers": True}, "must be an integer"),
        ({"group_layers": "2"}, "must be an integer"),
        ({"default_policy": 2}, "must hold request keys"),
        ({"default_policy": {"flow_cliff": 7}}, r"\['default_policy'\]: flow_cliff=7"),
        ({"max_policy": {"cliff": 2}}, "'cliff' is no request key"),
        ({"allow_request_policy": 0}, "must be true or false"),
        ({"untested_models": 1}, r"\['untested_models'\]=1: it must be true or false"),
        ({"default_policy": {"flow_log_attention": True}}, "is no request key of a policy"),
        ({"attention_log": True}, r"\['attention_log'\]=True: it must name a directory"),
        ({"attention_log": " "}, "it must name a directory"),
        (
            {"attention_log": "/proc/nowhere"},
            "attention_log='/proc/nowhere' cannot be written",
        ),
        ({"attention_log": "x", "attention_log_max_bytes": 0}, "must be an integer of at least 1"),
        ({"attention_log_max_bytes": True}, "must be an integer of at least 1"),
        ({"attention_log_kernel": "cuda"}, "='cuda': it must be one of 'auto', .*'xformers'"),
    ],
)
def test_bad_settings_are_refused_by_name(model_dir: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(model_dir, options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vllm-flow": {}}, "'vllm-flow'.*did you mean 'vllm_flow'"),
        ({"vllmFlow": {}}, "did you mean 'vllm_flow'"),
        (
            {"vllm_flow": {}, "VLLM_FLOW": {"max_policy": {}}},
            "'VLLM_FLOW'.*did you mean 'vllm_flow'",
        ),
        (
            {"vllm_flow": {}, "max_policy": {"flow_cliff": 2}},
            r"'max_policy'.* into the object 'vllm_flow'",
        ),
    ],
)
def test_settings_in_the_wrong_place_are_refused(
    model_dir: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(model_dir, additional_config=given)


def test_without_the_key_others_keep_their_settings(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option's name alone may be another extension's: it is told of, and no more."""
    said: list[str] = []
    monkeypatch.setattr(plugin.logger, "warning_once", lambda text, *v: said.append(text % v))
    config = config_of(model_dir, additional_config={"other": 1, "max_policy": {"flow_cliff": 2}})
    assert FlowSettings.of(config) is None
    (told,) = set(said)
    assert "'max_policy'" in told and "{'vllm_flow': {'max_policy': ...}}" in told


def test_the_log_says_what_is_on(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(plugin.logger, "info_once", lambda text, *v: said.append(text % v))
    config_of(model_dir)
    assert not said
    config_of(model_dir, {})
    config_of(
        model_dir,
        {"group_layers": 2, "default_policy": {"flow_cliff": 4}, "max_policy": {"flow_cliff": 2}},
    )
    config_of(model_dir, {"allow_request_policy": False, "attention_log": str(model_dir / "log")})
    first, bounded, closed = dict.fromkeys(said)
    assert "6 decoder layers, 6 storage groups of 1 layer." in first
    assert "evict nothing" in first and "may send any policy" in first
    assert "3 storage groups of 2 layers" in bounded
    assert '"4:0"' in bounded and 'no more than "2:0"' in bounded
    assert "refused" in closed and str(model_dir / "log") in closed


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell has read the JSON, so nobody else replaces the tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FlowSettings.read({"attention_log": "~/log"}, 6).attention_log == str(tmp_path / "log")
    profile = {"format": FORMAT, "num_layers": 6, "tasks": {"pope": {"flow_cliff": 3}}}
    (tmp_path / "cliff.json").write_text(json.dumps(profile))
    found = FlowSettings.read({"default_policy": {"profile": "~/cliff.json"}}, 6)
    assert found.default_policy == FlowPolicy.withdrawal(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"enforce_eager": False, "compilation_config": {"mode": 1}},
            "torch.compile of the whole model, .* leave out the mode",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
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
                "default_policy ranks by 'last_image', which reads keys",
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
    settings = FlowSettings.read({"attention_log": str(tmp_path)}, 6)
    with pytest.raises(ValueError, match="leave out speculative_config"):
        check_log(config, settings)
    config.speculative_config = None
    with pytest.raises(ValueError, match="leave out kv_cache_dtype"):
        check_log(config, replace(settings, quantised_keys=True))
    with pytest.raises(ValueError, match=r"pip install 'vllm-flow\[log\]'"):
        check_log(config, settings)
    config.model_config.enforce_eager = False
    with pytest.raises(ValueError, match="enforce_eager=True"):
        check_log(config, settings)
    config.parallel_config.tensor_parallel_size = 2
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        check_log(config, settings)


@pytest.mark.parametrize(("made_for", "warns"), [("another/model", True), ("{served}", False)])
def test_a_profile_of_another_model_is_told_at_start_up(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_for: str, warns: bool
) -> None:
    file = tmp_path / "cliff.json"
    name = made_for.format(served=model_dir.name)
    tasks = {"pope": {"flow_cliff": 3}}
    content = {"format": FORMAT, "model": name, "num_layers": 6, "tasks": tasks}
    file.write_text(json.dumps(content))
    said: list[str] = []
    monkeypatch.setattr(
        plugin.logger, "warning_once", lambda text, *values: said.append(text % values)
    )
    config_of(model_dir, {"default_policy": {"profile": str(file)}})
    assert any(f"it was made for {name}, and this is called {model_dir}" in line for line in said) is warns  # fmt: skip


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
