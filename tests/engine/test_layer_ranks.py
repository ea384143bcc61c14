"""What ranks by the rows of a layer stand on: where vLLM's layers turn their queries and keys."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest

from vllm_flow.engine.worker.choosing.layer_ranks import ROTATING

LAYERS = {
    "LlamaDecoderLayer": ("llama", "LlamaAttention"),
    "MistralDecoderLayer": ("mistral", "MistralAttention"),
    "Qwen2DecoderLayer": ("qwen2", "Qwen2Attention"),
    "Qwen3DecoderLayer": ("qwen3", "Qwen3Attention"),
    "Qwen3MoeDecoderLayer": ("qwen3_moe", "Qwen3MoeAttention"),
    "Qwen3VLDecoderLayer": ("qwen3_vl", "Qwen3Attention"),
    "Qwen3VLMoeDecoderLayer": ("qwen3_vl_moe", "Qwen3MoeAttention"),
}
"""Layer -> where it is, and the attention that it, or the layer it extends, makes."""


@pytest.mark.parametrize("name", ROTATING)
def test_every_layer_of_these_turns_its_rows_by_one_call(name: str) -> None:
    """A call under a condition would leave rows unranked in some layer, and end the engine there."""
    module, attention = LAYERS[name]
    layer = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    own = next(kind for kind in layer.__mro__ if attention in inspect.getsource(kind))
    kind = getattr(inspect.getmodule(own), attention)
    (function,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind.forward))).body
    assert isinstance(function, ast.FunctionDef)
    assert ast.unparse(function).count("self.rotary_emb") == 1
    always = [ast.unparse(line) for line in function.body if isinstance(line, ast.Assign)]
    assert any("self.rotary_emb(positions, q, k)" in line for line in always)
