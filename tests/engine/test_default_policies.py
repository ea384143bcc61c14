"""The operator hears of every request with images that his policy stays away from, and of every engine."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams

from tests.engine.settings_with import settings_with
from tests.engine.test_fitting import IMAGE, LAYERS, SETTINGS, request
from vllm_flow.cliff_file import Profile
from vllm_flow.engine import obstacles
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end import default_policies, fitting_engine, metrics
from vllm_flow.engine.front_end.default_policies import check_policies, warn_of_obstacles
from vllm_flow.engine.front_end.incoming import settle
from vllm_flow.engine.front_end.settled import Settled, noted
from vllm_flow.engine.obstacles import Misfit
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_keys import parse_policy

CLIFF = {"flow_cliff": 3}
TOWER = {"flow_stages": "0:50% cls_attention"}


def policy(keys: dict[str, Any]) -> FlowPolicy:
    found = parse_policy(keys, LAYERS)
    assert found is not None
    return found


def modality(sent: Any, name: str) -> Any:
    sent.mm_features[0].modality = name
    return sent


LOGGED = {"flow_log_attention": True, "flow_log_attention_heat": True}
SENT = {"kv_transfer_params": {"do_remote_decode": True}}
NO_TOWER = {"obstacles": {obstacles.TOWER: "which nobody looked for"}}
CASES: tuple[tuple[Misfit, dict[str, Any], Any, dict[str, Any]], ...] = (
    (Misfit.ENGINE, TOWER, request(None, IMAGE), NO_TOWER),
    (Misfit.ENGINE, {**CLIFF, "flow_when": "decode"}, request(None, IMAGE), {"connected": True}),
    (Misfit.STEP, {"flow_stages": "2:9 diversity"}, request(None, IMAGE), {"step_tokens": 90}),
    (Misfit.PROMPT_END, CLIFF, request(None, IMAGE, text=0), {}),
    (Misfit.PICTURE, {"flow_stages": "2:9 uniform, 4:50% uniform"}, request(None, IMAGE), {}),
    (Misfit.PICTURE, CLIFF, request(None, IMAGE, prompt_token_ids=[1, 2]), {}),
    (Misfit.VIDEO, TOWER, modality(request(None, IMAGE), "video"), {}),
    (Misfit.EMBEDDINGS, CLIFF, request(None, prompt_embeds=[[0.5]], prompt_token_ids=None), {}),
    (Misfit.EMBEDDINGS, TOWER, request(None, IMAGE), {"mm_embeds": True}),
    (Misfit.MODALITY, CLIFF, modality(request(None, IMAGE), "point_cloud"), {}),
    (Misfit.STREAMING, CLIFF, request(None, IMAGE, resumable=True), {}),
    (Misfit.KV_TRANSFER, CLIFF, request(SENT, IMAGE), {"connected": True}),
    (Misfit.LOG, {"flow_stages": "2:9 diversity"}, request(LOGGED, IMAGE), {}),
    (Misfit.BOUND, CLIFF, request(None, IMAGE), {"max_policy": policy({"flow_cliff": 9})}),
)  # fmt: skip


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the log says, of a process that has said nothing yet."""
    lines: list[str] = []
    monkeypatch.setattr(default_policies, "_told", set())
    monkeypatch.setattr(
        default_policies.logger, "warning", lambda text, *values: lines.append(text % values)
    )
    yield lines


@pytest.mark.parametrize(("kind", "keys", "sent", "settings"), CASES)
def test_a_request_that_a_default_policy_does_not_fit_is_told(
    kind: Misfit, keys: dict[str, Any], sent: Any, settings: dict[str, Any], said: list[str]
) -> None:
    found = settings_with(SETTINGS, default_policy=policy(keys), **settings)
    sent, kept = copy(sent), copy(sent)
    sent.sampling_params = sent.sampling_params.clone()
    kept.sampling_params = kept.sampling_params.clone()
    settle(sent, found)
    assert sent.cache_salt is None
    assert noted(sent.sampling_params) == Settled("", kind)
    [line] = said
    assert line.startswith(f'default_policy, "{found.default_policy}", is not applied to a request')
    assert f'default_policy_skipped_total{{reason="{kind.value}"}}' in line
    # Of a task's policy it is told as well, and of each policy once.
    profile = Profile({"reading": policy(keys), "other": policy({"flow_cliff": 4})}, None)
    kept.sampling_params.extra_args = {
        **(kept.sampling_params.extra_args or {}),
        "flow_task": "reading",
    }
    settle(kept, settings_with(found, default_policy=None, profile=profile))
    assert noted(kept.sampling_params) == Settled("reading", kind)
    assert said == [line]


def test_every_kind_of_misfit_has_a_case() -> None:
    assert {kind for kind, *_ in CASES} == set(Misfit)


