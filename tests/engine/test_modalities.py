"""Inputs of a modality that nobody decided about are refused by name, never left alone silently."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.multimodal.inputs import PlaceholderRange

from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end.incoming import settle
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.policy_error import PolicyError

KEYS = {"flow_cliff": 2}


def request_with(modalities: tuple[str, ...], keys: dict[str, Any] | None) -> Any:
    """As much of an EngineCoreRequest as is read: four tokens of each modality, and text after."""
    features = [
        SimpleNamespace(
            modality=name,
            mm_position=PlaceholderRange(offset=1 + 4 * i, length=4),
            identifier=f"{name} {i}",
        )
        for i, name in enumerate(modalities)
    ]
    return SimpleNamespace(
        sampling_params=SamplingParams(extra_args=keys),
        mm_features=features,
        prompt_token_ids=[0] * (4 * len(modalities) + 4),
        prompt_embeds=None,
        cache_salt=None,
        resumable=False,
    )


@pytest.mark.parametrize("modalities", [("point_cloud",), ("image", "point_cloud")])
def test_a_policy_does_not_pass_over_an_unknown_modality(modalities: tuple[str, ...]) -> None:
    with pytest.raises(PolicyError, match="of the modality 'point_cloud'"):
        settle(request_with(modalities, KEYS), FlowSettings(EngineFacts(4), 1))


def test_a_default_policy_stays_away_from_it() -> None:
    settings = FlowSettings.read({"default_policy": KEYS}, EngineFacts(4))
    request = request_with(("image", "point_cloud"), None)
    settle(request, settings)
    assert request.sampling_params.extra_args is None and request.cache_salt is None


@pytest.mark.parametrize("keys", [None, {"flow_cliff": 4}])
def test_the_baseline_takes_any_modality(keys: dict[str, Any] | None) -> None:
    request = request_with(("point_cloud",), keys)
    settle(request, FlowSettings(EngineFacts(4), 1))
    assert request.cache_salt is None


@pytest.mark.parametrize(
    "modalities", [("image",), ("video",), ("image", "audio"), ("vision_chunk",)]
)
def test_known_modalities_evict_beside_audio_that_stays(modalities: tuple[str, ...]) -> None:
    request = request_with(modalities, KEYS)
    settle(request, FlowSettings(EngineFacts(4), 1))
    assert request.cache_salt is not None
