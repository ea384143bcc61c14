"""The registry: a row is only there with a checkpoint that tests it, and every checkpoint has a row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.families.checkpoints import BUILDERS
from vllm_flow.engine.families import (
    FAMILIES,
    check_supported,
    decoder_of,
    family_of,
    refused,
)
from vllm_flow.engine.families.finding import residual_decoder
from vllm_flow.engine.families.text_types import TEXT_TYPES


def test_no_row_without_a_checkpoint_and_no_checkpoint_without_a_row() -> None:
    named = [name for family in FAMILIES for name in family.checkpoints]
    assert all(family.checkpoints for family in FAMILIES)
    assert sorted(set(named)) == sorted(BUILDERS)


def test_an_architecture_has_one_row() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert all(family_of(name) is family for name in family.architectures)
        assert set(family.decoders) <= set(TEXT_TYPES.values()), family.name


def test_architectures_are_vllms() -> None:
    """A renamed class upstream must not leave a row that nothing reaches."""
    from vllm import ModelRegistry

    from vllm_flow import models

    models.register()
    known_to_vllm = set(ModelRegistry.get_supported_archs())
    missing = {name for family in FAMILIES for name in family.architectures} - known_to_vllm
    assert not missing


def config(architecture: str, text_type: str = "llama", **facts: bool) -> Any:
    """As much of a ModelConfig as the checks read."""
    facts = {"is_hybrid": False, "is_attention_free": False} | facts
    return SimpleNamespace(
        architecture=architecture, hf_text_config=SimpleNamespace(model_type=text_type), **facts
    )


@pytest.mark.parametrize("fact", ["is_hybrid", "is_attention_free"])
def test_what_cannot_evict_is_refused_whatever_the_name(fact: str) -> None:
    with pytest.raises(ValueError, match="cannot evict from SomeModel"):
        check_supported(config("SomeModel", **{fact: True}), untested=True)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("Gemma3nForConditionalGeneration", "embeddings of their own"),
        ("KimiK3ForConditionalGeneration", "linear attention"),
        ("MiniMaxM3SparseForConditionalGeneration", "by an index"),
        ("Moondream3ForCausalLM", "both directions"),
        ("NemotronParseForConditionalGeneration", "by cross-attention"),
        ("WhisperForConditionalGeneration", "neither pictures nor videos"),
        ("PaliGemmaForConditionalGeneration", "both directions"),
        ("UnlimitedOCRForCausalLM", "see the last of one another"),
    ],
)
def test_what_cannot_evict_is_refused_by_name(architecture: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot evict from {architecture}: .*{reason}"):
        check_supported(config(architecture), untested=True)


def test_an_index_of_tokens_is_refused() -> None:
    """DeepSeek-V3.2 and what came after it, whatever the name."""
    found = config("KimiVLForConditionalGeneration", "deepseek_v3")
    check_supported(found)
    found.hf_text_config.index_topk = 2048
    with pytest.raises(ValueError, match="choose the tokens that they attend to by an index"):
        check_supported(found, untested=True)


def test_gemma_4_is_refused_by_its_configuration() -> None:
    """E2B and E4B: embeddings per layer, shared keys. 31B and 26B-A4B have neither."""
    name, larger = "Gemma4ForConditionalGeneration", dict(text_type="gemma4_text")
    check_supported(config(name, **larger))
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        smaller = config(name, **larger)
        setattr(smaller.hf_text_config, key, 18)
        with pytest.raises(ValueError, match="embeddings of their own"):
            check_supported(smaller, untested=True)


@pytest.mark.parametrize("name", sorted(refused.BY_NAME))
def test_what_is_refused_by_name_has_no_row(name: str) -> None:
    assert family_of(name) is None


BY_CONFIGURATION = {
    # states of other kinds
    "BailingMoeV3VLForConditionalGeneration",
    "Glm5NextForConditionalGeneration",
    "Qwen4ExpForConditionalGeneration",
    # an index of the tokens to attend to
    "DeepseekV4ForConditionalGeneration",
    "DeepseekV41ForCausalLM",
    "Dots3NoteForCausalLM",
}
"""Refused by what their configuration says; some of a name may not be, and are untested then."""

UNTESTED: set[str] = set()
"""Refused until somebody tests them; ``untested_models`` tries them."""


def test_every_multimodal_architecture_of_vllm_was_looked_at() -> None:
    """One that vLLM adds gets a row, a reason, or its name here."""
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    tested = {name for name in _MULTIMODAL_MODELS if family_of(name)}
    by_name = set(refused.BY_NAME) & set(_MULTIMODAL_MODELS)
    kinds = (tested, by_name, BY_CONFIGURATION, UNTESTED)
    assert sum(map(len, kinds)) == len(set().union(*kinds)), "each in one of them"
    assert set().union(*kinds) == set(_MULTIMODAL_MODELS)
    assert set(refused.BY_NAME) <= set(_MULTIMODAL_MODELS), "renamed upstream"


@pytest.mark.parametrize("name", sorted(UNTESTED | BY_CONFIGURATION))
def test_what_is_untested_is_refused_with_the_setting_that_tries_it(name: str) -> None:
    with pytest.raises(ValueError, match=rf"not tested with {name} .*'untested_models'\] to true"):
        check_supported(config(name))


class Layer(nn.Module):
    def forward(self, positions: Any, hidden_states: Any, residual: Any, extra: Any = None) -> Any:
        return hidden_states, residual


class SwappedLayer(nn.Module):
    """GPT-OSS calls its layers so: read by position, hidden states would be taken for positions."""

    def forward(self, hidden_states: Any, positions: Any, residual: Any) -> Any:
        return hidden_states, residual


class Inner:
    """As much as is read of a module that runs layers."""

    def __init__(self, layer: nn.Module) -> None:
        self.layers, self.norm = [layer], nn.Identity()

    def forward(self, input_ids: Any, positions: Any, inputs_embeds: Any, **others: Any) -> None:
        pass


class AddingInner(Inner):
    def forward(self, input_ids: Any, positions: Any, deepstack_embeds: Any = None) -> None:  # type: ignore[override]
        pass


def model_with(layer: nn.Module, path: str, kind: type[Inner] = Inner) -> Any:
    inner: Any = kind(layer)
    for name in reversed(path.split(".")):
        inner = SimpleNamespace(**{name: inner})
    return inner


@pytest.mark.parametrize("path", ["language_model.model", "llm.model", "model.text_model", "model"])
def test_the_usual_places_are_found(path: str) -> None:
    layer = Layer()
    decoder = decoder_of(model_with(layer, path), config("SomeModel"), untested=True)
    assert list(decoder.layers) == [layer]


def test_layers_called_differently_are_refused_even_if_allowed() -> None:
    model = model_with(SwappedLayer(), "model")
    with pytest.raises(ValueError, match=r"SwappedLayer takes \(hidden_states, positions"):
        decoder_of(model, config("SomeModel"), untested=True)


def test_what_is_added_between_layers_of_an_untested_model_is_refused() -> None:
    model = model_with(Layer(), "model", AddingInner)
    with pytest.raises(ValueError, match="which rows deepstack_embeds of AddingInner"):
        decoder_of(model, config("SomeModel"), untested=True)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="finds no decoder layers in SimpleNamespace"):
        residual_decoder(SimpleNamespace())


def test_a_tested_family_with_another_decoder_is_refused_when_loaded() -> None:
    name = "LlavaForConditionalGeneration"
    model = model_with(Layer(), "language_model.model")
    with pytest.raises(ValueError, match="on LlamaModel, .* has a Inner"):
        decoder_of(model, config(name))
    assert decoder_of(model, config(name), untested=True).layers