@pytest.mark.parametrize(
    "sent",
    [
        request(None),
        request(None, resumable=True),
        request(SENT),
        request(None, IMAGE),
        request({"flow_cliff": LAYERS}, IMAGE, text=0),
        request({"flow_cliff": 30}, IMAGE),
        modality(request(None, IMAGE, text=0), "audio"),
    ],
    ids=("text", "stream", "handed", "fits", "opts out", "asks otherwise", "audio"),
)
def test_others_are_not(sent: Any, said: list[str]) -> None:
    settle(sent, settings_with(SETTINGS, default_policy=policy(CLIFF), connected=True))
    assert noted(sent.sampling_params).skipped is None and not said


def test_a_policy_that_evicts_nothing_of_small_pictures_fits_them(said: list[str]) -> None:
    sent = request(None, (5, 9))
    settle(sent, settings_with(SETTINGS, default_policy=policy({"flow_stages": "2:9 uniform"})))
    assert noted(sent.sampling_params) == Settled() and not said


def test_each_kind_of_reason_is_said_once(said: list[str]) -> None:
    found = settings_with(SETTINGS, default_policy=policy(CLIFF))
    for text, streamed in ((0, False), (0, False), (9, True), (9, True), (0, False)):
        settle(request(None, IMAGE, text=text, resumable=streamed), found)
    assert ["ends with an image" in line for line in said] == [True, False]
    assert "streaming input" in said[1]


@pytest.mark.parametrize("parent", [False, True], ids=("one answer", "one of several"))
def test_skipped_requests_are_counted(
    monkeypatch: pytest.MonkeyPatch, said: list[str], parent: bool
) -> None:
    """Of several answers each has parameters that vLLM made of the request's: their fields alone."""
    if metrics._metrics is None:
        metrics.enable("somebody", 4)
    monkeypatch.setattr(metrics, "_model_name", "somebody")
    name, labels = "vllm_flow:default_policy_skipped_total", {"model_name": "somebody"}
    before = {
        kind: REGISTRY.get_sample_value(name, {**labels, "reason": kind.value}) or 0
        for kind in Misfit
    }
    sent = request(None, IMAGE, text=0)
    settle(sent, settings_with(SETTINGS, default_policy=policy(CLIFF)))
    state = SimpleNamespace(parent_req=None, prompt_len=600)
    if parent:
        state.parent_req = SimpleNamespace(sampling_params=sent.sampling_params)
        sent.sampling_params = copy(sent.sampling_params)
        assert noted(sent.sampling_params) == Settled()
    metrics.begin(state, sent)
    metrics.count(state)
    for kind, value in before.items():
        now = REGISTRY.get_sample_value(name, {**labels, "reason": kind.value}) or 0
        grown = now - value
        assert grown == (kind == Misfit.PROMPT_END)


def prefill_rows() -> list[float]:
    """What prompts have without a policy, counted so far: of images, of text."""
    labels = [{"model_name": "somebody", "what": what} for what in metrics.IMAGE_OR_TEXT]
    name = "vllm_flow:prefill_rows_total"
    return [REGISTRY.get_sample_value(name, these) or 0 for these in labels]


@pytest.mark.parametrize(
    ("sent", "policy", "task"),
    [
        (request(None), "no-image", ""),
        (request({"flow_cliff": 3}), "no-image", ""),
        (modality(request(None, IMAGE), "audio"), "no-image", ""),
        (request(None, prompt_embeds=[[0.5]], prompt_token_ids=None), "baseline", ""),
        (modality(request(None, IMAGE), "point_cloud"), "baseline", ""),
        (request({"flow_cliff": LAYERS}, IMAGE), "baseline", ""),
        (request({"flow_cliff": 5}, IMAGE), "cliff=5", ""),
        (request({"flow_task": "reading"}, IMAGE), "cliff=3", "reading"),
        (request({"flow_task": "everything"}, IMAGE), "baseline", "everything"),
        (request({"flow_task": "reading"}), "no-image", "reading"),
    ],
)
def test_requests_are_counted_by_policy_and_task(
    monkeypatch: pytest.MonkeyPatch, sent: Any, policy: str, task: str
) -> None:
    if metrics._metrics is None:
        metrics.enable("somebody", LAYERS)
    monkeypatch.setattr(metrics, "_model_name", "somebody")
    monkeypatch.setattr(metrics, "_num_layers", LAYERS)
    labels = {"model_name": "somebody", "policy": policy, "task": task}
    before = REGISTRY.get_sample_value("vllm_flow:requests_total", labels) or 0
    rows = prefill_rows()
    profile = Profile({"reading": FlowPolicy.withdrawal(3), "everything": None}, None)
    settle(sent, settings_with(SETTINGS, profile=profile))
    state = SimpleNamespace(parent_req=None, prompt_len=600)
    metrics.begin(state, sent)
    metrics.count(state)
    assert REGISTRY.get_sample_value("vllm_flow:requests_total", labels) == before + 1
    pictures = sum(f.mm_position.length for f in sent.mm_features or () if f.modality == "image")
    grown = [now - then for now, then in zip(prefill_rows(), rows, strict=True)]
    assert grown == [LAYERS * pictures, LAYERS * (600 - pictures)]


