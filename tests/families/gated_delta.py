"""Gated DeltaNet in float32 on CPU: torch in the place of vLLM's kernels, which take bfloat16 alone.

What surrounds the kernels stays vLLM's: which rows are decodes, which state a sequence starts from and where
it is kept. A stand-in takes the arguments of the kernel it stands for.

Legend: T rows, N sequences, K and V sizes of a key and of a value, H value heads; a cache of S states.
"""

from unittest import mock

import torch
from torch.nn import functional as F
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

STOCK = gdn_attention._spec_forward
"""vLLM's own, in whose place :func:`_check_drafts` comes."""


def install() -> None:
    """Use them from now on, in this process; to be called before a model is built."""
    gdn_attention.cpu_gdn_attention_core = _core
    gdn_attention.causal_conv1d_update_cpu = _convolve_one
    gdn_attention._spec_forward = _check_drafts
    gdn_attention.ops = _Kernels


def _core(
    mixed_qkv: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    core_attn_out: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    """vLLM's operator without its refusal of other types than bfloat16."""
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return
    metadata = context.attn_metadata[layer.prefix]
    if not metadata.num_actual_tokens:
        return
    width, convolved = layer.conv1d.weight.size(-1), layer.kv_cache[0]
    rows = convolved.size(-1 if gdn_attention.is_conv_state_dim_first() else -2)
    args = (layer, metadata, mixed_qkv, b, a, core_attn_out)
    # Processors that multiply in bfloat16, or tiles, have kernels of their own for convolutions, with packed weights.
    with (
        mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", lambda: False),
        mock.patch.object(torch.cpu, "_is_amx_tile_supported", lambda: False),
    ):
        if rows == width - 1:
            gdn_attention._cpu_gdn_attention_nonspec(*args)
        else:  # with room for drafts
            gdn_attention._cpu_gdn_attention_spec_aware(*args, width, rows)


def _convolve_one(x, conv_state, weight, bias, activation, conv_state_indices):
    """One row per sequence, x [N, C]; conv_state [S, C, width - 1] is moved on."""
    window = torch.cat([conv_state[conv_state_indices], x[..., None]], -1)
    conv_state[conv_state_indices] = window[..., 1:]
    found = (window * weight).sum(-1)
    assert bias is None and activation == "silu"
    return F.silu(found)


def _check_drafts(layer, metadata, mixed_TC, b_TH, a_TH, windows_SCW, states_SHKV, width, num_kept):
    """Of each sequence its last token and drafts behind it, however many, as vLLM's kernels for CUDA do: from what the
    last one that was accepted left.

    Here vLLM 0.32's function for CPUs keeps the wrong inputs of a convolution where drafts are fewer than asked for.
    """
    slots_NS = metadata.spec_state_indices_tensor[: metadata.num_spec_decodes]
    accepted_N = metadata.num_accepted_tokens[: metadata.num_spec_decodes]
    starts_N1 = metadata.spec_query_start_loc[: metadata.num_spec_decodes + 1]
    assert layer.conv1d.bias is None and layer.activation == "silu"
    weight_CW = gdn_attention._unpacked_conv_weight(layer)
    found_TC = torch.empty_like(mixed_TC)
    sequences = zip(slots_NS[:, 0], accepted_N, starts_N1[:-1], starts_N1[1:], strict=True)
    for slot, accepted, first, end in sequences:
        before = windows_SCW[slot][:, accepted - 1 :][:, : width - 1]
        inputs = torch.cat([before, mixed_TC[first:end].T], -1)
        found_TC[first:end] = F.silu((inputs.unfold(-1, width, 1) * weight_CW[:, None]).sum(-1)).T
        windows_SCW[slot][:, : inputs.shape[1] - 1] = inputs[:, 1:]
    query, key, value = (part.squeeze(0) for part in layer.rearrange_mixed_qkv(found_TC))
    return gdn_attention.ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
        layer.A_log,
        layer.dt_bias,
        query,
        key,
        value,
        a_TH,
        b_TH,
        states_SHKV,
        slots_NS,
        accepted_N,
        starts_N1,
        use_qk_l2norm_in_kernel=True,
    )


