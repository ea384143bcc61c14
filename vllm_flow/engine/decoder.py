"""The decoder hook: rows leave the hidden states at the cliff and come back after the final norm.

Seams: vLLM's forward context, which attention layers read their metadata and slots from and whose
``skip_compiled`` runs one call of the model eagerly; and, for such a call only, ``forward`` of each
decoder layer and of the final norm, hidden on the loaded model's instances. Compiled code is traced
without any of it. Knows steps, not policies, runners or schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_flow.engine.adapters import AdapterRows
from vllm_flow.engine.calls import FORMS, AliveRows, lengthened
from vllm_flow.engine.device_step import DeviceVariant, FlowStep
from vllm_flow.engine.drafts import COLLECTS, collector
from vllm_flow.engine.families import Decoder
from vllm_flow.engine.hiding import hidden
from vllm_flow.engine.last_layer import KeyWriter
from vllm_flow.engine.leaving import Pieces, at_their_rows
from vllm_flow.engine.ranking import Ranker
from vllm_flow.engine.tower_scores import Tower


class DecoderHook:
    """Runs one decoder's layers on the rows that are alive.

    Legend: T rows of the step (with padding), R rows alive, H hidden size.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._armed: FlowStep | None = None
        self._step: FlowStep | None = None
        self._num_rows = 0
        self._variant: DeviceVariant | None = None
        self._positions: Any = None
        self._rows: torch.Tensor | None = None
        self._ranked = False
        self._survivors: torch.Tensor | None = None
        self.ranker: Ranker | None = None
        """Set once there is a KV cache to read."""
        self.tower = Tower()
        """Set where the whole model is known."""
        self._replacements: list[tuple[nn.Module, Callable[..., Any]]] = []
        form = FORMS[decoder.call]
        self._select, self._lengthens = form.select, form.lengthens
        self.decoder = decoder
        self.eager_operators: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered for each eager call; see ``eager_ops.py``."""
        self.pieces: Pieces | None = None
        """Set where vLLM compiles the decoder in pieces, through which rows may leave, too."""
        self._adapters = AdapterRows(decoder.model)
        self._key_writers = [KeyWriter(decoder, layer) for layer in decoder.layers]
        for index, layer in enumerate(decoder.layers):
            hook = self._lengthened_layer if form.lengthens else self._layer
            self._replace(layer, partial(form.layer, partial(hook, index)))
        if decoder.norm is None:
            self._replace(decoder.model, self._returning)
        else:
            self._replace(decoder.norm, partial(form.norm, self._norm))
        self._collectors = collector(decoder.model, self._whole)
        """Of what EAGLE-3 reads between the layers; none where a decoder has no such method."""
        if decoder.injected is not None:
            self._replace(decoder.model, partial(self._model, decoder.injected))

    def arm(self, step: FlowStep | None) -> None:
        """Set what the next call of the model does; None for a stock pass. Good for one call."""
        self._armed = step
        self._survivors = None

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request from step to step."""
        if self.ranker is not None:
            self.ranker.remove(request_id)

    def forget_pictures(self) -> None:
        """Drop what is kept of pictures: vLLM drops their embeddings, whose weights may have changed."""
        if self.ranker is not None:
            self.ranker.forget_pictures()

    @contextmanager
    def around_call(self) -> Iterator[None]:
        """To be entered inside the forward context in which the whole model is called."""
        step, self._armed = self._armed, None
        if step is None:
            yield
            return
        context = get_forward_context()
        if step.attn_metadata:  # a profiling pass has none, and no context to put it into
            context.attn_metadata.update(step.attn_metadata)
            context.slot_mapping.update(step.slot_mapping)
        if not step.eager:
            yield
            return
        if self.pieces is not None and self.pieces.take(step):
            with self.pieces.leaving(step) as call:
                yield
            self._survivors = call.alive
            return
        context.skip_compiled = True
        # The step may have been padded for the graphs of compiled pieces, none of which runs now.
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE
        with self.installed(step), self.eager_operators():
            yield

    @contextmanager
    def installed(self, step: FlowStep) -> Iterator[None]:
        """Run the layers on the rows that are alive, for as long as the context lasts."""
        self._step = step
        try:
            with hidden("forward", self._replacements), hidden(COLLECTS, self._collectors):
                yield
        finally:
            self._step = self._variant = self._positions = self._rows = None
            self._ranked = False
            self._adapters.restore()
            if self.ranker is not None:
                self.ranker.forget()

    def alive(self, tensor_TH: torch.Tensor) -> torch.Tensor:
        """The rows of a step's tensor that are alive in the layer that runs or ran last, [R, H]."""
        return tensor_TH if self._rows is None else tensor_TH.index_select(0, self._rows)

    def marked(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The last call's hidden states with rows that left it as not-a-number; as they are if none did.

        Args:
            hidden_TH: what the model returned, with or without the rows of padding.
        """
        if self._survivors is None:
            return hidden_TH
        marked_TH = torch.full_like(hidden_TH, torch.nan)
        marked_TH[self._survivors] = hidden_TH[self._survivors]
        return marked_TH

    def _replace(self, module: nn.Module, replacement: Callable[..., Any]) -> None:
        self._replacements.append((module, partial(replacement, module.forward)))

    def _model(self, injected: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The model adds these after a layer, when the hidden states have lost rows.
        if kwargs.get(injected) is not None:
            kwargs[injected] = AliveRows(kwargs[injected], self.alive)
        return forward(*args, **kwargs)

    def _returning(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._norm(lambda hidden_RH: hidden_RH, forward(*args, **kwargs))

    def _lengthened_layer(
        self, index: int, forward: Any, positions: Any, hidden_TH: torch.Tensor, residual: Any
    ) -> tuple[torch.Tensor, ...]:
        """Where the model counts rows between its layers: those alive, before rows that nobody reads."""
        inputs = self._in_front(hidden_TH, residual)
        found = self._layer(index, forward, positions, *inputs)
        return tuple(lengthened(tensor, self._num_rows) for tensor in found)

    def _in_front(self, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
        """The rows alive of tensors that may be lengthened."""
        if self._rows is None:
            return tensors
        return tuple(None if tensor is None else tensor[: len(self._rows)] for tensor in tensors)

    def _layer(
        self,
        index: int,
        forward: Callable[..., Any],
        positions: Any,
        hidden_TH: torch.Tensor,
        residual_TH: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        step = self._step
        assert step is not None, "a layer is only taken over while a step is installed"
        if index == 0:
            self._num_rows = hidden_TH.shape[0]
            if rankings := step.rankings:
                assert self.ranker is not None, "nobody is served before there is a KV cache"
                self.ranker.look(rankings, hidden_TH)
        hidden_RH, residual_RH = hidden_TH, residual_TH
        variant = step.variants.get(index)
        if variant is not None:
            self._variant = variant
            if (last := variant.last) is not None:
                self._adapters.keep(last.rows)
                self._key_writers[index].write(
                    forward,
                    self._select(positions, last.rows),
                    hidden_TH.index_select(0, last.gather),
                    None if residual_TH is None else residual_TH.index_select(0, last.gather),
                    last.slots,
                    **kwargs,
                )
            if variant.gather is not None:
                if self.ranker is not None and variant.rankings:
                    compare = self.ranker.layer_ranks.compare
                    compare(variant.rankings, hidden_TH, residual_TH, self._rows)
                self._advance(variant, variant.gather)
                hidden_RH = hidden_RH.index_select(0, variant.gather)
                if residual_RH is not None:
                    residual_RH = residual_RH.index_select(0, variant.gather)
                # The model passes every layer the whole step's positions: [T], M-RoPE [3, T].
                self._positions = self._select(positions, self._rows)
                if variant.num_rows:
                    self._adapters.keep(self._rows)
        if self._variant is not None and self._variant.num_rows == 0:
            # A step of image tokens only: nothing is alive, and kernels dislike empty launches.
            return hidden_RH, hidden_RH if residual_RH is None else residual_RH
        if self._positions is not None:
            positions = self._positions
        following = step.variants.get(index + 1)
        watched = [r for r in following.rankings if r.by_layer] if following else []
        late = step.late.get(index, ())
        if not watched and not late:
            return forward(positions, hidden_RH, residual_RH, **kwargs)
        assert self.ranker is not None, "nobody is served before there is a KV cache"
        with self.ranker.watching(index, watched, self._rows, late):
            return forward(positions, hidden_RH, residual_RH, **kwargs)

    def _whole(self, tensor_RH: torch.Tensor) -> torch.Tensor:
        """[T, H] with the rows alive of what stands between two layers where they were; zero elsewhere."""
        if self._rows is None:
            return tensor_RH
        (alive_RH,) = self._in_front(tensor_RH)
        return at_their_rows(alive_RH, self._rows, self._num_rows)

    def _advance(self, variant: DeviceVariant, gather: torch.Tensor) -> None:
        """Make the variant's choices, and know from then on which rows are alive."""
        if variant.rankings:
            assert self.ranker is not None, "nobody is served before there is a KV cache"
            self.ranker.choose(variant.rankings, gather, self._rows)
            self._ranked = True
        if not self._ranked:
            self._rows = variant.rows  # as planned
        else:
            self._rows = gather if self._rows is None else self._rows.index_select(0, gather)

    def _norm(
        self,
        forward: Callable[..., Any],
        hidden_RH: torch.Tensor,
        residual_RH: torch.Tensor | None = None,
    ) -> Any:
        variant, num_rows = self._variant, self._num_rows
        if self._lengthens:
            hidden_RH, residual_RH = self._in_front(hidden_RH, residual_RH)
        inputs = (hidden_RH,) if residual_RH is None else (hidden_RH, residual_RH)
        if variant is None or self._rows is None:
            return forward(*inputs)
        self._survivors = self._rows
        if variant.num_rows:
            normed = forward(*inputs)
            hidden_RH = normed[0] if isinstance(normed, tuple) else normed
        hidden_TH = at_their_rows(hidden_RH, self._rows, num_rows)
        return hidden_TH if residual_RH is None else (hidden_TH, residual_RH)
