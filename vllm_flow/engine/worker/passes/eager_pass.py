"""One pass through a decoder's own code, in which rows leave between its layers.

The hook (``decoder.py``) makes one for each such call of the model and hands it every call of a layer and of the
final norm. What vLLM has compiled goes another way: ``compiled_pass.py``.

Legend: T rows of the step (with padding), R rows alive, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_flow.engine.worker.passes.calls import CallForm, at_their_rows, lengthened
from vllm_flow.engine.worker.passes.shared_experts import nobodys_row

if TYPE_CHECKING:
    from vllm_flow.engine.worker.choosing.device_ranking import DeviceRanking
    from vllm_flow.engine.worker.choosing.ranking import Ranker
    from vllm_flow.engine.worker.device_step import DeviceStep, DeviceVariant
    from vllm_flow.engine.worker.passes.adapters import AdapterRows
    from vllm_flow.engine.worker.passes.last_layer import KeyWriter


@dataclass(frozen=True)
class PassParts:
    """What the passes through one decoder have in common."""

    form: CallForm
    """How the model calls its layers."""
    key_writers: Mapping[int, KeyWriter]
    """By layer."""
    adapters: AdapterRows
    ranker: Ranker | None
    """None before there is a KV cache to read."""
    layers: range = range(0)
    """Numbers of those that this worker runs; the first is given all rows of the step."""
    waited_for: bool = False
    """Whether other engines wait for every layer of this one; see ``shared_experts.py``."""


class EagerPass:
    """Which rows are alive, from layer to layer of one call of the model.

    Args:
        step: what leaves where.
    """

    def __init__(self, step: DeviceStep, parts: PassParts) -> None:
        self._step, self._parts = step, parts
        self._num_rows = 0
        """T."""
        self._variant: DeviceVariant | None = None
        """The last that began."""
        self._positions: Any = None
        """Of the rows alive, as layers take them; None while all are."""
        self._chose = False
        """Whether choices were made on the device, so that the rows alive are no longer those planned."""
        self.rows: torch.Tensor | None = None
        """[R] rows of the step that are alive in the layer that runs or ran last; None while all are."""

    def alive(self, tensor_TH: torch.Tensor) -> torch.Tensor:
        """The rows of a step's tensor that are alive in the layer that runs or ran last, [R, H]."""
        return tensor_TH if self.rows is None else tensor_TH.index_select(0, self.rows)

    def whole(self, tensor_RH: torch.Tensor) -> torch.Tensor:
        """[T, H] with the rows alive of what stands between two layers where they were; zero elsewhere."""
        if self.rows is None:
            return tensor_RH
        (alive_RH,) = self._in_front(tensor_RH)
        return at_their_rows(alive_RH, self.rows, self._num_rows)

    def layer(
        self,
        index: int,
        forward: Callable[..., Any],
        positions: Any,
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None,
        **others: Any,
    ) -> tuple[torch.Tensor, ...]:
        """What a layer makes of the rows that are alive in it.

        Args:
            forward: the layer's own, in the hook's form; see ``calls.py``.
            positions: the whole step's, which the model passes every layer: [T], M-RoPE [3, T].
            hidden_RH, residual_RH: what came out of the layer before.
            others: what else it is given, and is no row's.
        """
        if not self._parts.form.lengthens:
            return self._layer(index, forward, positions, hidden_RH, residual_RH, **others)
        # The model counts rows between its layers: it is given the step's number, those alive in front.
        inputs = self._in_front(hidden_RH, residual_RH)
        found = self._layer(index, forward, positions, *inputs, **others)
        return tuple(lengthened(tensor, self._num_rows) for tensor in found)

    def norm(
        self,
        forward: Callable[..., Any],
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None = None,
    ) -> Any:
        """What the final norm makes of the rows alive, where they stood in the step."""
        if self._parts.form.lengthens:
            hidden_RH, residual_RH = self._in_front(hidden_RH, residual_RH)
        inputs = (hidden_RH,) if residual_RH is None else (hidden_RH, residual_RH)
        if self.rows is None:
            return forward(*inputs)
        if not self._none_alive:
            normed = forward(*inputs)
            hidden_RH = normed[0] if isinstance(normed, tuple) else normed
        hidden_TH = at_their_rows(hidden_RH, self.rows, self._num_rows)
        return hidden_TH if residual_RH is None else (hidden_TH, residual_RH)

    def _layer(
        self,
        index: int,
        forward: Callable[..., Any],
        positions: Any,
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if index == self._parts.layers.start:
            self._begin(hidden_RH)
        variant = self._step.variants.get(index)
        if variant is not None:
            self._variant = variant
            inputs = (positions, hidden_RH, residual_RH)
            self._store_last(index, variant, forward, *inputs, **others)
            hidden_RH, residual_RH = self._leave(variant, *inputs)
        if self._none_alive:
            if self._parts.waited_for:
                self._keep_up(forward, positions, hidden_RH, residual_RH, **others)
            return hidden_RH, hidden_RH if residual_RH is None else residual_RH
        if self._positions is not None:
            positions = self._positions
        with self._watching(index):
            return forward(positions, hidden_RH, residual_RH, **others)

    def _keep_up(
        self,
        forward: Callable[..., Any],
        positions: Any,
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None,
        **others: Any,
    ) -> None:
        """Run a layer without rows on one that is nobody's."""
        hidden, residual = (
            None if tensor is None else tensor.new_zeros(1, *tensor.shape[1:])
            for tensor in (hidden_RH, residual_RH)
        )
        first = torch.zeros(1, dtype=torch.long, device=hidden_RH.device)
        with nobodys_row():
            forward(self._parts.form.select(positions, first), hidden, residual, **others)

    def _begin(self, hidden_TH: torch.Tensor) -> None:
        self._num_rows = len(hidden_TH)
        if self._parts.layers.start:  # a later pipeline stage is told what the first one saw
            return
        if looked := [*self._step.rankings, *self._step.later]:
            self._ranker.look(looked, hidden_TH)

    def _store_last(
        self,
        index: int,
        variant: DeviceVariant,
        forward: Callable[..., Any],
        positions: Any,
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None,
        **others: Any,
    ) -> None:
        """Store keys and values of the rows of which this layer needs no more."""
        last = variant.last
        if last is None:
            return
        self._parts.adapters.keep(last.rows)
        self._parts.key_writers[index].write(
            forward,
            self._parts.form.select(positions, last.rows),
            *_gathered(last.gather, hidden_RH, residual_RH),
            last.slots,
            **others,
        )

    def _leave(
        self,
        variant: DeviceVariant,
        positions: Any,
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states and residual of the rows that are alive from the variant's first layer on."""
        gather = variant.gather
        if gather is None:
            return hidden_RH, residual_RH
        if variant.rankings:
            self._ranker.compare(variant.rankings, hidden_RH, residual_RH, self.rows)
            self._choose(variant.rankings, gather)
        elif self._chose:
            self._keep(gather)
        else:
            self.rows = variant.rows
        self._positions = self._parts.form.select(positions, self.rows)
        if not self._none_alive:
            self._parts.adapters.keep(self.rows)
        return _gathered(gather, hidden_RH, residual_RH)

    def choose_for_next(self) -> None:
        """Find which rows are alive right behind a pipeline stage's last layer, where the next is told; choose those
        for which a rank looks at that layer."""
        variant = self._step.variants.get(self._parts.layers.stop)
        if variant is None or variant.gather is None:
            return
        if variant.rankings:
            self._choose(variant.rankings, variant.gather)
        else:
            self._keep(variant.gather)

    def _choose(self, rankings: Sequence[DeviceRanking], gather_R: torch.Tensor) -> None:
        self._ranker.choose(rankings, gather_R, self.rows)
        self._chose = True
        self._keep(gather_R)

    def _keep(self, gather_R: torch.Tensor) -> None:
        self.rows = gather_R if self.rows is None else self.rows.index_select(0, gather_R)

    def _watching(self, index: int) -> AbstractContextManager[None]:
        """While a layer runs: see in its attention what a stage behind it goes by."""
        following = self._step.variants.get(index + 1)
        watched = [r for r in following.rankings if r.by_layer] if following else []
        late = self._step.late.get(index, ())
        if not watched and not late:
            return nullcontext()
        return self._ranker.watching(index, watched, self.rows, late)

    @property
    def _none_alive(self) -> bool:
        """Whether no row is alive: a step of image tokens only. Kernels dislike empty launches."""
        return self._variant is not None and self._variant.num_rows == 0

    @property
    def _ranker(self) -> Ranker:
        ranker = self._parts.ranker
        assert ranker is not None, "nobody is served before there is a KV cache"
        return ranker

    def _in_front(self, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
        """The rows alive of tensors that may be lengthened."""
        if self.rows is None:
            return tensors
        return tuple(None if tensor is None else tensor[: len(self.rows)] for tensor in tensors)


def _gathered(
    rows: torch.Tensor, hidden_RH: torch.Tensor, residual_RH: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    residual_RH = None if residual_RH is None else residual_RH.index_select(0, rows)
    return hidden_RH.index_select(0, rows), residual_RH
