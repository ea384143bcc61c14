"""The profile file: what serving reads from it, what it refuses, and how a second task joins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.cliff_file import (
    FORMAT,
    ProfileError,
    check_default,
    essential,
    lacks_default,
    load_profile,
    merged,
    read_profile,
    unlike,
    with_default,
    write_profile,
)
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.setting_values import with_profile_read
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_bounds import parse_task
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy

LAYERS = 32
NAMES = st.sampled_from(["pope", "textvqa"]) | st.text(min_size=1, max_size=8)
TASKS = st.dictionaries(NAMES, st.integers(0, LAYERS), min_size=1)


def content(tasks: dict[str, int], **more: Any) -> dict[str, Any]:
    entries = {
        task: {"flow_cliff": cliff, "evidence": {"curve": [1, 2]}} for task, cliff in tasks.items()
    }
    return {"format": FORMAT, "model": "m", "num_layers": LAYERS, "tasks": entries, **more}


@given(TASKS, st.none() | st.integers(0, LAYERS))
@settings(deadline=None)
def test_every_task_gets_its_cliff(tasks: dict[str, int], default: int | None) -> None:
    more = {} if default is None else {"default": {"flow_cliff": default}}
    for source in (content(tasks, **more), essential(content(tasks, **more))):
        found = read_profile(source, LAYERS)
        assert found.policies == {
            task: parse_policy({"flow_cliff": cliff}, LAYERS) for task, cliff in tasks.items()
        }
        if default is not None:
            assert found.default == parse_policy({"flow_cliff": default}, LAYERS)
        elif len(tasks) == 1:
            assert found.default == found.of_task(next(iter(tasks)))
        else:
            assert found.default is None


@given(TASKS, TASKS)
@settings(deadline=None)
def test_merging_keeps_what_the_new_run_does_not_have(
    before: dict[str, int], after: dict[str, int]
) -> None:
    old = content(before, default={"flow_cliff": 3}, created="then")
    new = merged(old, content(after, created="now"))
    found = {task: entry["flow_cliff"] for task, entry in new["tasks"].items()}
    assert found == {**before, **after}
    assert new["default"] == {"flow_cliff": 3} and new["created"] == "now"
    assert merged(None, old) == old
    assert "default" not in merged(content(before), content(after))


@pytest.mark.parametrize(("name", "value"), [("model", "other"), ("num_layers", 16)])
def test_profiles_of_two_models_are_not_merged(name: str, value: Any) -> None:
    with pytest.raises(ProfileError, match=f"another model: {name}"):
        merged(content({"a": 1}), {**content({"a": 1}), name: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "vllm-flow-cliff/2"}, "vllm-flow-cliff/1"),
        ({"format": None}, '"format" is null'),
        ({"num_layers": 30}, "30 decoder layers.*this one has 32"),
        ({"num_layers": None}, "this one has 32"),
        ({"tasks": {}}, "at least one task"),
        ({"tasks": ["pope"]}, "at least one task"),
        ({"tasks": {"pope": 3}}, "task 'pope' must be an object"),
        ({"tasks": {"pope": {"flow_cliff": 33}}}, "task 'pope': flow_cliff=33"),
        ({"tasks": {"pope": {"flow_cliff": True}}}, "task 'pope': flow_cliff=true"),
        ({"default": {}}, '"default" must be an object'),
        ({"default": "gqa"}, r"\"default\" is 'gqa', which is none of its tasks \(pope\)"),
        ({"default": {"flow_cliff": -1}}, "flow_cliff=-1"),
        (
            {"tasks": {"pope": {"flow_cliff": 3, "flow_kep": "9%"}}},
            "'pope': flow_kep=.*'flow_keep'",
        ),
        ({"tasks": {"pope": {"flow_cliff": 3, "flow_task": "a"}}}, "'pope': 'flow_task' is no"),
        ({"default": {"flow_cliff": 3, "Flow_When": "decode"}}, "Flow_When=.*'flow_when'"),
        ({"defualt": {"flow_cliff": 3}}, "'defualt'.*did you mean 'default'"),
    ],
)
def test_what_is_no_profile_of_this_model_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        read_profile({**content({"pope": 3}), **change}, LAYERS)


def test_true_is_no_number_of_layers() -> None:
    """Though Python takes it for 1."""
    one = {**content({"pope": 1}), "num_layers": 1}
    assert read_profile(one, 1).policies == {"pope": parse_policy({"flow_cliff": 1}, 1)}
    with pytest.raises(ProfileError, match="true decoder layers"):
        read_profile({**one, "num_layers": True}, 1)


@pytest.mark.parametrize("tasks", [{"pope": 3, "gqa": {"flow_cliff": 2}}, ["pope"], None])
def test_what_is_damaged_is_handed_on_to_be_named(tasks: Any) -> None:
    """The process that reads it refuses it, whichever that is."""
    damaged = {**content({}), "tasks": tasks}
    assert essential(damaged)["tasks"] == tasks
    with pytest.raises(ProfileError):
        read_profile(essential(damaged), LAYERS)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="none.json.*cannot be read"):
        read_profile(str(tmp_path / "none.json"), LAYERS)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ProfileError, match="list.json is no profile"):
        read_profile(tmp_path / "list.json", LAYERS)
    (tmp_path / "torn.json").write_text('{"format": ')
    with pytest.raises(ProfileError, match="torn.json.*no JSON"):
        read_profile(tmp_path / "torn.json", LAYERS)
    for source in (3, "", None, ["a"]):
        with pytest.raises(ProfileError, match="must name a file"):
            read_profile(source, LAYERS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "cliff.json"
    write_profile(path, content({"pope": 10}))
    assert load_profile(path)[1] == content({"pope": 10})
    assert read_profile(str(path), LAYERS).of_task("pope") == FlowPolicy.withdrawal(10)
    assert [p.name for p in path.parent.iterdir()] == ["cliff.json"]


# In the operator's settings.


def options(path: Path, **more: Any) -> dict[str, Any]:
    return {"default_policy": {"profile": str(path), **more}}


def test_settings_take_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "cliff.json"
    write_profile(path, content({"pope": 10, "textvqa": LAYERS}))
    found = FlowSettings.read(options(path), EngineFacts(LAYERS))
    assert found.profile is not None and found.default_policy is None
    assert found.profile.of_task("pope") == FlowPolicy.withdrawal(10)
    assert found.profile.of_task("textvqa") is None
    write_profile(path, content({"pope": 10}))
    assert FlowSettings.read(
        options(path), EngineFacts(LAYERS)
    ).default_policy == FlowPolicy.withdrawal(10)


def test_the_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "cliff.json"
    write_profile(path, content({"pope": 10}))
    given = options(path)
    read = with_profile_read(given)
    path.unlink()
    assert given == options(path), "the operator's own object stays as it was"
    assert FlowSettings.read(read, EngineFacts(LAYERS)).default_policy == FlowPolicy.withdrawal(10)
    assert with_profile_read(read) is read
    assert "evidence" not in json.dumps(read)
    for other in ({}, {"default_policy": {"flow_cliff": 3}}, {"default_policy": 3}, 7):
        assert with_profile_read(other) is other


def test_bad_profiles_are_refused_with_the_settings_name(tmp_path: Path) -> None:
    path = tmp_path / "cliff.json"
    with pytest.raises(ValueError, match=r"\['default_policy'\]: profile .* cannot be read"):
        FlowSettings.read(options(path), EngineFacts(LAYERS))
    with pytest.raises(ValueError, match=r"\['default_policy'\]: profile .* cannot be read"):
        with_profile_read(options(path))
    write_profile(path, content({"pope": 10}))
    for source in (options(path), with_profile_read(options(path))):
        # The second is what a server's processes get.
        with pytest.raises(
            ValueError, match=r"\['default_policy'\]: .*cliff.json .*this one has 24"
        ):
            FlowSettings.read(source, EngineFacts(24))
    with pytest.raises(ValueError, match="'flow_cliff' beside 'profile'"):
        FlowSettings.read(options(path, flow_cliff=3), EngineFacts(LAYERS))
    with pytest.raises(ValueError, match="no such option"):
        FlowSettings.read({"profile": str(path)}, EngineFacts(LAYERS))


# In a request.


@given(TASKS)
@settings(deadline=None)
def test_known_tasks_are_taken(tasks: dict[str, int]) -> None:
    for task in tasks:
        assert parse_task({"flow_task": task, "other": 1}, tasks) == task
        assert parse_policy({"flow_task": task}, LAYERS) is None
    assert (
        parse_task({}, tasks)
        is parse_task(None, None)
        is parse_task({"flow_cliff": 3}, None)
        is None
    )


@pytest.mark.parametrize(
    ("keys", "tasks", "says"),
    [
        ({"flow_task": "vqa"}, {"pope", "gqa"}, "known tasks: 'gqa', 'pope'"),
        ({"flow_task": 3}, {"pope"}, "known tasks: 'pope'"),
        ({"flow_task": ["pope"]}, {"pope"}, "known tasks: 'pope'"),
        ({"flow_task": None}, {"pope"}, "known tasks: 'pope'"),
        ({"flow_task": "pope"}, None, "no profile"),
        ({"flow_task": "pope", "flow_cliff": 3}, {"pope"}, "flow_cliff is there as well"),
    ],
)
def test_other_tasks_are_refused(keys: dict[str, Any], tasks: set[str] | None, says: str) -> None:
    with pytest.raises(PolicyError, match=says) as refusal:
        parse_task(keys, tasks)
    assert refusal.value.key == "flow_task"


@given(TASKS, st.data())
@settings(deadline=None)
def test_a_default_may_be_a_task(tasks: dict[str, int], data: st.DataObject) -> None:
    """Also of one that is measured again later."""
    before = content(tasks)
    assert lacks_default(before) == (len(tasks) > 1)
    named = data.draw(st.sampled_from(sorted(tasks)))
    found = with_default(before, named)
    assert not lacks_default(found) and with_default(before, None) == before
    again = merged(found, content({named: 7}))
    for source, cliff in ((found, tasks[named]), (essential(found), tasks[named]), (again, 7)):
        assert read_profile(source, LAYERS).default == parse_policy({"flow_cliff": cliff}, LAYERS)


def test_a_default_is_a_task_that_the_profile_will_have() -> None:
    check_default(None, "pope", None)
    check_default(None, "pope", "pope")
    check_default(content({"gqa": 3}), "pope", "gqa")
    for before in (None, content({"mme": 1}), {"tasks": ["gqa"]}):
        with pytest.raises(ProfileError, match="--default 'gqa': .* name one of (mme, )?pope"):
            check_default(before, "pope", "gqa")


LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
CACHED = "/c/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/0a1b"


@pytest.mark.parametrize(
    ("model", "architecture", "served", "found", "says"),
    [
        ("llava-hf/llava-1.5-7b-hf", LLAVA, ["llava-hf/llava-1.5-7b-hf"], [LLAVA], None),
        ("llava-hf/llava-1.5-7b-hf", "", ["/data/LLaVA-1.5-7B-hf/"], [LLAVA], None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "", [CACHED], [QWEN], None),
        (CACHED, "", ["Qwen/Qwen2.5-VL-7B-Instruct"], [QWEN], None),
        ("llava-1.5-7b-hf", "", ["/model", "llava-1.5-7b-hf"], [LLAVA], None),
        ("demo", LLAVA, ["{folder}"], [LLAVA], None),
        ("demo", LLAVA, ["/gone"], [LLAVA], "made for demo, and this is called /gone"),
        ("demo", "", ["{folder}"], [LLAVA], "made for demo, and this is called /"),
        ("m/a", QWEN, ["m/b", "b"], [QWEN], "made for m/a, and this is called m/b"),
        ("m/a", QWEN, ["{folder}"], [LLAVA], rf"made for m/a \({QWEN}\), and this is /.* \({LLAVA}\)"),
        ("", "", ["m/b"], [QWEN], None),
    ],
)  # fmt: skip
def test_a_profile_of_another_model_is_told(
    tmp_path: Path,
    model: str,
    architecture: str,
    served: list[str],
    found: list[str],
    says: str | None,
) -> None:
    written = {**content({"pope": 3}), "model": model, "architecture": architecture}
    names = [name.format(folder=tmp_path) for name in served]
    for source in (written, essential(written)):
        said = unlike(read_profile(source, LAYERS), names, found)
        assert (said is None) == (says is None)
        if said is not None and says is not None:
            assert re.search(says, said)
