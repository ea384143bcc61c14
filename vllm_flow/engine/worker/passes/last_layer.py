"""Keys and values of rows whose output nobody reads, computed and stored alone.

What :mod:`vllm_flow.last_layer` plans, in one layer: input norm, K and V projection, norm of the keys,
rotary embedding, and the write into the KV cache. Attention, output projection and MLP of these rows are left
out, and their queries where a layer is made as :data:`LAYERS` are. Of any other layer its own code runs up to its
attention, whatever it does before that: there keys and values are stored, and the call ends.

Seams: ``forward`` of a layer's ``Attention``, replaced for one call; the parts of a decoder layer by the names that
vLLM's Llama-like layers share (``input_layernorm``, ``self_attn.qkv_proj``, ``k_norm``, ``rotary_emb``, ``attn``)
or, of latent attention, ``MultiHeadLatentAttentionWrapper`` has (``kv_a_proj_with_mqa`` and so on); and
``do_kv_cache_update`` of the attention backend. Where a model or backend has none of them, image rows
run through the whole of their last layer, and :func:`reason_against` says why.

Legend: D rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from vllm_flow.engine.backends import used
from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.latent import store

if TYPE_CHECKING:
    from vllm_flow.engine.families import Decoder

LAYERS = (
    *("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"),
    *("Qwen3DecoderLayer", "Qwen3MoeDecoderLayer", "DeepseekV2DecoderLayer"),
    *("Qwen3VLDecoderLayer", "Qwen3VLMoeDecoderLayer", "AriaTextDecoderLayer"),
    *("Glm4DecoderLayer", "Glm4MoeDecoderLayer"),
)
"""Layers whose keys need no queries: norm, fused projection, optional norm per head, rotary embedding; or latent."""

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "TRITON_ATTN_DIFFKV", "CPU_MLA")
"""Backends that read from the cache all keys of a prefill that are no rows of the same run, and take more runs
than requests."""

SIZED = ("FLASHINFER",)
"""Backends that do so, too, and take as many runs as a step may have requests."""


def reason_against(decoder: Decoder, backends: Iterable[Any], mutual: bool = False) -> str | None:
    """Why a model's image rows cannot leave their last layer early; None if they can.

    Args:
        backends: the attention backends in use, vLLM's classes.
        mutual: whether tokens of a picture see one another in both directions, and runs are not causal.
    """
    if mutual:
        return "the tokens of a picture attend to one another in both directions"
    if len({weight.device.type for weight in decoder.model.parameters()}) > 1:
        return "some weights come to the device only when their layer is called"
    for layer in decoder.layers:
        attention = attention_of(layer)
        if attention is None and not (_apart(decoder, layer) and _latent(layer.self_attn)):
            return f"where {type(layer).__name__} keeps its keys is not known"
        if attention is not None and attention.kv_sharing_target_layer_name is not None:
            return "layers share keys"
    for backend in backends:
        name = backend.get_name()
        # Latent attention stores before it, whatever its backend says.
        if backend.forward_includes_kv_cache_update and not backend.is_mla():
            return f"{name} stores keys within attention"
        if name not in (*BACKENDS, *SIZED):
            return f"{name} may size its buffers by the number of requests"
    return None


def most_runs(attn_groups: Sequence[Sequence[Any]], max_num_reqs: int) -> int | None:
    """Into how many runs the rows of a last layer may fall; None where the backends do not care.

    Args:
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects.
        max_num_reqs: the most requests of a step.
    """
    sized = any(backend.get_name() in SIZED for backend in used(attn_groups))
    return max_num_reqs if sized else None


def spares(decoder: Decoder, attn_groups: Sequence[Sequence[Any]], mutual: bool = False) -> bool:
    """Whether image rows leave their last layer early; where not, the log says why.

    Args:
        attn_groups: per KV-cache group, vLLM's ``AttentionGroup`` objects.
        mutual: see :func:`reason_against`.
    """
    reason = reason_against(decoder, used(attn_groups), mutual)
    if reason is not None:
        init_logger("vllm.vllm_flow.last_layer").info_once(
            "Image rows run through the whole of the last layer that sees them, where keys and values "
            "would do: %s.",
            reason,
        )
    return reason is None


def attention_of(layer: nn.Module) -> Any:
    """vLLM's ``Attention`` in a decoder layer; None where it keeps something else, or has several."""
    found = [module for module in layer.modules() if isinstance(module, AttentionLayerBase)]
    kinds = (Attention, ChunkedLocalAttention)
    return found[0] if len(found) == 1 and type(found[0]) in kinds else None