class _Kernels:
    """The operators that ``gdn_attention`` calls on a CPU without accelerated convolutions."""

    @staticmethod
    def fused_gdn_gating_cpu(A_log, a, b, dt_bias):
        decay = -A_log.exp() * F.softplus(a.float() + dt_bias)
        return decay[None], b.sigmoid()[None]

    @staticmethod
    def chunk_gated_delta_rule_cpu(
        query, key, value, g, beta, initial_state, cu_seqlens, initial_state_indices, **kwargs
    ):
        assert kwargs["use_qk_l2norm_in_kernel"] and not kwargs["head_first"]
        found = _recur(
            query[0],
            key[0],
            value[0],
            g[0],
            beta[0],
            initial_state,
            initial_state_indices,
            cu_seqlens,
        )
        return found[None], initial_state

    @staticmethod
    def fused_sigmoid_gating_delta_rule_update_cpu(
        A_log,
        dt_bias,
        q,
        k,
        v,
        a,
        b,
        initial_state_source,
        initial_state_indices,
        cu_seqlens,
        **kwargs,
    ):
        assert kwargs["use_qk_l2norm_in_kernel"]
        g, beta = _Kernels.fused_gdn_gating_cpu(A_log, a, b, dt_bias)
        found = _recur(
            q[0], k[0], v[0], g[0], beta[0], initial_state_source, initial_state_indices, cu_seqlens
        )
        return found[:, None]

    @staticmethod
    def fused_sigmoid_gating_delta_rule_update_spec_cpu(
        A_log,
        dt_bias,
        q,
        k,
        v,
        a,
        b,
        initial_state_source,
        spec_state_indices,
        num_accepted_tokens,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
    ):
        """Of a sequence's last token and its drafts: from the state of the last one that was accepted, and a state
        kept of each."""
        assert use_qk_l2norm_in_kernel
        g, beta = _Kernels.fused_gdn_gating_cpu(A_log, a, b, dt_bias)
        found_THV = torch.empty_like(v)
        sequences = zip(
            spec_state_indices.tolist(),
            num_accepted_tokens.tolist(),
            cu_seqlens[:-1].tolist(),
            cu_seqlens[1:].tolist(),
            strict=True,
        )
        states = initial_state_source
        for slots, accepted, first, end in sequences:
            state = states[slots[accepted - 1]].clone()[None]
            for at, row in enumerate(range(first, end)):
                one = slice(row, row + 1)
                found_THV[one] = _recur(
                    q[one], k[one], v[one], g[0, one], beta[0, one], state, [0], [0, 1]
                )
                states[slots[at]] = state[0]
        return found_THV


def _recur(query_THK, key_THK, value_THV, decay_TH, beta_TH, states_SHKV, slots_N, starts_N1):
    """The delta rule row by row, [T, H, V]; states are read and left in their slots."""
    heads = value_THV.shape[1] // key_THK.shape[1]
    query_THK, key_THK = (
        (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(heads, 1)
        for part in (query_THK, key_THK)
    )
    query_THK = query_THK * query_THK.shape[-1] ** -0.5
    found_THV = torch.empty_like(value_THV)
    for slot, first, end in zip(slots_N, starts_N1[:-1], starts_N1[1:], strict=True):
        state_HKV = states_SHKV[slot]
        for row in range(int(first), int(end)):
            state_HKV.mul_(decay_TH[row].exp()[:, None, None])
            key_HK1 = key_THK[row][..., None]
            known_HV = (state_HKV * key_HK1).sum(1)
            delta_HV = (value_THV[row] - known_HV) * beta_TH[row][:, None]
            state_HKV.add_(key_HK1 * delta_HV[:, None])
            found_THV[row] = (state_HKV * query_THK[row][..., None]).sum(1)
    return found_THV
