"""The call of the whole model: where a step's metadata take the place of vLLM's, and eager steps begin.

Seam: ``__call__`` of the loaded model. Both runners call it inside their forward context, for steps, for
captures of CUDA graphs and for profiling alike, and vLLM compiles what is inside of it, never itself.
Takes no decision.
"""

from __future__ import annotations

from typing import Any

from vllm_flow.engine import adoption, pipeline
from vllm_flow.engine.families import decoder_of
from vllm_flow.engine.refusals import shares_experts
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.worker.passes.compiled_decoder import CompiledDecoder
from vllm_flow.engine.worker.passes.decoder import DecoderHook
from vllm_flow.engine.worker.passes.eager_ops import eager_operators
from vllm_flow.engine.worker.passes.pieces import compiles_in_pieces
from vllm_flow.engine.worker.passes.shared_experts import SharedExperts
from vllm_flow.engine.worker.tower.scores import ScoringModel, Tower
from vllm_flow.engine.worker.tower.views import tower_of


class FlowModel:
    """Mixed in before the loaded model's own class by :func:`adopt`."""

    flow_hook: DecoderHook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.flow_hook.around_call(kwargs.get("inputs_embeds")):
            found = super().__call__(*args, **kwargs)  # type: ignore[misc]
        return self.flow_hook.handing_on(found)


class FlowScoringModel(ScoringModel, FlowModel):
    """The same, of a model whose vision tower shows what ranks ask of it."""


def adopt(model: Any, vllm_config: Any, settings: FlowSettings) -> tuple[DecoderHook, Tower]:
    """Turn a loaded model into one that the returned hook takes over call by call, and whose tower is looked into.

    Raises:
        ValueError: see :func:`vllm_flow.engine.families.decoder_of`.
    """
    decoder = decoder_of(model, vllm_config.model_config, settings.untested_models)
    pipeline.check_stage(decoder, settings.engine.pipeline, settings.untested_models)
    compiled = None
    if compiles_in_pieces(vllm_config):
        compilation = vllm_config.compilation_config
        compiled = CompiledDecoder(decoder.layers, compilation, decoder.first_layer)
    experts = SharedExperts(decoder.layers) if shares_experts(vllm_config) else None
    operators = eager_operators(decoder.model, vllm_config)
    hook = DecoderHook(decoder, compiled, operators, experts)
    tower = tower_of(model, vllm_config)
    if tower.readable:
        adoption.adopt(model, FlowScoringModel)
    else:
        adoption.adopt(model, FlowModel)
    model.flow_hook, model.flow_tower = hook, tower
    return hook, tower
