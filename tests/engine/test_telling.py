"""What pipeline stages tell one another: one tensor among those that vLLM sends, in the steps that have any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm.sequence import IntermediateTensors

from vllm_flow.engine.families.decoder_parts import Decoder
from vllm_flow.engine.worker.choosing import telling
from vllm_flow.engine.worker.choosing.device_ranking import DeviceRanking
from vllm_flow.engine.worker.choosing.known import Known
from vllm_flow.engine.worker.choosing.late_scores import LateScores
from vllm_flow.engine.worker.choosing.ranking import Ranker
from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
from vllm_flow.engine.worker.model_call import FlowModel
from vllm_flow.engine.worker.passes import decoder as hooks
from vllm_flow.engine.worker.passes.decoder import DecoderHook
from vllm_flow.engine.worker.runner_v1 import FlowRunnerV1
from vllm_flow.handing_on import Part, What

NUMBERS = {
    What.ROWS: st.integers(0, 2**31 - 1),
    What.ORDER: st.integers(0, 2**31 - 1),
    What.WEIGHTS: st.floats(width=32, allow_nan=False),
    What.MASS: st.floats(width=32, allow_nan=False),
}


@given(st.lists(st.sampled_from(What), min_size=1, max_size=5), st.data())
def test_what_is_put_together_comes_apart(kinds: list[What], data: st.DataObject) -> None:
    numbers = [data.draw(st.lists(NUMBERS[what], min_size=1, max_size=4)) for what in kinds]
    told = [torch.tensor(own) for own in numbers]
    parts = [
        Part(what, (n,), len(own)) for n, (what, own) in enumerate(zip(kinds, numbers, strict=True))
    ]
    sent = telling.with_told(
        IntermediateTensors({"hidden_states": torch.zeros(3, 2)}), telling.put_together(told)
    )
    found = list(telling.taken_apart(sent, parts))
    assert [part for part, _ in found] == parts
    assert [own.tolist() for _, own in found] == numbers
    assert {own.dtype for _, own in found} <= {torch.int64, torch.float32}
    assert set(telling.without(sent).tensors) == {"hidden_states"}


@pytest.mark.parametrize("told", [None, [], [1, 2], [1, 2, 3, 4]])
def test_a_stage_that_waits_for_something_else_says_so(told: list[int] | None) -> None:
    received = None if told is None else IntermediateTensors({})
    if told:
        received = telling.with_told(IntermediateTensors({}), torch.tensor(told).int())
    got = len(told) if told else "none"
    with pytest.raises(RuntimeError, match=f"waited for 3 numbers .* got {got}: its workers do"):
        list(telling.taken_apart(received, [Part(What.ROWS, (), 1), Part(What.ORDER, (0,), 2)]))


def test_a_worker_takes_what_another_tells() -> None:
    parts = (
        Part(What.ROWS, (), 2),
        Part(What.ORDER, (0, 1, "diversity"), 2),
        Part(What.WEIGHTS, (1, 0, "raters"), 3),
        Part(What.MASS, ("late", 4), 2),
    )
    first, second = nothing_known(), nothing_known()
    # Of an order that is remembered for later, its beginning.
    first.orders[parts[1].key] = torch.tensor([7, 5, 6])
    first.weights[parts[2].key] = torch.tensor([0.5, 0.0, 1.0])
    first.late_scores.note("late", 4, torch.tensor([0.25, 0.75]))
    sent = telling.with_told(
        IntermediateTensors({}), first.tell(parts, torch.tensor([3, 8], dtype=torch.int32))
    )
    rows = second.take(parts, sent)
    assert rows is not None and rows.tolist() == [3, 8]
    assert second.orders[parts[1].key].tolist() == [7, 5]
    assert second.weights[parts[2].key].tolist() == [0.5, 0.0, 1.0]
    assert second.late_scores.noted("late", 4).tolist() == [0.25, 0.75]
    assert second.take(parts[1:2], told_of(first, parts[1:2])) is None
    assert second.tell(parts[1:3], None).tolist() == first.tell(parts[1:3], None).tolist()


def told_of(known: Known, parts: tuple[Part, ...]) -> IntermediateTensors:
    return telling.with_told(IntermediateTensors({}), known.tell(parts, None))


def nothing_known() -> Known:
    places: Any = None
    return Known(LateScores(places))


@given(st.data())
def test_rows_that_were_told_reach_every_variant(data: st.DataObject) -> None:
    """Behind the first, gathers say which of those before them stay; a guess of the host is nobody's."""
    alive = data.draw(st.lists(st.integers(0, 30), min_size=1, unique=True).map(sorted))
    rows, guess = np.array(alive), torch.arange(len(alive))
    variants, expected = {2: DeviceVariant(len(rows), guess, guess)}, {2: alive}
    for layer in data.draw(st.lists(st.integers(3, 6), unique=True).map(sorted)):
        at = data.draw(st.none() | st.lists(st.integers(0, len(rows) - 1), unique=True).map(sorted))
        rows = rows if at is None else rows[at]
        gather = None if at is None else torch.tensor(at, dtype=torch.long)
        variants[layer] = DeviceVariant(len(rows), torch.arange(len(rows)), gather)
        expected[layer] = rows.tolist()
        if not len(rows):
            break
    step = DeviceStep(variants=variants).with_rows(torch.tensor(alive))
    found = {layer: variant.rows for layer, variant in step.variants.items()}
    assert {n: own.tolist() for n, own in found.items() if own is not None} == expected
    first = step.variants[2].gather
    assert first is not None and first.tolist() == alive
    assert all(step.variants[n].gather is variants[n].gather for n in variants if n > 2)