def _apart(decoder: Decoder, layer: Any) -> bool:
    """Whether a layer's keys and values can be made without its queries."""
    if decoder.call not in ("residual", "scaled") or type(layer).__name__ not in LAYERS:
        return False
    attn = layer.self_attn
    if type(_latent(attn)) is MultiHeadLatentAttentionWrapper:
        return True
    return type(_bare(getattr(attn, "qkv_proj", None))) is QKVParallelLinear and isinstance(
        attn.rotary_emb, RotaryEmbedding | MRotaryEmbedding
    )


def _latent(attn: Any) -> Any:
    """What makes the vectors of latent attention; None where keys and values are stored."""
    return getattr(attn, "mla_attn", None)


def _bare(projection: Any) -> Any:
    """The projection itself, where vLLM has wrapped it for LoRA adapters."""
    return projection.base_layer if isinstance(projection, BaseLayerWithLoRA) else projection


class _Stored(Exception):
    """Ends a layer's call, once keys and values are where they belong."""


class KeyWriter:
    """Stores the keys and values of some rows, or their latent vectors, in one layer.

    One that :func:`reason_against` does not rule out.
    """

    def __init__(self, decoder: Decoder, layer: Any) -> None:
        self._layer, self._apart = layer, _apart(decoder, layer)
        self._attention = attention_of(layer)
        self._project: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._cut_from: Any = None

    def write(
        self,
        forward: Callable[..., Any],
        positions: Any,
        hidden_DH: torch.Tensor,
        residual_DH: torch.Tensor | None,
        slots: torch.Tensor,
        **others: Any,
    ) -> None:
        """Store the rows' keys and values.

        Args:
            forward: the layer's, in the form in which the hook calls it.
            positions: of the rows, as that takes them: [D], M-RoPE [3, D]; with what else it is given of each row,
                a tuple.
            hidden_DH, residual_DH: what comes out of the layer before; may be changed.
            slots: [D] slots of the layer's cache.
            others: what else the layer is given, and is no row's.
        """
        if self._apart:
            self._write_apart(positions, hidden_DH, residual_DH, slots)
        else:
            self._run_to_attention(forward, positions, hidden_DH, residual_DH, slots, **others)

    def _run_to_attention(
        self,
        forward: Callable[..., Any],
        positions: Any,
        hidden_DH: torch.Tensor,
        residual_DH: torch.Tensor | None,
        slots: torch.Tensor,
        **others: Any,
    ) -> None:
        attention = self._attention

        def keep(_query: Any, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> None:
            heads = attention.num_kv_heads
            key_DKD = key.reshape(-1, heads, attention.head_size)
            value_DKD = value.reshape(-1, heads, attention.head_size_v)
            store(attention, key_DKD, value_DKD, slots)
            raise _Stored

        try:
            with replaced("forward", [(attention, keep)]):
                forward(positions, hidden_DH, residual_DH, **others)
        except _Stored:
            return
        raise RuntimeError(f"{type(self._layer).__name__} did not come to its attention")

    def _write_apart(
        self,
        positions: Any,
        hidden_DH: torch.Tensor,
        residual_DH: torch.Tensor | None,
        slots: torch.Tensor,
    ) -> None:
        norm, attn = self._layer.input_layernorm, self._layer.self_attn
        if isinstance(positions, tuple):  # with factors of the queries
            positions = positions[0]
        if (latent := _latent(attn)) is not None:
            _write_latent(latent, positions, _normed(norm, hidden_DH, residual_DH), slots)
            return
        attention = attn.attn
        packed = getattr(attn.qkv_proj, "cpu_linear", None)
        if self._project is None or self._cut_from is not packed:  # weights may be loaded anew
            self._project, self._cut_from = key_value_projection(attn.qkv_proj), packed
        normed_DH = _normed(norm, hidden_DH, residual_DH)
        key, value = self._project(normed_DH).split([attn.kv_size, attn.kv_size], dim=-1)
        if (key_norm := getattr(attn, "k_norm", None)) is not None:
            key = key_norm(key.reshape(-1, attn.num_kv_heads, attn.head_dim)).view(key.shape)
        if isinstance(attn.rotary_emb, RotaryEmbedding):
            key, _ = attn.rotary_emb(positions, key, None)  # turns queries and keys alike
        else:  # M-RoPE wants both
            _, key = attn.rotary_emb(positions, torch.zeros_like(key), key)
        attention.impl.do_kv_cache_update(
            attention,
            key.view(-1, attn.num_kv_heads, attn.head_dim),
            value.view(-1, attn.num_kv_heads, attn.head_dim),
            attention.kv_cache,
            slots,
        )


def _normed(norm: Any, hidden_DH: torch.Tensor, residual_DH: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = (
        norm(hidden_DH) if residual_DH is None else norm(hidden_DH, residual_DH)[0]
    )
    return found


def _write_latent(
    latent: Any, positions: torch.Tensor, normed_DH: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store the rows' latent vectors: projection, norm, rotary embedding of the part that carries positions."""
    projection = (
        latent.kv_a_proj_with_mqa or latent.fused_qkv_a_proj
    )  # the latter makes queries first
    width, turned = latent.kv_lora_rank, latent.qk_rope_head_dim
    vector = projection(normed_DH)[0][:, -(width + turned) :]
    own = latent.kv_a_layernorm(vector[:, :width])
    key = vector[:, None, width:].contiguous()
    if latent.rotary_emb is not None:  # some want queries, too
        _, key = latent.rotary_emb(positions, torch.zeros_like(key), key)
    store(latent.mla_attn, torch.cat([own[:, None], key], dim=-1), key, slots)


def key_value_projection(qkv: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The K and V part of a fused projection as a projection of its own: [D, H] -> [D, 2 x kv].

    Of this rank's heads. A view of the weight where vLLM keeps it as loaded. On CPU vLLM packs the weight
    and gives it back to nobody: it is read off by multiplying the identity, and packed again, which takes
    the memory of that part once more. A quantised weight cannot be cut, nor one to which adapters add: all
    three are computed.
    """
    bare = _bare(qkv)
    first = bare.num_heads * bare.head_size
    if bare is not qkv or type(qkv.quant_method) is not UnquantizedLinearMethod:
        return lambda normed_DH: qkv(normed_DH)[0][:, first:]
    if qkv.weight.numel():

        def kept(normed_DH: torch.Tensor) -> torch.Tensor:
            bias = None if qkv.bias is None else qkv.bias[first:]
            return nn.functional.linear(normed_DH, qkv.weight[first:], bias)

        return kept
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    identity = torch.eye(qkv.input_size, dtype=qkv.params_dtype)
    weight = qkv.quant_method.apply(qkv, identity, None)[:, first:].t().contiguous()
    part = nn.Module()
    part.weight = nn.Parameter(weight, requires_grad=False)
    bias = None if qkv.bias is None else qkv.bias[first:].clone()
    part.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    dispatch_cpu_unquantized_gemm(part, remove_weight=True)
    return lambda normed_DH: part.cpu_linear(normed_DH, part.weight, part.bias)