@pytest.mark.parametrize(
    ("keys", "settings", "message"),
    [
        (
            {"flow_stages": "2:9 last_image"},
            {"quantised_keys": True},
            "rank 'last_image' reads keys",
        ),
        (
            {**CLIFF, "flow_when": "decode"},
            {"connected": True},
            "leave out flow_when, or have .* without kv_tr",
        ),
        (
            {**CLIFF, "flow_when": "decode"},
            {"attending": (3, 7), "keep_states": True},
            "after the prefill: by then",
        ),
    ],
)
def test_what_no_request_could_have_is_refused_at_start_up(
    keys: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^default_policy: .*{message}"):
        check_policies(settings_with(SETTINGS, default_policy=policy(keys), **settings))
    profile = Profile({"plain": policy(CLIFF), "a": policy(keys), "none": None}, None)
    with pytest.raises(ValueError, match=f"^default_policy of the task 'a': .*{message}"):
        check_policies(settings_with(SETTINGS, profile=profile, **settings))
    check_policies(settings_with(SETTINGS, default_policy=policy(keys)))
    check_policies(settings_with(SETTINGS, default_policy=policy(CLIFF), **settings))


@pytest.mark.parametrize(
    ("obstacle", "keys", "message"),
    [
        (obstacles.TOWER, {"flow_preset": "fastervlm"}, "'cls_attention' reads the attention of the"),
        (obstacles.RECEIVED, {"flow_stages": "0:9 received_attention"}, "among the vision tower's"),
        (obstacles.TILES, {"flow_preset": "hired"}, "'hired' goes by the tiles of a picture"),
        (obstacles.FRAMES, {"flow_preset": "dycoke"}, "'dycoke' goes by the frames of a video"),
        (obstacles.RANKS, {"flow_preset": "fastv"}, "'last_prompt' reads keys"),
        (obstacles.HIDDEN, {"flow_stages": "2:9 dart"}, "'dart' looks into the layers"),
        (obstacles.UNROTATED, {"flow_stages": "2:9 feather"}, "'feather' looks into the layers"),
        (obstacles.LATE, {**CLIFF, "flow_when": "decode"}, "cannot be moved"),
    ],
)  # fmt: skip
def test_what_the_workers_cannot_do_is_said_as_soon_as_they_have(
    obstacle: str, keys: dict[str, Any], message: str, said: list[str]
) -> None:
    able = settings_with(SETTINGS, default_policy=policy(keys))
    warn_of_obstacles(able)
    assert not said
    warn_of_obstacles(settings_with(able, obstacles={obstacle: "for a reason"}))
    [line] = said
    assert line.startswith('default_policy, "') and "cannot be applied by this engine" in line
    assert message in line and "for a reason" in line
    profile = Profile({"plain": policy(CLIFF), "reading": policy(keys)}, None)
    warn_of_obstacles(
        settings_with(SETTINGS, profile=profile, obstacles={obstacle: "for a reason"})
    )
    assert len(said) == 2 and said[1].startswith("default_policy of the task 'reading', ")
    # What goes by tiles goes by the class token, too.
    mine = (obstacle, obstacles.TOWER) if obstacle == obstacles.TILES else (obstacle,)
    others = {
        name: "why" for name in (*fitting_engine.LOOKS, obstacles.LATE)
        if name not in mine
    }  # fmt: skip
    warn_of_obstacles(settings_with(able, obstacles=others))
    assert len(said) == 2


class Client:
    """Not vLLM's asynchronous one: it is asked when it is made."""

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, str]]:
        assert (method, args) == (obstacles.METHOD, (obstacles.added_ranks(),))
        return [{obstacles.TOWER: "which nobody looked for"}]


def test_who_asks_a_client_hears_when_it_has_answered() -> None:
    config, heard = SimpleNamespace(), []
    for _ in range(2):  # vLLM's factories call each other
        obstacles.ask(Client(), config, lambda: heard.append(dict(obstacles.known(config))))
    assert heard == [{obstacles.TOWER: "which nobody looked for"}]


def test_the_parameters_that_go_to_the_engine_do_not_carry_it() -> None:
    import msgspec

    params = SamplingParams(extra_args={"a": 1})
    plain = msgspec.msgpack.encode(params)
    sent = request(None, IMAGE)
    sent.sampling_params = params
    settle(sent, FlowSettings.read({"default_policy": CLIFF}, EngineFacts(LAYERS)))
    params.extra_args = {"a": 1}
    assert msgspec.msgpack.encode(params) == plain