def test_the_first_runner_copies_only_what_vllm_knows() -> None:
    """Into tensors of these names; what is told has none of them."""
    seen: list[Any] = []

    class Upstream:
        def sync_and_gather_intermediate_tensors(self, *args: Any) -> None:
            seen.append(args)

    runner = type("Runner", (FlowRunnerV1, Upstream), {}).__new__
    own: Any = runner(type("Runner", (FlowRunnerV1, Upstream), {}))
    sent = telling.with_told(IntermediateTensors({"residual": torch.ones(1)}), torch.ones(2).int())
    own.sync_and_gather_intermediate_tensors(5, sent, True)
    own.sync_and_gather_intermediate_tensors(5, None, False)
    assert list(seen[0][1].tensors) == ["residual"]
    assert (seen[0][0], seen[0][2]) == (5, True) and seen[1] == (5, None, False)
    assert telling.NAME in sent.tensors  # the hook takes it out of this


class Layer(nn.Module):
    def forward(self, positions: Any, hidden: Any) -> Any:
        return hidden + positions[:, None]


class Model(nn.Module):
    def __init__(self, hands_on: bool) -> None:
        super().__init__()
        self.layers, self.hands_on = nn.ModuleList([Layer(), Layer()]), hands_on
        self.norm = nn.Identity()

    def forward(self, positions: Any, hidden: Any, **_: Any) -> Any:
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return (
            IntermediateTensors({"hidden_states": hidden}) if self.hands_on else self.norm(hidden)
        )


class Flow(FlowModel, Model):
    pass


class Choosing(Ranker):
    """Keeps the last rows of an image, whatever it is told to look at."""

    def __init__(self) -> None:
        self.known = nothing_known()
        self.forgotten = 0

    def look(self, rankings: Any, hidden_TH: torch.Tensor) -> None:
        pass

    def compare(self, *_: Any) -> None:
        pass

    def choose(self, rankings: Any, gather_R: torch.Tensor, rows: Any) -> None:
        gather_R[1:3] = torch.tensor([2, 3])

    @contextmanager
    def watching(self, *_: Any, **__: Any) -> Iterator[None]:
        yield

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> tuple[Flow, Flow]:
    """Layers 0 and 1, then 2 and 3."""
    context = lambda: SimpleNamespace(attn_metadata={}, slot_mapping={})  # noqa: E731
    monkeypatch.setattr(hooks, "get_forward_context", context)
    made = []
    for first in (0, 2):
        model = Flow(hands_on=first == 0)
        parts = Decoder(model, list(model.layers), model.norm, "plain", None, first, first == 0)
        # The module that runs the layers is called as it is, the loaded model around it as ours.
        model.flow_hook = DecoderHook(parts)
        model.flow_hook.ranker = Choosing()
        made.append(model)
    return made[0], made[1]


RANKING: Any = SimpleNamespace(by_layer=True)
TOLD = (Part(What.ROWS, (), 4),)
FIVE = torch.arange(5, dtype=torch.float32)


def guessed(rankings: tuple[DeviceRanking, ...] = ()) -> DeviceVariant:
    """Rows 1 to 3 are an image of which the host takes the first two to stay."""
    rows = torch.tensor([0, 1, 2, 4])
    return DeviceVariant(4, rows, rows.clone(), rankings=rankings)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_stage_computes_the_rows_that_the_one_before_chose(
    stages: tuple[Flow, Flow], layer: int
) -> None:
    """In its last layer, or right behind it, where all rows are sent, and those that stay are told."""
    first, second = stages
    hook = first.flow_hook
    hook.arm(DeviceStep({layer: guessed((RANKING,))}, tells=TOLD))
    sent = first(FIVE, torch.zeros(5, 2))
    gone = 0.0 if layer == 1 else 2.0
    assert sent["hidden_states"][:, 0].tolist() == [0.0, gone, 4.0, 6.0, 8.0]
    assert sent[telling.NAME].tolist() == [0, 2, 3, 4]
    second.flow_hook.received = sent
    later = {2: guessed(), 3: DeviceVariant(3, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))}
    second.flow_hook.arm(DeviceStep(later, told=TOLD))
    found = second(FIVE, sent["hidden_states"])
    assert found[:, 0].tolist() == [0.0, 0.0, 8.0, 12.0, 0.0]
    assert hook.ranker is not None and hook.ranker.forgotten == 1  # type: ignore[attr-defined]


def test_what_is_told_is_good_for_one_step(stages: tuple[Flow, Flow]) -> None:
    first, second = stages
    first.flow_hook.arm(DeviceStep({1: guessed((RANKING,))}, tells=TOLD))
    sent = first(FIVE, torch.zeros(5, 2))
    second.flow_hook.received = sent
    second.flow_hook.arm(None)
    second(FIVE, sent["hidden_states"])  # a step that no device chooses in
    second.flow_hook.arm(DeviceStep({2: guessed()}, told=TOLD))
    with pytest.raises(RuntimeError, match="waited for 4 numbers of the one before, and got none"):
        second(FIVE, sent["hidden_states"])
    first.flow_hook.arm(None)
    assert telling.NAME not in first(FIVE, torch.zeros(5, 2)).tensors
