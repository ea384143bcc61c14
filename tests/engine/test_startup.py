"""Start-up: inert without the key, our classes with it, a sentence for settings that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.configs import config_of
from tests.engine.harness import asynchronous_on_cpu
from tests.engine.tiny_llava import Shape, build
from vllm_flow.cliff_file import FORMAT
from vllm_flow.engine import plugin
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import FlowPolicy


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Shape(layers=6), tmp_path_factory.mktemp("models"))


def test_vllm_compiles_anew_for_other_settings(model_dir: Path) -> None:
    """As docs/cuda.md says: when vLLM's key leaves settings out, that goes."""
    keys = [
        config_of(model_dir, options).compute_hash()
        for options in (None, {}, {}, {"default_policy": {"flow_cliff": 1}})
    ]
    assert keys[1] == keys[2] and len(set(keys)) == 3


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
    name = config.model_config.served_model_name
    assert FlowSettings.of(config) == FlowSettings(
        EngineFacts(6, step_tokens=room, served_name=name), group_layers=1
    )
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
        (
            {"max_policy": {"cliff": 2}},
            "'cliff' is no request key of a policy; did you mean 'flow_cliff'",
        ),
        ({"max_policy": {"profile": "x"}}, "known keys: 'flow_cliff', .*, 'flow_when'[.]"),
        ({"max_policy": {"flow-task": "x"}}, "known keys: 'flow_cliff', .*, 'flow_when'[.]"),
        ({"allow_request_policy": 0}, "must be true or false"),
        ({"untested_models": 1}, r"\['untested_models'\]=1: it must be true or false"),
        ({"default_policy": {"flow_log_attention": True}}, "is no request key of a policy"),
        ({"attention_log": True}, r"\['attention_log'\]=true: it must name a directory"),
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
            r"'max_policy'.* into the object 'vllm_flow'; write {'vllm_flow': {'max_policy'",
        ),
        (
            {"vllm_flow": {}, "flow_cliff": 4},
            r"'flow_cliff'.*write {'vllm_flow': {'default_policy': {'flow_cliff'",
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
    assert FlowSettings.read({"attention_log": "~/log"}, EngineFacts(6)).attention_log == str(
        tmp_path / "log"
    )
    profile = {"format": FORMAT, "num_layers": 6, "tasks": {"pope": {"flow_cliff": 3}}}
    (tmp_path / "cliff.json").write_text(json.dumps(profile))
    found = FlowSettings.read({"default_policy": {"profile": "~/cliff.json"}}, EngineFacts(6))
    assert found.default_policy == FlowPolicy.withdrawal(3)


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
