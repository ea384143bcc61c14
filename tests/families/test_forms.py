"""The ways in which layers are called: each is checked, and loses the rows that leave with whatever it is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from tests.families.test_registry import SwappedLayer
from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.families.finding import check_call, of_stage, residual_decoder
from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
from vllm_flow.engine.worker.passes.decoder import DecoderHook


class PlainLayer(nn.Module):
    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + positions[:, None]


class MaskedLayer(nn.Module):
    def forward(
        self, positions: Any, hidden_states: Any, residual: Any, visual_token_mask: Any
    ) -> Any:
        assert len(visual_token_mask) == len(hidden_states) == len(positions)
        return hidden_states + visual_token_mask, hidden_states


class NamedLayer(nn.Module):
    def forward(self, hidden_states: Any, residual: Any, positions: Any, experts: Any) -> Any:
        assert len(hidden_states) == len(positions)
        return experts[0](hidden_states + positions[:, None]), hidden_states


class TensorLayer(nn.Module):
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return hidden_states + position_ids[:, None]


class AloneLayer(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 1


class BatchedLayer(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        cos, sin = kwargs["position_embeddings"]
        assert kwargs["position_ids"].shape[-1] == hidden_states.shape[1] == cos.shape[-2]
        return hidden_states + cos + sin


def test_every_form_of_call_passes_check_call() -> None:
    layers = dict(
        tensor=TensorLayer,
        batched=BatchedLayer,
        plain=PlainLayer,
        alone=AloneLayer,
        masked=MaskedLayer,
        named=NamedLayer,
    )
    for form, layer in layers.items():
        check_call(Decoder(nn.Identity(), [layer()], nn.Identity(), call=form))  # type: ignore[arg-type]


def test_rows_leave_layers_that_take_nothing_but_them() -> None:
    layers, norm = [AloneLayer(), AloneLayer()], Norm()
    hook = DecoderHook(Decoder(nn.Identity(), layers, norm, call="alone"))
    hidden = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(3, 8)
    with hook.installed(DROPS_THE_SECOND):
        for layer in layers:
            hidden = layer(hidden)
        found = norm(hidden)
    assert found[:, 0].tolist() == [3.0, 0.0, 6.0]


@pytest.mark.parametrize("form", ["plain", "masked"])
def test_layers_of_another_form_are_refused(form: Any) -> None:
    with pytest.raises(ValueError, match=r"calls decoder layers with \(positions, hidden_states"):
        check_call(Decoder(nn.Identity(), [SwappedLayer()], nn.Identity(), call=form))


DROPS_THE_SECOND = DeviceStep(
    variants={
        0: DeviceVariant(3, None, None),
        1: DeviceVariant(2, torch.tensor([0, 2]), torch.tensor([0, 2])),
    }
)


def test_a_mask_of_rows_loses_the_rows_that_leave() -> None:
    """Row 1 of three leaves before the second layer; its place is zero behind the norm."""
    layers = [MaskedLayer(), MaskedLayer()]
    norm = Norm()
    hook = DecoderHook(Decoder(nn.Identity(), layers, norm, call="masked"))
    positions, mask = torch.arange(3), torch.tensor([[1.0], [2.0], [4.0]])
    hidden, residual = torch.zeros(3, 8), None
    with hook.installed(DROPS_THE_SECOND):
        for layer in layers:
            hidden, residual = layer(positions, hidden, residual, mask)
        found, _ = norm(hidden, residual)
    assert found[:, 0].tolist() == [2.0, 0.0, 8.0]


def test_what_is_no_rows_goes_to_a_named_layer_as_it_is() -> None:
    """Intern-S2-Mobius hands its layers the experts that they share; a tensor may be the rows of a step."""
    layers, norm = [NamedLayer(), NamedLayer()], Norm()
    hook = DecoderHook(Decoder(nn.Identity(), layers, norm, call="named"))
    given: Any = dict(positions=torch.arange(3), residual=None)
    hidden = torch.zeros(3, 8)
    with hook.installed(DROPS_THE_SECOND):
        for layer in layers:
            hidden, _ = layer(hidden_states=hidden, experts=[nn.Identity()], **given)
        found = norm(hidden)
    assert found[:, 0].tolist() == [0.0, 0.0, 4.0]
    unknown = pytest.raises(RuntimeError, match="which rows experts")
    with hook.installed(DROPS_THE_SECOND), unknown:
        layers[0](hidden_states=hidden, experts=torch.zeros(3), **given)


def test_rows_come_back_without_a_norm() -> None:
    """Step-3.7's final norm runs with the logits: behind the last layer, what left is zero."""
    model = NormLater()
    hook = DecoderHook(Decoder(model, list(model.layers), None, call="plain"))
    with hook.installed(DROPS_THE_SECOND):
        found = model(torch.tensor([1, 2, 4]), torch.zeros(3, 8))
    assert found[:, 0].tolist() == [2.0, 0.0, 8.0]
    with hook.installed(DeviceStep(variants={})):
        found = model(torch.tensor([1, 2, 4]), torch.zeros(3, 8))
    assert found[:, 0].tolist() == [2.0, 4.0, 8.0]


