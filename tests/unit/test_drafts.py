"""Where a drafter's layers are stored, and which ways of drafting are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flow.engine import drafts
from vllm_flow.engine.draft_layers import OWN_NAMES, check_layers, layer_in_group, storage_layer
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.worker.passes.aux_hidden_states import COLLECTS, check_collects
from vllm_flow.grouping import DecoderLayers


def names_of(num_layers: int, draft_layers: int, prefix: str) -> list[tuple[str, int]]:
    """Names as vLLM gives them, with the numbers in them: the target's, then the drafter's."""
    first = 0 if prefix else num_layers
    target = [f"language_model.model.layers.{n}.self_attn.attn" for n in range(num_layers)]
    own = [f"{prefix}model.layers.{n}.self_attn.attn" for n in range(first, first + draft_layers)]
    return [(name, int(name.split(".layers.")[1].split(".")[0])) for name in target + own]


@given(st.data(), st.integers(1, 60), st.integers(0, 3), st.sampled_from(["", *OWN_NAMES]))
def test_a_drafters_layers_come_right_before_the_first(
    data: st.DataObject, num_layers: int, draft_layers: int, prefix: str
) -> None:
    names = names_of(num_layers, draft_layers, prefix)
    places = [storage_layer(*name, num_layers, draft_layers) for name in names]
    assert places == [*range(num_layers), *range(-draft_layers, 0)]

    decoder = DecoderLayers(num_layers, draft_layers=draft_layers)
    group_layers = data.draw(st.sampled_from(decoder.group_sizes()))
    settings = FlowSettings.read(
        {"group_layers": group_layers}, EngineFacts(num_layers, draft_layers=draft_layers)
    )
    assert settings.groups[0][0] == -draft_layers and settings.groups[-1][1] == num_layers - 1
    for name, place in zip(names, places, strict=True):
        first, last = settings.group_of(place)
        in_group = layer_in_group(*name, SimpleNamespace(first_layer=first, last_layer=last))
        assert in_group == (place if place >= 0 else -draft_layers)


@given(st.integers(1, 130), st.integers(1, 3))
def test_all_of_a_drafter_is_in_the_first_group(num_layers: int, draft_layers: int) -> None:
    decoder = DecoderLayers(num_layers, draft_layers=draft_layers)
    starts = decoder.group_starts(decoder.default_group_layers())
    assert starts[0] == -draft_layers and all(start >= 0 for start in starts[1:])
    assert len(starts) <= 12


def test_a_model_of_32_layers_is_stored_as_finely_beside_a_drafter() -> None:
    for draft_layers, groups in ((0, 8), (1, 11)):
        decoder = DecoderLayers(32, draft_layers=draft_layers)
        assert len(decoder.groups(decoder.default_group_layers())) == groups


@pytest.mark.parametrize("group_layers", [1, 5, 6])
def test_groups_without_room_for_it_are_refused(group_layers: int) -> None:
    with pytest.raises(ValueError, match="6 decoder layers, 2 of its drafter .*one of 2, 4, 8"):
        DecoderLayers(6, draft_layers=2).groups(group_layers)


def test_layers_that_are_elsewhere_are_refused() -> None:
    names = ["model.layers.0.attn", "model.layers.6.attn"]
    check_layers(names, {names[1]}, {names[0]: 0, names[1]: -1}.__getitem__)
    with pytest.raises(ValueError, match=r"takes \['model.layers.6.attn'\] for its layers"):
        check_layers(names, set(), {names[0]: 0, names[1]: -1}.__getitem__)


def config(method: str, **changed: Any) -> Any:
    """What of a ``VllmConfig`` is looked at."""
    facts = {"gemma4": False, "parallel": False, "mla": False, "mutual": False, "transfer": None}
    facts |= {"adaptive": False, "v2": False, "chunk": None}
    assert changed.keys() <= facts.keys()
    facts |= changed
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method,
            use_gemma4_mtp=lambda: facts["gemma4"],
            use_step3p5_mtp=lambda: False,
            use_multi_module_mtp=lambda: False,
            parallel_drafting=facts["parallel"],
            enable_adaptive_verification=facts["adaptive"],
        ),
        model_config=SimpleNamespace(
            use_mla=facts["mla"],
            is_mm_prefix_lm=facts["mutual"],
            attention_chunk_size=facts["chunk"],
        ),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        kv_transfer_config=facts["transfer"],
        use_v2_model_runner=facts["v2"],
    )


@pytest.mark.parametrize("method", drafts.METHODS)
@pytest.mark.parametrize("v2", [False, True])
def test_what_is_checked_by_the_target_is_served(method: str, v2: bool) -> None:
    assert drafts.reason_against(config(method, v2=v2)) is None


def test_model_runner_v2_has_two_names_of_drafts_from_the_text() -> None:
    assert drafts.reason_against(config("ngram_gpu", v2=True)) is None
    assert "to one of 'ngram', " in (drafts.reason_against(config("ngram_gpu")) or "")
    found = drafts.reason_against(config("ngram_gpu", v2=True, mla=True))
    assert "beside latent attention, " in (found or "") and "to 'ngram', or leave" in (found or "")
    assert drafts.reason_against(config("ngram", v2=True, mla=True)) is None


@pytest.mark.parametrize("method", drafts.METHODS)
def test_rows_that_only_the_device_shares_out_are_refused(method: str) -> None:
    found = drafts.reason_against(config(method, v2=True, adaptive=True))
    assert "leave enable_adaptive_verification out of speculative_config" in (found or "")


@pytest.mark.parametrize(
    ("method", "changed", "remedy"),
    [
        ("medusa", {}, "set the method of speculative_config to one of 'ngram', "),
        ("dflash", {}, "set the method of speculative_config to one of 'ngram', "),
        ("mtp", {"gemma4": True}, "read the target's keys"),
        ("eagle3", {"parallel": True}, "leave parallel_drafting out"),
        ("eagle", {"mla": True}, "beside latent attention"),
        ("eagle", {"mutual": True}, "beside pictures whose tokens see one another"),
        ("eagle", {"chunk": 32}, "to 'ngram' or 'draft_model', or leave it out"),
        ("eagle3", {"chunk": 32}, "beside chunks of local attention"),
        ("mtp", {"chunk": 32}, "beside chunks of local attention"),
        ("draft_model", {"transfer": object()}, "leave out kv_transfer_config"),
    ],
)
def test_what_is_not_is_refused(method: str, changed: dict[str, Any], remedy: str) -> None:
    assert remedy in (drafts.reason_against(config(method, **changed)) or "")
    if changed:
        assert drafts.reason_against(config("ngram", **changed)) is None
    if "chunk" in changed:
        assert drafts.reason_against(config("draft_model", **changed)) is None


def test_a_decoder_that_collects_otherwise_is_refused_for_eagle3() -> None:
    """What it reads between the layers is made whole where vLLM's decoders keep it."""
    known = SimpleNamespace(**{COLLECTS: print})
    check_collects(SimpleNamespace(model=known, norm=print))
    for model, norm in ((SimpleNamespace(), print), (known, None)):
        with pytest.raises(ValueError, match="how SimpleNamespace collects .* to 'eagle' or"):
            check_collects(SimpleNamespace(model=model, norm=norm))
