"""The decoder hook: where rows may leave the hidden states, for one call of the model.

Seams: vLLM's forward context, which attention layers read their metadata and slots from and whose
``skip_compiled`` runs one call of the model eagerly; and, for such a call only, ``forward`` of each
decoder layer and of the final norm, replaced on the loaded model's instances. Compiled code is traced
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
from vllm.sequence import IntermediateTensors

from vllm_flow.engine.families import Decoder
from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.choosing import telling
from vllm_flow.engine.worker.choosing.ranking import Ranker
from vllm_flow.engine.worker.device_step import DeviceStep
from vllm_flow.engine.worker.passes.adapters import AdapterRows
from vllm_flow.engine.worker.passes.aux_hidden_states import COLLECTS, collector
from vllm_flow.engine.worker.passes.calls import FORMS, AliveRows
from vllm_flow.engine.worker.passes.compiled_decoder import CompiledDecoder
from vllm_flow.engine.worker.passes.eager_pass import EagerPass, PassParts
from vllm_flow.engine.worker.passes.last_layer import KeyWriter
from vllm_flow.engine.worker.passes.shared_experts import SharedExperts


class DecoderHook:
    """Takes one decoder over, for the calls of the model in which rows leave.

    Such a call is an :class:`EagerPass` through the layers' own code, or a
    :class:`~vllm_flow.engine.worker.passes.compiled_pass.CompiledPass` through what vLLM has compiled.

    Legend: T rows of the step (with padding), H hidden size.

    Args:
        decoder: its parts.
        compiled: where vLLM compiles the decoder in pieces, through which rows may leave, too.
        eager_operators: entered for each eager call; see ``eager_ops.py``.
        shared_experts: where other engines compute experts for this one.
    """

    def __init__(
        self,
        decoder: Decoder,
        compiled: CompiledDecoder | None = None,
        eager_operators: Callable[[], AbstractContextManager[None]] = nullcontext,
        shared_experts: SharedExperts | None = None,
    ) -> None:
        self.decoder = decoder
        self.ranker: Ranker | None = None
        """Set once there is a KV cache to read."""
        self.received: IntermediateTensors | None = None
        """What an earlier pipeline stage sent for the next call of the model; good for that one."""
        self._words: torch.Tensor | None = None
        """What a later one is to be told of the last call."""
        self._compiled, self._eager_operators = compiled, eager_operators
        self._shared_experts = shared_experts
        self._armed: DeviceStep | None = None
        self._pass: EagerPass | None = None
        self._survivors: torch.Tensor | None = None
        """Rows of the last call that it ended with; None where none left."""
        self._adapters = AdapterRows(decoder.model)
        self._key_writers = {
            index: KeyWriter(decoder, layer)
            for index, layer in zip(decoder.own, decoder.layers, strict=True)
        }
        self._form = FORMS[decoder.call]
        self._replacements = list(self._replaced(decoder))
        self._collectors = collector(decoder.model, lambda tensor: self._running.whole(tensor))
        """Of what EAGLE-3 reads between the layers; none where a decoder has no such method."""

    def _replaced(self, decoder: Decoder) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Modules and what runs in the place of their ``forward`` during a pass."""
        for index, layer in zip(decoder.own, decoder.layers, strict=True):
            run = partial(self._form.layer, partial(self._layer, index))
            yield layer, partial(run, layer.forward)
        if decoder.norm is not None:
            yield decoder.norm, partial(self._form.norm, self._norm, decoder.norm.forward)
        if decoder.norm is None or decoder.injected is not None or decoder.hands_on:
            yield decoder.model, partial(self._model, decoder.model.forward)

    def arm(self, step: DeviceStep | None) -> None:
        """Set what the next call of the model does; None for a stock pass. Good for one call."""
        self._armed = step
        self._survivors = None

    @contextmanager
    def around_call(self, embeddings_TH: torch.Tensor | None = None) -> Iterator[None]:
        """To be entered inside the forward context in which the whole model is called.

        Args:
            embeddings_TH: what it is called with, if with embeddings; rows of kept tokens may be written to.
        """
        step, self._armed = self._armed, None
        received, self.received = self.received, None
        if self._shared_experts is not None:
            self._shared_experts.agree(step)
        if step is None:
            yield
            return
        context = get_forward_context()
        if step.attn_metadata:  # a profiling pass has none, and no context to put it into
            context.attn_metadata.update(step.attn_metadata)
            context.slot_mapping.update(step.slot_mapping)
        try:
            if step.told:
                rows_R = self._choosing.known.take(step.told, received)
                step = step if rows_R is None else step.with_rows(rows_R)
            if not step.eager:
                yield
            elif self._compiled is not None and self._compiled.takes(step):
                with self._compiled.leaving(step) as compiled:
                    yield
                self._survivors = compiled.rows
            else:
                with self._eagerly(step, context, embeddings_TH) as eager:
                    yield
                self._survivors = eager.rows
            if step.tells:
                self._words = self._choosing.known.tell(step.tells, self._survivors)
        finally:
            if self.ranker is not None:
                self.ranker.forget()

    def handing_on(self, found: Any) -> Any:
        """What the model returned, for a later pipeline stage with what that must be told of this call."""
        words_W, self._words = self._words, None
        return found if words_W is None else telling.with_told(found, words_W)

    @contextmanager
    def _eagerly(
        self, step: DeviceStep, context: Any, embeddings_TH: torch.Tensor | None
    ) -> Iterator[EagerPass]:
        context.skip_compiled = True
        # The step may have been padded for the graphs of compiled pieces, none of which runs now.
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE
        with self.installed(step) as eager, self._eager_operators():
            if step.rankings and embeddings_TH is not None:
                self._choosing.merge(step.rankings, embeddings_TH)
            yield eager
            eager.choose_for_next()

    @contextmanager
    def installed(self, step: DeviceStep) -> Iterator[EagerPass]:
        """Run the layers on the rows that are alive, for as long as the context lasts."""
        parts = PassParts(
            self._form,
            self._key_writers,
            self._adapters,
            self.ranker,
            self.decoder.own,
            self._shared_experts is not None,
        )
        self._pass = EagerPass(step, parts)
        try:
            with replaced("forward", self._replacements), replaced(COLLECTS, self._collectors):
                yield self._pass
        finally:
            self._pass = None
            self._adapters.restore()

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

    @property
    def _choosing(self) -> Ranker:
        assert self.ranker is not None, "nobody is served before there is a KV cache"
        return self.ranker

    @property
    def _running(self) -> EagerPass:
        assert self._pass is not None, "a layer is only taken over while a step is installed"
        return self._pass

    def _layer(self, index: int, forward: Callable[..., Any], *args: Any, **others: Any) -> Any:
        return self._running.layer(index, forward, *args, **others)

    def _norm(self, forward: Callable[..., Any], *args: Any) -> Any:
        return self._running.norm(forward, *args)

    def _model(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        injected = self.decoder.injected
        if injected is not None and kwargs.get(injected) is not None:
            # The model adds these after a layer, when the hidden states have lost rows.
            kwargs[injected] = AliveRows(kwargs[injected], self._running.alive)
        found = forward(*args, **kwargs)
        if self.decoder.hands_on:
            whole = self._running.whole
            return IntermediateTensors({name: whole(found[name]) for name in found.tensors})
        if self.decoder.norm is None:
            return self._running.norm(lambda hidden_RH: hidden_RH, found)
        return found