def test_what_is_added_before_a_layer_loses_the_rows_that_leave() -> None:
    """Granite 4 Vision's loop: it looks whether there is something for a layer, then adds it."""
    model = AddingModel()
    hook = DecoderHook(
        Decoder(model, list(model.layers), model.norm, call="plain", injected="added")
    )
    features = {f"ds_{layer}": torch.tensor([[1.0], [2.0], [4.0]]) for layer in (0, 2)}
    with hook.installed(DROPS_THE_SECOND):
        found = model(torch.zeros(3), torch.zeros(3, 8), added=IntermediateTensors(features))
    assert found[:, 0].tolist() == [2.0, 0.0, 8.0]


def test_a_pipeline_stage_gives_all_rows_on_and_takes_its_own_out_again() -> None:
    """Row 1 leaves in the first of two stages, behind its last layer something is added; row 0 in the second's last."""
    hidden, positions = torch.zeros(3, 8), torch.tensor([1, 2, 4])
    first, second = StageOfFour(range(2)), StageOfFour(range(2, 4))
    hooks = []
    for stage in (first, second):
        decoder = of_stage(
            Decoder(stage, list(stage.layers), stage.norm, "plain", injected="added")
        )
        check_call(decoder)
        assert decoder.own == stage.own and decoder.hands_on == (stage is first)
        hooks.append(DecoderHook(decoder))
    with hooks[0].installed(DROPS_THE_SECOND):
        sent = first(
            positions,
            hidden,
            added=IntermediateTensors({"it": torch.tensor([[10.0], [20.0], [40.0]])}),
        )
    assert sent["hidden_states"][:, 0].tolist() == [12.0, 0.0, 48.0]
    rows = torch.tensor([0, 2])
    later = {
        2: DeviceVariant(2, rows, rows),
        3: DeviceVariant(1, torch.tensor([2]), torch.tensor([1])),
    }
    with hooks[1].installed(DeviceStep(variants=later)):
        found = second(positions, sent["hidden_states"], added=None)
    assert found[:, 0].tolist() == [0.0, 0.0, 56.0]
    nobody = DeviceVariant(0, torch.tensor([], dtype=int), torch.tensor([], dtype=int))
    with hooks[0].installed(DeviceStep(variants={0: nobody})):
        sent = first(positions, hidden + 1, added=None)
    assert not sent["hidden_states"].any() and len(sent["hidden_states"]) == 3


def test_layers_of_other_stages_say_nothing_of_how_layers_are_called() -> None:
    stage = StageOfFour(range(1, 3))
    for layer in (1, 2):
        stage.layers[layer] = ScaledLayer()
    decoder = of_stage(residual_decoder(SimpleNamespace(model=stage)))
    assert decoder.call == "scaled" and decoder.own == range(1, 3)
    check_call(decoder)


class ScaledLayer(nn.Module):
    def forward(
        self, positions: Any, hidden_states: Any, residual: Any, llama_4_scaling: Any
    ) -> Any:
        raise NotImplementedError


class StageOfFour(nn.Module):
    def __init__(self, own: range) -> None:
        super().__init__()
        layers = [PlainLayer() if layer in own else PPMissingLayer() for layer in range(4)]
        self.layers, self.own = nn.ModuleList(layers), own
        self.norm = Norm() if own.stop == 4 else PPMissingLayer()

    def forward(self, positions: Any, hidden: Any, added: Any) -> Any:
        for layer in self.own:
            hidden = self.layers[layer](positions, hidden)
        if added is not None:
            hidden = hidden + added["it"]
        if self.own.stop < 4:
            return IntermediateTensors({"hidden_states": hidden})
        return self.norm(hidden)


class Norm(nn.Module):
    def forward(self, hidden: Any, residual: Any = None) -> Any:
        return hidden if residual is None else (hidden, residual)


class NormLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PlainLayer() for _ in range(2)])

    def forward(self, positions: Any, hidden: Any) -> Any:
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return hidden


class AddingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PlainLayer() for _ in range(3)])
        self.norm = Norm()

    def forward(self, positions: Any, hidden: Any, added: Any) -> Any:
        for index, layer in enumerate(self.layers):
            if f"ds_{index}" in added.tensors:
                hidden = hidden + added.tensors[f"ds_{index}"]
            hidden = layer(positions, hidden)
        return self.norm(hidden)


def test_a_tensor_of_unknown_rows_is_refused() -> None:
    layer = BatchedLayer()
    hook = DecoderHook(Decoder(nn.Identity(), [layer], nn.Identity(), call="batched"))
    tables = (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
    unknown = pytest.raises(RuntimeError, match="which rows attention_mask")
    with hook.installed(DeviceStep(variants={})), unknown:
        layer(
            torch.zeros(1, 3, 8),
            position_ids=torch.zeros(1, 3),
            position_embeddings=tables,
            attention_mask=torch.zeros(3, 3),
        )
